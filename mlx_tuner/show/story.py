"""What there is to say about a run, in plain words: the same on the terminal and on the page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_tuner import __version__
from mlx_tuner.runs.metrics import STOPPED, EvalRecord, Record, Summary, train_records
from mlx_tuner.words import duration, plural, ram, rate, scientific

if TYPE_CHECKING:
    from mlx_tuner.system.device import Machine

_MOST_ROWS = 20
"""Of the trajectory: longer ones are thinned."""
_MOST_MARKS = 8


@dataclass(frozen=True)
class Baseline:
    """A run of the user's with PEFT, to which the same work here is compared."""

    recipe: str
    rows: int
    trainable_parameters: int
    samples_per_second: float
    runtime_seconds: float
    machine: str


PEFT_BASELINE = Baseline("codealpaca", 100, 4_358_144, 1.468, 204.34, "PEFT on an M4 Pro")


def headline(summary: Summary) -> str:
    """How far the run came."""
    steps = plural(summary.total_steps, "step")
    if summary.steps != summary.total_steps:
        steps = f"{summary.steps:,} of {steps}"
    time = duration(summary.runtime_seconds)
    return f"{summary.status}: {steps}, {summary.epochs:.3g} epochs, {time}"


def description(summary: Summary) -> str:
    """What was trained."""
    share = 100 * summary.trainable_parameters / summary.total_parameters
    return (
        f"{summary.model} · {plural(summary.rows, 'row')} · rank {summary.rank} · "
        f"{summary.trainable_parameters:,} of {summary.total_parameters:,} parameters "
        f"trained ({share:.4f} %)"
    )


def time_spent(summary: Summary) -> dict[str, float]:
    """Seconds by what they went to; together they are the run's."""
    other = dict(summary.other_seconds)
    waiting = other.pop("waiting for rows", 0.0)
    known = {"training": summary.training_seconds - waiting, **other, "waiting for rows": waiting}
    rest = summary.runtime_seconds - sum(known.values())
    return {what: s for what, s in {**known, "other": rest}.items() if s >= 0.05}


def span(summary: Summary) -> str:
    """What the first loss, and the last, is the mean of."""
    return "epoch" if summary.epochs >= 2 else "half"


def numbers(summary: Summary) -> Iterator[tuple[str, str]]:
    """Loss, time, speed and memory by name; what ten times the rows would take."""
    reduction = summary.loss_reduction_percent
    yield (
        "loss",
        f"{summary.first_epoch_loss:.4f} → {summary.last_epoch_loss:.4f}  "
        f"{abs(reduction):.1f} % {'lower' if reduction >= 0 else 'higher'}  "
        f"(first {span(summary)} to last; average {summary.train_loss:.4f}, "
        f"last {summary.final_loss:.4f})",
    )
    if summary.best_val_loss is not None:
        base = "" if summary.base_val_loss is None else f"{summary.base_val_loss:.4f} → "
        yield "validation", f"{base}{summary.best_val_loss:.4f} at step {summary.best_step:,}"
    if summary.nonfinite_steps:
        steps = plural(summary.nonfinite_steps, "step")
        yield "skipped", f"{steps} left out: loss or gradient not finite"
    if summary.restarts:
        yield (
            "restarts",
            f"{summary.restarts:,}: training died, and went on from its last checkpoint",
        )
    spent = ", ".join(f"{duration(s)} {what}" for what, s in time_spent(summary).items())
    yield "time", f"{duration(summary.runtime_seconds)}: {spent}"
    epoch, step = duration(summary.seconds_per_epoch), duration(summary.seconds_per_step)
    yield "", f"{epoch} an epoch, {step} a step"
    yield (
        "speed",
        f"{rate(summary.samples_per_second)} samples/s, "
        f"{rate(summary.steps_per_second)} steps/s, {rate(summary.tokens_per_second)} tokens/s",
    )
    if summary.tokenized_rows_per_second is not None:
        yield "tokenisation", f"{rate(summary.tokenized_rows_per_second)} rows/s"
    yield "memory", f"{summary.peak_memory_gb:.2f} GB at most"
    if summary.samples_per_second > 0:
        yield (
            "projection",
            f"ten times the rows ({10 * summary.rows:,}), {summary.epochs:.3g} epochs: "
            f"about {duration(10 * summary.seconds_per_epoch * summary.epochs)}",
        )
    theirs = PEFT_BASELINE
    same = (theirs.recipe, theirs.rows, theirs.trainable_parameters)
    if same == (summary.recipe, summary.rows, summary.trainable_parameters):
        factor = summary.samples_per_second / theirs.samples_per_second
        yield (
            "baseline",
            f"{factor:.2f} × as fast as {theirs.machine}: {theirs.samples_per_second} samples/s, "
            f"{duration(theirs.runtime_seconds)}",
        )


