"""Counts a run's steps and seconds between two log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr

from mlx_tuner.runs.metrics import Steps, TrainRecord

if TYPE_CHECKING:
    from mlx_tuner.engine.trainer import StepResult


class Meter(Steps, frozen=False):
    """Adds up steps until they are logged; a checkpoint keeps what it has."""

    other_seconds: dict[str, float] = Field(default_factory=dict)
    """Of the whole run, by what they went to."""
    earlier_seconds: float = 0.0
    """Of the processes that this one resumes."""
    _started: float = PrivateAttr(default_factory=lambda: time.monotonic())

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"learning_rate": math.nan, "trained_tokens": 0, **_none(), **values})

    @property
    def elapsed_seconds(self) -> float:
        """Since the start of the run, in this process and those that it resumes."""
        return self.earlier_seconds + time.monotonic() - self._started

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Count the time in the block as gone to this."""
        start = time.monotonic()
        yield
        self._spend(what, time.monotonic() - start)

    def step(self, result: StepResult) -> None:
        """Take in one optimizer step."""
        self.losses.append(_rounded(result.loss))
        self.grad_norms.append(_rounded(result.grad_norm))
        self.nonfinite_steps += not result.finite
        self.learning_rate = result.learning_rate
        self.rows += result.rows
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.trained_tokens += result.target_tokens
        self._spend("waiting for rows", result.waited)

    def record(
        self, step: int, epoch: float, *, memory_gb: float, peak_memory_gb: float, restarts: int = 0
    ) -> TrainRecord:
        """The log line of the steps since the one before."""
        made = TrainRecord(
            step=step,
            epoch=epoch,
            **self.model_dump(include=set(Steps.model_fields)),
            memory_gb=memory_gb,
            peak_memory_gb=peak_memory_gb,
            elapsed_seconds=self.elapsed_seconds,
            restarts=restarts,
        )
        for name, value in _none().items():
            setattr(self, name, value)
        return made

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that `from_json` goes on as if nothing had happened."""
        return self.to_json() | {"earlier_seconds": self.elapsed_seconds}

    def _spend(self, what: str, seconds: float) -> None:
        self.other_seconds[what] = self.other_seconds.get(what, 0.0) + seconds


def _none() -> dict[str, Any]:
    """What no steps add up to."""
    lists: dict[str, Any] = {"losses": [], "grad_norms": []}
    return {**lists, "nonfinite_steps": 0, "rows": 0, "tokens": 0, "seconds": 0.0}


def _rounded(value: float) -> float:
    """In the seven digits that an fp32 number has."""
    return float(f"{value:.7g}")
