"""How much memory a training step takes, estimated from shapes before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHUNK_BYTES = 64 * 2**20

SMALLEST, LARGEST = 512, 16_384
"""Bounds of an automatic ``micro_batch_tokens``: fewer starve the GPU, more gain nothing."""

HEADROOM = 0.85
"""Part of the budget that an estimate may fill; the rest is for what it leaves out."""


def activation_bytes(
    config: Mapping[str, Any], itemsize: int, *, row_tokens: int, checkpointing: bool
) -> int:
    """Bytes that one flat token keeps for the backward pass, in all blocks together.

    A block keeps its input and the normed inputs of attention and MLP, queries, keys and values
    flat, in slots and rotated, attention's probabilities over ``row_tokens`` keys, and both
    branches of the MLP, in fp32 also the gate's sigmoid (`forward.swiglu`). With checkpointing it
    keeps its input alone, and one block at a time is whole.
    """
    text = config.get("text_config", config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    size = text.get("head_dim") or hidden // heads
    keys_values = 2 * text.get("num_key_value_heads", heads) * size
    inner = text.get("intermediate_size", 0)
    if experts := text.get("num_experts_per_tok"):
        inner = experts * text["moe_intermediate_size"]
        inner += text.get("shared_expert_intermediate_size", 0)
    attention = 4 * (heads * size + keys_values) + heads * row_tokens
    block = 6 * hidden + attention + (3 if itemsize == 4 else 2) * inner
    blocks = text["num_hidden_layers"]
    kept = blocks * hidden + block if checkpointing else blocks * block
    return itemsize * kept


def step_bytes(
    weights: int, trainable_parameters: int, micro_batch_tokens: int, token_bytes: int
) -> int:
    """Peak bytes of a step: weights, the adapter with gradient and moments, activations, logits.

    Args:
        weights: bytes of the frozen weights.
        micro_batch_tokens: flat tokens of the largest micro-batch.
        token_bytes: `activation_bytes` of a token.
    """
    adapter = 4 * 6 * trainable_parameters  # parameters, gradient, moments; old and new at once
    return weights + adapter + micro_batch_tokens * token_bytes + 5 * CHUNK_BYTES


def auto_micro_batch_tokens(
    budget: int, weights: int, trainable_parameters: int, token_bytes: int
) -> int:
    """The most flat tokens that fit into ``budget`` bytes, within `SMALLEST` and `LARGEST`."""
    room = HEADROOM * budget - step_bytes(weights, trainable_parameters, 0, token_bytes)
    return int(min(LARGEST, max(SMALLEST, room // token_bytes)))
