"""Checks a model's weights and tokens against its config before anything of it is loaded.

Only JSON and safetensors headers are read here; nothing of the folder is ever run or unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_tuner.errors import Fault, ModelError, first_line
from mlx_tuner.models.architecture import quantise_layers, skeleton
from mlx_tuner.models.folder import (
    CODE_KEYS,
    CONFIG,
    GENERATION,
    INDEX,
    NOT_OURS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_folder,
    has_tokenizer,
    read_optional,
)
from mlx_tuner.models.tensors import TensorInfo, read_header
from mlx_tuner.system.foreign import PICKLES, read_json
from mlx_tuner.words import printable

_SHARDS = "model*.safetensors"  # what mlx-lm reads
_MAX_LISTED = 10
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
"""MLX's, by their names in safetensors files."""
_PACKED = {"U32", "U8"}  # in the weights and scales of quantised layers only


@dataclass(frozen=True)
class ModelFiles:
    """A model folder that can be loaded."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    """Every tensor of all shards, by the name it has there."""
    notes: tuple[str, ...]
    """What a user should know, a sentence each."""


def check_model_folder(folder: Path) -> ModelFiles:
    """Everything that can be known to be wrong with a model folder without reading its weights.

    Raises:
        ModelError: with all that is wrong. After it returns, mlx-lm loads the folder.
    """
    config = check_folder(folder)
    if not has_tokenizer(folder):
        what = "missing, and so is vocab.json; the model has no tokenizer"
        raise ModelError(Fault(str(folder / TOKENIZER), "", what))
    shards = _shards(folder)
    tensors = _tensors(folder, shards)
    _check_weights(folder, config, tensors)
    if faults := list(_token_faults(folder, config, tensors)):
        raise ModelError(*faults)
    return ModelFiles(folder, config, shards, tensors, tuple(_notes(folder, config)))


# ---- files -------------------------------------------------------------------------------------


def _shards(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights: those that mlx-lm will read, and no other."""
    found = sorted(folder.glob(_SHARDS))
    if not found and not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        what = f"no {_SHARDS} here"
        if pickles:
            what = (
                f"only pickled weights here ({pickles[0]}), which can run code when they are read"
            )
        raise ModelError(Fault(str(folder), "", f"{what}; take the model's safetensors weights"))
    faults: list[Fault] = []
    if (index := folder / INDEX).exists():
        listed = set(_weight_map(index).values())
        for name in sorted(listed):
            if not _is_plain(name):
                faults.append(Fault(str(index), "weight_map", f"{name!r} is no name of a shard"))
            elif folder / name not in found:
                faults.append(Fault(str(folder / name), "", f"missing, though {INDEX} names it"))
        for path in found:
            if path.name not in listed:
                what = f"not in {INDEX}, though mlx-lm would load it; remove one of the two"
                faults.append(Fault(str(path), "", what))
    if faults:
        raise ModelError(*faults)
    return tuple(found)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and Path(name).match(_SHARDS)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(
            Fault(str(index), "weight_map", "must give each tensor the name of a file")
        )
    return weight_map


