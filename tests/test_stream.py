"""Steps come in order, ahead of time, with their errors in place, and leave no thread behind."""

import gc
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tuner.data.stream import prefetch
from mlx_tuner.engine.batching import Example


class FakeDataset:
    """Gives examples that only know their row, and keeps what it was asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.fails_at = fails_at

    def batches(self, steps: Sequence[Sequence[int]]) -> list[list[Example]]:
        positions = [position for step in steps for position in step]
        self.asked.append(positions)
        if self.fails_at in positions:
            raise ValueError(f"row {self.fails_at}")
        nothing = np.zeros(0, np.int32)
        mask = nothing.astype(bool)
        return [[Example(nothing, mask, row) for row in step] for step in steps]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= before


def rows_of(steps) -> list[list[int]]:
    return [[example.row for example in step] for step in steps]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@given(
    steps=st.lists(st.lists(st.integers(0, 1000), max_size=9), max_size=30),
    window=st.integers(1, 40),
)
def test_steps_are_those_asked_for_in_their_order(steps, window):
    assert rows_of(prefetch(FakeDataset(), steps, window)) == steps


def test_the_first_step_is_encoded_alone_and_then_whole_steps_to_a_window():
    dataset = FakeDataset()
    steps = [[i, i] for i in range(8)]
    assert rows_of(prefetch(dataset, steps, window=5)) == steps
    assert [len(asked) for asked in dataset.asked] == [2, 6, 6, 2]


def test_steps_are_encoded_before_they_are_asked_for_but_not_without_bound():
    dataset = FakeDataset()
    stream = prefetch(dataset, ([i] for i in range(10**9)), window=10)
    assert rows_of([next(stream)]) == [[0]]
    wait_until(lambda: len(dataset.asked) == 4)  # One taken, two waiting, one in hand.
    time.sleep(0.05)
    assert len(dataset.asked) == 4
    assert rows_of([next(stream)]) == [[1]]
    wait_until(lambda: len(dataset.asked) == 5)
    stream.close()


def test_an_error_comes_after_the_windows_before_it():
    stream = prefetch(FakeDataset(fails_at=30), ([i] for i in range(100)), window=10)
    assert rows_of(next(stream) for _ in range(21)) == [[i] for i in range(21)]
    with pytest.raises(ValueError, match="row 30"):
        next(stream)


def test_an_error_in_making_the_steps_is_raised_too():
    def steps():
        yield [0]
        raise RuntimeError("no more")

    stream = prefetch(FakeDataset(), steps())
    with pytest.raises(RuntimeError, match="no more"):
        rows_of(stream)


@pytest.mark.parametrize("taken", [0, 1, 25])
def test_stopping_early_ends_the_thread(taken):
    dataset = FakeDataset()
    stream = prefetch(dataset, ([i] for i in range(10**9)), window=10)
    for _ in range(taken):
        next(stream)
    stream.close()
    asked = len(dataset.asked)
    time.sleep(0.02)
    assert len(dataset.asked) == asked
    assert not any(thread.name.startswith("mlx-tune rows") for thread in threading.enumerate())


def test_dropping_the_iterator_ends_the_thread():
    stream = prefetch(FakeDataset(), ([i] for i in range(10**9)), window=10)
    next(stream)
    del stream
    gc.collect()
    wait_until(lambda: not any(t.name.startswith("mlx-tune rows") for t in threading.enumerate()))


def test_an_error_of_the_consumer_ends_the_thread():
    def consume() -> None:
        for step in prefetch(FakeDataset(), ([i] for i in range(10**9)), window=10):
            if step[0].row == 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
