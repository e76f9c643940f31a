"""LoRA for linear layers, plain or quantised (Hu et al. 2021, arXiv:2106.09685).

Shapes: N tokens, I inputs, O outputs, r rank. Factors are stored as mlx-lm stores them,
``lora_a`` (I, r) and ``lora_b`` (r, O), in fp32; products run in the dtype of the input, the
factors' own gradients in fp32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_tuner.errors import Fault, ModelError

# Routers pick experts; adapting them changes which weights train, so "all-linear" leaves them out.
ROUTERS = frozenset({"gate", "shared_expert_gate"})

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.(.+)$")


class LoRALinear(nn.Module):
    """``y = Wx + b + scale · B(A(dropout(x)))`` with W frozen.

    ``lora_a`` starts Kaiming-uniform with a = √5, which is U(±1/√I), and ``lora_b`` at zero,
    as PEFT initialises them, so that training starts from the base model.
    """

    def __init__(
        self,
        linear: nn.Linear | nn.QuantizedLinear,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        key: mx.array | None = None,
    ) -> None:
        super().__init__()
        outputs, inputs = dimensions(linear)
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.scale = scale
        self.dropout = dropout
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """(…, I) to (…, O)."""
        return self.add(self.linear(x), product(self.drop(x), self.lora_a))

    @property
    def kept_outputs(self) -> int:
        """Numbers of a token's output that are kept for the backward pass."""
        return 0

    def neutral(self) -> dict[str, mx.array]:
        """Values of what is trained here with which the layer is its base."""
        return {name: mx.zeros_like(self[name]) for name in ("lora_a", "lora_b")}

    def add(self, y: mx.array, z: mx.array) -> mx.array:
        """``y + scale · B z``, of (…, O) and (…, r)."""
        return add_product(self.scale)(y, z, self.lora_b)

    def drop(self, x: mx.array) -> mx.array:
        """Inverted dropout while training, by the tokens' keys that `set_dropout_keys` gave."""
        if not (self.dropout and self.training):
            return x
        keys = self._dropout_keys ^ self._dropout_key
        keep = mx.vmap(lambda key: mx.random.bernoulli(1 - self.dropout, x.shape[-1:], key=key))
        kept = keep(keys).reshape(x.shape)
        return mx.where(kept, x * (1 / (1 - self.dropout)), 0).astype(x.dtype)

    def fuse(self, dtype: mx.Dtype | None = None) -> nn.Linear:
        """A plain linear layer with ``W + scale · (A B)ᵀ``, summed in fp32.

        A quantised base is dequantised. ``dtype`` defaults to that of the base's weights
        (of its scales, where they are quantised).
        """
        weight = dense_weight(self.linear)
        outputs, inputs = weight.shape
        fused = nn.Linear(inputs, outputs, bias="bias" in self.linear)
        delta = self.scale * (self.lora_a @ self.lora_b).T
        fused.weight = (weight.astype(mx.float32) + delta).astype(dtype or weight.dtype)
        if "bias" in self.linear:
            fused.bias = self.linear.bias.astype(dtype or self.linear.bias.dtype)
        return fused


@mx.custom_function
def product(x: mx.array, factor: mx.array) -> mx.array:
    """``x @ factor``, (…, I) by (I, O) in fp32, in the dtype of ``x``."""
    return x @ factor.astype(x.dtype)


@product.vjp
def _product_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    return _product_vjp_of(*primals, cotangent)


