"""The numbers of a run: a record a log line or evaluation, and the summary of them all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    computed_field,
)

FINISHED, STOPPED_EARLY, STOPPED, RUNNING = "finished", "stopped early", "stopped", "running"

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that JSON has as null where it is not finite."""


class Figures(BaseModel):
    """Plain values that can be kept as JSON. What follows from others is no field, but is shown."""

    model_config = ConfigDict(frozen=True, strict=True, ser_json_inf_nan="null")

    def to_json(self) -> dict[str, Any]:
        """All values, null for what is not finite."""
        values: dict[str, Any] = json.loads(self.model_dump_json())
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; keys that are not ours are left out.

        ValueError for a field that lacks or is not of its type.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}") from None


class Line(Figures):
    """What every line of `metrics.jsonl` has."""

    event: str
    step: int
    """Optimizer steps finished."""
    epoch: Number
    """Rows consumed / rows an epoch."""


class Steps(Figures):
    """What some optimizer steps add up to."""

    losses: list[Number]
    """Of each step, the mean over its target tokens; NaN where all of its rows were left out."""
    grad_norms: list[Number]
    """Of each step, the global L2 norm before clipping."""
    nonfinite_steps: int
    """Those whose loss or gradient was not finite, and which changed nothing."""
    learning_rate: Number
    """The one that the last step used."""
    rows: int
    tokens: int
    """All of the rows', prompts included, padding not."""
    seconds: Number
    """Of the steps alone."""
    trained_tokens: int
    """Target tokens since the start of the run."""


class TrainRecord(Steps, Line):
    """A log line: the steps since the one before."""

    event: Literal["train"] = "train"
    memory_gb: Number
    """Active and cached at this moment, 10⁹ bytes."""
    peak_memory_gb: Number
    """The most that was active so far, 10⁹ bytes."""
    elapsed_seconds: Number
    """Since the start of the run, evaluations and saving included."""
    restarts: int = 0
    """Of the training process so far, by itself, after it died."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss(self) -> float:
        """Mean over the steps that changed something."""
        return mean(self.finite_losses)

    @property
    def finite_losses(self) -> list[float]:
        """Of the steps whose loss and gradient were finite."""
        pairs = zip(self.losses, self.grad_norms, strict=True)
        return [loss for loss, norm in pairs if math.isfinite(loss + norm)]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def grad_norm(self) -> float:
        """Of the last step."""
        return self.grad_norms[-1] if self.grad_norms else math.nan

    @computed_field  # type: ignore[prop-decorator]
    @property
    def samples_per_second(self) -> float:
        return ratio(self.rows, self.seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_second(self) -> float:
        return ratio(self.tokens, self.seconds)


class EvalRecord(Line):
    """An evaluation on the validation rows. Step 0 is before training."""

    event: Literal["eval"] = "eval"
    val_loss: Number
    """Mean over all target tokens of the validation rows."""


class Sample(Figures):
    """An answer while training to one of the recipe's prompts. Step 0 is before training."""

    step: int
    prompt: str
    answer: str
    stopped: bool
    """By itself, not by the longest length."""


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


def train_records(records: Sequence[Record]) -> list[TrainRecord]:
    """The log lines among them."""
    return [record for record in records if isinstance(record, TrainRecord)]


