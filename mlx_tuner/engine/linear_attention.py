"""Gated DeltaNet of Qwen3-Next and Qwen3.5 on flat tokens, from mlx-lm's modules.

Shapes: N flat tokens; n chunks of C tokens, of the prefix first, then of the rows (`gated_delta`);
h key heads of size K, H value heads of size V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_tuner.engine import gated_delta, lora
from mlx_tuner.engine.exponential import sigmoid
from mlx_tuner.engine.gather import Gather

NORM_EPS = 1e-6
"""Added to the sum of a query's or key's squares, in mlx-lm as in the paper's code."""


class Chunks(NamedTuple):
    """Where flat tokens lie in chunks."""

    slots: Gather
    size: int
    """C, how many of them a chunk has."""
    real: mx.array
    """(N, 1), whether a token is none that pads."""
    prefix: int
    """Tokens of the prefix at the front."""
    prefix_rows: tuple[int, ...]
    """A one for each chunk of the prefix, which is a row alone."""
    rows: tuple[int, ...]
    """As `gated_delta.chunk` gives it, of the rows."""

    @classmethod
    def of(cls, prefix: int, lengths: Sequence[int], total: int, size: int) -> Chunks:
        """Of ``prefix`` flat tokens, rows of such lengths, longest first, and padding to ``total``.

        Padding has an empty slot, of which there is one where padding is to a multiple of a chunk.
        """
        before, prefix_rows = gated_delta.chunk([prefix], size)
        after, rows = gated_delta.chunk(lengths, size)
        own = sum(lengths)
        before, after = (
            np.where(before < prefix, before, total),
            np.where(after < own, after + prefix, total),
        )
        tokens = np.concatenate([before, after])
        used = np.flatnonzero(tokens < total)
        slots = np.full(total, tokens.argmax(), np.int32)
        slots[tokens[used]] = used
        tokens = mx.array(tokens.astype(np.int32))
        real = mx.arange(total)[:, None] < prefix + own
        return cls(Gather(mx.array(slots), tokens), size, real, prefix, prefix_rows, rows)


