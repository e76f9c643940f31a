"""Cross-entropy of a linear head that never holds all the logits.

Shapes: M targets, D hidden size, V vocabulary. The logits of one chunk of targets are made,
turned into the loss and its gradient with respect to the hidden states, and dropped, so memory
does not grow with M (the idea of Wijmans et al. 2024, arXiv:2411.09009, with the loop outside
the kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner.engine import fusion, sums
from mlx_tuner.engine.backend import CPU, Backend
from mlx_tuner.engine.exponential import exp

MIN_CHUNK = 32
"""Targets."""


def linear_cross_entropy(
    hidden: mx.array,
    head: nn.Module,
    targets: mx.array,
    weights: mx.array,
    *,
    backend: Backend = CPU,
) -> mx.array:
    """``Σᵢ weightsᵢ · (logsumexp(W hᵢ) − (W hᵢ)[targetsᵢ])``, differentiable in ``hidden`` alone.

    Args:
        hidden: (M, D), any float dtype.
        head: the output layer or the tied embedding, (V, D), plain or quantised, frozen.
        targets: (M,) token ids.
        weights: (M,) fp32; 0 leaves a target out.
        backend: how large a chunk is.

    Returns:
        The sum, an fp32 scalar. Softmax and sums run in fp32 whatever the dtype of ``hidden``.
    """

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array) -> tuple[mx.array, mx.array]:
        parts = _in_chunks(hidden, head, targets, weights, backend, with_gradient=True)
        losses, gradients = zip(*parts, strict=True)
        return mx.stack(losses).sum(), mx.concatenate(gradients)

    @loss_and_gradient.vjp
    def loss_and_gradient_vjp(
        primals: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype)

    return loss_and_gradient(hidden)[0]


def linear_cross_entropy_value(
    hidden: mx.array,
    head: nn.Module,
    targets: mx.array,
    weights: mx.array,
    *,
    backend: Backend = CPU,
) -> mx.array:
    """`linear_cross_entropy` without a gradient, which takes a third of its products."""
    parts = _in_chunks(hidden, head, targets, weights, backend, with_gradient=False)
    return mx.stack([loss for loss, *_ in parts]).sum()


def _in_chunks(
    hidden: mx.array,
    head: nn.Module,
    targets: mx.array,
    weights: mx.array,
    backend: Backend,
    *,
    with_gradient: bool,
) -> list[list[mx.array]]:
    """Of each chunk the weighted loss and, if asked for, its gradient (n, D)."""
    parts: list[list[mx.array]] = []
    for rows in _chunks(hidden.shape[0], head.weight.shape[0], backend):
        h = hidden[rows]
        if parts:
            # Wait for the previous chunk, so that only one chunk of logits exists at a time.
            (h,) = mx.depends([h], parts[-1])
        loss, *error = _softmax_loss(
            _logits(head, h), targets[rows], weights[rows], backend.fused, with_gradient
        )
        of_rows = weights[rows, None].astype(h.dtype)
        parts.append([loss, *(of_rows * _times_weight(head, e.astype(h.dtype)) for e in error)])
    return parts


def _softmax_loss(
    logits: mx.array, targets: mx.array, weights: mx.array, fused: bool, with_gradient: bool
) -> list[mx.array]:
    """The weighted loss of (n, V) logits; then softmax less one-hot (n, V), still unweighted."""
    # z − max is exact where it matters, so that a target of any probability has its exact loss.
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = _exponentials(fused)(logits, largest)
    total = sums.row_sums(exponentials)
    targets = targets[:, None]
    shifted = mx.take_along_axis(logits, targets, axis=-1).astype(mx.float32) - largest
    loss = sums.total(weights * (mx.log(total) - shifted)[:, 0])
    if not with_gradient:
        return [loss]
    p = exponentials / total
    # The one is subtracted before any rounding to 16 bits.
    return [loss, mx.put_along_axis(p, targets, mx.take_along_axis(p, targets, -1) - 1, axis=-1)]


@cache
def _exponentials(fused: bool) -> Callable[[mx.array, mx.array], mx.array]:
    """``exp(z − max)`` in fp32."""

    def exponentials(logits: mx.array, largest: mx.array) -> mx.array:
        return exp(logits.astype(mx.float32) - largest.astype(mx.float32), fused=fused)

    return fusion.fused(exponentials) if fused else exponentials


def _chunks(total: int, vocabulary: int, backend: Backend) -> list[slice]:
    """Chunks of like length in whole tiles."""
    most = max(MIN_CHUNK, backend.chunk_bytes // (4 * vocabulary))
    most = max(1, most // backend.tile) * backend.tile
    size = backend.rounded_up(-(-total // -(-total // most)))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits(head: nn.Module, hidden: mx.array) -> mx.array:
    """(n, D) to (n, V)."""
    return head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)


def _times_weight(head: nn.Module, error: mx.array) -> mx.array:
    """(n, V) to (n, D): the product with the head's weights, never dequantised whole."""
    if "scales" not in head:
        return error @ head.weight
    return mx.quantized_matmul(
        error,
        head.weight,
        scales=head.scales,
        biases=head.get("biases"),
        transpose=False,
        group_size=head.group_size,
        bits=head.bits,
        mode=head.mode,
    )
