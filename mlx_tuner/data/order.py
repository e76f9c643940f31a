"""The order of the rows: a keyed permutation of an epoch, and a split by content.

Both are pure functions, so a position in the data is one integer, and nothing that is done in
between (evaluation, micro-batches, an interruption) can move a row.
"""

import hashlib

import numpy as np

ORDER_VERSION = 1
"""Changes with every change of the numbers below: a resumed run must not go on in another order."""

_ROUNDS = 12


def _mix(x: np.ndarray) -> np.ndarray:
    """Spread every bit of 64-bit ``x`` over all bits (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(count: int, *numbers: int) -> np.ndarray:
    """``count`` 64-bit keys, from integers of any size and sign: uint64, shape (count,)."""
    text = " ".join(map(str, numbers)).encode()
    return np.frombuffer(hashlib.shake_128(text).digest(8 * count), "<u8")


class Permutation:
    """A shuffle of ``range(n)`` as a function of (seed, epoch, n), in constant memory.

    A Feistel network over the smallest power of two that holds ``n``: each round replaces one half
    of an index's bits by its XOR with a keyed hash of the other half, which can be undone and so
    never maps two indices to one. An index that lands at or above ``n`` goes through the network
    again ("cycle walking", Black & Rogaway 2002); that takes less than two passes on average.
    """

    def __init__(self, seed: int, epoch: int, n: int) -> None:
        self._n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << bits - bits // 2) - 1)
        self._round_keys = _keys(_ROUNDS, seed, epoch, n)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, position: int) -> int:
        """The index at ``position`` of the shuffled order."""
        return int(self.slice(position, position + 1)[0])

    def slice(self, first: int, last: int) -> np.ndarray:
        """The indices at positions first..last-1, int64, shape (last - first,)."""
        if not 0 <= first <= last <= self._n:
            raise IndexError(f"positions {first}..{last} of {self._n}")
        values = self._encipher(np.arange(first, last, dtype=np.uint64))
        while (outside := np.flatnonzero(values >= self._n)).size:
            values[outside] = self._encipher(values[outside])
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self._low_bits, values & self._low_mask
        for index, key in enumerate(self._round_keys):
            if index % 2:
                low = low ^ (_mix(high + key) & self._low_mask)
            else:
                high = high ^ (_mix(low + key) & self._high_mask)
        return (high << self._low_bits) | low


def in_validation(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out, from 32-bit digests of their content: bool, shape of ``digests``.

    A row's side depends on its own content and the seed alone: equal rows are always on the same
    side, and rows added to a file move no old one across.
    """
    hashes = _mix(digests.astype(np.uint64) + _keys(1, seed))
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
