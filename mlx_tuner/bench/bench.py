"""What this machine can do: training and generation speed, against its peak and against others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlx_tuner.bench import speed
from mlx_tuner.bench.measure import (
    SCHEMA_VERSION,
    Measures,
    Spread,
    interleave,
    ratio,
    result,
    spreads,
)
from mlx_tuner.bench.model import twin
from mlx_tuner.bench.peer import MlxLmTrainer
from mlx_tuner.bench.workload import (
    BASELINE_MODEL,
    LEARNING_RATE,
    RANK,
    SCALE,
    TARGET_MODULES,
    Settings,
    adapted,
    choose,
    gemm_tflops,
    workload_of,
)
from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.show.progress import Display
from mlx_tuner.show.story import PEFT_BASELINE
from mlx_tuner.system import cache, device, files
from mlx_tuner.system.device import Machine

PROJECTED_ROWS, PROJECTED_EPOCHS = (100, 1_000, 20_000), 3

Result = Mapping[str, Any]
"""A result file's content, as `bench` and `sweep.measure` make it."""


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
        work = choose(settings, gemm)
        for note in work.notes:
            display.note(note)
        with display.task(f"building {work.name}"):
            base = work.build()
            model = adapted(twin(base, work.config))
            trainer = work.trainer(model)
        variants = {
            "ours": partial(speed.train_pass, trainer, work.batches),
            "forward": partial(speed.forward_pass, trainer, work.batches),
        }
        if settings.peer:
            peer = MlxLmTrainer(
                twin(base, work.config),
                rank=RANK,
                scale=SCALE,
                target_modules=TARGET_MODULES,
                learning_rate=LEARNING_RATE,
            )
            variants["mlx-lm"] = partial(speed.peer_pass, peer, work.batches)
        with display.task("training", settings.repeats * len(variants)) as advance:
            runs = interleave(
                variants,
                repeats=settings.repeats,
                warmups=1,
                seconds=settings.training_seconds,
                on_result=lambda *_: advance(1),
            )
        with display.task("generating"):
            model.eval()
            answering = {
                "base": base,
                "adapter": model,
                "fused": speed.fused(base, model, work.config),
            }
            vocabulary = work.config.get("text_config", work.config)["vocab_size"]
            generated = interleave(
                {
                    name: partial(speed.generation_pass, each, vocabulary, settings.decoded_tokens)
                    for name, each in answering.items()
                },
                repeats=settings.repeats,
                warmups=1,
            )
    notes = [*work.notes, *machine.notes, *device.facts().notes]
    if (done := len(runs["ours"])) < settings.repeats:
        notes.append(f"{done} of {settings.repeats} passes, for time: the machine was busy")
    told = work.describe(trainer, settings)
    found = {
        **result("bench", command, machine),
        "workload": told,
        **training_figures(runs, told, machine, gemm=gemm, dense=dense),
        "generation": {name: _plain(spreads(turns)) for name, turns in generated.items()},
        "against": {"mlx-lm": peer_ratios(runs)} if settings.peer else {},
        "notes": list(dict.fromkeys(notes)),
    }
    if before:
        found["against"][str(earlier)] = earlier_ratios(found, before)
    return found


