"""verdict.py: hand-made validation curves get the verdict that a person would give."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_records import train_record, users_run, validated

from mlx_tuner.runs.metrics import EvalRecord
from mlx_tuner.runs.verdict import against_base, judge


@pytest.mark.parametrize(
    ("kind", "values", "base"),
    [
        ("improving", [1.0, 0.8, 0.7, 0.6], 1.2),
        ("improving", [1.0, 0.9, 0.95, 0.8], None),  # a bump on the way down
        ("improving", [1.0 - 0.005 * i for i in range(30)], None),  # slow but steady
        ("flat", [1.0, 0.8, 0.702, 0.7, 0.703, 0.701], 1.2),
        ("flat", [0.7, 0.7, 0.7], None),
        ("flat", [2.0, 1.5, 1.2, 1.0, 0.9, 0.895, 0.893], None),
        ("overfitting", [1.0, 0.8, 0.7, 0.75, 0.9], 1.2),
        ("overfitting", [0.7, 0.8, 0.9], 1.2),  # best at the first evaluation
        ("rising", [1.0, 0.8, 0.7, 0.8], 1.2),
        ("too few", [0.9], 1.2),
        ("too few", [0.9, 0.8], None),
        ("worse than base", [1.3, 1.4, 1.5], 1.2),
        ("worse than base", [1.3], 1.2),
        ("no validation", [], 1.2),
        ("no validation", [math.nan, math.nan], None),
    ],
)
def test_curves_are_judged_as_a_person_would(kind, values, base):
    assert judge(validated(values, base)).kind == kind


def test_overfitting_names_the_step_the_rise_and_what_was_kept():
    text = judge(validated([1.0, 0.8, 0.7, 0.75, 0.84], 1.2)).text
    assert text.startswith("Overfitting since step 30: validation loss rose from 0.7 to 0.84")
    assert "(+20.0 %) while training loss went on falling" in text
    assert "adapter of step 30, the best, was kept" in text


def test_training_loss_that_did_not_fall_is_not_said_to_have_fallen():
    records = [
        record if isinstance(record, EvalRecord) else train_record(record.step, 1.0)
        for record in validated([1.0, 0.7, 0.8, 0.9])
    ]
    assert "training loss" not in judge(records).text


def test_each_verdict_says_what_the_numbers_are_and_what_to_do():
    assert "since step 30, at 0.7" in judge(validated([1.0, 0.8, 0.702, 0.7, 0.703])).text
    assert "to 0.6 (−14.3 % since step 30)" in judge(validated([1.0, 0.8, 0.7, 0.6])).text
    assert "loss 1.2 → 1.3 (+8.3 %)" in (judge(validated([1.3, 1.4], 1.2)).text)
    assert "best 0.9 (−25.0 % since the start)" in judge(validated([0.9], 1.2)).text
    assert "data.valid" in judge(users_run()).text


def test_a_loss_of_zero_divides_nothing():
    assert judge(validated([0.0, 0.0, 0.0], 0.0)).kind in ("like the base", "flat")
    assert judge(validated([0.0, 0.1, 0.2])).kind == "overfitting"


@given(
    st.lists(st.floats(0, 1e6) | st.just(math.nan), max_size=30),
    st.none() | st.floats(0, 1e6),
)
def test_any_curve_gets_a_verdict(values, base):
    assert judge(validated(values, base)).text.endswith(".")


@pytest.mark.parametrize(
    ("base", "tuned", "sure", "kind"),
    [
        (2.0, 1.0, True, "better than base"),
        (2.0, 2.5, True, "worse than base"),
        (2.0, 1.99, True, "like the base"),
        (2.0, 1.0, False, "like the base"),
        (2.0, math.nan, True, "too few"),
    ],
)
def test_base_and_tuned_are_told_apart_where_they_differ_by_more_than_chance(
    base, tuned, sure, kind
):
    assert against_base(base, tuned, sure=sure).kind == kind


def test_a_run_and_its_evaluation_say_the_same_of_a_worse_model():
    assert judge(validated([1.3, 1.4, 1.5], 1.2)) == against_base(1.2, 1.3, named="before training")
