"""What this machine can do: training and generation speed, against its peak and against others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_tuner import assembly
from mlx_tuner.bench import synthetic
from mlx_tuner.bench.measure import Spread, interleave
from mlx_tuner.bench.speed import (
    Generation,
    Limit,
    Phases,
    Training,
    WatchedTrainer,
    limit_of,
    measure_generation,
    peer_of,
    peer_pass,
    peer_ratios,
    phase_pass,
    phases_of,
    train_pass,
    training_of,
)
from mlx_tuner.bench.sweep import Sweep
from mlx_tuner.bench.workload import (
    JOB,
    JOB_BATCH_SIZE,
    JOB_ROWS,
    RANK,
    SCALE,
    TARGET_MODULES,
    Settings,
    Workload,
    choose,
    count_flops,
    dense_shape,
    describe,
    gemm_tflops,
)
from mlx_tuner.engine import batching, lora, memory
from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.show.progress import Display
from mlx_tuner.show.report import PEFT_BASELINE
from mlx_tuner.system import cache, device, files
from mlx_tuner.system.device import Machine

SCHEMA_VERSION = 1
RESULTS = Path("benchmarks") / "results"
"""Of a clone of the repository, from where the README's tables are made."""
PROJECTED_ROWS, PROJECTED_EPOCHS = (100, 1_000, 20_000), 3


@dataclass(frozen=True)
class Result:
    """All that was measured. As JSON it is what `--against FILE.json` reads."""

    machine: Machine
    workload: Workload
    training: Training
    phases: Phases
    limit: Limit
    baseline: Mapping[str, Any]
    """The user's samples/s, the factor to them, and whether it was measured on the same work."""
    projection: Mapping[str, float]
    """Seconds of training by rows, for three epochs."""
    generation: Mapping[str, Generation]
    """Of "base", "adapter" and "fused"."""
    notes: tuple[str, ...]
    """What was made smaller, and what slowed the machine down."""
    command: str
    against: Mapping[str, Any]
    """Ratios of ours to "mlx-lm" or to an earlier result, by its file's name."""
    date: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    schema_version: int = SCHEMA_VERSION
    benchmark: str = "bench"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench(
    settings: Settings, display: Display, *, command: str, earlier: Path | None = None
) -> Result:
    """Measure what the settings say.

    Args:
        command: the command line, for the record.
        earlier: a result file to compare with.

    Raises:
        TunerError: the model cannot be had, or a file is not a result.
    """
    before = load_result(earlier) if earlier else None
    machine = device.facts()
    with device.limits():
        with display.task("measuring matrix products"):
            dense = gemm_tflops()
            gemm = gemm_tflops(settings.quantize) if settings.quantize else dense
        subject = choose(settings, gemm)
        for note in subject.notes:
            display.note(note)
        with display.task(f"building {subject.name}"):
            model = subject.build()
        base = synthetic.twin(model, subject.config)
        peer = peer_of(synthetic.twin(model, subject.config)) if settings.peer else None
        lora.attach(model, rank=RANK, scale=SCALE, target_modules=TARGET_MODULES)
        tokens = subject.micro_batch_tokens(model)
        trainer = WatchedTrainer(model, micro_batch_tokens=tokens, compile=assembly.on_gpu())
        work = describe(subject, trainer, settings)

        variants = {
            "ours": lambda: train_pass(trainer, subject.batches),
            "phases": lambda: phase_pass(trainer, subject.batches),
        }
        if peer:
            variants["mlx-lm"] = lambda: peer_pass(peer, subject.batches)
        total = settings.repeats * len(variants) * work.steps
        with display.task("training", total) as advance:
            runs = interleave(
                variants,
                repeats=settings.repeats,
                warmups=1,
                seconds=settings.training_seconds,
                on_result=lambda name, measures: advance(work.steps),
            )
        training = training_of(runs["ours"], work, machine, gemm=gemm, dense=dense)
        phases = phases_of(runs["phases"], training.steps_per_second.median)
        with display.task("generating"):
            generation = measure_generation(
                base,
                model,
                subject.config,
                decoded=settings.decoded_tokens,
                repeats=settings.repeats,
            )
    against = {}
    if peer:
        against["mlx-lm"] = peer_ratios(runs)
    if before:
        against[str(earlier)] = earlier_ratios(training, work, machine, before)
    notes = [*subject.notes, *machine.notes, *device.facts().notes]
    if (done := len(runs["ours"])) < settings.repeats:
        notes.append(f"{done} of {settings.repeats} passes, for time: the machine was busy")
    return Result(
        machine=machine,
        workload=work,
        training=training,
        phases=phases,
        limit=limit_of(work, training, phases, machine),
        baseline=against_baseline(work, training),
        projection={
            str(rows): rows * PROJECTED_EPOCHS / training.samples_per_second.median
            for rows in PROJECTED_ROWS
        },
        generation=generation,
        notes=tuple(dict.fromkeys(notes)),
        command=command,
        against=against,
    )