def read(
    net: nn.Module,
    chunks: Chunks,
    x: mx.array,
    past: tuple[mx.array, ...],
    *,
    fused: bool = False,
) -> tuple[mx.array, ...]:
    """What the heads read for tokens (N, D), before the gated norm.

    Args:
        net: mlx-lm's module.
        past: where the prefix was computed elsewhere: its state (1, h, H / h, K, V) and the
            last inputs (1, width - 1, channels) of the convolution.
        fused: as in `exponential.sigmoid`.

    Returns:
        The gate (N, H, V), the outputs in chunks' slots (S, H · V), and, where the prefix is at the
        front, its state and last inputs.
    """
    mixed, z, b, a = _project(net, x)
    width = net.conv_kernel_size - 1
    heads = (net.num_k_heads, net.num_v_heads // net.num_k_heads)
    state, tail = past or (
        mx.zeros((1, *heads, net.head_k_dim, net.head_v_dim)),
        mx.zeros((1, width, mixed.shape[1]), mixed.dtype),
    )
    # An empty slot has strength 0 and decay 1, and so leaves the state alone.
    beta = mx.sigmoid(b.astype(mx.float32))
    decay = nn.softplus(a.astype(mx.float32) + net.dt_bias)
    log_decay = -mx.exp(net.A_log.astype(mx.float32)) * decay
    # Tokens that pad share an empty slot, on which the state does depend through these two.
    beta, log_decay = (mx.where(chunks.real, y, 0) for y in (beta, log_decay))
    parts = [
        chunks.slots.back(y).reshape(-1, chunks.size, y.shape[1]) for y in (mixed, log_decay, beta)
    ]
    first = len(chunks.prefix_rows)
    outputs = []
    if chunks.prefix:
        prefix = [part[:first] for part in parts]
        out, state = _through_chunks(net, chunks.prefix_rows, prefix, tail, state, fused)
        tail = mx.concatenate([tail[0], mixed[: chunks.prefix]])[None, -width:]
        outputs.append(out)
    if chunks.rows:
        rows = [part[first:] for part in parts]
        outputs.append(_through_chunks(net, chunks.rows, rows, tail, state, fused)[0])
    out = mx.concatenate(outputs).flatten(0, 1)
    return z, out, *((state, tail) if chunks.prefix else ())


def _project(net: nn.Module, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Queries, keys and values (N, channels), gate (N, H · V), strength and decay (N, H)."""
    if "in_proj_qkv" in net:
        mixed, z, b, a = lora.project(
            [net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a], x
        )
        return mixed, z, b, a
    # Qwen3-Next has a key head's queries, keys, values and gates side by side.
    qkvz, ba = (
        y.reshape(len(x), net.num_k_heads, -1)
        for y in lora.project([net.in_proj_qkvz, net.in_proj_ba], x)
    )
    size, values = net.head_k_dim, net.num_v_heads // net.num_k_heads * net.head_v_dim
    *mixed, z = mx.split(qkvz, [size, 2 * size, 2 * size + values], axis=-1)
    b, a = mx.split(ba, 2, axis=-1)
    z, b, a = (y.reshape(len(x), -1) for y in (z, b, a))
    return mx.concatenate([y.reshape(len(x), -1) for y in mixed], axis=1), z, b, a


def _through_chunks(
    net: nn.Module,
    rows: Sequence[int],
    parts: Sequence[mx.array],
    tail: mx.array,
    state: mx.array,
    fused: bool,
) -> tuple[mx.array, mx.array]:
    """Convolution and rule in fp32, (n, C, channels) and (n, C, H) twice to (n, C, H · V).

    What they keep for the backward pass is many times their input, so they are computed again.
    """

    def through(mixed: mx.array, tail: mx.array, *others: mx.array) -> tuple[mx.array, mx.array]:
        weight = net.conv1d.weight[..., 0].T
        mixed, tail, weight = (y.astype(mx.float32) for y in (mixed, tail, weight))
        mixed = _silu_of(fused)(gated_delta.causal_conv(mixed, weight, tail, rows))[0]
        return _rule(net, rows, mixed, *others)

    mixed, log_decay, beta = parts
    out, state = mx.checkpoint(through)(mixed, tail, log_decay, beta, state)
    return out.astype(mixed.dtype), state


def _rule(
    net: nn.Module,
    rows: Sequence[int],
    mixed: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    heads = (net.num_k_heads, net.num_v_heads // net.num_k_heads)
    q, k, v = mx.split(mixed, [net.key_dim, 2 * net.key_dim], axis=-1)
    q, k = (_normed(y.reshape(*y.shape[:2], heads[0], 1, -1)) for y in (q, k))
    q = q * net.head_k_dim**-0.5
    v, log_decay, beta = (y.reshape(*y.shape[:2], *heads, -1) for y in (v, log_decay, beta))
    q, k, v, log_decay, beta = (mx.moveaxis(y, 1, 3) for y in (q, k, v, log_decay, beta))
    inputs = q, k, v, log_decay[..., 0], beta[..., 0], state
    out, state = gated_delta.scan(*inputs, rows)
    return mx.moveaxis(out, 3, 1).reshape(*mixed.shape[:2], -1), state


@cache
def _silu_of(fused: bool) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """``x · σ(x)``, and σ(x), so that the gradient needs no other exponential."""

    @mx.custom_function
    def silu(x: mx.array) -> tuple[mx.array, mx.array]:
        s = sigmoid(x, fused=fused)
        return x * s, s

    @silu.vjp
    def gradient(
        _: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> mx.array:
        value, s = outputs
        return cotangents[0] * (s + value * (1 - s))

    return silu


def _normed(x: mx.array) -> mx.array:
    """To length 1 along the last axis."""
    size = x.shape[-1]
    return mx.fast.rms_norm(x, None, NORM_EPS / size) * size**-0.5


def token_numbers(text: Mapping[str, Any], chunk: int) -> tuple[float, float]:
    """How many numbers a block's linear attention holds for each token.

    Kept for the backward pass are, in the weights' dtype, the convolution's inputs, the gate, and
    the outputs as they are and normed. At work in the backward pass are, in fp32, twelve times the
    convolution's channels and each value head's scores in its chunk, and 2.5 times the states that
    chunks start from (fitted to peaks measured for 24 shapes: within 5 %).

    Args:
        text: the model's config.
        chunk: tokens.

    Returns:
        Kept, and at work.
    """
    heads, size = text["linear_num_value_heads"], text["linear_value_head_dim"]
    key_size = text["linear_key_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * key_size + heads * size
    kept = channels + 3 * heads * size
    at_work = 12 * (channels + heads * chunk) + 2.5 * heads * key_size * size / chunk
    return kept, at_work
