"""A model by name or folder, loaded through mlx-lm, and its facts without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models import chat_template

BUILTIN = "builtin:"

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


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path


def resolve(name: str, revision: str | None = None) -> Path:
    """The folder of ``builtin:NAME``, of a path, or of a Hub name (downloaded where needed).

    Raises:
        ModelError: there is no such model.
    """
    if name.startswith(BUILTIN):
        folder = Path(str(files("mlx_tuner") / "builtin" / name.removeprefix(BUILTIN)))
        if not folder.is_dir():
            raise ModelError(Fault(name, "model.path", "no such built-in model; try tiny-qwen"))
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(Fault(name, "model.path", "no such folder"))
    from mlx_tuner.system import hub

    return hub.download_model(name, revision)


def load(folder: Path) -> Loaded:
    """Load a checked model folder; its code, if it holds any, is never run.

    Raises:
        ModelError: the folder is not a Qwen model that can be trained.
    """
    from mlx_tuner.models.model_files import check_model_folder

    config = check_model_folder(folder).config
    model, config = mlx_lm_utils.load_model(folder)
    return Loaded(model, load_tokenizer(folder), config, folder)


def load_tokenizer(folder: Path) -> TokenizerWrapper:
    """The folder's tokenizer with its chat template and every end-of-sequence id.

    Raises:
        ModelError: the template does not come to an end.
    """
    eos = mlx_lm_utils.load_config(folder).get("eos_token_id")
    settings = {"trust_remote_code": False}
    tokenizer = mlx_lm_utils.load_tokenizer(folder, settings, eos_token_ids=eos)
    chat_template.require_end(tokenizer, folder)
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        ModelError: it is missing, broken, or of a model that this package does not train.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(Fault(str(path), "", "missing; is this a model folder?")) from None
    except (ValueError, OSError) as error:
        raise ModelError(Fault(str(path), "", f"unreadable: {error}")) from None
    if not isinstance(config, dict) or config.get("model_type") not in MODEL_TYPES:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ModelError(
            Fault(
                str(path), "model_type", f"{found!r} is not one of {', '.join(sorted(MODEL_TYPES))}"
            )
        )
    return config


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The model of a config with weights that are never computed: shapes only, no memory.

    Quantised configs give quantised layers.
    """
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


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype that the model computes in: that of its norms, which are never quantised."""
    return model.layers[0].input_layernorm.weight.dtype