@dataclass(frozen=True)
class Trajectory:
    """A run's log lines and evaluations by step, as a table of text."""

    names: list[str]
    rows: list[list[str]]
    best: int | None
    """The row of the best evaluation."""
    left_out: int
    """Lines that would have been too many."""


def trajectory(records: Sequence[Record], best_step: int | None) -> Trajectory:
    """The table, thinned to what fits on a screen."""
    trained = {record.step: record for record in train_records(records) if record.rows}
    evaluated = {r.step: r for r in records if isinstance(r, EvalRecord)}
    steps = sorted(trained.keys() | evaluated.keys())
    shown = _thinned(steps, sorted(evaluated), best_step)
    rows = []
    for step in shown:
        train, evaluation = trained.get(step), evaluated.get(step)
        cells = [f"{step:,}", f"{(train or evaluated[step]).epoch:.2f}"]
        cells += [f"{train.loss:.4f}" if train else ""]
        if evaluated:
            cells.append(f"{evaluation.val_loss:.4f}" if evaluation else "")
        cells += [f"{train.grad_norm:.3f}", scientific(train.learning_rate)] if train else ["", ""]
        if evaluated:
            cells.append("★ best" if step == best_step else "start" if step == 0 else "")
        rows.append(cells)
    names = ["step", "epoch", "loss", "val loss", "grad norm", "LR", ""]
    if not evaluated:
        names = [name for name in names if name not in ("val loss", "")]
    best = shown.index(best_step) if best_step in shown else None
    return Trajectory(names, rows, best, len(steps) - len(shown))


def _thinned(steps: Sequence[int], evaluated: Sequence[int], best: int | None) -> list[int]:
    """About `_MOST_ROWS` of the steps, evenly: evaluated ones, first, last and best."""
    if len(steps) <= _MOST_ROWS:
        return list(steps)
    pool = evaluated if len(evaluated) >= _MOST_ROWS // 2 else steps
    gaps = min(len(pool), _MOST_ROWS - 2) - 1
    kept = {pool[round(i * (len(pool) - 1) / gaps)] for i in range(gaps + 1)}
    if len(evaluated) <= _MOST_ROWS // 2:
        kept |= set(evaluated)
    return sorted(kept | {steps[0], steps[-1]} | {step for step in steps if step == best})


def machine(facts: Machine, ranks: int = 1) -> dict[str, str]:
    """Chip, memory and versions by name; how many such processes, where there are several."""
    cores = f", {facts.gpu_cores} GPU cores" if facts.gpu_cores else ""
    return {
        "chip": f"{facts.chip}{cores}, {facts.cpu_cores} CPU cores",
        "memory": ram(facts.memory_bytes),
        "backend": facts.backend,
        "system": facts.os,
        "Python": facts.python,
        "MLX": facts.mlx,
        "mlx-lm": facts.mlx_lm,
        "mlx-tune": __version__,
        **({"ranks": str(ranks)} if ranks > 1 else {}),
    }


def what_next(summary: Summary, run: Path) -> list[tuple[str, str]]:
    """Commands, and what each is for."""
    place = shlex.quote(str(run))
    resume = f"mlx-tune run {place}/recipe.toml --run-dir {place} --resume"
    return [
        *([(resume, "go on")] if summary.status == STOPPED else []),
        (f"mlx-tune generate {place} PROMPT", "ask the tuned model; without PROMPT, chat"),
        (f"mlx-tune eval {place}", "against the base, on held-out rows"),
        (f"mlx-tune compare {place} OTHER", "beside other runs"),
        (f"mlx-tune fuse {place} -o FOLDER", "a model of its own; --push OWNER/NAME shares it"),
    ]


def epoch_marks(records: Sequence[Record]) -> list[tuple[float, str]]:
    """The steps where epochs end; of many epochs, some."""
    step, epoch = max(((r.step, r.epoch) for r in records), default=(0, 0.0))
    every = max(1, math.ceil(epoch / _MOST_MARKS))
    ends = range(every, math.floor(epoch + 1e-6) + 1, every)
    return [(step * number / epoch, f"epoch {number}") for number in ends]
