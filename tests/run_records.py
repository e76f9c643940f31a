"""Records and summaries of runs that never were, for tests of what shows them."""

from __future__ import annotations

from typing import Any

from mlx_tuner.runs.metrics import EvalRecord, Record, Summary, TrainRecord, best_evaluation

USERS_TABLE = (
    (10, 0.8, 1.1542, 0.619, 1.8e-4),
    (20, 1.56, 0.925, 0.611, 1.379e-4),
    (30, 2.32, 0.7703, 0.410, 6.897e-5),
)
"""Step, epoch, loss, gradient norm and learning rate of the user's run on CodeAlpaca rows."""


def train_record(
    step: int, loss: float, *, epoch: float = 0.0, grad_norm: float = 0.5, rate: float = 1e-4
) -> TrainRecord:
    """A log line with plausible speeds."""
    epoch = epoch or step / 10
    return TrainRecord(step, epoch, loss, grad_norm, rate, 6.1, 742.0, 600 * step, 5.4, 1.3 * step)


def users_run() -> list[Record]:
    """The log lines of the user's run."""
    return [
        train_record(step, loss, epoch=epoch, grad_norm=norm, rate=rate)
        for step, epoch, loss, norm, rate in USERS_TABLE
    ]


def validated(values: list[float], base: float | None = None, every: int = 10) -> list[Record]:
    """A run whose validation loss takes these values, its training loss falling all the time."""
    records: list[Record] = [] if base is None else [EvalRecord(0, 0.0, base)]
    for number, value in enumerate(values, 1):
        records.append(train_record(every * number, 2.0 / number))
        records.append(EvalRecord(every * number, every * number / 10, value))
    return records


def summary_of(records: list[Record], **changes: Any) -> Summary:
    """A summary that fits the records."""
    train = [record for record in records if isinstance(record, TrainRecord)]
    best = best_evaluation(records)
    first, final = train[0].loss, train[-1].loss
    values: dict[str, Any] = {
        "recipe": "codealpaca",
        "model": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "status": "finished",
        "rows": 100,
        "rank": 16,
        "steps": train[-1].step,
        "total_steps": train[-1].step,
        "epochs": train[-1].epoch,
        "trainable_parameters": 4_358_144,
        "total_parameters": 1_548_072_448,
        "train_loss": sum(record.loss for record in train) / len(train),
        "first_loss": first,
        "final_loss": final,
        "loss_reduction_percent": 100 * (1 - final / first),
        "best_step": best.step if best else None,
        "best_val_loss": best.val_loss if best else None,
        "runtime_seconds": 204.34,
        "training_seconds": 190.0,
        "samples_per_second": 6.0,
        "steps_per_second": 0.75,
        "tokens_per_second": 742.4,
        "seconds_per_step": 1.333,
        "seconds_per_epoch": 16.7,
        "trained_tokens": 41_234,
        "tokenized_rows_per_second": 8123.0,
        "peak_memory_gb": 5.42,
        "nonfinite_steps": 0,
        "stopped_early": False,
    }
    return Summary(**{**values, **changes})
