"""What a run did, for the terminal: table, chart, numbers, verdict, and where everything is."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.runs.metrics import FINISHED, STOPPED, EvalRecord, Record, Summary, TrainRecord
from mlx_tuner.runs.verdict import Kind, judge
from mlx_tuner.show.chart import Chart, Point, Series
from mlx_tuner.words import duration, plural, rate, scientific

_TRAIN, _VALID, _BEST = "cyan", "yellow", "bold green"
_MOST_ROWS = 20
"""Of the trajectory: longer ones are thinned."""
_VERDICT_STYLES: dict[Kind, str] = {
    "worse than base": "bold red",
    "overfitting": "bold yellow",
    "rising": "yellow",
    "improving": "green",
    "flat": "green",
}


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


def report(records: Sequence[Record], summary: Summary, run: Path) -> RenderableType:
    """All that is worth knowing about a run that has ended, to print with rich.

    Args:
        run: its directory, as the user should see it.
    """
    parts = [
        _headline(summary),
        _trajectory(records, summary.best_step),
        _chart(records, summary),
        _numbers(summary),
        _verdict(records),
        _files(summary, run),
    ]
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in parts if part is not None), "")


def _headline(summary: Summary) -> RenderableType:
    """Which run, how far, and what was trained."""
    signs = {FINISHED: ("✓", "bold green"), STOPPED: ("✗", "bold yellow")}
    sign, style = signs.get(summary.status, ("✓", "bold green"))
    steps = plural(summary.total_steps, "step")
    if summary.steps != summary.total_steps:
        steps = f"{summary.steps:,} of {steps}"
    title = Text.assemble(
        (f"{sign} {summary.recipe}", style),
        (f" {summary.status}", "bold"),
        f": {steps}, {summary.epochs:.3g} epochs, {duration(summary.runtime_seconds)}",
    )
    share = 100 * summary.trainable_parameters / summary.total_parameters
    facts = (
        f"{summary.model} · {plural(summary.rows, 'row')} · rank {summary.rank} · "
        f"{summary.trainable_parameters:,} of {summary.total_parameters:,} parameters "
        f"trained ({share:.4f} %)"
    )
    return Group(title, Text(facts, "dim"))


def _trajectory(records: Sequence[Record], best_step: int | None) -> RenderableType | None:
    """The log lines and evaluations by step, thinned to what fits on a screen."""
    trained = {r.step: r for r in records if isinstance(r, TrainRecord)}
    evaluated = {r.step: r for r in records if isinstance(r, EvalRecord)}
    steps = sorted(trained.keys() | evaluated.keys())
    if not steps:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    names = ["step", "epoch", "loss", "val loss", "grad norm", "LR", ""]
    for name in names if evaluated else [n for n in names if n not in ("val loss", "")]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    shown = _thinned(steps, sorted(evaluated), best_step)
    for step in shown:
        train, evaluation = trained.get(step), evaluated.get(step)
        epoch = (train or evaluated[step]).epoch
        cells = [f"{step:,}", f"{epoch:.2f}", f"{train.loss:.4f}" if train else ""]
        if evaluated:
            cells.append(f"{evaluation.val_loss:.4f}" if evaluation else "")
        cells += [f"{train.grad_norm:.3f}", scientific(train.learning_rate)] if train else ["", ""]
        style = _BEST if step == best_step else "dim" if step == 0 else ""
        if evaluated:
            cells.append("★ best" if step == best_step else "base" if step == 0 else "")
        table.add_row(*cells, style=style)
    if len(shown) == len(steps):
        return table
    note = f"{len(shown)} of {len(steps)} lines; all of them are in metrics.jsonl"
    return Group(table, Text(note, "dim"))


def _thinned(steps: Sequence[int], evaluated: Sequence[int], best: int | None) -> list[int]:
    """About `_MOST_ROWS` of the steps, evenly: evaluated ones, first, last and best."""
    if len(steps) <= _MOST_ROWS:
        return list(steps)
    pool = evaluated if len(evaluated) >= _MOST_ROWS // 2 else steps
    gaps = min(len(pool), _MOST_ROWS - 2) - 1
    kept = {pool[round(i * (len(pool) - 1) / gaps)] for i in range(gaps + 1)}
    return sorted(kept | {steps[0], steps[-1]} | {step for step in steps if step == best})


def _chart(records: Sequence[Record], summary: Summary) -> RenderableType | None:
    """Loss by step, with the best evaluation marked; without any, the lowest training loss."""
    train: list[Point] = [
        (r.step, r.loss) for r in records if isinstance(r, TrainRecord) and math.isfinite(r.loss)
    ]
    valid: list[Point] = [
        (r.step, r.val_loss)
        for r in records
        if isinstance(r, EvalRecord) and math.isfinite(r.val_loss)
    ]
    if len({step for step, _ in train + valid}) < 2:
        return None
    legend = Text.assemble(("loss", "bold"), ("  ─ train", _TRAIN))
    if valid:
        legend.append("  ● validation", _VALID)
    if summary.best_step is not None and summary.best_val_loss is not None:
        word, mark = "best", (float(summary.best_step), summary.best_val_loss)
    else:
        word, mark = "lowest", min(train, key=lambda point: point[1])
    legend.append(f"  ★ {word} {mark[1]:.4f}, step {mark[0]:,.0f}", _BEST)
    return Group(
        legend,
        Chart([Series(train, _TRAIN), Series(valid, _VALID, dotted=True)], mark),
    )


def _numbers(summary: Summary) -> RenderableType:
    """Loss, time, speed and memory; what ten times the rows would take."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in _facts(summary):
        grid.add_row(name, text)
    return grid


