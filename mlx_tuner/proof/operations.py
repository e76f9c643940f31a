"""Single operations of a training step, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_tuner.engine.gather import Gather
from mlx_tuner.engine.loss import linear_cross_entropy
from mlx_tuner.engine.swiglu import swiglu
from mlx_tuner.proof.sides import DTYPES, TRUTH, Outcome, Side

LENGTHS = (1, 8, 9, 33)
"""Tokens of rows after their shared prefix: around the tiles of attention's kernels."""
PREFIX = 10


def check_swiglu(side: Side) -> Outcome:
    """The MLP's gate and its gradient, against float64."""
    inputs = [_noise(97, 129, seed=i) for i in range(3)]

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        gate, up, cotangent = (mx.array(x).astype(dtype) for x in inputs)
        function = partial(swiglu, fused=side.backend.fused)
        values, gradients = mx.vjp(function, [gate, up], [cotangent])
        return [*values, *gradients]

    def truth(gate: np.ndarray, up: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
        sigmoid = 1 / (1 + np.exp(-gate))
        silu = gate * sigmoid
        return [silu * up, cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu]

    return _operation(side, compute, truth, inputs, {"fp32": 2e-6, "bf16": 4e-3})


def check_loss(side: Side) -> Outcome:
    """Cross-entropy over 151,936 tokens and its gradient, in chunks, against float64."""
    hidden, weight = _noise(9, 32, seed=0), _noise(151_936, 32, seed=1)
    targets = np.arange(9) * 16_881

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        head = nn.Linear(32, len(weight), bias=False)
        head.weight = mx.array(weight).astype(dtype)
        loss = partial(
            linear_cross_entropy,
            head=head,
            targets=mx.array(targets),
            weights=mx.ones(9),
            backend=side.backend,
        )
        return list(mx.value_and_grad(lambda x: loss(x))(mx.array(hidden).astype(dtype)))

    def truth(hidden: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
        logits = hidden @ weight.T
        logsumexp = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        error = np.exp(logits - logsumexp[:, None])
        error[np.arange(9), targets] -= 1
        return [(logsumexp - logits[np.arange(9), targets]).sum(), error @ weight]

    return _operation(side, compute, truth, [hidden, weight], {"fp32": 2e-6, "bf16": 2e-2})


def check_gathers(side: Side) -> Outcome:
    """Moving tokens to slots and back, forward and backward: bit for bit."""
    there = np.array([2, 0, 1, 5, 4])
    back = np.array([1, 2, 0, 5, 4, 3])
    x, cotangent = _noise(6, 64, seed=0), _noise(5, 64, seed=1)
    with side.here():
        gather = Gather(mx.array(there), mx.array(back))
        (value,), (gradient,) = mx.vjp(gather, [mx.array(x)], [mx.array(cotangent)])
        found = np.array(value), np.array(gradient)
    expected = np.zeros_like(x)
    expected[there] = cotangent
    ok = np.array_equal(found[0], x[there]) and np.array_equal(found[1], expected)
    return ok, "bit for bit" if ok else "differs"


def check_attention(side: Side, head_size: int) -> Outcome:
    """Attention after a shared prefix and its gradient, for rows of every length of `LENGTHS`."""
    worst = {"fp32": 0.0, "bf16": 0.0}
    ok = True
    for length in LENGTHS:
        shapes = [(4, length), (2, PREFIX + length), (2, PREFIX + length), (4, length)]
        inputs = [_noise(2, *shape, head_size, seed=i) for i, shape in enumerate(shapes)]

        def compute(dtype: mx.Dtype, inputs: list[np.ndarray] = inputs) -> list[mx.array]:
            *qkv, cotangent = (mx.array(x).astype(dtype) for x in inputs)
            attend = partial(
                mx.fast.scaled_dot_product_attention, scale=head_size**-0.5, mask="causal"
            )
            values, gradients = mx.vjp(lambda q, k, v: attend(q, k, v), qkv, [cotangent])
            return [*values, *gradients]

        fine, errors = _errors(side, compute, _attention, inputs, {"fp32": 1e-5, "bf16": 2e-2})
        ok = ok and fine
        worst = {name: max(worst[name], error) for name, error in errors.items()}
    return ok, _told(worst)


def _attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cotangent: np.ndarray
) -> list[np.ndarray]:
    """Causal attention (R, heads, T, size) and its gradients by their formulas, in float64."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, groups, axis=1) for x in (k, v))
    scale, (length, keys) = q.shape[-1] ** -0.5, (q.shape[2], k.shape[2])
    scores = scale * q @ wide_k.swapaxes(2, 3)
    seen = np.tril(np.ones((length, keys), bool), keys - length)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    p = exponentials / exponentials.sum(-1, keepdims=True)
    of_p = cotangent @ wide_v.swapaxes(2, 3)
    of_scores = scale * p * (of_p - (of_p * p).sum(-1, keepdims=True))

    def by_kv_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2)

    return [
        p @ wide_v,
        of_scores @ wide_k,
        by_kv_head(of_scores.swapaxes(2, 3) @ q),
        by_kv_head(p.swapaxes(2, 3) @ cotangent),
    ]


def check_products(side: Side) -> Outcome:
    """Plain products, against float64; whether fp32 ones are rounded to TF32 is said."""
    inputs = [_noise(256, 320, seed=0), _noise(320, 256, seed=1)]

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        a, b = (mx.array(x).astype(dtype) for x in inputs)
        return [a @ b]

    bounds = {"fp32": 2e-3, "bf16": 4e-3}
    ok, errors = _errors(side, compute, lambda a, b: [a @ b], inputs, bounds)
    tf32 = "on: fp32 keeps 10 bits; off by MLX_ENABLE_TF32=0" if errors["fp32"] > 1e-5 else "off"
    return ok, f"{_told(errors)}; TF32 {tf32}"


def check_quantised_products(side: Side) -> Outcome:
    """Products with 4-bit weights, against the weights that they stand for."""
    x, weight = _noise(70, 128, seed=0), _noise(192, 128, seed=1)
    with TRUTH.here():
        packed = mx.quantize(mx.array(weight), bits=4)
        dense = np.array(mx.dequantize(*packed, bits=4)).astype(np.float64)

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        weights, *rest = packed
        options = [part.astype(dtype) for part in rest]
        return [mx.quantized_matmul(mx.array(x).astype(dtype), weights, *options, bits=4)]

    bounds = {"fp32": 2e-3, "bf16": 2e-2}
    return _operation(side, compute, lambda x: [x @ dense.T], [x], bounds)


def _operation(
    side: Side,
    compute: Callable[[mx.Dtype], list[mx.array]],
    truth: Callable[..., Sequence[np.ndarray]],
    inputs: Sequence[np.ndarray],
    bounds: dict[str, float],
) -> Outcome:
    ok, errors = _errors(side, compute, truth, inputs, bounds)
    return ok, _told(errors)


def _errors(
    side: Side,
    compute: Callable[[mx.Dtype], list[mx.array]],
    truth: Callable[..., Sequence[np.ndarray]],
    inputs: Sequence[np.ndarray],
    bounds: dict[str, float],
) -> tuple[bool, dict[str, float]]:
    """Relative errors in L2 norm by dtype, the largest of all results, and whether they are small.

    Args:
        truth: of the inputs, which are rounded to bf16 already, in float64.
    """
    wanted = truth(*(x.astype(np.float64) for x in inputs))
    errors = {}
    for name in bounds:
        with side.here():
            found = [np.array(x.astype(mx.float32)) for x in compute(DTYPES[name])]
        errors[name] = max(map(relative, found, wanted))
    return all(errors[name] <= bound for name, bound in bounds.items()), errors


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """The error in L2 norm, over the norm."""
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) + 1e-30))


def _told(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _noise(*shape: int, seed: int) -> np.ndarray:
    """Numbers that bf16 has exactly, so that both dtypes start from the same ones."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (drawn.view(np.uint32) & 0xFFFF0000).view(np.float32)
