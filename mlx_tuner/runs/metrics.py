"""The numbers of a run: one record a log line or evaluation, and the summary at the end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

_Record = TypeVar("_Record", bound="JsonFields")


class JsonFields:
    """A dataclass of plain values as a JSON object; a number that is not finite is null there."""

    event: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """The fields in order, after `event` where the class has one."""
        values: dict[str, Any] = {"event": self.event} if self.event else {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            values[item.name] = None if _is_not_finite(value) else value
        return values

    @classmethod
    def from_json(cls: type[_Record], values: Mapping[str, Any]) -> _Record:
        """The inverse of `to_json`; keys that are not ours are left out.

        ValueError for a field that lacks or is not of its type.
        """
        known = {}
        for item in dataclasses.fields(cls):  # type: ignore[arg-type]
            if item.name not in values:
                raise ValueError(f"{item.name}: is missing")
            known[item.name] = _checked(item.name, str(item.type), values[item.name])
        return cls(**known)


@dataclass(frozen=True)
class TrainRecord(JsonFields):
    """What is logged every `log_every` steps, of the steps since the log line before."""

    event: ClassVar[str] = "train"

    step: int
    """Optimizer steps finished."""
    epoch: float
    """Rows consumed / rows an epoch."""
    loss: float
    """Mean over the steps of each step's mean over its target tokens."""
    grad_norm: float
    """Global L2 norm before clipping, of the last step."""
    learning_rate: float
    """The one that the last step used."""
    samples_per_second: float
    tokens_per_second: float
    """All tokens of the rows, prompts included, padding not."""
    trained_tokens: int
    """Target tokens since the start of the run."""
    peak_memory_gb: float
    """10⁹ bytes."""
    elapsed_seconds: float
    """Since the start of the run, evaluations and saving included."""


@dataclass(frozen=True)
class EvalRecord(JsonFields):
    """An evaluation on the validation rows. Step 0 is the base model."""

    event: ClassVar[str] = "eval"

    step: int
    epoch: float
    val_loss: float
    """Mean over all target tokens of the validation rows."""


Record = TrainRecord | EvalRecord


def record_from_json(values: Mapping[str, Any]) -> Record | None:
    """A line of `metrics.jsonl`; None for an event that is not known here."""
    kinds: dict[str, type[TrainRecord] | type[EvalRecord]] = {
        "train": TrainRecord,
        "eval": EvalRecord,
    }
    kind = kinds.get(str(values.get("event")))
    return kind.from_json(values) if kind else None


def best_evaluation(records: Sequence[Record]) -> EvalRecord | None:
    """The evaluation of the lowest loss after at least one step, the earliest of equals."""
    tuned = [r for r in records if isinstance(r, EvalRecord) and r.step > 0]
    finite = [r for r in tuned if math.isfinite(r.val_loss)]
    return min(finite, key=lambda record: record.val_loss, default=None)


@dataclass(frozen=True)
class Summary(JsonFields):
    """A run as a whole, once it has ended."""

    recipe: str
    model: str
    status: str
    """"finished", "stopped early" (by its evaluations) or "stopped" (by a signal)."""
    rows: int
    """Training rows, of an epoch."""
    rank: int
    steps: int
    """Optimizer steps finished."""
    total_steps: int
    """Optimizer steps planned."""
    epochs: float
    """Epochs passed."""
    trainable_parameters: int
    total_parameters: int
    train_loss: float
    """Mean over all steps."""
    first_loss: float
    """Of the first log line."""
    final_loss: float
    """Of the last log line."""
    loss_reduction_percent: float
    """From the first to the last log line."""
    best_step: int | None
    """Of the lowest validation loss; None without validation rows."""
    best_val_loss: float | None
    runtime_seconds: float
    """All of the run, evaluations and saving included."""
    training_seconds: float
    """The optimizer steps alone, which the speeds and times below are of."""
    samples_per_second: float
    steps_per_second: float
    tokens_per_second: float
    """All tokens of the rows, prompts included, padding not."""
    seconds_per_step: float
    seconds_per_epoch: float
    trained_tokens: int
    """Target tokens."""
    tokenized_rows_per_second: float | None
    """None where rows came from an earlier run's work."""
    peak_memory_gb: float
    """10⁹ bytes."""
    nonfinite_steps: int
    """Steps whose loss or gradient was not finite, and which changed nothing."""
    stopped_early: bool


@dataclass
class _Tally:
    """Sums over steps."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    finite_steps: int = 0

    @property
    def loss(self) -> float:
        """Mean of the steps' losses; not-a-number if no step had a finite one."""
        return self.loss_sum / self.finite_steps if self.finite_steps else math.nan


@dataclass
class Meter:
    """Adds up the numbers of single steps, between log lines and over the run.

    Speeds are over the `seconds` of the steps, so neither evaluations nor saving slow them down.
    """

    clock: Callable[[], float] = time.monotonic
    _all: _Tally = field(default_factory=_Tally)
    _since_log: _Tally = field(default_factory=_Tally)
    _grad_norm: float = math.nan
    _learning_rate: float = math.nan
    _first_loss: float | None = None
    _final_loss: float | None = None
    _earlier_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def elapsed_seconds(self) -> float:
        """Since the start of the run, in this process and those that it resumes."""
        return self._earlier_seconds + self.clock() - self._started

    def step(
        self,
        *,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        rows: int,
        tokens: int,
        target_tokens: int,
        seconds: float,
        finite: bool = True,
    ) -> None:
        """Take in one optimizer step. One that was not finite has no part in mean losses."""
        for tally in (self._all, self._since_log):
            tally.steps += 1
            tally.rows += rows
            tally.tokens += tokens
            tally.target_tokens += target_tokens
            tally.seconds += seconds
            if finite:
                tally.loss_sum += loss
                tally.finite_steps += 1
        self._grad_norm, self._learning_rate = grad_norm, learning_rate

    def record(self, step: int, epoch: float, *, peak_memory_gb: float) -> TrainRecord:
        """The log line of the steps since the one before."""
        since, self._since_log = self._since_log, _Tally()
        if since.finite_steps:
            self._final_loss = since.loss
            if self._first_loss is None:
                self._first_loss = since.loss
        return TrainRecord(
            step=step,
            epoch=epoch,
            loss=since.loss,
            grad_norm=self._grad_norm,
            learning_rate=self._learning_rate,
            samples_per_second=_rate(since.rows, since.seconds),
            tokens_per_second=_rate(since.tokens, since.seconds),
            trained_tokens=self._all.target_tokens,
            peak_memory_gb=peak_memory_gb,
            elapsed_seconds=self.elapsed_seconds,
        )

    def summary(
        self,
        *,
        recipe: str,
        model: str,
        status: str,
        rows: int,
        rank: int,
        total_steps: int,
        epochs: float,
        trainable_parameters: int,
        total_parameters: int,
        best: EvalRecord | None,
        tokenized_rows_per_second: float | None,
        peak_memory_gb: float,
    ) -> Summary:
        """The run so far as a whole. Steps never logged stand in for log lines that lack."""
        done = self._all
        final = self._since_log.loss if self._final_loss is None else self._final_loss
        first = final if self._first_loss is None else self._first_loss
        return Summary(
            recipe=recipe,
            model=model,
            status=status,
            rows=rows,
            rank=rank,
            steps=done.steps,
            total_steps=total_steps,
            epochs=epochs,
            trainable_parameters=trainable_parameters,
            total_parameters=total_parameters,
            train_loss=done.loss,
            first_loss=first,
            final_loss=final,
            loss_reduction_percent=reduction_percent(first, final),
            best_step=best.step if best else None,
            best_val_loss=best.val_loss if best else None,
            runtime_seconds=self.elapsed_seconds,
            training_seconds=done.seconds,
            samples_per_second=_rate(done.rows, done.seconds),
            steps_per_second=_rate(done.steps, done.seconds),
            tokens_per_second=_rate(done.tokens, done.seconds),
            seconds_per_step=_rate(done.seconds, done.steps),
            seconds_per_epoch=_rate(done.seconds * rows, done.rows),
            trained_tokens=done.target_tokens,
            tokenized_rows_per_second=tokenized_rows_per_second,
            peak_memory_gb=peak_memory_gb,
            nonfinite_steps=done.steps - done.finite_steps,
            stopped_early=status == STOPPED_EARLY,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that `resumed` goes on as if nothing had happened."""
        return {
            "all": dataclasses.asdict(self._all),
            "since_log": dataclasses.asdict(self._since_log),
            "first_loss": self._first_loss,
            "final_loss": self._final_loss,
            "elapsed_seconds": self.elapsed_seconds,
        }

    @classmethod
    def resumed(
        cls, state: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic
    ) -> Meter:
        """A meter that goes on from a `state`."""
        return cls(
            clock,
            _all=_Tally(**state["all"]),
            _since_log=_Tally(**state["since_log"]),
            _first_loss=state["first_loss"],
            _final_loss=state["final_loss"],
            _earlier_seconds=state["elapsed_seconds"],
        )


FINISHED, STOPPED_EARLY, STOPPED = "finished", "stopped early", "stopped"


def reduction_percent(first: float, final: float) -> float:
    """By how much `final` is less than `first`; not-a-number where that means nothing."""
    return 100 * (first - final) / first if first else math.nan


def _rate(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _checked(name: str, kind: str, value: Any) -> Any:
    """`value` as a field of type `kind`, the annotation's text."""
    optional = kind.endswith(" | None")
    kind = kind.removesuffix(" | None")
    if value is None and (optional or kind == "float"):
        return None if optional else math.nan
    expected = {"int": int, "float": int | float, "str": str, "bool": bool}[kind]
    if not isinstance(value, expected) or (kind != "bool" and isinstance(value, bool)):
        raise ValueError(f"{name}: is {value!r:.40}, not of type {kind}")
    return float(value) if kind == "float" else value
