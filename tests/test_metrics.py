"""metrics.py: what is logged is what happened."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tuner.runs.metrics import (
    EvalRecord,
    Meter,
    Summary,
    TrainRecord,
    best_evaluation,
    record_from_json,
)

FACTS = {
    "recipe": "codealpaca",
    "model": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "status": "finished",
    "rows": 100,
    "rank": 16,
    "total_steps": 39,
    "epochs": 3.0,
    "trainable_parameters": 4_358_144,
    "total_parameters": 1_548_072_448,
    "best": None,
    "tokenized_rows_per_second": 5000.0,
    "peak_memory_gb": 6.5,
}


class Clock:
    """A clock that goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(meter: Meter, loss: float = 1.0, **changes) -> None:
    numbers = {"grad_norm": 0.5, "learning_rate": 1e-4, "rows": 8, "tokens": 800}
    meter.step(loss=loss, **{**numbers, "target_tokens": 200, "seconds": 2.0, **changes})


def test_logged_loss_is_the_mean_of_the_steps_since_the_last_line():
    meter = Meter()
    for loss in (3.0, 1.0):
        step(meter, loss)
    assert meter.record(2, 0.5, peak_memory_gb=1.0).loss == 2.0
    for loss in (0.5, 0.25, 0.75):
        step(meter, loss)
    assert meter.record(5, 1.0, peak_memory_gb=1.0).loss == 0.5


def test_grad_norm_and_learning_rate_are_those_of_the_last_step():
    meter = Meter()
    step(meter, grad_norm=9.0, learning_rate=2e-4)
    step(meter, grad_norm=0.4, learning_rate=1e-4)
    record = meter.record(2, 0.5, peak_memory_gb=1.0)
    assert (record.grad_norm, record.learning_rate) == (0.4, 1e-4)


def test_speeds_count_the_time_of_steps_and_not_of_evaluations():
    clock = Clock()
    meter = Meter(clock)
    for rows in (8, 4):
        clock.now += 2.0
        step(meter, rows=rows, seconds=2.0)
    clock.now += 100.0  # an evaluation
    record = meter.record(2, 0.5, peak_memory_gb=1.0)
    assert record.samples_per_second == 12 / 4
    assert record.tokens_per_second == 1600 / 4
    assert record.elapsed_seconds == 104.0
    summary = meter.summary(**FACTS)
    assert summary.samples_per_second == 3.0
    assert summary.steps_per_second == 0.5
    assert summary.seconds_per_step == 2.0
    assert summary.seconds_per_epoch == 100 / 3.0
    assert (summary.training_seconds, summary.runtime_seconds) == (4.0, 104.0)


def test_trained_tokens_are_the_targets_of_the_whole_run():
    meter = Meter()
    for _ in range(3):
        step(meter, target_tokens=7)
        record = meter.record(1, 0.1, peak_memory_gb=1.0)
    assert record.trained_tokens == 21
    assert meter.summary(**FACTS).trained_tokens == 21


def test_the_summary_has_the_users_numbers():
    meter = Meter()
    for loss in (1.2, 1.0, 0.8, 0.6, 0.4):
        step(meter, loss)
        if loss in (1.0, 0.6):
            meter.record(1, 0.1, peak_memory_gb=1.0)
    best = EvalRecord(step=3, epoch=0.3, val_loss=0.7)
    summary = meter.summary(**{**FACTS, "best": best})
    assert summary.steps == 5
    assert summary.train_loss == pytest.approx(0.8)  # of all steps
    assert summary.first_loss == pytest.approx(1.1)  # of the first line: 1.2, 1.0
    assert summary.final_loss == pytest.approx(0.7)  # of the last line: 0.8, 0.6
    assert summary.loss_reduction_percent == pytest.approx(100 * 0.4 / 1.1)
    assert (summary.best_step, summary.best_val_loss) == (3, 0.7)
    assert not summary.stopped_early
    assert meter.summary(**{**FACTS, "status": "stopped early"}).stopped_early


def test_a_run_shorter_than_a_log_line_still_has_losses():
    meter = Meter()
    step(meter, 2.0)
    step(meter, 1.0)
    summary = meter.summary(**FACTS)
    assert (summary.first_loss, summary.final_loss, summary.train_loss) == (1.5, 1.5, 1.5)


