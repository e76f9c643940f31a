"""How much memory a training step takes, from shapes alone, before anything is loaded.

Of a block a micro-batch keeps until its backward pass, for N tokens, S slots and A attention scores
a head (`batching.Sizes`), with D hidden size, H and K the widths of all heads' queries and keys, h
heads, F intermediate size, in the dtype of the weights:

    N · D       the input, and the one after attention
    N · D       the normed input, where its adapters read it; the same before the MLP
    S · (H+2K)  queries, keys and values in slots, rotated
    S · H       attention's outputs, where its backward pass is fused; N · H where o_proj reads them
    A · h       attention's probabilities, where it is not
    N · 2F      both branches of the MLP; N · F more where down_proj reads their product

Linear attention keeps what `linear_attention.token_numbers` says. With checkpointing a micro-batch
keeps N · D a block, and one block at a time is whole. On top comes what the head holds of a chunk
of logits. The factors are fitted to measured peaks; a run's rehearsal holds the estimate to its
own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_tuner.engine.backend import CPU, Backend
from mlx_tuner.engine.batching import SLOTS_PER_TOKEN, Sizes
from mlx_tuner.engine.linear_attention import token_numbers

SMALLEST, LARGEST = 512, 16_384
"""Bounds of an automatic ``micro_batch_tokens``: fewer starve the GPU, more gain nothing."""

HEADROOM = 0.85
"""Part of the budget that an estimate may fill; the rest is for what it leaves out."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step, as a function of the sizes of its largest micro-batch."""

    weights: int
    adapter: int
    """Its gradient and moments."""
    token: float
    """What a block keeps per flat token."""
    slot: float
    """What it keeps per slot."""
    score: float
    """What it keeps per attention score."""
    kept: float
    """Blocks whose activations are kept."""
    work: float
    """Blocks' worth of activations that the backward pass of a recomputed block works with."""
    recurrence: float
    """What the backward pass of one block's linear attention works with, per token."""
    carried: float
    """What recomputed blocks keep, per token."""
    target: float
    """The logits of one target, and what is made of them."""
    chunk: int
    """The same of a chunk, at most."""
    keys_per_token: int | None = None
    """`Backend.keys_per_token`."""

    def peak(self, sizes: Sizes) -> int:
        """Bytes of a step whose largest micro-batch has these sizes."""
        return sum(self.parts(sizes).values())

    def parts(self, sizes: Sizes) -> dict[str, int]:
        """The same by what the bytes are for."""
        block = self.token * sizes.tokens + self.slot * sizes.slots + self.score * sizes.scores
        head = min(self.target * sizes.targets, self.chunk)
        kept = self.carried * sizes.tokens + self.kept * block
        work = self.recurrence * sizes.tokens + self.work * block
        return {
            "weights": self.weights,
            "adapter and moments": self.adapter,
            "activations": int(kept + max(work - head, 0)),
            "logits": int(head),
        }

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the micro-batch."""
        return self.weights + self.adapter

    def most(self, micro_batch_tokens: int, longest_row: int) -> Sizes:
        """The largest sizes of a micro-batch, for rows of at most ``longest_row`` tokens."""
        tokens = max(micro_batch_tokens, longest_row)
        slots = max(int(SLOTS_PER_TOKEN * micro_batch_tokens), longest_row)
        scores = slots * longest_row
        if self.keys_per_token:
            scores = min(scores, max(self.keys_per_token * micro_batch_tokens, longest_row**2))
        return Sizes(tokens, slots, scores, tokens)

    def micro_batch_tokens(self, budget: int, longest_row: int) -> int:
        """The most flat tokens that fit into ``budget`` bytes, within `SMALLEST` and `LARGEST`."""
        return max(
            SMALLEST,
            _last(LARGEST, lambda n: self.peak(self.most(n, longest_row)) <= HEADROOM * budget),
        )

    def longest_row(self, budget: int) -> int:
        """Tokens of the longest row that fits into ``budget`` bytes alone."""
        return _last(2**24, lambda n: self.peak(Sizes(n, n, n * n, n)) <= HEADROOM * budget)

    def measured(self, sizes: Sizes, peak: int) -> StepMemory:
        """The same, scaled to what a step of these sizes was measured to take."""
        scale = max(0, peak - self.fixed) / max(1, self.peak(sizes) - self.fixed)
        return replace(
            self,
            token=scale * self.token,
            slot=scale * self.slot,
            score=scale * self.score,
            recurrence=scale * self.recurrence,
            carried=scale * self.carried,
            target=scale * self.target,
            chunk=int(scale * self.chunk),
        )


def _last(most: int, fits: Any) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones fit; or 0."""
    return bisect_left(range(1, most + 1), True, key=lambda n: not fits(n))


def step_memory(
    config: Mapping[str, Any],
    itemsize: int,
    *,
    weights: int,
    trainable_parameters: int,
    target_modules: Collection[str],
    kept_outputs: float = 0,
    checkpointing: bool = False,
    backend: Backend = CPU,
) -> StepMemory:
    """What a step of a model takes.

    Args:
        config: the model's ``config.json``.
        itemsize: bytes of a number of the weights' dtype.
        weights: bytes of all weights, the adapter's included.
        target_modules: last segments of the names of adapted modules.
        kept_outputs: numbers that a block's adapters keep of a token's outputs, as DoRA's do.
    """
    text = config.get("text_config", config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    size = text.get("head_dim") or hidden // heads
    queries, keys = heads * size, text.get("num_key_value_heads", heads) * size
    inner = text.get("intermediate_size", 0)
    if experts := text.get("num_experts_per_tok"):
        inner = experts * text["moe_intermediate_size"]
        inner += text.get("shared_expert_intermediate_size", 0)
    adapted = set(target_modules)
    every = text.get("full_attention_interval", 1)  # the other blocks are Gated DeltaNet
    softmax = 1 / every
    token = (
        hidden * 2
        + hidden * bool(adapted & {"gate_proj", "up_proj"})
        + inner * (2 + ("down_proj" in adapted))
        + softmax * hidden * bool(adapted & {"q_proj", "k_proj", "v_proj"})
        + softmax * queries * ("o_proj" in adapted)
        + kept_outputs
    )
    slot = softmax * (queries + 2 * keys + queries * (not backend.keeps_scores))
    score = softmax * heads * backend.keeps_scores
    recurrence = 0.0
    if every > 1:
        held, recurrence = token_numbers(text, backend.recurrence_chunk)
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        token += (1 - softmax) * (
            held
            + hidden * any(name.startswith("in_proj") for name in adapted)
            + values * ("out_proj" in adapted)
        )
    blocks = text["num_hidden_layers"]
    return StepMemory(
        weights=weights,
        # Moments, the gradient, the micro-batches' sum, and the factors cut out of one vector.
        adapter=4 * 5 * trainable_parameters,
        token=itemsize * token,
        slot=itemsize * slot,
        score=itemsize * score,
        # The backward pass begins beside all that is kept. A block that is computed again has all
        # of its gradients at a time, but for those that `recurrence` counts.
        kept=0 if checkpointing else blocks + 0.2,
        work=(1.7 if recurrence else 3.1) if checkpointing else 0,
        recurrence=4 * recurrence,
        carried=itemsize * blocks * hidden if checkpointing else 0,
        # Logits, exponentials, error; two more are sent to the device before these are freed.
        target=5 * 4 * text["vocab_size"],
        chunk=5 * backend.chunk_bytes,
        keys_per_token=backend.keys_per_token,
    )