def curve(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    """Step and value of each record that has this figure, where it is finite."""
    points = [(record.step, getattr(record, name)) for record in records if hasattr(record, name)]
    return [point for point in points if math.isfinite(point[1])]


def by_step(records: Sequence[Record], name: Literal["losses", "grad_norms"]) -> list[float]:
    """The loss or gradient norm of every step, in the order of steps."""
    return list(chain.from_iterable(getattr(r, name) for r in train_records(records)))


class Change(Figures):
    """What a number of each step, such as its loss, was on average at a run's start and end."""

    first: Number
    """Mean over the steps of the first epoch; of the first half where there are not two."""
    last: Number
    """Mean over as many steps at the end, which hold as many ragged steps."""

    @property
    def percent(self) -> float:
        """From first to last; not-a-number where that means nothing."""
        return 100 * (self.last - self.first) / self.first if self.first else math.nan


def change_of(records: Sequence[Record], name: Literal["losses", "grad_norms"]) -> Change:
    """From the first epoch of a run to its last."""
    values, train = by_step(records, name), train_records(records)
    # A step has batch_size rows but for an epoch's last, so that steps an epoch is the next integer
    # above steps / epochs, wherever in an epoch that is taken.
    epoch = math.ceil(train[-1].step / train[-1].epoch - 1e-9) if train else 1
    span = max(1, min(epoch, len(values) // 2))
    return Change(first=mean(values[:span]), last=mean(values[-span:]))


class Facts(Figures):
    """What a run is, known before its first step."""

    recipe: str
    model: str
    rows: int
    """Training rows, of an epoch."""
    rank: int
    total_steps: int
    """Optimizer steps planned."""
    trainable_parameters: int
    total_parameters: int
    valid_rows: int = 0
    data_notes: list[str] = []
    """What there is to say about the rows."""
    machine: dict[str, str] = {}
    """What it ran on: chip, memory, versions."""


class Summary(Facts):
    """A run as a whole."""

    status: str
    """"finished", "stopped early" (by its evaluations), "stopped" (by a signal) or "running"."""
    steps: int
    """Optimizer steps finished."""
    epochs: Number
    """Epochs passed."""
    train_loss: Number
    """Mean over all steps."""
    first_loss: Number
    """Of the first log line."""
    final_loss: Number
    """Of the last log line."""
    first_epoch_loss: Number
    """Mean over the steps of the first epoch, or half of a run of less than two."""
    last_epoch_loss: Number
    """Mean over as many steps at the end."""
    base_val_loss: Number | None
    """Before training: the base model's, if the adapter was new; None without validation rows."""
    best_step: int | None
    """Of the lowest validation loss; None without validation rows."""
    best_val_loss: Number | None
    runtime_seconds: Number
    """All of the run, evaluations and saving included."""
    training_seconds: Number
    """The optimizer steps alone, which the speeds and times below are of."""
    other_seconds: dict[str, float]
    """By what they went to: evaluating, saving and the like; waiting is part of the steps'."""
    trained_rows: int
    tokens: int
    """All of the rows', prompts included, padding not."""
    trained_tokens: int
    """Target tokens."""
    tokenized_rows_per_second: float | None
    """None where only the run's records are known."""
    peak_memory_gb: Number
    """10⁹ bytes."""
    nonfinite_steps: int
    """Steps whose loss or gradient was not finite, and which changed nothing."""
    restarts: int = 0
    """Of the training process, by itself, after it died."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stopped_early(self) -> bool:
        return self.status == STOPPED_EARLY

    @computed_field  # type: ignore[prop-decorator]
    @property
    def loss_reduction_percent(self) -> float:
        """From the first epoch to the last."""
        return -Change(first=self.first_epoch_loss, last=self.last_epoch_loss).percent

    @computed_field  # type: ignore[prop-decorator]
    @property
    def samples_per_second(self) -> float:
        return ratio(self.trained_rows, self.training_seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def steps_per_second(self) -> float:
        return ratio(self.steps, self.training_seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_second(self) -> float:
        return ratio(self.tokens, self.training_seconds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds_per_step(self) -> float:
        return ratio(self.training_seconds, self.steps)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds_per_epoch(self) -> float:
        return ratio(self.training_seconds * self.rows, self.trained_rows)


def summarise(
    facts: Facts,
    records: Sequence[Record],
    *,
    status: str,
    runtime_seconds: float | None = None,
    other_seconds: Mapping[str, float] | None = None,
    tokenized_rows_per_second: float | None = None,
    restarts: int = 0,
) -> Summary:
    """A run as its records tell it.

    Args:
        runtime_seconds: so far; by default until the last log line.
    """
    train, best = train_records(records), best_evaluation(records)
    finite = [loss for record in train for loss in record.finite_losses]
    losses = [record.loss for record in train if record.finite_losses]
    base = next((r.val_loss for r in records if isinstance(r, EvalRecord) and r.step == 0), None)
    change = change_of(records, "losses")
    steps = sum(len(record.losses) for record in train)
    return Summary(
        **dict(facts),
        status=status,
        steps=steps,
        epochs=train[-1].epoch if train else 0.0,
        train_loss=mean(finite),
        first_loss=losses[0] if losses else math.nan,
        final_loss=losses[-1] if losses else math.nan,
        first_epoch_loss=change.first,
        last_epoch_loss=change.last,
        base_val_loss=base,
        best_step=best.step if best else None,
        best_val_loss=best.val_loss if best else None,
        runtime_seconds=(
            max((record.elapsed_seconds for record in train), default=0.0)
            if runtime_seconds is None
            else runtime_seconds
        ),
        training_seconds=sum((record.seconds for record in train), 0.0),
        other_seconds=dict(other_seconds or {}),
        trained_rows=sum(record.rows for record in train),
        tokens=sum(record.tokens for record in train),
        trained_tokens=train[-1].trained_tokens if train else 0,
        tokenized_rows_per_second=tokenized_rows_per_second,
        peak_memory_gb=max((record.peak_memory_gb for record in train), default=0.0),
        nonfinite_steps=sum(record.nonfinite_steps for record in train),
        restarts=restarts,
    )


def ratio(amount: float, per: float) -> float:
    """amount / per; 0 where `per` is 0, as by a clock that stands still."""
    return amount / per if per > 0 else 0.0


def mean(values: Sequence[float]) -> float:
    """Of the finite values; not-a-number where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