def _facts(summary: Summary) -> Iterator[tuple[str, Text]]:
    """Each number with its name, and an explanation in parentheses where it needs one."""
    reduction = summary.loss_reduction_percent
    word = "lower" if reduction >= 0 else "higher"
    yield (
        "loss",
        Text.assemble(
            f"{summary.first_epoch_loss:.4f} → {summary.last_epoch_loss:.4f}  ",
            (f"{abs(reduction):.1f} % {word}", "green" if reduction > 0 else "yellow"),
            f"  (first epoch to last; average {summary.train_loss:.4f}, "
            f"last {summary.final_loss:.4f})",
        ),
    )
    if summary.nonfinite_steps:
        what = f"{plural(summary.nonfinite_steps, 'step')} left out: loss or gradient not finite"
        yield "skipped", Text(what, "bold yellow")
    spent = [f"{duration(summary.training_seconds)} training"]
    spent += [f"{duration(s)} {what}" for what, s in summary.other_seconds.items() if s >= 0.05]
    yield (
        "time",
        Text(f"{duration(summary.runtime_seconds)}: {', '.join(spent)}"),
    )
    yield (
        "",
        Text(
            f"{duration(summary.seconds_per_epoch)} an epoch, "
            f"{duration(summary.seconds_per_step)} a step"
        ),
    )
    yield (
        "speed",
        Text(
            f"{rate(summary.samples_per_second)} samples/s, "
            f"{rate(summary.steps_per_second)} steps/s, "
            f"{rate(summary.tokens_per_second)} tokens/s"
        ),
    )
    if summary.tokenized_rows_per_second is not None:
        yield "tokenisation", Text(f"{rate(summary.tokenized_rows_per_second)} rows/s")
    yield "memory", Text(f"{summary.peak_memory_gb:.2f} GB at most")
    if summary.samples_per_second > 0:
        seconds = 10 * summary.seconds_per_epoch * summary.epochs
        epochs = f"{summary.epochs:.3g} epochs"
        yield (
            "projection",
            Text(
                f"ten times the rows ({10 * summary.rows:,}), {epochs}: about {duration(seconds)}"
            ),
        )
    yield from _against_baseline(summary, PEFT_BASELINE)


def _against_baseline(summary: Summary, baseline: Baseline) -> Iterator[tuple[str, Text]]:
    """Only for the same work: the recipe with its rows on the model it is for."""
    same = (baseline.recipe, baseline.rows, baseline.trainable_parameters)
    if same == (summary.recipe, summary.rows, summary.trainable_parameters):
        factor = summary.samples_per_second / baseline.samples_per_second
        yield (
            "baseline",
            Text.assemble(
                (f"{factor:.2f} × as fast", "bold green" if factor > 1 else "yellow"),
                f" as {baseline.machine}: {baseline.samples_per_second} samples/s, "
                f"{duration(baseline.runtime_seconds)}",
            ),
        )


def _verdict(records: Sequence[Record]) -> RenderableType:
    verdict = judge(records)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(Text("verdict", "bold"), Text(verdict.text, _VERDICT_STYLES.get(verdict.kind, "")))
    return grid


def _files(summary: Summary, run: Path) -> RenderableType:
    """Where everything is, and what can be done with it."""
    kept = "the best by validation loss" if summary.best_step is not None else "after the last step"
    place = shlex.quote(str(run))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="fold")
    grid.add_column(style="dim")
    grid.add_row(Text("files", "bold"), "")
    grid.add_row(Text(f"{run}/adapters.safetensors"), kept)
    grid.add_row(Text(f"{run}/loss.png"), "and grad_norm.png, metrics.jsonl, summary.json")
    grid.add_row(Text("next", "bold"), "")
    if summary.status == STOPPED:
        grid.add_row(Text(f"mlx-tune run {place}/recipe.toml --run-dir {place} --resume"), "go on")
    grid.add_row(Text(f"mlx-tune generate {place} PROMPT"), "ask the tuned model")
    grid.add_row(Text(f"mlx-tune compare {place} OTHER"), "beside other runs")
    return grid
