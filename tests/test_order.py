"""The order of the rows is a permutation, well mixed, the same for ever, and split by content."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tuner.data import order
from mlx_tuner.data.order import Permutation, in_validation
from mlx_tuner.recipe.schedule import rows_of_step, steps_per_epoch

SEEDS = st.integers(-(2**70), 2**70)


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, epoch=st.integers(0, 10**6), n=st.integers(0, 5000))
def test_every_index_comes_exactly_once(seed, epoch, n):
    assert sorted(Permutation(seed, epoch, n).slice(0, n).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**16 + 1, 1_000_003])
def test_every_index_comes_exactly_once_in_large_orders(n):
    counts = np.bincount(Permutation(1, 2, n).slice(0, n))
    assert len(counts) == n
    assert (counts == 1).all()


@settings(deadline=None)
@given(
    seed=SEEDS,
    n=st.integers(1, 10**15),
    position=st.floats(0, 1, exclude_max=True),
    count=st.integers(1, 20),
)
def test_any_position_can_be_asked_for_by_itself(seed, n, position, count):
    permutation = Permutation(seed, 0, n)
    first = int(position * n)
    last = min(first + count, n)
    indices = permutation.slice(first, last).tolist()
    assert indices == [permutation[i] for i in range(first, last)]
    assert all(0 <= index < n for index in indices)
    assert len(set(indices)) == last - first


@pytest.mark.parametrize("bad", [(-1, 1), (2, 1), (0, 6)])
def test_positions_outside_are_refused(bad):
    with pytest.raises(IndexError):
        Permutation(0, 0, 5).slice(*bad)


def test_the_order_never_changes():
    """Checkpoints depend on these numbers: other ones need another ORDER_VERSION."""
    assert order.ORDER_VERSION == 1
    assert Permutation(42, 0, 5).slice(0, 5).tolist() == [4, 3, 0, 2, 1]
    assert Permutation(42, 1, 100).slice(0, 10).tolist() == [35, 26, 61, 79, 97, 8, 89, 47, 46, 86]
    assert Permutation(0, 7, 10**9).slice(123, 127).tolist() == [
        407461639,
        845861248,
        106891902,
        804259318,
    ]
    assert in_validation(np.arange(40, dtype=np.uint32), 0.2, 42).nonzero()[0].tolist() == [
        0,
        4,
        10,
        22,
        29,
        35,
        36,
    ]


def chi_square(observed: np.ndarray, degrees: int) -> float:
    """Standard deviations from what a uniform distribution gives."""
    expected = observed.sum() / observed.size
    value = ((observed - expected) ** 2 / expected).sum()
    return float((value - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_few_rows_are_equally_likely(n):
    seen = Counter(tuple(Permutation(seed, 0, n).slice(0, n).tolist()) for seed in range(1000))
    assert len(seen) == math.factorial(n)
    assert abs(chi_square(np.array(list(seen.values())), len(seen) - 1)) < 5


@pytest.mark.parametrize("n", [7, 16, 50])
def test_every_row_is_as_likely_at_every_position_and_after_every_other(n):
    orders = np.array([Permutation(9, epoch, n).slice(0, n) for epoch in range(600)])
    at_position = np.array([np.bincount(column, minlength=n) for column in orders.T])
    assert abs(chi_square(at_position, (n - 1) ** 2)) < 5
    follows = np.zeros((n, n))
    np.add.at(follows, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    assert abs(chi_square(follows[~np.eye(n, dtype=bool)], n * (n - 1) - 1)) < 5


def test_orders_of_a_large_file_are_as_unlike_as_chance_makes_them():
    n = 200_000
    orders = [
        Permutation(seed, epoch, n).slice(0, n) for seed, epoch in [(0, 0), (0, 1), (1, 0), (2, 0)]
    ]
    positions = np.arange(n)
    for i, first in enumerate(orders):
        assert abs(np.corrcoef(positions, first)[0, 1]) < 5 / math.sqrt(n)
        assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / math.sqrt(n)
        for second in orders[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(n)
            assert np.count_nonzero(first == second) < 10  # One is expected.


@pytest.mark.parametrize(("rows", "batch_size"), [(5, 4), (100, 8), (23, 23), (7, 16)])
def test_an_interrupted_run_goes_on_in_the_same_order(rows, batch_size):
    """Three epochs with seven interruptions: the ordered rows of the steps, not a set of them."""
    steps = 3 * steps_per_epoch(rows, batch_size)

    def rows_of(first_step: int, last_step: int) -> list[list[int]]:
        found = []
        for step in range(first_step, last_step):
            epoch, first, last = rows_of_step(step, rows, batch_size)
            found.append(Permutation(7, epoch, rows).slice(first, last).tolist())
        return found

    whole = rows_of(0, steps)
    cuts = [0, *sorted(np.random.default_rng(0).integers(0, steps, 7).tolist()), steps]
    pieces = [rows_of(a, b) for a, b in pairwise(cuts)]
    assert [step for piece in pieces for step in piece] == whole
    epochs = np.array_split(np.concatenate(whole), 3)
    assert all(sorted(epoch.tolist()) == list(range(rows)) for epoch in epochs)
    assert rows < 20 or len({tuple(epoch) for epoch in epochs}) == 3


@given(
    old=st.lists(st.integers(0, 2**32 - 1), max_size=50),
    new=st.lists(st.integers(0, 2**32 - 1), max_size=50),
    fraction=st.floats(0, 1),
    seed=SEEDS,
)
def test_rows_that_are_added_move_no_other_across_the_split(old, new, fraction, seed):
    sides = dict(zip(old, in_validation(np.array(old, np.uint32), fraction, seed), strict=True))
    both = np.array(new + old, np.uint32)
    for digest, side in zip(both.tolist(), in_validation(both, fraction, seed), strict=True):
        assert sides.setdefault(digest, side) == side


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.999])
def test_the_split_has_the_asked_size_and_is_another_one_for_another_seed(fraction):
    n = 100_000
    digests = np.arange(n, dtype=np.uint32)
    splits = [in_validation(digests, fraction, seed) for seed in (0, 1)]
    spread = math.sqrt(n * fraction * (1 - fraction))
    for split in splits:
        assert abs(split.sum() - fraction * n) <= 5 * spread
    overlap = np.count_nonzero(splits[0] & splits[1])
    assert abs(overlap - fraction**2 * n) <= 5 * fraction * math.sqrt(n)
