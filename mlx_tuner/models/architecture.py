"""The model that a config describes, without its weights: its layers, their shapes, its size."""

from __future__ import annotations

from collections.abc import Callable
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
    if how := config.get("quantization"):
        quantise_layers(model, how)
    return model


def quantise_layers(
    model: nn.Module, how: dict[str, Any], has_scales: Callable[[str], bool] = lambda path: True
) -> None:
    """Quantise the layers that have scales, by their paths, each as a config's table says."""
    nn.quantize(
        model,
        group_size=how["group_size"],
        bits=how["bits"],
        mode=how.get("mode", "affine"),
        class_predicate=lambda path, layer: how.get(
            path, hasattr(layer, "to_quantized") and has_scales(path)
        ),
    )


def parameter_count(model: nn.Module) -> int:
    """Parameters of the model as it was before quantisation, adapters included."""
    adapters = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return int(mlx_lm_utils.get_total_parameters(model)) + adapters


def config_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a config gives the weights, or its text model's; None if it does not say."""
    tables = (config, config.get("text_config", {}))
    found = (table.get(key) for table in tables for key in DTYPE_KEYS)
    return next(filter(None, found), None)


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype that the model computes in: that of its norms, which are never quantised."""
    return model.layers[0].input_layernorm.weight.dtype
