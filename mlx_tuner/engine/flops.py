"""FLOPs of a training step, counted from its shapes.

A product (n, a) x (a, b) is 2·n·a·b FLOP, a multiplication and an addition each. Element-wise
work is not counted. D hidden size, F intermediate size, V vocabulary, h heads of size s,
H = h·s and K = kv heads·s; N flat tokens, M targets, r rank. A block's products are

    forward     q 2NDH, k and v 2NDK each; scores and values 2·h·s·T·(P+T) each for a row of T
                tokens after P shared ones (the whole rectangle: no kernel with a gradient skips
                the upper triangle); o 2nHD; gate, up and down 2nDF each, where n = N, but n = M
                in the last block, whose outputs are needed at targets only
    backward    the same again for each input's gradient, that is once for a linear and twice for
                each of attention's two products; no gradient of frozen weights; nothing where the
                input depends on no adapter, as in blocks below the first adapted one
    adapter     forward 2nr(in + out); backward 4nr·out (dB, dz) + 2nr·in (dA) + 2nr·in (dx)
    recomputed  with gradient checkpointing: the forward again but for the down projection

and the head 2MDV forward, 2MDV backward. A prefix that several micro-batches attend to is run
once more beforehand, forward, without what its keys and values do not need.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_tuner.engine.batching import MicroBatch, Step

DENSE_FAMILIES = frozenset({"qwen2", "qwen3"})
"""mlx-lm's model types that these formulas hold for."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelDims:
    """A dense model's sizes."""

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelDims:
        """From a Hugging Face ``config.json`` of one of the `DENSE_FAMILIES`."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
        )

    def linear(self, name: str) -> tuple[int, int]:
        """``(inputs, outputs)`` of a block's linear layer."""
        width, kv_width = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, width),
            "k_proj": (self.hidden, kv_width),
            "v_proj": (self.hidden, kv_width),
            "o_proj": (width, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[name]


@dataclass(frozen=True)
class Adapters:
    """Which linear layers have adapters, and of what rank."""

    rank: int
    target_modules: Collection[str]
    """Names out of `LINEARS`."""
    num_layers: int
    """How many blocks, counted from the last."""


def step_flops(
    shape: ModelDims, step: Step, adapters: Adapters, *, checkpointing: bool = False
) -> int:
    """FLOP of one optimizer step, forward and backward, as the module's docstring counts them."""
    total = _prefix_states(shape, len(step.prefix), adapters)
    for batch in step.micro_batches:
        total += _micro_batch(shape, batch, adapters, checkpointing)
    return total


def _micro_batch(
    shape: ModelDims, batch: MicroBatch, adapters: Adapters, checkpointing: bool
) -> int:
    tokens, targets = len(batch.tokens), len(batch.sources)
    # Two products of so many FLOP each, forward: scores and values.
    prefix = batch.prefix + batch.past
    score = 2 * shape.heads * shape.head_size
    inside = score * batch.prefix**2
    groups = score * sum(rows * longest * (prefix + longest) for rows, longest in batch.groups)

    total = 2 * 2 * targets * shape.hidden * shape.vocabulary
    # Whether a gradient is needed of the block's input, …
    needs_input = False
    # … and of the keys and values that were computed elsewhere.
    needs_past = bool(batch.past)
    for block in range(shape.layers):
        adapted = _adapted(shape, adapters, block)
        ends = targets if block == shape.layers - 1 else tokens
        needs_qkv = {n: needs_input or n in adapted for n in ("q_proj", "k_proj", "v_proj")}
        total += _attention(needs_qkv, inside, forward=2)
        if needs_past:
            needs_qkv |= {"k_proj": True, "v_proj": True}
        total += _attention(needs_qkv, groups, forward=2)
        needs_attended = any(needs_qkv.values())
        needs_middle = needs_input or needs_attended or "o_proj" in adapted
        needs_gated = needs_middle or bool(adapted & {"gate_proj", "up_proj"})
        needs = {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), needs_input),
            "o_proj": needs_attended,
            **dict.fromkeys(("gate_proj", "up_proj"), needs_middle),
            "down_proj": needs_gated,
        }
        for name in LINEARS:
            rows = tokens if name in ("q_proj", "k_proj", "v_proj") else ends
            rank = adapters.rank if name in adapted else 0
            total += _linear(shape, name, rows, rank, needs[name])
        needs_output = needs_gated or "down_proj" in adapted
        if checkpointing and needs_output:
            total += _recomputed(shape, tokens, ends, adapted, adapters.rank, inside + groups)
        needs_input = needs_output
    return total


def _linear(shape: ModelDims, name: str, rows: int, rank: int, needs_input: bool) -> int:
    """Forward and backward of a linear layer and its adapter (rank 0: none)."""
    inputs, outputs = shape.linear(name)
    frozen = 2 * rows * inputs * outputs * (1 + needs_input)
    return frozen + 2 * rows * rank * (inputs * (2 + needs_input) + outputs * 3)


def _attention(needs: Mapping[str, bool], product: int, *, forward: int) -> int:
    """``forward`` products, and of the backward pass those whose result is needed.

    dV = PᵀdO; dP = dO Vᵀ, then dQ = dS K and dK = dSᵀQ.
    """
    queries, keys, values = needs["q_proj"], needs["k_proj"], needs["v_proj"]
    return product * (forward + values + (queries or keys) + queries + keys)


def _recomputed(
    shape: ModelDims, tokens: int, ends: int, adapted: Collection[str], rank: int, product: int
) -> int:
    """A checkpointed block's second forward pass: all but the block's last product."""
    total = 2 * product
    for name in LINEARS:
        rows = tokens if name in ("q_proj", "k_proj", "v_proj") else ends
        inputs, outputs = shape.linear(name)
        outputs = 0 if name == "down_proj" else outputs
        total += 2 * rows * inputs * outputs
        total += 2 * rows * rank * (inputs + outputs) * (name in adapted)
    return total


def _prefix_states(shape: ModelDims, tokens: int, adapters: Adapters) -> int:
    """Forward of a prefix for its keys and values: of the last block only those two."""
    total = 0
    for block in range(shape.layers):
        last = block == shape.layers - 1
        adapted = _adapted(shape, adapters, block)
        for name in ("k_proj", "v_proj") if last else LINEARS:
            inputs, outputs = shape.linear(name)
            total += 2 * tokens * inputs * outputs
            total += 2 * tokens * adapters.rank * (inputs + outputs) * (name in adapted)
        if not last:
            total += 2 * 2 * shape.heads * shape.head_size * tokens**2
        elif "q_proj" in adapted and adapted & {"k_proj", "v_proj"}:
            # The A matrices share one product, that of the queries with them.
            total += 2 * tokens * adapters.rank * shape.hidden
    return total


def _adapted(shape: ModelDims, adapters: Adapters, block: int) -> set[str]:
    """Names of the block's adapted linears."""
    first = shape.layers - adapters.num_layers
    return set(adapters.target_modules) if block >= first else set()
