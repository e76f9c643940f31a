"""The order of the rows: a shuffle of each epoch, and a split by content.

Both are pure functions, so a position in the data is one integer, and nothing that is done in
between (evaluation, micro-batches, an interruption) can move a row.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1)
def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """``numpy.random.RandomState([seed, epoch]).permutation(n)``: uint32, shape (n,).

    NumPy keeps this generator's numbers the same for ever (NEP 19). An epoch's order is kept
    until another one is asked for.
    """
    order = np.arange(n, dtype=np.uint32)
    np.random.RandomState([seed, epoch]).shuffle(order)
    order.flags.writeable = False
    return order


def in_validation(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out, from 64-bit digests of their content: bool, shape of ``digests``.

    A row's side depends on its own content and the seed alone: equal rows are always on the same
    side, and rows added to a file move no old one across. The product with an odd random number
    spreads the digests anew for each seed (multiply-shift hashing, Dietzfelbinger et al. 1997).
    """
    factor = np.random.RandomState(seed).randint(2**63, dtype=np.uint64) * np.uint64(2)
    hashes = digests * (factor + np.uint64(1))
    return hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
