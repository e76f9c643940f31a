"""Encodes the rows of the next steps in the background, while this one is computed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from queue import Empty, Queue
from typing import Protocol

from mlx_tuner.engine.batching import Example

WINDOW_ROWS = 512
"""Rows that are encoded at once: enough to keep all cores busy."""

_WINDOWS_AHEAD = 2


class Examples(Protocol):
    """What gives examples by position, such as a `Dataset`."""

    def batches(self, steps: Sequence[Sequence[int]]) -> list[list[Example]]:
        """The examples at the positions of each of `steps`."""


def prefetch(
    dataset: Examples, steps: Iterable[Sequence[int]], window: int = WINDOW_ROWS
) -> Iterator[list[Example]]:
    """The examples of each of `steps`, a list of positions each, in their order.

    A thread encodes ahead: the first step by itself, so that it can begin, then steps of at least
    `window` rows at once, up to two such windows before they are asked for. What is raised there
    is raised here, in its place. The thread ends with the iterator, also where that is closed or
    dropped before its end.
    """
    queue: Queue[list[list[Example]] | BaseException | None] = Queue(_WINDOWS_AHEAD)
    stopped = threading.Event()

    def work() -> None:
        try:
            for positions in _windows(steps, window):
                queue.put(dataset.batches(positions))
                if stopped.is_set():
                    return
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    thread = threading.Thread(target=work, name="mlx-tune rows", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item
    finally:
        stopped.set()
        _empty(queue)  # Lets a thread go on that waits for room; it puts one more at most.
        thread.join()


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


def _empty(queue: Queue) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass
