"""DoRA: LoRA with a learned magnitude for each row of the weights.

(Liu et al. 2024, arXiv:2402.09353.) Shapes as in `lora`. Nothing of the shape of W is computed: the
lengths of the rows of ``W + scale · (A B)ᵀ`` follow from those of W, from W A and from Aᵀ A.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner.engine import sums
from mlx_tuner.engine.lora import LoRALinear, dense_weight

_SMALLEST = 1e-30
"""A row of zeros has no direction; it stays one."""


class DoRALinear(LoRALinear):
    """``y = m / ‖V‖ · Vx + b`` with ``V = W + scale · (A B)ᵀ``, its rows' lengths ‖V‖ (O,).

    As in PEFT and mlx-lm, ‖V‖ counts as constant in the gradient, and m (O,) starts as ‖W‖, so
    that training starts from the base model.
    """

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, **settings: Any) -> None:
        super().__init__(linear, **settings)
        self._squares = _row_squares(dense_weight(linear).astype(mx.float32))
        self.m = mx.sqrt(self._squares)

    @property
    def kept_outputs(self) -> int:
        """Numbers of a token's output that are kept for the backward pass, for m's gradient."""
        return int(self.m.size)

    def neutral(self) -> dict[str, mx.array]:
        return {**super().neutral(), "m": mx.sqrt(self._squares)}

    def add(self, y: mx.array, z: mx.array) -> mx.array:
        """The layer's output from that of its base, (…, O), and ``A x``, (…, r)."""
        scaled = scale_columns(super().add(self._unbiased(y), z), self.m / self._lengths())
        return scaled + self.linear.bias if "bias" in self.linear else scaled

    def _unbiased(self, y: mx.array) -> mx.array:
        return y - self.linear.bias if "bias" in self.linear else y

    def _lengths(self) -> mx.array:
        """‖V‖ (O,) in fp32: ‖v‖² = ‖w‖² + 2 · scale · (W A) b + scale² · bᵀ (Aᵀ A) b."""
        a, b = mx.stop_gradient(self.lora_a), self.scale * mx.stop_gradient(self.lora_b)
        quantised = isinstance(self.linear, nn.QuantizedLinear)
        dtype = (self.linear.scales if quantised else self.linear.weight).dtype
        of_base = self._unbiased(self.linear(a.T.astype(dtype))).astype(mx.float32)
        cross, own = (of_base * b).sum(axis=0), (b * (a.T @ a @ b)).sum(axis=0)
        return mx.sqrt(mx.maximum(self._squares + 2 * cross + own, _SMALLEST))

    def fuse(self, dtype: mx.Dtype | None = None) -> nn.Linear:
        """A plain linear layer with ``m / ‖V‖ · V``, computed in fp32; see `LoRALinear.fuse`."""
        fused = super().fuse(mx.float32)
        kept = dtype or dense_weight(self.linear).dtype
        lengths = mx.sqrt(_row_squares(fused.weight))
        factors = self.m / mx.maximum(lengths, _SMALLEST)
        fused.weight = (factors[:, None] * fused.weight).astype(kept)
        if "bias" in self.linear:
            fused.bias = self.linear.bias.astype(dtype or self.linear.bias.dtype)
        return fused


def _row_squares(weight: mx.array) -> mx.array:
    """The squared length of each row of (O, I), as (O,)."""
    return sums.row_sums(mx.square(weight))[:, 0]


@mx.custom_function
def scale_columns(y: mx.array, factors: mx.array) -> mx.array:
    """(…, O) times (O,) in fp32, in the dtype of ``y``; the factors' gradient is summed in fp32."""
    return y * factors.astype(y.dtype)


@scale_columns.vjp
def _scale_columns_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    y, factors = primals
    rows, errors = (x.reshape(-1, x.shape[-1]).astype(mx.float32) for x in (y, cotangent))
    return cotangent * factors.astype(cotangent.dtype), sums.column_sums(rows * errors)