def training_figures(
    runs: Mapping[str, list[Measures]],
    work: Mapping[str, Any],
    machine: Machine,
    *,
    gemm: float,
    dense: float,
) -> dict[str, Any]:
    """Speed, what a step's time goes to, and what the speed means: for the baseline, for more rows.

    Args:
        gemm: measured speed of large products with weights as the model's are, in TFLOP/s.
        dense: the same with weights that are not quantised.
    """
    training, forward = spreads(runs["ours"]), spreads(runs["forward"])
    samples, step = training["samples_per_second"].median, 1 / training["steps_per_second"].median
    flops_per_step = work["flops"] / work["steps"] if work["flops"] else None
    tflops = flops_per_step / step / 1e12 if flops_per_step else None
    peak = machine.peak_tflops or dense
    python = training.pop("python_seconds").median
    phases = {name.removesuffix("_seconds"): spread.median for name, spread in forward.items()}
    parts = {
        "products": (tflops or 0.0) / gemm,
        "weights": None,
        "python": python / step,
    }
    if machine.bandwidth_gb_per_second:
        read = work["weight_bytes"] * work["passes_over_weights"] / work["steps"]
        parts["weights"] = read / (machine.bandwidth_gb_per_second * 1e9) / step
    parts["other"] = max(
        0.0, 1 - max(parts["products"] or 0, parts["weights"] or 0) - python / step
    )
    here = tflops * 1e12 / baseline_flops() if tflops else None
    return {
        "training": {
            **_plain(training),
            "peak_memory_gb": training["peak_memory_gb"].high,
            "gemm_tflops": gemm,
            "flops_per_step": flops_per_step,
            "tflops": tflops,
            "peak_tflops": peak,
            # "table": the chip's FP32 shaders; "measured": large products, not quantised
            "peak_source": "table" if machine.peak_tflops else "measured",
            "percent_of_peak": 100 * tflops / peak if tflops else None,
        },
        # Seconds; rows are laid out and Python builds graphs while the device computes.
        "phases": {**phases, "backward": step - phases["forward"], "python": python, "step": step},
        # Parts of a step's time, were each all that it waits for.
        "limit": {**parts, "verdict": max(parts, key=lambda name: parts[name] or 0.0)},
        "baseline": {
            "samples_per_second": PEFT_BASELINE.samples_per_second,
            "of": f"{PEFT_BASELINE.machine}, {PEFT_BASELINE.recipe}",
            "here": here,
            "factor": here / PEFT_BASELINE.samples_per_second if here else None,
        },
        "projection": {str(n): n * PROJECTED_EPOCHS / samples for n in PROJECTED_ROWS},
    }


def baseline_flops() -> float:
    """FLOP that a row of the baseline's run takes."""
    settings = Settings()
    steps = -(-settings.rows // settings.batch_size)
    count = workload_of(BASELINE_MODEL, settings, steps=steps).flops()
    assert count is not None
    return count / settings.rows


def peer_ratios(runs: Mapping[str, list[Measures]]) -> dict[str, Any]:
    """mlx-lm's own figures, and ours over them, pass by pass."""
    keys = ("samples_per_second", "tokens_per_second", "peak_memory_gb")
    return {
        "figures": _plain(spreads(runs["mlx-lm"])),
        "ratios": _plain({key: ratio(runs["ours"], runs["mlx-lm"], key) for key in keys}),
    }


def load_result(path: Path) -> Result:
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


def earlier_ratios(found: Result, before: Result) -> dict[str, Any]:
    """Ours over an earlier result's, and in what the two are not the same work or machine."""
    ratios = {}
    for key in ("samples_per_second", "tokens_per_second"):
        ours, theirs = (Spread(**result["training"][key]) for result in (found, before))
        ratios[key] = ours / theirs
    peak = found["training"]["peak_memory_gb"] / before["training"]["peak_memory_gb"]
    ratios["peak_memory_gb"] = Spread.of([peak])
    same = ("model", "dtype", "quantize", "batch_size", "seq", "rows", "tokens")
    now, then = (
        {**{key: result["workload"][key] for key in same}, "chip": result["machine"]["chip"]}
        for result in (found, before)
    )
    return {
        "date": before["date"],
        "ratios": _plain(ratios),
        "differs": [f"{k}: {now[k]} here, {then[k]} there" for k in now if now[k] != then[k]],
    }


def _plain(spreads: Mapping[str, Spread]) -> dict[str, dict[str, float]]:
    return {key: spread.to_json() for key, spread in spreads.items()}


def save(found: Result, name: str | None) -> Path:
    """Write a result to ``benchmarks/results/NAME.json``, a sweep's heat map beside it.

    Where there is no such folder, to the user's cache folder: a bench leaves nothing where it
    happens to be run.

    Args:
        name: None for one made of the machine's chip and the model.
    """
    work = found["workload"]
    bits = f"-{work['quantize']}bit" if work["quantize"] else ""
    default = f"{found['benchmark']}-{found['machine']['chip']}-{work['model']}{bits}"
    name = name or re.sub("[^a-z0-9.]+", "-", default.lower()).strip("-.")
    path = cache.results_folder() / f"{name}.json"
    files.write_json(path, found)
    if found["benchmark"] == "sweep":
        from mlx_tuner.bench.sweep import draw

        draw(path.with_suffix(".png"), found)
    return path
