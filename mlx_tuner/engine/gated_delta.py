"""Gated DeltaNet over rows in chunks (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464).

A head has a state S (K, V) that a token with query q, key k, value v, decay g = exp(ℓ) and
strength β rewrites and then reads:

    S ← g S + k β (v − g Sᵀ k)ᵀ        o = Sᵀ q

Token by token, that keeps a state a token for the backward pass. Instead rows are cut into chunks
of C tokens. Within one, with D_ij = exp(ℓ_{j+1} + … + ℓ_i) for i ≥ j and γ_i = D_i0 g_0, the
rewrites u = β (v − g Sᵀ k) solve a unit lower triangular system (the WY form, arXiv:2406.06484)

    (I + A) U = β (V − γ K S)          A_ij = β_i D_ij k_i·k_j  for i > j
    O = γ Q S + (D ∘ Q Kᵀ) U           S ← γ_C S + (D_C K)ᵀ U

where all but S is the same for each S, so one product serves all chunks of all rows and only
two a chunk wait for the chunk before.

Shapes: R rows; n chunks in all, those of every row's first C tokens first, then of the next
C tokens of the rows that have them (rows go longest first), and so on; h key heads of size K,
each with r value heads of size V; all in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np


def chunk(lengths: Sequence[int], size: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Cut rows, longest first, that lie one after another, into chunks of ``size`` tokens.

    Returns:
        The token of each slot (n · C,), counted from the first row's first, and as many as there
        are tokens where the slot is padding; and how many rows have a first chunk, a second, ….
    """
    own = np.asarray(lengths, np.int64)
    ends = np.cumsum(own)
    tokens, rows = [np.empty(0, np.int64)], []
    for first in range(0, max(lengths, default=0), size):
        at = (ends - own)[own > first, None] + first + np.arange(size)
        tokens.append(np.where(at < ends[own > first, None], at, own.sum()).ravel())
        rows.append(len(at))
    return np.concatenate(tokens), tuple(rows)


def causal_conv(x: mx.array, weight: mx.array, tail: mx.array, rows: Sequence[int]) -> mx.array:
    """Depthwise convolution of each row with what came before it, (n, C, channels) as ``x``.

    Args:
        weight: (width, channels).
        tail: (1, width - 1, channels), what stands before every row.
        rows: as in `chunk`.
    """
    width = weight.shape[0]
    ends = x[:, x.shape[1] - (width - 1) :]
    before = [mx.broadcast_to(tail, (rows[0], *tail.shape[1:]))]
    first = 0
    for now, later in pairwise(rows):
        before.append(ends[first : first + later])
        first += now
    x = mx.concatenate([mx.concatenate(before), x], axis=1)
    size = x.shape[1] - (width - 1)
    return sum(weight[i] * x[:, i : i + size] for i in range(width))


def scan(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
    rows: Sequence[int],
) -> tuple[mx.array, mx.array]:
    """The rule over chunked rows that all start from one state.

    Args:
        q: (n, h, 1, C, K); ``k`` alike.
        v: (n, h, r, C, V).
        log_decay: ℓ (n, h, r, C), at most 0; ``beta`` alike.
        state: (1, h, r, K, V).
        rows: as in `chunk`.

    Returns:
        The outputs (n, h, r, C, V), and the states after the last chunk of the rows that have it.
    """
    size = q.shape[-2]
    lower = mx.tri(size, dtype=mx.bool_)
    strictly = mx.tri(size, k=-1, dtype=mx.bool_)
    # Each sum of its own: differences of one running sum would lose digits after a strong decay.
    between = mx.cumsum(mx.where(strictly, log_decay[..., None], 0), axis=-2)
    decay = mx.where(lower, mx.exp(between), 0)
    from_start = mx.exp(mx.cumsum(log_decay, axis=-1))
    keys = k.swapaxes(-1, -2)
    system = mx.where(strictly, beta[..., None] * decay * (k @ keys), 0)
    solved = inverse(system) * beta[..., None, :]
    written = solved @ v
    read = (solved * from_start[..., None, :]) @ k
    kept = decay[..., -1:, :] * keys
    whole = from_start[..., -1:, None]

    state = mx.broadcast_to(state, (rows[0], *state.shape[1:]))
    states, updates = [], []
    first = 0
    for count in rows:
        at = slice(first, first + count)
        state = state[:count]
        update = written[at] - read[at] @ state
        states.append(state)
        updates.append(update)
        state = whole[at] * state + kept[at] @ update
        first += count
    start, update = mx.concatenate(states), mx.concatenate(updates)
    out = from_start[..., None] * (q @ start) + (decay * (q @ keys)) @ update
    return out, state


@mx.custom_function
def inverse(a: mx.array) -> mx.array:
    """``(I + A)⁻¹`` for strictly lower triangular A (…, C, C), C a power of two.

    By halves, from blocks of two up: the inverse of [[X, 0], [Z, Y]] is
    [[X⁻¹, 0], [−Y⁻¹ Z X⁻¹, Y⁻¹]]. (The series I − A + A² − … cancels where keys repeat.)
    """
    size = a.shape[-1]
    block = mx.arange(size)
    result = mx.eye(size)
    width = 1
    while width < size:
        same = (block[:, None] // (2 * width)) == (block // (2 * width))
        halves = same & ((block[:, None] // width) != (block // width))
        corner = mx.where(halves, a, 0)
        result = result - (corner if width == 1 else result @ corner @ result)
        width *= 2
    return result


@inverse.vjp
def _inverse_vjp(a: mx.array, cotangent: mx.array, result: mx.array) -> mx.array:
    transposed = result.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)