def _tensors(folder: Path, shards: tuple[Path, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    homes: dict[str, str] = {}
    faults: list[Fault] = []
    for shard in shards:
        try:
            header = read_header(shard)
        except ModelError as error:
            faults += error.faults
            continue
        for name in header.keys() & homes.keys():
            faults.append(Fault(str(shard), name, f"is in {homes[name]} too"))
        tensors |= header
        homes |= dict.fromkeys(header, shard.name)
    if (index := folder / INDEX).exists() and not faults:
        weight_map = _weight_map(index)
        for name in sorted(weight_map.keys() | homes.keys()):
            if (told := weight_map.get(name)) != (home := homes.get(name)):
                what = f"is in {home or 'no shard'}, not in {told or 'the index'}"
                faults.append(Fault(str(index), name, what))
    if faults:
        raise ModelError(*_shortened(faults, folder))
    return tensors


# ---- weights -----------------------------------------------------------------------------------


def _check_weights(folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """The tensors against the layers that the config describes, both as mlx-lm names them."""
    quantised = "quantization" in config
    faults = [
        Fault(str(folder), name, f"{tensor.dtype} is a dtype that is not taken here; {NOT_OURS}")
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES or (tensor.dtype in _PACKED and not quantised)
    ]
    if faults:
        raise ModelError(*_shortened(faults, folder))
    # Never computed, so they take no memory.
    weights = {n: mx.zeros(t.shape, DTYPES[t.dtype]) for n, t in tensors.items()}
    model = skeleton({**config, "quantization": None}, str(folder / CONFIG))
    try:
        if hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
        if quantised:
            quantise_layers(model, config["quantization"], lambda path: f"{path}.scales" in weights)
        model(mx.zeros((1, 2), mx.int32))  # a graph that is never computed: numbers of a wrong type
    except KeyError as error:
        raise ModelError(Fault(str(folder), str(error.args[0]), "missing")) from None
    except Exception as error:  # whatever mlx-lm makes of tensors or a quantisation that is wrong
        what = f"no {config['model_type']} model can be run with it: {first_line(error)}"
        raise ModelError(Fault(str(folder / CONFIG), "", what)) from None
    expected = {name: value.shape for name, value in tree_flatten(model.parameters())}
    found = {name: value.shape for name, value in weights.items()}
    for name in expected.keys() - found.keys():
        faults.append(Fault(str(folder), name, f"missing; {CONFIG} asks for it"))
    for name in found.keys() - expected.keys():
        faults.append(
            Fault(str(folder), name, f"not a tensor of the model that {CONFIG} describes")
        )
    for name in found.keys() & expected.keys():
        if found[name] != expected[name]:
            what = f"shape {list(found[name])}, where {CONFIG} asks for {list(expected[name])}"
            faults.append(Fault(str(folder), name, what))
    if faults:
        raise ModelError(*_shortened(sorted(faults, key=lambda fault: fault.field), folder))


def _shortened(faults: list[Fault], folder: Path) -> list[Fault]:
    more = len(faults) - _MAX_LISTED
    if more <= 0:
        return faults
    return [*faults[:_MAX_LISTED], Fault(str(folder), "", f"and {more} more tensors like these")]


# ---- tokenizer and notes -----------------------------------------------------------------------


def _token_faults(
    folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> Iterator[Fault]:
    """Tokens that the embedding does not have (MLX would read past its end), and no end token."""
    rows = min(t.shape[0] for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
    for path, field, token in _token_ids(folder, config):
        if token >= rows:
            what = f"token id {token}, but the embedding has {rows} rows"
            yield Fault(str(path), field, what)
    ends = [
        config.get("eos_token_id"),
        read_optional(folder / GENERATION).get("eos_token_id"),
        read_optional(folder / TOKENIZER_CONFIG).get("eos_token"),
    ]
    if all(end is None for end in ends):
        what = "no end-of-sequence token, here or in the tokenizer's files; add one"
        yield Fault(str(folder / CONFIG), "eos_token_id", what)


def _notes(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    settings = read_optional(folder / TOKENIZER_CONFIG)
    keys = [key for key in CODE_KEYS if key in config or key in settings]
    code = sorted(printable(path.name) for path in folder.glob("*.py"))
    if keys or code:
        yield f"{folder}: code of the model is ignored: {', '.join([*keys, *code])}"
    templates = [folder / f"chat_template.{kind}" for kind in ("jinja", "json")]
    if "chat_template" not in settings and not any(path.exists() for path in templates):
        yield f"{folder}: no chat template, so only rows of plain text can be trained on"


def _token_ids(folder: Path, config: dict[str, Any]) -> Iterator[tuple[Path, str, int]]:
    """Every config that names tokens, as file and field, with the highest id there.

    Those of the tokenizer are checked once it is loaded (`model.load_tokenizer`).
    """
    path = folder / GENERATION
    for where, table in ((folder / CONFIG, config), (path, read_optional(path))):
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = table.get(field)
            ids = value if isinstance(value, list) else [value]
            yield where, field, max((i for i in ids if type(i) is int), default=0)
