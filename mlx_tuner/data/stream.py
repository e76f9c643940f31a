"""Encodes the rows of the next steps in the background, while this one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from mlx_tuner.engine.batching import Example

if TYPE_CHECKING:
    from mlx_tuner.data.dataset import Dataset

WINDOW_ROWS = 512
"""Rows that are encoded at once: enough to keep all cores busy."""

_WINDOWS_AHEAD = 3
"""Two that wait, and the one in hand."""


def prefetch(
    dataset: Dataset, steps: Iterable[Sequence[int]], window: int = WINDOW_ROWS
) -> Iterator[list[Example]]:
    """The examples of each of `steps`, a list of positions each, in their order.

    A thread encodes ahead: the first step by itself, so that it can begin, then steps of at least
    `window` rows at once, up to three such windows before they are asked for. What is raised there
    is raised here, in its place. The thread ends with the iterator, also where that is closed or
    dropped before its end.
    """
    ahead: deque[Future[list[list[Example]]]] = deque()
    pool = ThreadPoolExecutor(1, "mlx-tune rows")
    try:
        for positions in _windows(steps, window):
            ahead.append(pool.submit(dataset.batches, positions))
            if len(ahead) > _WINDOWS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _windows(steps: Iterable[Sequence[int]], window: int) -> Iterator[list[Sequence[int]]]:
    rows, wanted = 0, 1
    steps_of_window: list[Sequence[int]] = []
    for step in steps:
        steps_of_window.append(step)
        rows += len(step)
        if rows >= wanted:
            yield steps_of_window
            rows, wanted, steps_of_window = 0, window, []
    if steps_of_window:
        yield steps_of_window
