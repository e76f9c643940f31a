"""The hidden states that predict a target, with no token computed twice and none for nothing.

Linears, norms and MLPs run on flat tokens (N, D). Attention alone sees rows: queries, keys and
values are put into their groups' slots (R, T), attend causally to their own row and to the
shared prefix, and the outputs go back to flat; linear attention does so in chunks of rows. The
last block computes attention's outputs and its MLP only where a hidden state predicts a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import checkpoint

from mlx_tuner.engine import linear_attention, lora
from mlx_tuner.engine.backend import CPU, Backend
from mlx_tuner.engine.batching import MicroBatch
from mlx_tuner.engine.gather import Gather
from mlx_tuner.engine.linear_attention import Chunks
from mlx_tuner.engine.mlp import mlp
from mlx_tuner.engine.noise import Noise
from mlx_tuner.engine.swiglu import swiglu

PrefixState = tuple[mx.array, ...]
"""What a block's later tokens need of a prefix: keys and values (1, heads, P, head size) of softmax
attention; the recurrent state and the last inputs of the convolution of Gated DeltaNet."""


class Layout(NamedTuple):
    """A `MicroBatch` on the device; the numbers that decide shapes stay Python's."""

    tokens: mx.array
    token_of_slot: mx.array
    slot_of_token: mx.array
    sources: mx.array
    source_of_token: mx.array
    targets: mx.array
    weights: mx.array
    prefix: int
    past: int
    lengths: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    repeats: int
    backend: Backend
    dropout_keys: mx.array | None = None
    """(N, 2) uint32, each token's own (`lora.token_keys`); None without dropout."""
    noise: Noise | None = None
    """What is added to the embeddings."""

    @classmethod
    def of_prefix(cls, tokens: mx.array, backend: Backend = CPU) -> Layout:
        """A prefix alone, for what later tokens need of it."""
        own, none = mx.arange(len(tokens)), mx.zeros(0)
        alone = (len(tokens), 0, (), ())
        return cls(tokens, own, own, none, none, none, none, *alone, repeats=1, backend=backend)

    @classmethod
    def of(
        cls,
        batch: MicroBatch,
        backend: Backend = CPU,
        dropout_keys: np.ndarray | None = None,
        noise: Noise | None = None,
    ) -> Layout:
        return cls(
            mx.array(batch.tokens),
            mx.array(batch.token_of_slot),
            mx.array(batch.slot_of_token),
            mx.array(batch.sources),
            mx.array(batch.source_of_token),
            mx.array(batch.targets),
            mx.array(batch.weights),
            batch.prefix,
            batch.past,
            batch.lengths,
            batch.groups,
            batch.repeats,
            backend,
            None if dropout_keys is None else mx.array(dropout_keys),
            noise,
        )


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits: the output layer or the tied embedding."""
    language = getattr(model, "language_model", model)
    return language.lm_head if "lm_head" in language else language.model.embed_tokens


def hidden_at_targets(
    model: nn.Module,
    layout: Layout,
    past: Sequence[PrefixState] = (),
    *,
    checkpointing: bool = False,
) -> tuple[mx.array, list[PrefixState]]:
    """Final hidden states (M, D), one for each of ``layout.targets``, normed, for the head.

    Args:
        past: each block's state after a prefix that was computed elsewhere (`prefix_states`).
        checkpointing: keep only each block's input for the backward pass and recompute the rest.

    Returns:
        The hidden states, and each block's state after the prefix at the front of the layout.
    """
    sources = Gather(layout.sources, layout.source_of_token)
    x, inside = _through_blocks(model, layout, past, sources, checkpointing)
    x = model.model.norm(x)
    if layout.repeats > 1:
        # The gradient of a broadcast is a sum, in one order always; a gather's is a scatter-add.
        first = mx.broadcast_to(x[:1], (layout.repeats, x.shape[1]))
        x = mx.concatenate([first, x[1:]])
    return x, inside


def prefix_states(model: nn.Module, tokens: mx.array, backend: Backend = CPU) -> list[PrefixState]:
    """Each block's state after prefix tokens (P,)."""
    return _through_blocks(model, Layout.of_prefix(tokens, backend), (), None, False)[1]


def _through_blocks(
    model: nn.Module,
    layout: Layout,
    past: Sequence[PrefixState],
    sources: Gather | None,
    checkpointing: bool,
) -> tuple[mx.array, list[PrefixState]]:
    x = model.model.embed_tokens(layout.tokens)
    if layout.noise is not None:
        x = Noise(*layout.noise).on(x)
    slots = Gather(layout.slot_of_token, layout.token_of_slot)
    size = layout.backend.recurrence_chunk
    chunks = Chunks.of(layout.prefix, layout.lengths, len(layout.tokens), size)
    inside = []
    for i, block in enumerate(model.layers):
        run: Callable[..., Any] = (
            partial(_linear_attention, block.linear_attn, chunks, layout.backend.fused)
            if "linear_attn" in block
            else partial(_attention, block.self_attn, layout, slots)
        )
        last = i == len(model.layers) - 1
        run = partial(_block, block, layout, run, sources if last else None)
        run = checkpoint(block, run) if checkpointing else run
        x, *state = run(x, *(past[i] if past else ()))
        inside.append(tuple(state))
    return x, inside


