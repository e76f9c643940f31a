"""The processes that train one adapter together, and what they tell one another.

Every rank knows all rows of a step and computes its share of them; one sum over the ranks later
they have the same gradient, and make the same update. All call these functions in the same order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np


class Ranks:
    """One process, which is all there is: sums are what they were."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.speeds = [1.0] * self.size
        """How fast each rank computes, in any unit: their shares of the rows."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes and shows."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which rows of a step this rank computes, in their order.

        Args:
            lengths: tokens of each of the step's rows.
        """
        return shares(lengths, self.speeds)[self.rank]

    def sum(self, vector: mx.array, numbers: mx.array) -> tuple[mx.array, mx.array]:
        """Both, fp32 of one dimension, summed over the ranks: the same bits on each of them."""
        return vector, numbers

    def meet(self, own: mx.array) -> None:
        """Compute what this rank has to add to a sum, before others are waited for."""

    def gather(self, content: bytes) -> list[bytes]:
        """What each rank gives, in their order."""
        return [content]

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        form = f"{len(values)}d"
        given = [struct.unpack(form, each) for each in self.gather(struct.pack(form, *values))]
        return [sum(column) for column in zip(*given, strict=True)]

    def take_over(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Rank 0's arrays, given some of the same shapes and types."""
        return list(arrays)


class Group(Ranks):
    """This process among others that `mlx.launch` has started.

    The group must outlive whatever was sent to it. Collectives run on MLX's default CPU stream,
    one after the other: beside a GPU's work, and in the same order everywhere.

    Args:
        group: of MLX.
        on_meeting: is called each time this rank's part of a sum is computed.
    """

    def __init__(
        self, group: mx.distributed.Group, on_meeting: Callable[[], None] = lambda: None
    ) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group, self._on_meeting = group, on_meeting
        super().__init__()

    def sum(self, vector: mx.array, numbers: mx.array) -> tuple[mx.array, mx.array]:
        """One message of all: each costs a round of the ring."""
        joined = mx.concatenate([vector, numbers])
        joined = mx.distributed.all_sum(joined, group=self._group)
        return joined[: vector.size], joined[vector.size :]

    def meet(self, own: mx.array) -> None:
        mx.eval(own)
        self._on_meeting()

    def gather(self, content: bytes) -> list[bytes]:
        sizes = self._gathered(np.array([len(content)], np.int32)).ravel().tolist()
        padded = np.zeros(max(*sizes, 1), np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        rows = self._gathered(padded)
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def _gathered(self, values: np.ndarray) -> np.ndarray:
        found = mx.distributed.all_gather(mx.array(values), group=self._group)
        return np.array(found).reshape(self.size, len(values))

    def take_over(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """As sums to which the other ranks add zeros."""
        taken = []
        for array in arrays:
            given = array if self.leads else mx.zeros_like(array)
            taken.append(mx.distributed.all_sum(given, group=self._group))
            mx.eval(taken[-1])  # one by one, lest they go out in another order elsewhere
        return taken


def shares(lengths: Sequence[int], speeds: Sequence[float]) -> list[list[int]]:
    """Which of a step's rows each rank computes, so that all are done at about the same time.

    The longest row comes first, and each goes to the rank that would be done with it first, which
    goes back and forth between ranks of one speed. (Graham 1969, doi:10.1137/0117039: at most a
    third longer than the best way.)

    Args:
        lengths: tokens of each row.
        speeds: of each rank, in any unit.

    Returns:
        For each rank the indices of its rows, in their order; some may have none.
    """
    found: list[list[int]] = [[] for _ in speeds]
    loads = [0] * len(speeds)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        done = [(load + lengths[i]) / speed for load, speed in zip(loads, speeds, strict=True)]
        rank = done.index(min(done))
        found[rank].append(i)
        loads[rank] += lengths[i]
    return [sorted(own) for own in found]


def join(backend: str, on_meeting: Callable[[], None] = lambda: None) -> Ranks:
    """This process's place among those that were started with it, once all of them are there.

    Args:
        backend: of MLX: "ring", "jaccl" or "nccl".
        on_meeting: as in `Group`.

    Raises:
        RuntimeError: MLX's, where they do not find one another.
    """
    group = mx.distributed.init(strict=True, backend=backend)
    return Group(group, on_meeting) if group.size() > 1 else Ranks()
