"""Cross-entropy of a linear head that never holds all the logits.

Shapes: M targets, D hidden size, V vocabulary. The logits of one chunk of targets are made,
turned into the loss and its gradient with respect to the hidden states, and dropped, so memory
does not grow with M (the idea of Wijmans et al. 2024, arXiv:2411.09009, with the loop outside
the kernel).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner.engine.lanes import lanes

CHUNK_BYTES = 64 * 2**20
"""Bytes of fp32 logits in a chunk; a chunk has at least `MIN_CHUNK` targets."""

MIN_CHUNK = 32


def linear_cross_entropy(
    hidden: mx.array, head: nn.Module, targets: mx.array, weights: mx.array
) -> mx.array:
    """``Σᵢ weightsᵢ · (logsumexp(W hᵢ) − (W hᵢ)[targetsᵢ])``, differentiable in ``hidden`` alone.

    Args:
        hidden: (M, D), any float dtype.
        head: the output layer or the tied embedding, (V, D), plain or quantised, frozen.
        targets: (M,) token ids.
        weights: (M,) fp32; 0 leaves a target out.

    Returns:
        The sum, an fp32 scalar. Softmax and sums run in fp32 whatever the dtype of ``hidden``.
    """

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array) -> tuple[mx.array, mx.array]:
        losses: list[mx.array] = []
        gradients: list[mx.array] = []
        for start, chunk, lane in _chunks(hidden.shape[0], _vocabulary(head)):
            rows = slice(start, start + chunk)
            # A lane's next chunk waits for all of its last one; else all their logits are alive.
            h = hidden[rows]
            if len(gradients) >= len(lanes()):
                last = -len(lanes())
                (h,) = mx.depends([h], [gradients[last], losses[last]])
            loss, gradient = _chunk_loss(h, head, targets[rows], weights[rows], lane)
            losses.append(loss)
            gradients.append(gradient)
        return mx.stack(losses).sum(), mx.concatenate(gradients)

    @loss_and_gradient.vjp
    def loss_and_gradient_vjp(
        primals: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype)

    return loss_and_gradient(hidden)[0]


def _chunk_loss(
    hidden: mx.array, head: nn.Module, targets: mx.array, weights: mx.array, lane: mx.Stream
) -> tuple[mx.array, mx.array]:
    logits = _logits(head, hidden)
    with mx.stream(lane):
        loss, error = _softmax_loss(logits.astype(mx.float32), targets, weights)
        error = error.astype(hidden.dtype)
    return loss, weights[:, None].astype(hidden.dtype) * _times_weight(head, error)


def _softmax_loss(
    logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """The weighted loss of (n, V) logits, and softmax less one-hot (n, V), still unweighted."""
    p = mx.softmax(logits, axis=-1)
    # logsumexp(z) = z_j − log p_j for any j; the largest p_j loses nothing to rounding.
    best = mx.argmax(logits, axis=-1, keepdims=True)
    logsumexp = _pick(logits, best) - mx.log(_pick(p, best))
    targets = targets[:, None]
    loss = (weights * (logsumexp - _pick(logits, targets))).sum()
    # The one is subtracted before any rounding to 16 bits.
    error = mx.put_along_axis(p, targets, mx.take_along_axis(p, targets, -1) - 1, axis=-1)
    return loss, error


def _pick(values: mx.array, index: mx.array) -> mx.array:
    return mx.take_along_axis(values, index, axis=-1)[:, 0]


def _chunks(total: int, vocabulary: int) -> list[tuple[int, int, mx.Stream]]:
    """``(start, length, stream)`` of chunks of like length, over the lanes in turn."""
    streams = lanes()
    most = max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary) // len(streams))
    size = -(-total // -(-total // most))
    return [
        (start, min(size, total - start), streams[i % len(streams)])
        for i, start in enumerate(range(0, total, size))
    ]


def _vocabulary(head: nn.Module) -> int:
    return head.weight.shape[0]


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
