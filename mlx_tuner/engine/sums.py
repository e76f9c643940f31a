"""Sums that keep their tail.

MLX's CPU backend adds a whole row, or a whole array, in a few fp32 accumulators: the mean of a
million numbers is off by a thousandth, a softmax over 150,000 logits by nearly as much. Of a
product with ones, 2e-6 of a softmax's sum is lost. Level by level, 1e-7 is.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_tuner.engine.exponential import exp

PARTS = 16
"""Numbers that are added one after the other."""


def row_sums(x: mx.array) -> mx.array:
    """The sum of each row of (n, V), as (n, 1).

    A row is cut into 16 parts, which are added, and so on with what that gives, so that few numbers
    are added to one that is much larger (pairwise summation, Higham 1993).
    """
    while x.shape[1] > PARTS:
        if odd := x.shape[1] % PARTS:
            x = mx.pad(x, [(0, 0), (0, PARTS - odd)])
        x = x.reshape(len(x), PARTS, -1).sum(axis=1)
    return x.sum(axis=1, keepdims=True)


def total(x: mx.array) -> mx.array:
    """The sum of all numbers of an array, a scalar of its dtype."""
    return row_sums(x.reshape(1, x.size)).reshape(())


def norm(x: mx.array) -> mx.array:
    """The L2 norm of an array, a scalar."""
    return mx.sqrt(total(mx.square(x)))


def column_sums(x: mx.array) -> mx.array:
    """The sum of each column of (n, V), as (V,): a matrix product, which adds in blocks."""
    return (mx.ones((1, len(x)), x.dtype) @ x)[0]


def logsumexp(x: mx.array) -> mx.array:
    """``log Σ exp`` of each row of (n, V), as (n,)."""
    largest = x.max(axis=-1, keepdims=True)
    return (largest + mx.log(row_sums(exp(x - largest))))[:, 0]