def _block(
    block: nn.Module,
    layout: Layout,
    mix: Callable[..., Any],
    sources: Gather | None,
    x: mx.array,
    *past: mx.array,
) -> tuple[mx.array, ...]:
    """(N, D) to (N, D), or to (U, D) with ``sources``; then the state after the prefix."""
    _give_dropout_keys(block, layout, sources)
    mixed, *state = mix(sources, block.input_layernorm(x), past)
    x = mixed + (x if sources is None else sources(x))
    normed = block.post_attention_layernorm(x)
    return x + mlp(block.mlp, normed, fused=layout.backend.fused), *state


def _give_dropout_keys(block: nn.Module, layout: Layout, sources: Gather | None) -> None:
    """Every layer of a block its tokens' keys: those after attention may see the sources alone."""
    keys = layout.dropout_keys
    if keys is None:
        return
    lora.set_dropout_keys(block, keys)
    if sources is not None:
        mixer = block.linear_attn.out_proj if "linear_attn" in block else block.self_attn.o_proj
        for module in (mixer, block.mlp):
            lora.set_dropout_keys(module, keys[layout.sources])


def _attention(
    attention: nn.Module,
    layout: Layout,
    slots: Gather,
    sources: Gather | None,
    x: mx.array,
    past: PrefixState,
) -> tuple[mx.array, ...]:
    """Softmax attention of (N, D), as `_block`."""
    q, k, v, gate = _project(attention, x)
    prefix, *groups = zip(*(_split(slots.back(y), layout) for y in (q, k, v)), strict=True)
    outputs = []
    if layout.prefix:
        q, k, v = (_heads(attention, y[None]) for y in prefix)
        past = (attention.rope(k), v)
        outputs.append(_join_heads(_attend(attention, attention.rope(q), *past))[0])
    offset = layout.prefix + layout.past
    for group, (rows, longest) in zip(groups, layout.groups, strict=True):
        q, k, v = (_heads(attention, y.reshape(rows, longest, -1)) for y in group)
        q, k = attention.rope(q, offset=offset), attention.rope(k, offset=offset)
        if past:
            k, v = (_after(a, b) for a, b in zip(past, (k, v), strict=True))
        outputs.append(_join_heads(_attend(attention, q, k, v)).reshape(rows * longest, -1))
    out = slots(mx.concatenate(outputs))
    if sources is not None:
        out, gate = sources(out), gate if gate is None else sources(gate)
    if gate is not None:
        out = out * mx.sigmoid(gate)
    return attention.o_proj(out), *(past if layout.prefix else ())


def _linear_attention(
    net: nn.Module,
    chunks: Chunks,
    fused: bool,
    sources: Gather | None,
    x: mx.array,
    past: PrefixState,
) -> tuple[mx.array, ...]:
    """Gated DeltaNet of (N, D), as `_block`."""
    z, out, *state = linear_attention.read(net, chunks, x, past, fused=fused)
    out = chunks.slots(out)
    if sources is not None:
        z, out = sources(z), sources(out)
    out = net.norm(out.reshape(-1, net.head_v_dim)).reshape(z.shape)
    return net.out_proj(swiglu(z, out, fused=fused)), *state


def _project(
    attention: nn.Module, x: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    """Queries, keys, values and, where the family has one, the outputs' gate, each (N, heads · head
    size); queries and keys normed where the family norms them."""
    q, k, v = lora.project([attention.q_proj, attention.k_proj, attention.v_proj], x)
    gate, size = None, round(attention.scale**-2)
    if "num_attention_heads" in vars(attention):  # Qwen3-Next's: a head's queries, then its gate
        q, gate = mx.split(q.reshape(len(x), -1, 2 * size), 2, axis=2)
        q, gate = q.reshape(len(x), -1), gate.reshape(len(x), -1)
    if "q_norm" in attention:
        q = attention.q_norm(q.reshape(-1, size)).reshape(q.shape)
        k = attention.k_norm(k.reshape(-1, size)).reshape(k.shape)
    return q, k, v, gate


def _heads(attention: nn.Module, x: mx.array) -> mx.array:
    """(R, T, heads · head size) to (R, heads, T, head size)."""
    size = round(attention.scale**-2)
    return x.reshape(*x.shape[:2], -1, size).transpose(0, 2, 1, 3)


def _join_heads(x: mx.array) -> mx.array:
    """(R, heads, T, head size) to (R, T, heads · head size)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _attend(attention: nn.Module, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Causal attention of (R, heads, T, head size) to keys that end where the queries end."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.scale, mask="causal")


def _after(past: mx.array, own: mx.array) -> mx.array:
    """The prefix's keys or values in front of each row's own."""
    shape = (own.shape[0], *past.shape[1:])
    return mx.concatenate([mx.broadcast_to(past, shape), own], axis=2)


def _split(x: mx.array, layout: Layout) -> list[mx.array]:
    """(S, D) to the prefix's part and each group's."""
    ends, end = [], layout.prefix
    for rows, longest in layout.groups:
        ends.append(end)
        end += rows * longest
    return mx.split(x, ends)
