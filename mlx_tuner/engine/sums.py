"""Sums that keep their tail.

MLX's CPU backend adds a whole row, or a whole array, in a few fp32 accumulators: the mean of a
million numbers is off by a thousandth, a softmax over 150,000 logits by nearly as much. Summed in
blocks, the error is no larger than torch's.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_tuner.engine.exponential import exp

BLOCK = 1024


def total(x: mx.array) -> mx.array:
    """The sum of all numbers of an array, a scalar of its dtype."""
    x = x.reshape(-1)
    while x.size > BLOCK:
        blocks = -(-x.size // BLOCK)
        x = mx.pad(x, (0, blocks * BLOCK - x.size)).reshape(blocks, BLOCK).sum(axis=-1)
    return x.sum()


def norm(x: mx.array) -> mx.array:
    """The L2 norm of an array, a scalar."""
    return mx.sqrt(total(mx.square(x)))


def row_sums(x: mx.array) -> mx.array:
    """The sum of each row of (n, V), as (n, 1): a matrix product, which adds in blocks."""
    return x @ mx.ones((x.shape[-1], 1), x.dtype)


def column_sums(x: mx.array) -> mx.array:
    """The sum of each column of (n, V), as (V,), likewise."""
    return (mx.ones((1, len(x)), x.dtype) @ x)[0]


def logsumexp(x: mx.array) -> mx.array:
    """``log Σ exp`` of each row of (n, V), as (n,)."""
    largest = x.max(axis=-1, keepdims=True)
    return (largest + mx.log(row_sums(exp(x - largest))))[:, 0]