def against_baseline(work: Workload, training: Training) -> dict[str, Any]:
    """The factor to the user's baseline; of other work, by the FLOPs that his would take."""
    samples: float | None = training.samples_per_second.median
    basis = "measured"
    if not work.is_the_job:
        basis = "scaled by FLOPs"
        shape = dense_shape(synthetic.config_of(JOB))
        assert shape is not None
        rows = synthetic.rows(JOB_ROWS, shape.vocabulary)
        starts = range(0, len(rows), JOB_BATCH_SIZE)
        steps = [
            batching.make_micro_batches(rows[i : i + JOB_BATCH_SIZE], memory.LARGEST)
            for i in starts
        ]
        a_row = sum(count_flops(shape, step) for step in steps) / len(rows)
        samples = training.tflops * 1e12 / a_row if training.tflops else None
    return {
        "samples_per_second": PEFT_BASELINE.samples_per_second,
        "of": f"{PEFT_BASELINE.machine}, {PEFT_BASELINE.recipe}",
        "here": samples,
        "factor": samples / PEFT_BASELINE.samples_per_second if samples else None,
        "basis": basis,
    }


def load_result(path: Path) -> dict[str, Any]:
    """A result that this command has written.

    Raises:
        UsageError: it is something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        kind = found["benchmark"], found["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(Fault(str(path), "--against", f"is no result file: {error}")) from None
    if kind != ("bench", SCHEMA_VERSION):
        what = f"is a result of {kind[0]!r}, schema {kind[1]!r}; needs 'bench', {SCHEMA_VERSION}"
        raise UsageError(Fault(str(path), "--against", what))
    return dict(found)


def earlier_ratios(
    training: Training, work: Workload, machine: Machine, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Ours over an earlier result's, and in what the two are not the same work or machine."""
    figures = before["training"]
    ratios = {}
    for key in ("samples_per_second", "tokens_per_second"):
        ours, theirs = getattr(training, key), figures[key]
        ratios[key] = Spread(
            ours.median / theirs["median"],
            ours.low / theirs["high"],
            ours.high / theirs["low"],
            min(ours.repeats, theirs["repeats"]),
        )
    peak = training.peak_memory_gb / figures["peak_memory_gb"]
    ratios["peak_memory_gb"] = Spread(peak, peak, peak, 1)
    same = ("model", "dtype", "quantize", "batch_size", "seq", "rows", "tokens")
    now = {**{key: getattr(work, key) for key in same}, "chip": machine.chip}
    then = {**{key: before["workload"][key] for key in same}, "chip": before["machine"]["chip"]}
    return {
        "date": before["date"],
        "ratios": ratios,
        "differs": [f"{k}: {now[k]} here, {then[k]} there" for k in now if now[k] != then[k]],
    }


def save(result: Result | Sweep, name: str | None) -> Path:
    """Write a result to ``benchmarks/results/NAME.json``, a sweep's heat map beside it.

    Where there is no such folder, to the user's cache folder: a bench leaves nothing where it
    happens to be run.

    Args:
        name: None for one made of the machine's chip and the model.
    """
    if isinstance(result, Sweep):
        default = f"sweep-{result.machine.chip}-{result.model}"
    else:
        work = result.workload
        quantised = f"-{work.quantize}bit" if work.quantize else ""
        default = f"bench-{result.machine.chip}-{work.model}{quantised}"
    folder = RESULTS if RESULTS.is_dir() else cache.user_folder() / "bench"
    path = folder / f"{name or _slug(default)}.json"
    files.write_json(path, result.to_json())
    if isinstance(result, Sweep):
        from mlx_tuner.show.plots import heat_maps

        heat_maps(
            path.with_suffix(".png"),
            {
                f"{f'{bits} bit' if bits else result.dtype}: tokens a second": [
                    [result.cell(bits, rows, seq).tokens_per_second for seq in result.seqs]
                    for rows in result.batch_sizes
                ]
                for bits in result.quantizations
            },
            rows=[str(size) for size in result.batch_sizes],
            columns=[str(seq) for seq in result.seqs],
            ylabel="rows a step",
            xlabel="tokens a row",
        )
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
