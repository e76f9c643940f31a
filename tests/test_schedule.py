"""Schedules against transformers' own, and against the figures of three recorded runs."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tuner.recipe.schedule import (
    epoch_at,
    learning_rate,
    rows_of_step,
    steps_per_epoch,
    total_steps,
)


def rates(steps: int, warmup: int = 0, schedule: Any = "linear", peak: float = 2e-4) -> list[float]:
    return [
        learning_rate(s, peak=peak, total_steps=steps, warmup_steps=warmup, schedule=schedule)
        for s in range(steps)
    ]


def test_first_run_of_five_rows_has_its_recorded_rates_and_epochs() -> None:
    assert total_steps(5, 4, epochs=3, max_steps=None) == 6
    assert [float(f"{rate:.3g}") for rate in rates(6)] == [
        2e-4,
        1.67e-4,
        1.33e-4,
        1e-4,
        6.67e-5,
        3.33e-5,
    ]
    assert [epoch_at(step, 5, 4) for step in range(1, 7)] == [0.8, 1.0, 1.8, 2.0, 2.8, 3.0]


def test_improved_run_of_eight_rows_ends_at_a_tenth_of_the_rate() -> None:
    assert total_steps(8, 4, epochs=5, max_steps=None) == 10
    assert rates(10) == pytest.approx([n * 2e-5 for n in range(10, 0, -1)])
    assert [epoch_at(step, 8, 4) for step in range(1, 11)] == [n / 2 for n in range(1, 11)]


def test_codealpaca_run_of_a_hundred_rows_has_its_recorded_log_lines() -> None:
    steps = total_steps(100, 8, epochs=3, max_steps=None)
    assert (steps, steps_per_epoch(100, 8)) == (39, 13)
    logged = [(epoch_at(step, 100, 8), rates(39, warmup=10)[step - 1]) for step in (10, 20, 30)]
    assert [epoch for epoch, _ in logged] == [0.8, 1.56, 2.32]
    assert [float(f"{rate:.4g}") for _, rate in logged] == [1.8e-4, 1.379e-4, 6.897e-5]


def test_cosine_is_at_half_the_peak_halfway_and_warm_up_starts_at_zero() -> None:
    cosine = rates(20, warmup=10, schedule="cosine", peak=1.0)
    assert cosine[0] == 0
    assert cosine[5] == 0.5
    assert cosine[10] == 1
    assert cosine[15] == pytest.approx(0.5)
    assert cosine[19] == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    assert rates(5, warmup=2, schedule="constant", peak=1.0) == [0, 0.5, 1, 1, 1]


def test_a_run_that_is_all_warm_up_only_rises() -> None:
    assert rates(4, warmup=4, peak=1.0) == [0, 0.25, 0.5, 0.75]


def test_max_steps_is_the_length_whatever_the_rows() -> None:
    assert total_steps(100, 8, epochs=None, max_steps=7) == 7


@pytest.mark.parametrize(("epochs", "max_steps"), [(None, None), (1, 1)])
def test_a_length_is_given_once(epochs: int | None, max_steps: int | None) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        total_steps(10, 2, epochs, max_steps)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(39, 10), (10, 0), (7, 7), (50, 3)])
def test_rates_equal_those_of_transformers_bit_for_bit(
    schedule: str, steps: int, warmup: int
) -> None:
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    reference = optimization.get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(steps, warmup, schedule) == expected


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 70), epochs=st.integers(1, 3))
def test_each_epoch_uses_each_row_once_and_the_last_step_takes_the_rest(
    rows: int, batch_size: int, epochs: int
) -> None:
    seen: list[list[int]] = [[] for _ in range(epochs)]
    consumed = 0
    for step in range(total_steps(rows, batch_size, epochs, None)):
        epoch, first, last = rows_of_step(step, rows, batch_size)
        assert 0 < last - first <= batch_size
        seen[epoch] += range(first, last)
        consumed += last - first
        assert epoch_at(step + 1, rows, batch_size) == consumed / rows
    assert seen == [list(range(rows))] * epochs
