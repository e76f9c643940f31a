"""A block's MLP on flat tokens: dense, or a mixture of experts."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner.engine import lora
from mlx_tuner.engine.gather import Gather
from mlx_tuner.engine.swiglu import swiglu


def mlp(module: nn.Module, x: mx.array, *, fused: bool = False) -> mx.array:
    """(N, D) to (N, D), by mlx-lm's module of either kind."""
    if "switch_mlp" in module:
        return _mixture(module, x, fused)
    gate, up = lora.project([module.gate_proj, module.up_proj], x)
    return module.down_proj(swiglu(gate, up, fused=fused))


def _mixture(module: nn.Module, x: mx.array, fused: bool) -> mx.array:
    """Each token's most probable experts, weighted by their probabilities, and the shared one."""
    probabilities = mx.softmax(module.gate(x), axis=-1, precise=True)
    chosen = mx.argpartition(probabilities, kth=-module.top_k, axis=-1)[:, -module.top_k :]
    chosen = mx.stop_gradient(chosen)
    weights = mx.take_along_axis(probabilities, chosen, axis=-1)
    if getattr(module, "norm_topk_prob", False):
        weights = weights / weights.sum(axis=-1, keepdims=True)
    y = _experts(module.switch_mlp, x, chosen, fused)
    y = (y * weights[..., None]).sum(axis=1).astype(x.dtype)
    if "shared_expert" not in module:
        return y
    shared = mlp(module.shared_expert, x, fused=fused)
    return y + mx.sigmoid(module.shared_expert_gate(x)) * shared


def _experts(experts: nn.Module, x: mx.array, chosen: mx.array, fused: bool) -> mx.array:
    """The outputs (N, k, D) of the experts ``chosen`` (N, k) for each of the tokens (N, D).

    Tokens are sorted by expert. A token's copies are made by a broadcast and moved by a
    permutation, whose gradients are a sum and a permutation; those of mlx-lm's one gather would be
    added in any order on a GPU.
    """
    n, k = chosen.shape
    order = mx.argsort(chosen.reshape(-1))
    place = mx.argsort(order)
    copies = mx.broadcast_to(x[:, None], (n, k, x.shape[1])).reshape(n * k, -1)
    inputs, of_input = Gather(order, place)(copies)[:, None], chosen.reshape(-1)[order]
    gate = experts.gate_proj(inputs, of_input, sorted_indices=True)
    up = experts.up_proj(inputs, of_input, sorted_indices=True)
    out = experts.down_proj(swiglu(gate, up, fused=fused), of_input, sorted_indices=True)
    return Gather(place, order)(out[:, 0]).reshape(n, k, -1)
