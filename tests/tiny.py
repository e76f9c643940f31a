"""Tiny random models of every family, random rows, and the plain way to compute their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example
from mlx_tuner.models.model import skeleton

VOCABULARY = 64

BASE = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": BASE,
    "qwen2 untied": {**BASE, "tie_word_embeddings": False},
    "qwen3": {**BASE, "model_type": "qwen3"},
    "qwen2_moe": {**BASE, **_EXPERTS, "model_type": "qwen2_moe"},
    "qwen3_moe": {**BASE, **_EXPERTS, "model_type": "qwen3_moe"},
    "qwen3_next": {**BASE, **_EXPERTS, **_LINEAR_ATTENTION, "model_type": "qwen3_next"},
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {**BASE, **_LINEAR_ATTENTION, "model_type": "qwen3_5_text"},
    },
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": {**BASE, **_EXPERTS, **_LINEAR_ATTENTION, "model_type": "qwen3_5_moe_text"},
    },
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
