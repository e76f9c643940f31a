"""The gate of an MLP, with a gradient that keeps nothing but its inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx

from mlx_tuner.engine import fusion
from mlx_tuner.engine.exponential import sigmoid


def swiglu(gate: mx.array, up: mx.array, *, fused: bool = False) -> mx.array:
    """``gate · σ(gate) · up`` (Shazeer 2020, arXiv:2002.05202), computed in fp32.

    Args:
        gate, up: (N, F), any float dtype.
        fused: one kernel forward and one backward.
    """
    return _swiglu_of(fused)(gate, up)


@cache
def _swiglu_of(fused: bool) -> Callable[[mx.array, mx.array], mx.array]:
    of: Callable[[Any], Any] = fusion.fused if fused else lambda function: function
    forward, backward = of(partial(_forward, fused)), of(partial(_backward, fused))

    @mx.custom_function
    def gated(gate: mx.array, up: mx.array) -> mx.array:
        result: mx.array = forward(gate, up)
        return result

    @gated.vjp
    def gated_vjp(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        # The backward pass has no part in common with the forward pass that a compiler, or an
        # early evaluation, could keep in memory between them.
        gate, up = mx.depends(list(primals), [cotangent])
        return backward(gate, up, cotangent)

    return gated


def _forward(fused: bool, gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * sigmoid(wide, fused=fused) * up).astype(gate.dtype)


def _backward(
    fused: bool, gate: mx.array, up: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    wide, wide_up, wide_cotangent = (x.astype(mx.float32) for x in (gate, up, cotangent))
    s = sigmoid(wide, fused=fused)
    of_gate = (wide_cotangent * wide_up * s * (1 + wide * (1 - s))).astype(gate.dtype)
    of_up = (wide_cotangent * (s * wide)).astype(gate.dtype)
    if fused:
        # A compiled kernel gives out what its last operation reads. So with a last one that reads
        # both gradients (and picks that of the gate, which is no number where the gate is none)
        # there is one kernel for both; without it there are three, and the sigmoid goes through
        # memory.
        of_gate = mx.where(wide == wide, of_gate, of_up)
    return of_gate, of_up
