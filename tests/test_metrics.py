"""metrics.py, meter.py: what is logged is what happened."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_records import FACTS, evaluation, train_record

from mlx_tuner.engine.trainer import StepResult
from mlx_tuner.runs import meter as meters
from mlx_tuner.runs.meter import Meter
from mlx_tuner.runs.metrics import (
    EvalRecord,
    Summary,
    TrainRecord,
    best_evaluation,
    change_of,
    record_from_json,
    summarise,
)


class Clock:
    """A clock that goes on only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters.time, "monotonic", clock)
    return clock


def step(meter: Meter, loss: float = 1.0, **changes) -> None:
    numbers = {"grad_norm": 0.5, "learning_rate": 1e-4, "rows": 8, "tokens": 800, "finite": True}
    numbers |= {"target_tokens": 200, "seconds": 2.0, "waited": 0.25, **changes}
    meter.step(StepResult(loss=loss, **numbers))


def record(meter: Meter, number: int, epoch: float = 0.5, peak: float = 1.0) -> TrainRecord:
    return meter.record(number, epoch, memory_gb=2.0, peak_memory_gb=peak)


def test_logged_loss_is_the_mean_of_the_steps_since_the_last_line():
    meter = Meter()
    for loss in (3.0, 1.0):
        step(meter, loss)
    assert record(meter, 2).loss == 2.0
    for loss in (0.5, 0.25, 0.75):
        step(meter, loss)
    line = record(meter, 5)
    assert line.loss == 0.5
    assert line.losses == [0.5, 0.25, 0.75]


def test_grad_norm_and_learning_rate_are_those_of_the_last_step():
    meter = Meter()
    step(meter, grad_norm=9.0, learning_rate=2e-4)
    step(meter, grad_norm=0.4, learning_rate=1e-4)
    line = record(meter, 2)
    assert (line.grad_norm, line.learning_rate) == (0.4, 1e-4)
    assert line.grad_norms == [9.0, 0.4]


def test_speeds_count_the_time_of_steps_and_not_of_evaluations(clock):
    meter = Meter()
    for rows in (8, 4):
        clock.now += 2.0
        step(meter, rows=rows)
    with meter.timing("evaluating"):
        clock.now += 100.0
    line = record(meter, 2, epoch=0.12)
    assert line.samples_per_second == 12 / 4
    assert line.tokens_per_second == 1600 / 4
    assert line.elapsed_seconds == 104.0
    summary = summarise(FACTS, [line], status="finished", other_seconds=meter.other_seconds)
    assert summary.samples_per_second == 3.0
    assert summary.steps_per_second == 0.5
    assert summary.seconds_per_step == 2.0
    assert summary.seconds_per_epoch == 100 / 3.0
    assert (summary.training_seconds, summary.runtime_seconds) == (4.0, 104.0)
    assert summary.other_seconds == {"waiting for rows": 0.5, "evaluating": 100.0}


def test_trained_tokens_are_the_targets_of_the_whole_run():
    meter = Meter()
    for _ in range(3):
        step(meter, target_tokens=7)
        line = record(meter, 1)
    assert line.trained_tokens == 21
    assert summarise(FACTS, [line], status="finished").trained_tokens == 21


def test_the_summary_has_the_users_numbers():
    meter, records = Meter(), [EvalRecord(step=0, epoch=0.0, val_loss=1.5)]
    for number, loss in enumerate((1.2, 1.0, 0.8, 0.6, 0.4), 1):
        step(meter, loss)
        if number in (2, 4, 5):
            records.append(record(meter, number, epoch=number / 2, peak=6.0 - number))
    records.append(EvalRecord(step=4, epoch=2.0, val_loss=0.7))
    summary = summarise(FACTS, records, status="finished")
    assert summary.steps == 5
    assert summary.train_loss == pytest.approx(0.8)  # of all steps
    assert summary.first_loss == pytest.approx(1.1)  # of the first line: 1.2, 1.0
    assert summary.final_loss == pytest.approx(0.4)  # of the last line, which has one step
    assert (summary.best_step, summary.best_val_loss, summary.base_val_loss) == (4, 0.7, 1.5)
    assert summary.peak_memory_gb == 4.0
    assert not summary.stopped_early
    assert summarise(FACTS, records, status="stopped early").stopped_early


def test_the_loss_fell_from_the_first_epoch_to_the_last_whatever_the_ragged_steps():
    """Five rows, four a step: a step of 4 rows and one of 1 take turns, as in `first.toml`."""
    losses = [1.0, 4.0, 0.9, 3.0, 0.8, 2.0]
    epochs = [0.8, 1.0, 1.8, 2.0, 2.8, 3.0]
    records = [train_record(n, *pair) for n, pair in enumerate(zip(losses, strict=True), 1)]
    records = [r.model_copy(update={"epoch": e}) for r, e in zip(records, epochs, strict=True)]
    summary = summarise(FACTS, records, status="finished")
    assert (summary.first_epoch_loss, summary.last_epoch_loss) == (2.5, 1.4)
    assert summary.loss_reduction_percent == pytest.approx(44.0)  # not 100 % higher: 1.0 to 2.0
    # Stopped in the middle of an epoch: its window still has a step of each kind.
    change = change_of(records[:5], "losses")
    assert (change.first, change.last) == (2.5, pytest.approx(1.9))


def test_less_than_two_epochs_are_halved():
    records = [train_record(n, float(n), epoch=n / 10) for n in range(1, 6)]
    change = change_of(records, "losses")
    assert (change.first, change.last) == (1.5, 4.5)
    assert math.isnan(change_of([], "losses").percent)


