"""Records and summaries of runs that never were, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_tuner.runs.metrics import EvalRecord, Facts, Record, Summary, TrainRecord, summarise
from mlx_tuner.runs.run import Run

USERS_TABLE = (
    (10, 0.8, 1.1542, 0.619, 1.8e-4),
    (20, 1.56, 0.925, 0.611, 1.379e-4),
    (30, 2.32, 0.7703, 0.410, 6.897e-5),
)
"""Step, epoch, loss, gradient norm and learning rate of the user's run on CodeAlpaca rows."""


def train_record(
    step: int,
    loss: float,
    *,
    epoch: float = 0.0,
    grad_norm: float = 0.5,
    rate: float = 1e-4,
    steps: int = 1,
) -> TrainRecord:
    """A log line of some steps, all alike, with plausible speeds: 8 rows and 974 tokens each."""
    return TrainRecord(
        step=step,
        epoch=epoch or step / 10,
        losses=[loss] * steps,
        grad_norms=[grad_norm] * steps,
        nonfinite_steps=0,
        learning_rate=rate,
        rows=8 * steps,
        tokens=974 * steps,
        seconds=1.3125 * steps,
        trained_tokens=600 * step,
        memory_gb=6.1,
        peak_memory_gb=5.4,
        elapsed_seconds=1.5 * step,
    )


def evaluation(step: int, val_loss: float) -> EvalRecord:
    """An evaluation; ten steps are an epoch."""
    return EvalRecord(step=step, epoch=step / 10, val_loss=val_loss)


def users_run() -> list[Record]:
    """The log lines of the user's run."""
    return [
        train_record(step, loss, epoch=epoch, grad_norm=norm, rate=rate, steps=10)
        for step, epoch, loss, norm, rate in USERS_TABLE
    ]


def validated(values: list[float], base: float | None = None, every: int = 10) -> list[Record]:
    """A run whose validation loss takes these values, its training loss falling all the time."""
    records: list[Record] = [] if base is None else [evaluation(0, base)]
    for number, value in enumerate(values, 1):
        records.append(train_record(every * number, 2.0 / number, steps=every))
        records.append(evaluation(every * number, value))
    return records


FACTS = Facts(
    recipe="codealpaca",
    model="Qwen/Qwen2.5-Coder-1.5B-Instruct",
    rows=100,
    rank=16,
    total_steps=39,
    trainable_parameters=4_358_144,
    total_parameters=1_548_072_448,
)


def summary_of(records: list[Record], **changes: Any) -> Summary:
    """The summary of the records, some of its values changed."""
    made = summarise(
        FACTS,
        records,
        status="finished",
        runtime_seconds=204.34,
        other_seconds={"evaluating": 10.0, "saving": 4.3},
        tokenized_rows_per_second=8123.0,
    )
    return made.model_copy(update=changes)


def begin(
    path: Path, recipe_toml: str, *, overwrite: bool = False, keep_out_of: Sequence[Path] = ()
) -> Run:
    """A new run in `path`."""
    run = Run(path, overwrite=overwrite)
    try:
        run.begin(recipe_toml, keep_out_of=keep_out_of)
    except BaseException:
        run.close()
        raise
    return run
