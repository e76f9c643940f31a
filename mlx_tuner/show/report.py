"""What a run did, for the terminal: table, chart, numbers, verdict, and where everything is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.runs.metrics import STOPPED, Record, Summary, curve
from mlx_tuner.runs.verdict import Tone, judge
from mlx_tuner.show import story
from mlx_tuner.show.chart import Chart, Series

_TRAIN, _VALID, _BEST = "cyan", "yellow", "bold green"
_STYLES: dict[Tone, str] = {"bad": "bold red", "warn": "bold yellow", "good": "green", "": ""}


def report(records: Sequence[Record], summary: Summary, run: Path) -> RenderableType:
    """All that is worth knowing about a run that has ended, to print with rich.

    Args:
        run: its directory, as the user should see it.
    """
    verdict = judge(records)
    said = Text(verdict.text, _STYLES[verdict.tone])
    parts = [
        _headline(summary),
        _trajectory(records, summary.best_step),
        _chart(records, summary),
        _pairs((Text(name, "bold"), text) for name, text in story.numbers(summary)),
        _pairs([(Text("verdict", "bold"), said)]),
        _files(summary, run),
    ]
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in parts if part is not None), "")


def _headline(summary: Summary) -> RenderableType:
    sign, style = ("✗", "bold yellow") if summary.status == STOPPED else ("✓", "bold green")
    status, _, rest = story.headline(summary).partition(":")
    title = Text.assemble((f"{sign} {summary.recipe}", style), (f" {status}", "bold"), f":{rest}")
    return Group(title, Text(story.description(summary), "dim"))


def _trajectory(records: Sequence[Record], best_step: int | None) -> RenderableType | None:
    told = story.trajectory(records, best_step)
    if not told.rows:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in told.names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for number, row in enumerate(told.rows):
        style = _BEST if number == told.best else "dim" if row[0] == "0" else ""
        table.add_row(*row, style=style)
    if not told.left_out:
        return table
    lines = f"{len(told.rows)} of {len(told.rows) + told.left_out} lines"
    return Group(table, Text(f"{lines}; all of them are in metrics.jsonl", "dim"))


def _chart(records: Sequence[Record], summary: Summary) -> RenderableType | None:
    """Loss by step, with the best evaluation marked; without any, the lowest training loss."""
    train, valid = curve(records, "loss"), curve(records, "val_loss")
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


def _pairs(rows: Iterable[tuple[str | Text, str | Text]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def _files(summary: Summary, run: Path) -> Table:
    """Where everything is, and what can be done with it."""
    kept = "the best by validation loss" if summary.best_step is not None else "after the last step"
    rows = [
        (f"{run}/adapters.safetensors", kept),
        (f"{run}/report.html", "all of this with charts, in a browser"),
        (f"{run}/loss.png", "and grad_norm.png, metrics.jsonl, summary.json"),
    ]
    return _pairs(
        [
            (Text("files", "bold"), ""),
            *((place, Text(what, "dim")) for place, what in rows),
            (Text("next", "bold"), ""),
            *((command, Text(what, "dim")) for command, what in story.what_next(summary, run)),
        ]
    )
