"""The hidden states that predict a target, with no token computed twice and none for nothing.

Linears, norms and MLPs run on flat tokens (N, D). Attention alone sees rows: queries, keys and
values are put into their groups' slots (R, T), attend causally to their own row and to the
shared prefix, and the outputs go back to flat. The last block computes queries' outputs and
its MLP only where a hidden state predicts a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import MicroBatch
from mlx_tuner.engine.lanes import lanes

FLAT_FAMILIES = frozenset({"qwen2", "qwen3", "qwen2_moe", "qwen3_moe"})
"""mlx-lm's model types whose blocks are softmax attention and an MLP, and nothing else."""

KeysValues = tuple[mx.array, mx.array]


class Layout(NamedTuple):
    """A `MicroBatch` on the device; the numbers that decide shapes stay Python's."""

    tokens: mx.array
    token_of_slot: mx.array
    slot_of_token: mx.array
    sources: mx.array
    targets: mx.array
    weights: mx.array
    prefix: int
    past: int
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, batch: MicroBatch) -> Layout:
        return cls(
            mx.array(batch.tokens),
            mx.array(batch.token_of_slot),
            mx.array(batch.slot_of_token),
            mx.array(batch.sources),
            mx.array(batch.targets),
            mx.array(batch.weights),
            batch.prefix,
            batch.past,
            batch.groups,
        )


def is_flat(model: nn.Module) -> bool:
    """Whether the model's family takes the flat path; the others are padded to groups."""
    return model.model_type in FLAT_FAMILIES


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits: the output layer or the tied embedding."""
    language = getattr(model, "language_model", model)
    return language.lm_head if "lm_head" in language else language.model.embed_tokens


def hidden_at_targets(
    model: nn.Module,
    layout: Layout,
    past: Sequence[KeysValues] | None = None,
    *,
    checkpointing: bool = False,
) -> tuple[mx.array, list[KeysValues]]:
    """Final hidden states (M, D) at ``layout.sources``, normed and ready for the head.

    Args:
        past: keys and values (1, heads, P, head size) of each block for a prefix that was
            computed elsewhere (`prefix_states`).
        checkpointing: keep only each block's input for the backward pass and recompute the rest.

    Returns:
        The states, and each block's keys and values of the prefix at the front of the layout.
    """
    if not is_flat(model):
        return _padded_hidden(model, layout, checkpointing=checkpointing), []
    x = model.model.embed_tokens(layout.tokens)
    slots = Slots(layout.token_of_slot, layout.slot_of_token)
    inside = []
    for i, block in enumerate(model.layers):
        last = i == len(model.layers) - 1
        run: Callable[..., Any]
        run = partial(_block, block, layout, slots, layout.sources if last else None)
        run = _checkpointed(block, run) if checkpointing else run
        x, *keys_values = run(x, *(past[i] if past else ()))
        inside.append(tuple(keys_values))
    return model.model.norm(x), inside


def prefix_states(model: nn.Module, tokens: mx.array) -> list[KeysValues]:
    """Each block's keys and values (1, heads, P, head size) for prefix tokens (P,)."""
    x = model.model.embed_tokens(tokens)
    states = []
    for block in model.layers:
        q, k, v = _project(block.self_attn, block.input_layernorm(x))
        q, k, v = (_heads(block.self_attn, y[None]) for y in (q, k, v))
        q, k = block.self_attn.rope(q), block.self_attn.rope(k)
        states.append((k, v))
        out = _attend(block.self_attn, q, k, v)
        x = _rest_of_block(block, x, _join_heads(out)[0])
    return states


def _block(
    block: nn.Module,
    layout: Layout,
    slots: Slots,
    sources: mx.array | None,
    x: mx.array,
    *past: mx.array,
) -> tuple[mx.array, ...]:
    """(N, D) to (N, D), or to (M, D) with ``sources``; then the prefix's keys and values."""
    attention = block.self_attn
    q, k, v = (slots.fill(y) for y in _project(attention, block.input_layernorm(x)))
    prefix, *groups = zip(*(_split(y, layout) for y in (q, k, v)), strict=True)
    outputs = []
    if layout.prefix:
        q, k, v = (_heads(attention, y[None]) for y in prefix)
        past = (attention.rope(k), v)
        outputs.append(_join_heads(_attend(attention, attention.rope(q), *past))[0])
    offset = layout.prefix + layout.past
    for i, (group, shape) in enumerate(zip(groups, layout.groups, strict=True)):
        with mx.stream(lanes()[i % len(lanes())]):
            q, k, v = (_heads(attention, y.reshape(*shape, -1)) for y in group)
            q, k = attention.rope(q, offset=offset), attention.rope(k, offset=offset)
            if past:
                k, v = (_after(a, b) for a, b in zip(past, (k, v), strict=True))
            outputs.append(
                _join_heads(_attend(attention, q, k, v)).reshape(shape[0] * shape[1], -1)
            )
    out = mx.concatenate(outputs)
    if sources is None:
        out = slots.gather(out)
    else:
        x, out = x[sources], out[layout.slot_of_token[sources]]
    return _rest_of_block(block, x, out), *(past if layout.prefix else ())