def _product_vjp_of(
    x: mx.array, factor: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    rows, errors = (y.reshape(-1, y.shape[-1]).astype(mx.float32) for y in (x, cotangent))
    return cotangent @ factor.astype(x.dtype).T, rows.T @ errors


@cache
def add_product(scale: float) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """``y + scale · (z @ factor)``, (…, O), (…, r) and (r, O) in fp32, in the dtype of ``y``."""

    @mx.custom_function
    def add(y: mx.array, z: mx.array, factor: mx.array) -> mx.array:
        return mx.addmm(y, z, factor.astype(z.dtype), alpha=scale)

    @add.vjp
    def add_vjp(
        primals: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, __: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        _, z, factor = primals
        of_z, of_factor = _product_vjp_of(z, factor, cotangent)
        return cotangent, scale * of_z, scale * of_factor

    return add


def project(layers: Sequence[nn.Module], x: mx.array) -> list[mx.array]:
    """The outputs of several linear layers for one input (N, I).

    Their adapters read the input once for all A matrices. With dropout each has an input of its
    own, and layers without an adapter have nothing to share.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    if len(adapted) < 2 or any(layer.dropout and layer.training for layer in adapted):
        return [layer(x) for layer in layers]
    ends = list(accumulate(layer.lora_a.shape[1] for layer in adapted))
    factors = mx.concatenate([layer.lora_a for layer in adapted], axis=1)
    inner = product(x, factors)
    inner = dict(zip(map(id, adapted), mx.split(inner, ends[:-1], axis=-1), strict=True))
    return [
        layer.add(layer.linear(x), inner[id(layer)]) if id(layer) in inner else layer(x)
        for layer in layers
    ]


def dimensions(linear: nn.Linear | nn.QuantizedLinear) -> tuple[int, int]:
    """``(outputs, inputs)`` of a linear layer."""
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return outputs, inputs


def dense_weight(linear: nn.Linear | nn.QuantizedLinear) -> mx.array:
    """The layer's weights (O, I), dequantised where they are quantised."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight
    return mx.dequantize(
        linear.weight,
        linear.scales,
        linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def attach(
    model: nn.Module,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] | Literal["all-linear"],
    num_layers: int | None = None,
    seed: int = 0,
    layer: type[LoRALinear] = LoRALinear,
) -> None:
    """Freeze the model and put a LoRA layer in place of each target, in its last blocks.

    Args:
        target_modules: last segments of module names (``q_proj``), or ``"all-linear"``.
        num_layers: how many blocks, counted from the last; all where None.
        layer: the kind of LoRA layer.

    Raises:
        ModelError: a target matches no linear layer, or there are fewer blocks than asked for.
    """
    targets = find_targets(model, target_modules, num_layers)
    model.freeze()
    modules = dict(model.named_modules())
    keys = mx.random.split(mx.random.key(seed), len(targets))
    adapted = [
        (path, layer(modules[path], rank=rank, scale=scale, dropout=dropout, key=key))
        for path, key in zip(targets, keys, strict=True)
    ]
    model.update_modules(tree_unflatten(adapted))


def number_layers(model: nn.Module) -> None:
    """Give each LoRA layer a key of its own, by which its dropout masks differ from the others'."""
    for number, layer in enumerate(adapted_modules(model).values()):
        layer._dropout_key = mx.array(_mix(np.array([number], np.uint64)).view(np.uint32))


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str] | Literal["all-linear"],
    num_layers: int | None = None,
) -> list[str]:
    """Paths of the linear layers of the last ``num_layers`` blocks that the names select.

    Raises:
        ModelError: as `attach` does.
    """
    blocks = len(model.layers)
    if num_layers is not None and num_layers > blocks:
        raise ModelError(
            Fault("", "lora.num_layers", f"{num_layers} layers, but the model has {blocks}")
        )
    first = 0 if num_layers is None else blocks - num_layers
    linears = [path for block, path in _block_linears(model) if block >= first]
    names = {path: path.rsplit(".", 1)[-1] for path in linears}
    if target_modules == "all-linear":
        wanted = set(names.values()) - ROUTERS
    else:
        wanted = set(target_modules)
        if missing := sorted(wanted - set(names.values())):
            raise ModelError(
                Fault(
                    "",
                    "lora.target_modules",
                    f"{', '.join(missing)} matches no linear layer; "
                    f"there are {', '.join(sorted(set(names.values())))}",
                )
            )
    return [path for path in linears if names[path] in wanted]


def _block_linears(model: nn.Module) -> list[tuple[int, str]]:
    """Block and path of every linear layer in one, in their order."""
    return sorted(
        (int(match[1]), path)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear)) and (match := _BLOCK.search(path))
    )


def split_block(path: str) -> tuple[int, str]:
    """The block and the path within it: ``model.layers.3.mlp.up_proj`` is 3 and ``mlp.up_proj``.

    Raises:
        ValueError: the module is in no block.
    """
    if (match := _BLOCK.search(path)) is None:
        raise ValueError(path)
    return int(match[1]), match[2]


def adapted_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by path, in the order of their blocks."""
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, LoRALinear)]
    return dict(sorted(found, key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's factors by name, ``model.layers.0.self_attn.q_proj.lora_a`` and so on."""
    return dict(tree_flatten(model.trainable_parameters()))


def neutral(model: nn.Module) -> dict[str, mx.array]:
    """Values by the names of `trainable` with which the model is its base."""
    return {
        f"{path}.{name}": value
        for path, layer in adapted_modules(model).items()
        for name, value in layer.neutral().items()
    }


def token_keys(seed: int, step: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys of the dropout masks of tokens (N,), by their rows' numbers and positions in them.

    A function of these numbers alone, so that masks depend on nothing that happened before, nor on
    which tokens are computed together. (Steele et al. 2014, SplitMix64's mixing.)

    Returns:
        (N, 2) uint32; a layer mixes its own key in (`set_dropout_keys`).
    """
    (of_step,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    x = rows.astype(np.uint64) << np.uint64(32) | positions.astype(np.uint64)
    return _mix(_mix(x) ^ of_step).view(np.uint32).reshape(-1, 2)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def set_dropout_keys(model: nn.Module, keys: mx.array) -> None:
    """Give LoRA layers the `token_keys` (N, 2) of the tokens that come next."""
    for _, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module._dropout_keys = keys


def fuse_all(model: nn.Module, dtype: mx.Dtype | None = None) -> None:
    """Replace every LoRA layer of the model by its fused linear layer."""
    fused = [(path, layer.fuse(dtype)) for path, layer in adapted_modules(model).items()]
    model.update_modules(tree_unflatten(fused))
