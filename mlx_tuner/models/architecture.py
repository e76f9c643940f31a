"""The model that a config describes, without its weights: its layers, their shapes, its size."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner.errors import Fault, ModelError

# Whatever a folder's config.json says, only these model classes are ever imported.
MODEL_TYPES = frozenset(
    {
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
    }
)

DTYPE_KEYS = ("dtype", "torch_dtype")


def skeleton(config: dict[str, Any], where: str = "config.json") -> nn.Module:
    """The model of a config with weights that are never computed: shapes only, no memory.

    Quantised configs give quantised layers.

    Raises:
        ModelError: no such model can be built; `where` is what the fault calls the config.
    """
    try:
        return _built(config)
    except Exception as error:  # whatever mlx-lm's constructors make of a config that is wrong
        what = f"no {config['model_type']} model can be built from it: {error!r}"
        raise ModelError(Fault(where, "", " ".join(what.split()))) from None


def _built(config: dict[str, Any]) -> nn.Module:
    model_class, args_class = mlx_lm_utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    if quantization := config.get("quantization"):
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda path, module: quantization.get(
                path, hasattr(module, "to_quantized")
            ),
        )
    return model


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model as it was before quantisation, adapters included."""
    return sum(
        _dense_size(module)
        for _, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    ) + sum(value.size for _, value in tree_flatten(model.trainable_parameters()))


def _dense_size(module: nn.Module) -> int:
    bits = getattr(module, "bits", None)
    sizes = dict(tree_flatten(module.parameters()))
    if bits is None:
        return sum(v.size for v in sizes.values())
    return sizes["weight"].size * 32 // bits + (sizes["bias"].size if "bias" in sizes else 0)


def config_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a config gives the weights, or its text model's; None if it does not say."""
    tables = (config, config.get("text_config", {}))
    found = (table.get(key) for table in tables for key in DTYPE_KEYS)
    return next(filter(None, found), None)


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype that the model computes in: that of its norms, which are never quantised."""
    return model.layers[0].input_layernorm.weight.dtype
