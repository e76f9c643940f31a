"""The order of the rows is a permutation, well mixed, the same for ever, and split by content."""

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples

from mlx_tuner.data.order import in_validation, shuffled
from mlx_tuner.recipe.schedule import rows_of_step, steps_per_epoch

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=examples(50))
@given(seed=SEEDS, epoch=st.integers(0, 10**6), n=st.integers(0, 5000))
def test_the_order_is_numpys_own(seed, epoch, n):
    expected = np.random.RandomState([seed, epoch]).permutation(n)
    assert shuffled(seed, epoch, n).tolist() == expected.tolist()
    assert sorted(expected.tolist()) == list(range(n))


def test_the_order_never_changes():
    """A resumed run must go on in the order that it began with."""
    assert shuffled(42, 0, 5).tolist() == [4, 0, 3, 1, 2]
    assert shuffled(42, 1, 100)[:10].tolist() == [34, 31, 6, 78, 88, 0, 76, 37, 28, 48]
    held_out = in_validation(DIGESTS[:40], 0.2, 42).nonzero()[0]
    assert held_out.tolist() == [
        2,
        3,
        5,
        7,
        8,
        12,
        19,
        20,
        28,
    ]


DIGESTS = np.frombuffer(
    b"".join(hashlib.blake2b(b"%d" % i, digest_size=8).digest() for i in range(100_000)), np.uint64
)


def test_orders_of_a_large_file_are_as_unlike_as_chance_makes_them():
    n = 200_000
    orders = [shuffled(seed, epoch, n) for seed, epoch in [(0, 0), (0, 1), (1, 0), (2, 0)]]
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
            found.append(shuffled(7, epoch, rows)[first:last].tolist())
        return found

    whole = rows_of(0, steps)
    cuts = [0, *sorted(np.random.default_rng(0).integers(0, steps, 7).tolist()), steps]
    pieces = [rows_of(a, b) for a, b in pairwise(cuts)]
    assert [step for piece in pieces for step in piece] == whole
    epochs = np.array_split(np.concatenate(whole), 3)
    assert all(sorted(epoch.tolist()) == list(range(rows)) for epoch in epochs)
    assert rows < 20 or len({tuple(epoch) for epoch in epochs}) == 3


@given(
    old=st.lists(st.integers(0, 2**64 - 1), max_size=50),
    new=st.lists(st.integers(0, 2**64 - 1), max_size=50),
    fraction=st.floats(0, 1),
    seed=SEEDS,
)
def test_rows_that_are_added_move_no_other_across_the_split(old, new, fraction, seed):
    sides = dict(zip(old, in_validation(np.array(old, np.uint64), fraction, seed), strict=True))
    both = np.array(new + old, np.uint64)
    for digest, side in zip(both.tolist(), in_validation(both, fraction, seed), strict=True):
        assert sides.setdefault(digest, side) == side


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.999])
def test_the_split_has_the_asked_size_and_is_another_one_for_another_seed(fraction):
    n = len(DIGESTS)
    splits = [in_validation(DIGESTS, fraction, seed) for seed in (0, 1)]
    spread = math.sqrt(n * fraction * (1 - fraction))
    for split in splits:
        assert abs(split.sum() - fraction * n) <= 5 * spread
    overlap = np.count_nonzero(splits[0] & splits[1])
    assert abs(overlap - fraction**2 * n) <= 5 * fraction * math.sqrt(n)