def _rest_of_block(block: nn.Module, x: mx.array, attended: mx.array) -> mx.array:
    x = x + block.self_attn.o_proj(attended)
    return x + _mlp(block.mlp, block.post_attention_layernorm(x))


def _project(attention: nn.Module, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values, each (N, heads · head size), normed where the family norms them."""
    q, k, v = lora.project([attention.q_proj, attention.k_proj, attention.v_proj], x)
    if "q_norm" in attention:
        size = attention.q_norm.weight.size
        q = attention.q_norm(q.reshape(-1, size)).reshape(q.shape)
        k = attention.k_norm(k.reshape(-1, size)).reshape(k.shape)
    return q, k, v


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


class Slots:
    """Moves flat tokens to slots and back. Each is the other's transpose, gathers both.

    (MLX would differentiate a gather by a scatter-add, which is slow, and on a GPU atomic.)
    """

    def __init__(self, token_of_slot: mx.array, slot_of_token: mx.array) -> None:
        real = (token_of_slot < slot_of_token.shape[0])[:, None]
        token_of_slot = mx.where(real[:, 0], token_of_slot, 0)

        def fill(x: mx.array) -> mx.array:
            return mx.where(real, x[token_of_slot], 0)

        def gather(x: mx.array) -> mx.array:
            return x[slot_of_token]

        self.fill = mx.custom_function(fill)
        self.gather = mx.custom_function(gather)
        self.fill.vjp(lambda _, cotangent, __: gather(cotangent))
        self.gather.vjp(lambda _, cotangent, __: fill(cotangent))


def _mlp(mlp: nn.Module, x: mx.array) -> mx.array:
    if "gate_proj" not in mlp:
        return mlp(x)  # a mixture of experts
    return mlp.down_proj(swiglu(*lora.project([mlp.gate_proj, mlp.up_proj], x)))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """``gate · σ(gate) · up`` (Shazeer 2020, arXiv:2002.05202), computed in fp32.

    In fp32 the gradient takes the sigmoid from the forward pass: on the CPU backend an exponential
    costs twenty multiplications. In half precision it is computed again, so that it needs neither
    memory nor rounding.
    """
    return _swiglu(gate, up)[0]


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    wide = gate.astype(mx.float32)
    sigmoid = side_by_side(mx.sigmoid, wide)
    kept = sigmoid if gate.dtype == mx.float32 else mx.zeros(())
    return (wide * sigmoid * up).astype(gate.dtype), kept


@_swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    dtype = primals[0].dtype
    gate, up, cotangent = (x.astype(mx.float32) for x in (*primals, cotangents[0]))
    sigmoid = outputs[1] if dtype == mx.float32 else mx.sigmoid(gate)
    silu = gate * sigmoid
    of_gate = cotangent * up * (sigmoid + silu * (1 - sigmoid))
    return of_gate.astype(dtype), (cotangent * silu).astype(dtype)


def side_by_side(function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """An element-wise function of x, its first axis shared out among the lanes."""
    streams = lanes()
    if len(streams) == 1:
        return function(x)
    parts = []
    for part, stream in zip(mx.split(x, _cuts(x.shape[0], len(streams))), streams, strict=True):
        with mx.stream(stream):
            parts.append(function(part))
    return mx.concatenate(parts)


def _cuts(length: int, parts: int) -> list[int]:
    return [length * i // parts for i in range(1, parts)]


def _checkpointed(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` that keeps only its inputs for the backward pass (Chen 2016, arXiv:1604.06174)."""

    def inner(parameters: dict[str, mx.array], *args: Any) -> Any:
        module.update(tree_unflatten(list(parameters.items())))
        return run(*args)

    parameters = dict(tree_flatten(module.trainable_parameters()))
    return lambda *args: mx.checkpoint(inner)(parameters, *args)


def _padded_hidden(model: nn.Module, layout: Layout, *, checkpointing: bool) -> mx.array:
    """Hidden states (M, D) of a family that only mlx-lm knows how to run, a group a pass."""
    language = getattr(model, "language_model", model)
    tokens = Slots(layout.token_of_slot, layout.slot_of_token).fill(layout.tokens[:, None])[:, 0]
    states = []
    with _checkpointed_blocks(language.model, checkpointing):
        for part, shape in zip(_split(tokens, layout)[1:], layout.groups, strict=True):
            out = language.model(part.reshape(shape))
            states.append(out.flatten(0, 1))
    return mx.concatenate(states)[layout.slot_of_token[layout.sources]]


@contextmanager
def _checkpointed_blocks(stack: nn.Module, enabled: bool) -> Iterator[None]:
    blocks = stack.layers
    if enabled:
        stack.layers = [_CheckpointedBlock(block) for block in blocks]
    try:
        yield
    finally:
        stack.layers = blocks


class _CheckpointedBlock:
    """Stands in for a block while mlx-lm's own forward pass runs."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return _checkpointed(self._block, partial(self._block, **kwargs))(*args)