def test_steps_that_were_not_finite_are_kept_counted_and_left_out_of_means():
    meter, records = Meter(), []
    step(meter, 2.0)
    step(meter, 9.0, grad_norm=math.inf, finite=False)
    records.append(record(meter, 2, epoch=0.5))
    assert records[0].loss == 2.0
    assert '"grad_norms":[0.5,null]' in records[0].model_dump_json()
    step(meter, math.nan, finite=False)
    json.dumps(meter.state(), allow_nan=False)
    records.append(record(meter, 3, epoch=0.75))
    assert math.isnan(records[1].loss)
    summary = summarise(FACTS, records, status="finished")
    assert (summary.train_loss, summary.final_loss) == (2.0, 2.0)
    assert (summary.steps, summary.nonfinite_steps) == (3, 2)


def test_a_resumed_meter_goes_on_as_if_nothing_had_happened(clock):
    through, first = Meter(), Meter()
    for meter in (through, first):
        step(meter, 3.0)
        record(meter, 1)
        step(meter, 2.0)
    clock.now += 10.0
    second = Meter.from_json(json.loads(json.dumps(first.state())))
    for meter in (through, second):
        step(meter, 1.0)
    clock.now += 5.0
    assert record(second, 3) == record(through, 3)
    assert second.state() == through.state()


def test_a_clock_that_stands_still_gives_no_infinite_rates():
    meter = Meter()
    step(meter, seconds=0.0)
    line = record(meter, 1)
    assert line.samples_per_second == 0.0
    json.dumps(summarise(FACTS, [line], status="finished").to_json(), allow_nan=False)


def test_what_is_written_has_the_agreed_keys():
    wanted = (
        "event step epoch loss grad_norm learning_rate samples_per_second tokens_per_second "
        "trained_tokens peak_memory_gb elapsed_seconds"
    )
    assert set(wanted.split()) <= train_record(1, 1.0).to_json().keys()
    evaluated = EvalRecord(step=10, epoch=0.8, val_loss=1.0)
    assert evaluated.to_json() == {"event": "eval", "step": 10, "epoch": 0.8, "val_loss": 1.0}
    wanted = (
        "steps epochs trainable_parameters total_parameters train_loss first_loss final_loss "
        "best_step best_val_loss runtime_seconds samples_per_second steps_per_second "
        "tokens_per_second peak_memory_gb stopped_early"
    )
    written = summarise(FACTS, [train_record(1, 1.0)], status="finished").to_json()
    assert set(wanted.split()) <= written.keys()


def test_no_field_of_a_summary_is_the_quotient_of_two_others():
    records = [train_record(n, 1 / n, epoch=n / 7) for n in range(1, 22)]
    summary = summarise(FACTS, records, status="finished", runtime_seconds=31.7)
    values = {name: getattr(summary, name) for name in Summary.model_fields}
    numbers = {n: v for n, v in values.items() if type(v) in (int, float) and v not in (0, 1)}
    for name, value in numbers.items():
        quotients = {a / b for n, a in numbers.items() for m, b in numbers.items() if n != m}
        assert not any(math.isclose(value, q, rel_tol=1e-9) for q in quotients), name


numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)
steps = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4)


@given(steps, st.lists(numbers, min_size=6, max_size=6), st.lists(counts, min_size=4, max_size=4))
def test_records_survive_json(steps, numbers, counts):
    line = TrainRecord(
        step=counts[0],
        epoch=numbers[0],
        losses=[loss for loss, _ in steps],
        grad_norms=[norm for _, norm in steps],
        nonfinite_steps=counts[0],
        learning_rate=numbers[1],
        rows=counts[1],
        tokens=counts[2],
        seconds=numbers[2],
        trained_tokens=counts[3],
        memory_gb=numbers[3],
        peak_memory_gb=numbers[4],
        elapsed_seconds=numbers[5],
        restarts=counts[0],
    )
    assert record_from_json(json.loads(line.model_dump_json())) == line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_json_and_nan_after_it(value):
    line = evaluation(1, value).model_dump_json()
    assert '"val_loss":null' in line
    assert math.isnan(record_from_json(json.loads(line)).val_loss)


@pytest.mark.parametrize("tuned", [[], [evaluation(1, 0.5)]])
def test_a_summary_survives_json(tuned):
    summary = summarise(FACTS, [train_record(1, 1.0), *tuned], status="finished")
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_lines_of_later_versions_are_read_for_what_is_known():
    assert record_from_json({"event": "checkpoint", "step": 3}) is None
    values = {"event": "eval", "step": 1, "epoch": 1, "val_loss": 2, "perplexity": 7.4}
    assert record_from_json(values) == EvalRecord(step=1, epoch=1.0, val_loss=2.0)


@pytest.mark.parametrize("change", [{"step": "3"}, {"step": True}, {"step": None}])
def test_a_field_of_the_wrong_type_is_named(change):
    with pytest.raises(ValueError, match=r"^step: Input should be a valid integer$"):
        EvalRecord.from_json({"step": 1, "epoch": 0.5, "val_loss": 1.0, **change})


@pytest.mark.parametrize("name", ["step", "rows", "losses", "nonfinite_steps", "memory_gb"])
def test_a_log_line_lacks_nothing(name):
    values = train_record(1, 1.0).to_json()
    del values[name]
    with pytest.raises(ValueError, match=rf"^{name}: Field required$"):
        record_from_json(values)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match=r"^val_loss: Field required$"):
        EvalRecord.from_json({"step": 1, "epoch": 0.5})


def test_the_best_evaluation_is_the_earliest_lowest_one_after_the_base():
    values = {0: 0.1, 10: 0.9, 20: 0.7, 30: 0.7, 40: math.nan}
    records = [evaluation(step, loss) for step, loss in values.items()]
    assert best_evaluation(records) == records[2]
    assert best_evaluation(records[:1]) is None
