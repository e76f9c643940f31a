"""Runs side by side: their facts from what they left, as a Markdown table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_tuner.errors import Fault, RecipeError, RunError, TunerError
from mlx_tuner.recipe.tables import load_recipe
from mlx_tuner.runs.metrics import (
    JsonFields,
    Record,
    TrainRecord,
    best_evaluation,
    reduction_percent,
)
from mlx_tuner.runs.run import RECIPE, is_run, is_running, read_records, read_summary
from mlx_tuner.words import duration, rate

PLOT = "compare.png"
_TREND = 0.1
"""Relative change of the gradient norm from which on it is said to fall or rise."""

Trend = Literal["falling", "steady", "rising"]


@dataclass(frozen=True)
class RunFacts(JsonFields):
    """What is compared of a run; None for what it has not got, or not yet."""

    name: str
    path: str
    status: str
    """As in the summary; "running" or "interrupted" where there is none."""
    model: str | None
    rows: int | None
    rank: int | None
    steps: int
    epochs: float
    first_loss: float | None
    final_loss: float | None
    loss_reduction_percent: float | None
    best_val_loss: float | None
    best_step: int | None
    first_grad_norm: float | None
    final_grad_norm: float | None
    grad_norm_trend: Trend | None
    samples_per_second: float | None
    tokens_per_second: float | None
    runtime_seconds: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were asked for."""

    runs: tuple[RunFacts, ...]
    records: dict[str, list[Record]]
    """By the runs' names, for plots."""

    def to_json(self) -> dict[str, Any]:
        """`{"runs": [...]}`, plain values."""
        return {"runs": [run.to_json() for run in self.runs]}

    def to_markdown(self) -> str:
        """A table with a column a run and a line a fact."""
        lines = [["", *(run.name.replace("|", r"\|") for run in self.runs)]]
        lines += [[title, *map(show, self.runs)] for title, show in _LINES]
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
    train = [record for record in records if isinstance(record, TrainRecord)]
    norms = [record.grad_norm for record in train]
    best = best_evaluation(records)
    facts: dict[str, Any] = {
        "name": name,
        "path": str(path),
        "best_val_loss": best.val_loss if best else None,
        "best_step": best.step if best else None,
        "first_grad_norm": norms[0] if norms else None,
        "final_grad_norm": norms[-1] if norms else None,
        "grad_norm_trend": _trend(norms),
    }
    running = is_running(path)
    if (summary := read_summary(path)) and not running:
        shared = {field.name for field in dataclasses.fields(RunFacts)} - facts.keys()
        return RunFacts(**facts, **{name: getattr(summary, name) for name in shared})
    try:
        recipe = load_recipe(path / RECIPE, check_paths=False)
    except RecipeError as error:
        raise RunError(*error.faults) from None
    first, last = (train[0], train[-1]) if train else (None, None)
    return RunFacts(
        **facts,
        status="running" if running else "interrupted",
        model=recipe.model.path,
        rows=None,
        rank=recipe.lora.rank,
        steps=max((record.step for record in records), default=0),
        epochs=max((record.epoch for record in records), default=0.0),
        first_loss=first.loss if first else None,
        final_loss=last.loss if last else None,
        loss_reduction_percent=reduction_percent(first.loss, last.loss) if first and last else None,
        samples_per_second=last.samples_per_second if last else None,
        tokens_per_second=last.tokens_per_second if last else None,
        runtime_seconds=last.elapsed_seconds if last else None,
    )


def _trend(norms: Sequence[float]) -> Trend | None:
    """The last third of the gradient norms against the first."""
    if len(norms) < 2:
        return None
    third = max(1, len(norms) // 3)
    before, after = sum(norms[:third]), sum(norms[-third:])
    if abs(after - before) <= _TREND * before:
        return "steady"
    return "falling" if after < before else "rising"


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names; the paths where two are called the same."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [f"{n} ({names[:i].count(n) + 1})" if n in names[:i] else n for i, n in enumerate(names)]


def _known(show: Callable[[Any], str], *fields: str) -> Callable[[RunFacts], str]:
    """Show fields of a run, or a dash where one of them is None or not finite."""

    def cell(run: RunFacts) -> str:
        facts = run.to_json()
        values = [facts[name] for name in fields]
        return "–" if None in values else show(*values)

    return cell


_LINES: tuple[tuple[str, Callable[[RunFacts], str]], ...] = (
    ("status", _known(str, "status")),
    ("model", _known(lambda model: str(model).replace("|", r"\|"), "model")),
    ("rows", _known("{:,}".format, "rows")),
    ("rank", _known(str, "rank")),
    ("steps", _known("{:,}".format, "steps")),
    ("epochs", _known("{:.3g}".format, "epochs")),
    ("first loss", _known("{:.4f}".format, "first_loss")),
    ("final loss", _known("{:.4f}".format, "final_loss")),
    ("loss reduction", _known("{:.1f} %".format, "loss_reduction_percent")),
    ("best validation loss", _known("{:.4f} at step {:,}".format, "best_val_loss", "best_step")),
    (
        "gradient norm",
        _known(
            "{:.3f} → {:.3f}, {}".format, "first_grad_norm", "final_grad_norm", "grad_norm_trend"
        ),
    ),
    ("samples/s", _known(rate, "samples_per_second")),
    ("tokens/s", _known(rate, "tokens_per_second")),
    ("run time", _known(duration, "runtime_seconds")),
)
"""What each line of the table shows."""
