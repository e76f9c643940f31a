"""Runs side by side, by their summaries and records: as a Markdown table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import computed_field

from mlx_tuner.errors import Fault, RecipeError, RunError, TunerError
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.runs.metrics import (
    Change,
    Facts,
    Figures,
    Number,
    Record,
    Summary,
    change_of,
    summarise,
    train_records,
)
from mlx_tuner.runs.place import RECIPE, is_run, is_running
from mlx_tuner.runs.run import read_records, read_summary
from mlx_tuner.runs.verdict import judge
from mlx_tuner.words import duration, plural, rate

PLOT, PAGE = "compare.png", "compare.html"
_TREND_PERCENT = 10.0
"""Change of the gradient norm from which on it is said to fall or rise."""

Trend = Literal["falling", "steady", "rising"]


class RunFacts(Figures):
    """What is compared of a run; None for what it has not got, or not yet."""

    name: str
    path: str
    status: str
    """As in the summary; "running" or "interrupted" where there is none."""
    model: str
    dataset: str
    """The training rows' file, or where on the Hub they are."""
    rows: int | None
    rank: int
    steps: int
    epochs: float
    first_loss: Number
    final_loss: Number
    loss: Change
    grad_norm: Change
    base_val_loss: Number | None
    best_val_loss: Number | None
    best_step: int | None
    quality: str
    """What its validation losses say, in a few words."""
    samples_per_second: float | None
    tokens_per_second: float | None
    runtime_seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_reduction_percent(self) -> float:
        return -self.loss.percent

    @computed_field  # type: ignore[prop-decorator]
    @property
    def grad_norm_trend(self) -> Trend | None:
        percent = self.grad_norm.percent
        if not math.isfinite(percent):
            return None
        if abs(percent) <= _TREND_PERCENT:
            return "steady"
        return "falling" if percent < 0 else "rising"


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were asked for."""

    runs: tuple[RunFacts, ...]
    records: dict[str, list[Record]]
    """By the runs' names, for plots."""

    def to_json(self) -> dict[str, Any]:
        """`{"runs": [...]}`, plain values."""
        return {"runs": [run.to_json() for run in self.runs]}

    def table(self) -> list[list[str]]:
        """The runs' names, then a line a fact."""
        facts = [[title, *map(show, self.runs)] for title, show in _LINES]
        return [["", *(run.name for run in self.runs)], *facts]

    def to_markdown(self) -> str:
        """A table with a column a run and a line a fact."""
        lines = [[cell.replace("|", r"\|") for cell in line] for line in self.table()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * width for width in widths]
        return "\n".join(
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in (lines[0], rule, *lines[1:])
        )


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the runs in `paths`. RunError, with all faults, for what is no run or is broken."""
    faults: list[Fault] = []
    runs: list[RunFacts] = []
    records: dict[str, list[Record]] = {}
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            own = _records(path)
            runs.append(_facts(path, name, own))
            records[name] = own
        except TunerError as error:
            faults.extend(error.faults)
    if faults:
        raise RunError(*faults)
    return Comparison(tuple(runs), records)


def draw(found: Comparison, folder: Path) -> list[Path]:
    """Make compare.html and compare.png in a folder."""
    from mlx_tuner.show import page, plots
    from mlx_tuner.system import files

    plots.comparison(folder / PLOT, found.records)
    shown = page.comparison(found.records, *progression(found.runs), found.table())
    files.write_text(folder / PAGE, shown)
    return [folder / PAGE, folder / PLOT]


def _records(path: Path) -> list[Record]:
    if not path.is_dir():
        what = "is not there" if not path.exists() else "is not a folder"
        raise RunError(Fault(str(path), "", f"{what}; give the directory of a run"))
    if not is_run(path):
        what = "has neither recipe.toml nor metrics.jsonl; give the directory of a run"
        raise RunError(Fault(str(path), "", what))
    return read_records(path)


def _facts(path: Path, name: str, records: Sequence[Record]) -> RunFacts:
    """From the summary where the run has ended, else from what it has logged so far."""
    running = is_running(path)
    summary = None if running else read_summary(path)
    try:
        recipe = load_recipe(path / RECIPE, check_paths=False)
    except RecipeError as error:
        raise RunError(*error.faults) from None
    so_far = summary or summarise(
        Facts(
            recipe=recipe.name,
            model=recipe.model.path,
            rows=0,
            rank=recipe.lora.rank,
            total_steps=0,
            trainable_parameters=0,
            total_parameters=0,
        ),
        records,
        status="running" if running else "interrupted",
    )
    shared = RunFacts.model_fields.keys() & Summary.model_fields.keys()
    train = train_records(records)
    return RunFacts(
        name=name,
        path=str(path),
        **{field: getattr(so_far, field) for field in shared - {"rows"}},
        dataset=recipe.data.train.rpartition("/")[2],
        rows=so_far.rows if summary else None,
        quality=judge(records).kind,
        loss=change_of(records, "losses"),
        grad_norm=change_of(records, "grad_norms"),
        samples_per_second=so_far.samples_per_second if train else None,
        tokens_per_second=so_far.tokens_per_second if train else None,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names; the paths where two are called the same."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [f"{n} ({names[:i].count(n) + 1})" if n in names[:i] else n for i, n in enumerate(names)]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _known(show: Callable[[Any], str], *fields: str) -> Callable[[RunFacts], str]:
    """Show fields of a run, or a dash where one of them is None or not finite."""

    def cell(run: RunFacts) -> str:
        facts = run.to_json()
        values = [facts[name] for name in fields]
        return "–" if None in values else show(*values)

    return cell


def progression(runs: Sequence[RunFacts]) -> tuple[list[str], list[list[str]]]:
    """Names and rows of the table that tells how the versions went."""

    def row(run: RunFacts) -> list[str]:
        rows = "" if run.rows is None else f", {plural(run.rows, 'row')}"
        first, last, percent = run.loss.first, run.loss.last, run.loss.percent
        loss = f"{first:.4f} → {last:.4f} ({percent:+.1f} %)" if math.isfinite(percent) else "–"
        quality = run.quality
        if run.best_val_loss is not None:
            quality += f", {run.best_val_loss:.4f}"
        return [run.name, f"{run.dataset}{rows}", loss, quality, run.status]

    return ["version", "dataset", "loss", "quality", "status"], list(map(row, runs))


def _grad_norm(run: RunFacts) -> str:
    norm, trend = run.grad_norm, run.grad_norm_trend
    return f"{norm.first:.3f} → {norm.last:.3f}, {trend}" if trend else "–"


_LINES: tuple[tuple[str, Callable[[RunFacts], str]], ...] = (
    ("status", _known(str, "status")),
    ("dataset", _known(str, "dataset")),
    ("model", _known(str, "model")),
    ("rows", _known("{:,}".format, "rows")),
    ("rank", _known(str, "rank")),
    ("steps", _known("{:,}".format, "steps")),
    ("epochs", _known("{:.3g}".format, "epochs")),
    ("first log line's loss", _known("{:.4f}".format, "first_loss")),
    ("last log line's loss", _known("{:.4f}".format, "final_loss")),
    ("loss, at the start", lambda run: _number(run.loss.first)),
    ("loss, at the end", lambda run: _number(run.loss.last)),
    ("loss reduction", _known("{:.1f} %".format, "loss_reduction_percent")),
    ("best validation loss", _known("{:.4f} at step {:,}".format, "best_val_loss", "best_step")),
    ("quality", _known(str, "quality")),
    ("gradient norm", _grad_norm),
    ("samples/s", _known(rate, "samples_per_second")),
    ("tokens/s", _known(rate, "tokens_per_second")),
    ("run time", _known(duration, "runtime_seconds")),
)
"""What each line of the table shows."""
