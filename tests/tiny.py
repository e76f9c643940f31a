"""Tiny random models of every family, random rows, and the plain way to compute their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_tuner.bench.model import FAMILIES as ALL_FAMILIES
from mlx_tuner.bench.model import tiny_config
from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example
from mlx_tuner.models.architecture import skeleton

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


def plain_loss(
    model: nn.Module, rows: Sequence[Example], dtype: mx.Dtype = mx.float32
) -> tuple[float, dict[str, mx.array]]:
    """Summed loss and its gradient, one row at a time through mlx-lm's own forward pass."""

    def loss(factors: dict[str, mx.array]) -> mx.array:
        set_adapter(model, factors)
        total = mx.zeros(())
        for row in rows:
            logits = model(mx.array(row.tokens)[None, :-1])[0].astype(dtype)
            targets, mask = mx.array(row.tokens[1:]), mx.array(row.loss_mask[1:])
            total = total + (nn.losses.cross_entropy(logits, targets) * mask).sum()
        return total

    factors = lora.trainable(model)
    value, gradient = mx.value_and_grad(loss)(factors)
    set_adapter(model, factors)
    mx.eval(value, gradient)
    return value.item(), gradient


def relative_error(ours: Mapping[str, mx.array], truth: Mapping[str, mx.array]) -> float:
    """The largest relative error of any of the arrays, in L2 norm."""
    assert ours.keys() == truth.keys()
    return max(
        (mx.linalg.norm(ours[name] - truth[name]) / (mx.linalg.norm(truth[name]) + 1e-12)).item()
        for name in truth
    )
