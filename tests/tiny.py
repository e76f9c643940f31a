"""Tiny random models of every family, random rows, and the plain way to compute their loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map_with_path, tree_unflatten

from mlx_tuner.bench.model import FAMILIES as ALL_FAMILIES
from mlx_tuner.bench.model import tiny_config
from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example
from mlx_tuner.models.architecture import skeleton
from mlx_tuner.proof.sides import TRUTH

BASE = tiny_config("qwen2")
VOCABULARY = BASE["vocab_size"]
FAMILIES = {family: tiny_config(family) for family in ALL_FAMILIES} | {
    "qwen2 untied": tiny_config("qwen2", tie_word_embeddings=False)
}


def tiny_model(
    config: Mapping[str, Any] = BASE, *, dropout: float = 0.0, strength: float = 0.1
) -> nn.Module:
    """A model with random weights and an adapter on all its linear layers that is not zero."""
    mx.random.seed(0)
    model = skeleton(dict(config))
    mx.eval(model.parameters())
    lora.attach(model, rank=4, scale=2.0, dropout=dropout, target_modules="all-linear")
    factors = lora.trainable(model)
    set_adapter(model, {name: strength * mx.random.normal(v.shape) for name, v in factors.items()})
    mx.eval(model.parameters())
    return model


def set_adapter(model: nn.Module, factors: Mapping[str, mx.array]) -> None:
    model.update(tree_unflatten(list(factors.items())))


def random_rows(
    lengths: Sequence[int], *, prefix: int = 0, seed: int = 0, mask_prompt: bool = True
) -> list[Example]:
    """Rows that share ``prefix`` tokens, then have ``lengths`` of their own, each with a target."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCABULARY, prefix)
    rows = []
    for length in lengths:
        own = rng.integers(0, VOCABULARY, length)
        tokens = np.concatenate([shared, own]).astype(np.int32)
        mask = np.zeros(len(tokens), bool)
        if mask_prompt:
            mask[rng.integers(max(prefix, 1), len(tokens)) :] = True
        else:
            mask[1:] = True
        rows.append(Example(tokens, mask))
    return rows


def plain_loss(model: nn.Module, rows: Sequence[Example]) -> tuple[float, dict[str, mx.array]]:
    """Summed loss and its gradient, one row at a time through mlx-lm's own modules in float64.

    Both are rounded to fp32 at the end alone, so that they are the truth and no peer's rounding.
    """

    def loss(factors: dict[str, mx.array]) -> mx.array:
        set_adapter(model, factors)
        total = mx.zeros((), mx.float64)
        for row in rows:
            logits = model(mx.array(row.tokens)[None, :-1])[0]
            targets, mask = mx.array(row.tokens[1:]), mx.array(row.loss_mask[1:])
            total = total + (nn.losses.cross_entropy(logits, targets) * mask).sum()
        return total

    as_it_was = model.parameters()
    with _in_float64():
        model.update(tree_map_with_path(_widened, as_it_was))
        value, gradient = mx.value_and_grad(loss)(lora.trainable(model))
        mx.eval(value, gradient)
        assert all(part.dtype == value.dtype == mx.float64 for part in gradient.values())
    model.update(as_it_was)
    return value.item(), {name: mx.array(np.array(g, np.float32)) for name, g in gradient.items()}


def _widened(path: str, x: mx.array) -> mx.array:
    """Quantised weights stay as they are."""
    quantised = path.endswith((".scales", ".biases")) or not mx.issubdtype(x.dtype, mx.floating)
    return x if quantised else x.astype(mx.float64)


@contextmanager
def _in_float64() -> Iterator[None]:
    """mlx-lm's modules compute in float64, which MLX has on the CPU, where they ask for fp32."""

    def gather_mm(x: mx.array, weights: mx.array, *, rhs_indices: mx.array, **_: Any) -> mx.array:
        return x @ weights[rhs_indices]

    def quantized_matmul(x: mx.array, weight: mx.array, *, transpose: bool, **how: Any) -> mx.array:
        weight = mx.dequantize(weight, **how).astype(mx.float64)
        return x @ (weight.T if transpose else weight)

    def depthwise(conv: nn.Conv1d, x: mx.array) -> mx.array:
        weight = conv.weight[..., 0].T
        length = x.shape[1] - len(weight) + 1
        return sum(w * x[:, i : i + length] for i, w in enumerate(weight))

    with pytest.MonkeyPatch.context() as patch, TRUTH.here():
        patch.setattr(mx, "float32", mx.float64)
        patch.setattr(mx, "gather_mm", gather_mm)  # these MLX lacks
        patch.setattr(mx, "quantized_matmul", quantized_matmul)
        patch.setattr(nn.Conv1d, "__call__", depthwise)
        mx.disable_compile()  # which takes longer
        try:
            yield
        finally:
            mx.enable_compile()


def relative_error(ours: Mapping[str, mx.array], truth: Mapping[str, mx.array]) -> float:
    """The largest relative error of any of the arrays, in L2 norm."""
    assert ours.keys() == truth.keys()
    return max(
        (mx.linalg.norm(ours[name] - truth[name]) / (mx.linalg.norm(truth[name]) + 1e-12)).item()
        for name in truth
    )
