"""intervals.py: against tables, formulas and simulation."""

import numpy as np
import pytest

from mlx_tuner.commands.intervals import Share, _student, mean_over_targets


@pytest.mark.parametrize(
    ("freedom", "percentile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_students_percentiles_are_those_of_the_tables(freedom, percentile):
    assert _student(freedom) == pytest.approx(percentile, rel=0.02)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.255, 0.366)],
)
def test_a_share_has_wilsons_interval(count, of, low, high):
    share = Share(count=count, of=of).share
    assert (share.value, share.low) == (count / of, pytest.approx(low, abs=5e-4))
    assert share.high == pytest.approx(high, abs=5e-4)


def test_rows_of_one_length_have_the_interval_of_their_mean():
    sums, targets = [10.0, 14.0, 9.0, 15.0], [10, 10, 10, 10]
    found = mean_over_targets(sums, targets)
    # Mean 1.2, deviation 0.29439 of the rows' means, t(3) = 3.182.
    assert found.value == pytest.approx(1.2)
    assert found.high - found.value == pytest.approx(3.182 * 0.29439 / 2, rel=0.01)


def test_the_interval_holds_the_truth_in_19_of_20_samples_of_ragged_rows():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        targets = random.integers(5, 200, 40)
        sums = targets * (1.3 + 0.4 * random.standard_normal(40))
        found = mean_over_targets(sums.tolist(), targets.tolist())
        hits += found.low <= 1.3 <= found.high
    assert 920 <= hits <= 980


def test_one_row_has_no_interval():
    found = mean_over_targets([3.0], [2])
    assert found.value == 1.5
    assert found.low != found.low