def test_steps_that_were_not_finite_are_counted_and_left_out_of_means():
    meter = Meter()
    step(meter, 2.0)
    step(meter, math.nan, grad_norm=math.inf, finite=False)
    record = meter.record(2, 0.5, peak_memory_gb=1.0)
    assert record.loss == 2.0
    step(meter, math.inf, finite=False)
    assert math.isnan(meter.record(3, 0.75, peak_memory_gb=1.0).loss)
    summary = meter.summary(**FACTS)
    assert (summary.train_loss, summary.final_loss) == (2.0, 2.0)
    assert (summary.steps, summary.nonfinite_steps) == (3, 2)
    json.dumps(meter.state(), allow_nan=False)


def test_a_resumed_meter_goes_on_as_if_nothing_had_happened():
    clock = Clock()
    through, first = Meter(clock), Meter(clock)
    for meter in (through, first):
        step(meter, 3.0)
        meter.record(1, 0.1, peak_memory_gb=1.0)
        step(meter, 2.0)
    clock.now += 10.0
    state = json.loads(json.dumps(first.state()))
    second = Meter.resumed(state, clock=clock)
    for meter in (through, second):
        step(meter, 1.0)
    clock.now += 5.0
    assert second.record(3, 0.3, peak_memory_gb=1.0) == through.record(3, 0.3, peak_memory_gb=1.0)
    assert second.summary(**FACTS) == through.summary(**FACTS)


def test_a_clock_that_stands_still_gives_no_infinite_rates():
    meter = Meter(Clock())
    step(meter, seconds=0.0)
    assert meter.record(1, 0.1, peak_memory_gb=1.0).samples_per_second == 0.0
    json.dumps(meter.summary(**FACTS).to_json(), allow_nan=False)


def test_records_have_exactly_the_agreed_keys():
    assert [f.name for f in dataclasses.fields(TrainRecord)] == [
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "samples_per_second",
        "tokens_per_second",
        "trained_tokens",
        "peak_memory_gb",
        "elapsed_seconds",
    ]
    evaluation = EvalRecord(step=10, epoch=0.8, val_loss=1.0)
    assert evaluation.to_json() == {"event": "eval", "step": 10, "epoch": 0.8, "val_loss": 1.0}
    needed = [
        "steps",
        "epochs",
        "trainable_parameters",
        "total_parameters",
        "train_loss",
        "first_loss",
        "final_loss",
        "best_step",
        "best_val_loss",
        "runtime_seconds",
        "samples_per_second",
        "steps_per_second",
        "tokens_per_second",
        "peak_memory_gb",
        "stopped_early",
    ]
    assert set(needed) <= {f.name for f in dataclasses.fields(Summary)}


numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 10**12)
train_records = st.builds(
    TrainRecord,
    counts,
    numbers,
    numbers,
    numbers,
    numbers,
    numbers,
    numbers,
    counts,
    numbers,
    numbers,
)
eval_records = st.builds(EvalRecord, counts, numbers, numbers)


@given(st.one_of(train_records, eval_records))
def test_records_survive_json(record):
    line = json.dumps(record.to_json(), allow_nan=False)
    assert record_from_json(json.loads(line)) == record


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_null_in_json_and_nan_after_it(value):
    line = json.dumps(EvalRecord(1, 0.1, value).to_json(), allow_nan=False)
    assert '"val_loss": null' in line
    assert math.isnan(record_from_json(json.loads(line)).val_loss)


def test_a_summary_survives_json():
    meter = Meter()
    step(meter)
    for best in (None, EvalRecord(1, 0.1, 0.5)):
        summary = meter.summary(**{**FACTS, "best": best, "tokenized_rows_per_second": None})
        assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_lines_of_later_versions_are_read_for_what_is_known():
    assert record_from_json({"event": "checkpoint", "step": 3}) is None
    values = {"event": "eval", "step": 1, "epoch": 1, "val_loss": 2, "perplexity": 7.4}
    assert record_from_json(values) == EvalRecord(1, 1.0, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "step: is '3', not of type int"),
        ({"step": True}, "step: is True, not of type int"),
        ({"step": None}, "step: is None, not of type int"),
        ({"epoch": "x" * 1000}, "epoch: is 'xxxx"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        EvalRecord.from_json({"step": 1, "epoch": 0.5, "val_loss": 1.0, **change})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="val_loss: is missing"):
        EvalRecord.from_json({"step": 1, "epoch": 0.5})


def test_the_best_evaluation_is_the_earliest_lowest_one_after_the_base():
    records = [
        EvalRecord(0, 0.0, 0.1),
        EvalRecord(10, 0.5, 0.9),
        EvalRecord(20, 1.0, 0.7),
        EvalRecord(30, 1.5, 0.7),
        EvalRecord(40, 2.0, math.nan),
    ]
    assert best_evaluation(records) == records[2]
    assert best_evaluation(records[:1]) is None
