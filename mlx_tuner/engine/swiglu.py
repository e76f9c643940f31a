"""The gate of an MLP, with a gradient that keeps nothing but its inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_tuner.engine import fusion


def swiglu(gate: mx.array, up: mx.array, *, fused: bool = False) -> mx.array:
    """``gate · σ(gate) · up`` (Shazeer 2020, arXiv:2002.05202), computed in fp32.

    Args:
        gate, up: (N, F), any float dtype.
        fused: one kernel forward and one backward, which computes the sigmoid again. Else fp32
            keeps it for the gradient: on the CPU backend an exponential costs twenty
            multiplications.
    """
    return _swiglu_of(fused)(gate, up)[0]


@cache
def _swiglu_of(fused: bool) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    of = fusion.fused if fused else _as_it_is
    forward, backward = of(_forward), of(_backward)

    @mx.custom_function
    def both(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
        if fused or gate.dtype != mx.float32:
            return forward(gate, up), mx.zeros(())
        sigmoid = mx.sigmoid(gate)
        return gate * sigmoid * up, sigmoid

    @both.vjp
    def both_vjp(
        primals: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array],
        outputs: tuple[mx.array, mx.array],
    ) -> tuple[mx.array, mx.array]:
        gate, up = primals
        if outputs[1].ndim:
            return _gradients(gate, up, cotangents[0], outputs[1])
        # The backward pass has no part in common with the forward pass that a compiler, or an
        # early evaluation, could keep in memory between them.
        gate, up = mx.depends([gate, up], [cotangents[0]])
        return backward(gate, up, cotangents[0])

    return both


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _forward(gate: mx.array, up: mx.array) -> mx.array:
    wide = gate.astype(mx.float32)
    return (wide * mx.sigmoid(wide) * up).astype(gate.dtype)


def _backward(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    wide, wide_up, wide_cotangent = (x.astype(mx.float32) for x in (gate, up, cotangent))
    of_gate, of_up = _gradients(wide, wide_up, wide_cotangent, mx.sigmoid(wide))
    of_gate, of_up = of_gate.astype(gate.dtype), of_up.astype(gate.dtype)
    # A compiled kernel gives out what its last operation reads. So with a last one that reads
    # both gradients (and picks that of the gate, which is no number where the gate is none) there
    # is one kernel for both; without it there are three, and the sigmoid goes through memory.
    return mx.where(wide == wide, of_gate, of_up), of_up


def _gradients(
    gate: mx.array, up: mx.array, cotangent: mx.array, sigmoid: mx.array
) -> tuple[mx.array, mx.array]:
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu
