"""An adapter: its factors, in mlx-lm's files (a run's as well) and on a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_tuner.engine.dora import DoRALinear
from mlx_tuner.engine.lora import LoRALinear, dimensions, split_block
from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.adapter_config import ALL_LAYERS, CONFIG, MlxConfig, read_config
from mlx_tuner.models.tensors import TensorInfo, read_header
from mlx_tuner.system import files

WEIGHTS = "adapters.safetensors"

_NOTE = "mlx_tuner"
"""Key of the safetensors metadata for what a format has no field for; other programs skip it."""

_PLACES = (("", "language_model."), ("model.language_model.", "language_model.model."))
"""Prefixes of Qwen3.5's blocks: transformers' (text alone; with vision), and MLX's."""

_FLOATS = {"F32", "F16", "BF16"}
_MAX_NAME = 200


@dataclass(frozen=True)
class Adapter:
    """LoRA factors and what they mean: ``y = Wx + scale · lora_b(lora_a(x))``, or DoRA's."""

    tensors: Mapping[str, mx.array]
    """``PATH.lora_a`` (I, r) and ``PATH.lora_b`` (r, O) of each adapted module, in fp32; of DoRA
    its magnitudes ``PATH.m`` (O,) as well."""
    rank: int
    scale: float
    dropout: float = 0.0
    num_layers: int = ALL_LAYERS
    """Blocks that may be adapted, counted from the last."""
    base: str = ""
    """The base model as its user named it: a Hub name, a folder, ``builtin:NAME``."""
    revision: str | None = None
    fingerprint: str | None = None
    """Of the base's weights (see `fingerprint`); None where the adapter's maker left none."""
    folder: Path | None = None
    """Where it was read from."""

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, block by block."""
        paths = {name.rpartition(".")[0] for name in self.tensors}
        return sorted(paths, key=split_block)

    @property
    def is_dora(self) -> bool:
        """Whether the modules have magnitudes; all of them do, or none."""
        return any(name.endswith(".m") for name in self.tensors)

    @property
    def keys(self) -> list[str]:
        """The adapted modules by their paths within a block, such as ``self_attn.q_proj``."""
        return sorted({split_block(path)[1] for path in self.modules})


# ---- writing -----------------------------------------------------------------------------------


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Write the pair of files that ``mlx_lm.load(…, adapter_path=directory)`` reads, each whole.

    The base's revision and fingerprint are keys of our own beside mlx-lm's. The weights come
    first: a config is never there without them.
    """
    write_tensors(directory / WEIGHTS, adapter.tensors, "mlx", None)
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if adapter.is_dora else "lora",
        "num_layers": adapter.num_layers,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": adapter.keys,
        },
        "model": adapter.base,
        "revision": adapter.revision,
        "fingerprint": adapter.fingerprint,
    }
    files.write_json(directory / CONFIG, config)


def write_tensors(
    path: Path, tensors: Mapping[str, mx.array], made_for: str, note: Mapping[str, Any] | None
) -> None:
    """Write a safetensors file, whole or not at all, with a note that `load_tensors` returns.

    Everything is evaluated first: a lazy tensor may still be waiting to be read from `path`.
    """
    values = dict(tensors)
    mx.eval(values)
    metadata = {"format": made_for} | ({_NOTE: json.dumps(note)} if note else {})
    with files.replacing(path) as temporary:
        mx.save_safetensors(str(temporary), values, metadata)


# ---- reading -----------------------------------------------------------------------------------


def read_mlx(directory: Path) -> Adapter:
    """Read an adapter in mlx-lm's format.

    Raises:
        ModelError: it is of another kind, or its files are damaged or contradict each other; all
            faults of the tensors at once.
    """
    path = directory / CONFIG
    config = read_config(directory, MlxConfig)
    parameters = config.lora_parameters
    dora = config.fine_tune_type == "dora"
    tensors, _ = load_tensors(directory / WEIGHTS, lambda header: _check_header(header, dora))
    adapter = Adapter(
        tensors=tensors,
        rank=parameters.rank,
        scale=parameters.scale,
        dropout=parameters.dropout,
        num_layers=config.num_layers or ALL_LAYERS,
        base=config.model or "",
        revision=config.revision,
        fingerprint=config.fingerprint,
        folder=directory,
    )
    _check_against_config(adapter, path, parameters.keys)
    return adapter


def _check_header(header: Mapping[str, TensorInfo], dora: bool) -> Iterable[tuple[str, str]]:
    """What is wrong with mlx-lm's tensors by what their names and shapes say."""
    for name, info in header.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "m":
            if fault := unusable_magnitude(info, header.get(f"{module}.lora_b"), dora, axis=1):
                yield name, fault
        elif leaf not in ("lora_a", "lora_b"):
            yield name, "not a factor of a LoRA adapter"
        elif fault := unusable(module, info):
            yield name, fault
        elif (other := f"{module}.{'lora_b' if leaf == 'lora_a' else 'lora_a'}") not in header:
            yield name, f"there is no {other}"
        elif leaf == "lora_a" and info.shape[1] != header[other].shape[0]:
            yield name, f"shape {info.shape} does not go with {header[other].shape} of its lora_b"
        elif dora and f"{module}.m" not in header:
            yield name, f"there is no {module}.m"


def unusable(module: str, info: TensorInfo) -> str | None:
    """Why a factor of this module cannot be used, whatever the format."""
    if len(module) > _MAX_NAME:
        return f"a name of {len(module):,} characters"
    if info.dtype not in _FLOATS:
        return f"dtype {info.dtype}; must be one of {', '.join(sorted(_FLOATS))}"
    try:
        split_block(module)
    except ValueError:
        return "adapts a module outside the blocks (embeddings, lm_head), which is not supported"
    if len(info.shape) == 3:
        return "adapts stacked experts, which is not supported"
    if len(info.shape) != 2 or 0 in info.shape:
        return f"shape {info.shape}; must be that of a matrix"
    return None


def unusable_magnitude(info: TensorInfo, b: TensorInfo | None, dora: bool, axis: int) -> str | None:
    """Why a magnitude of DoRA cannot be used, whatever the format; `axis` of B is the outputs'."""
    if not dora:
        return "the magnitude of a DoRA adapter, but the config says that it is none"
    if info.dtype not in _FLOATS:
        return f"dtype {info.dtype}; must be one of {', '.join(sorted(_FLOATS))}"
    if b is None or len(b.shape) != 2 or info.shape != (b.shape[axis],):
        return f"shape {info.shape} does not go with its B"
    return None


def _check_against_config(adapter: Adapter, path: Path, keys: list[str] | None) -> None:
    faults = [
        Fault(
            str(path), name, f"rank {tensor.shape[1]}, but lora_parameters.rank is {adapter.rank}"
        )
        for name, tensor in adapter.tensors.items()
        if name.endswith(".lora_a") and tensor.shape[1] != adapter.rank
    ]
    if keys is not None:
        found = set(adapter.keys)
        what = {
            "{} has tensors, but is not listed": found - set(keys),
            "{} is listed, but has no tensors": set(keys) - found,
        }
        faults += [
            Fault(str(path), "lora_parameters.keys", text.format(key))
            for text, differing in what.items()
            for key in sorted(differing)
        ]
    if faults:
        raise ModelError(*faults)


def load_tensors(
    path: Path, check: Callable[[Mapping[str, TensorInfo]], Iterable[tuple[str, str]]]
) -> tuple[dict[str, mx.array], dict[str, Any] | None]:
    """The tensors of a safetensors file in fp32, in memory, and the note written with them.

    Args:
        check: from the header to a (name, fault) for everything wrong with it.

    Raises:
        ModelError: the header is wrong, `check` found faults, or values are not finite.
    """
    header = read_header(path)
    faults = [Fault(str(path), name, what) for name, what in check(header)]
    if not header:
        faults = [Fault(str(path), "", "holds no tensors")]
    if faults:
        raise ModelError(*faults)
    loaded: dict[str, mx.array]
    metadata: dict[str, str]
    loaded, metadata = mx.load(str(path), return_metadata=True)
    tensors = {name: loaded[name].astype(mx.float32) for name in sorted(loaded)}
    finite = {name: mx.isfinite(tensor).all() for name, tensor in tensors.items()}
    mx.eval(tensors, finite)
    if bad := [name for name in tensors if not finite[name].item()]:
        what = "holds NaN or infinity: the run diverged, or the file is damaged"
        raise ModelError(*(Fault(str(path), name, what) for name in bad))
    try:
        note = json.loads(metadata[_NOTE])
    except (KeyError, ValueError, RecursionError):
        note = None
    return tensors, note if isinstance(note, dict) else None


# ---- onto a model ------------------------------------------------------------------------------


def apply(model: nn.Module, adapter: Adapter) -> None:
    """Freeze the model and put a `LoRALinear` with the adapter's factors where it has any.

    Raises:
        ModelError: a module is not there, is no linear layer or has other dimensions; all of them.
    """
    where = str(adapter.folder or "adapter")
    adapter = named_as_in(model, adapter)
    modules = dict(model.named_modules())
    faults, layers = [], []
    for path in adapter.modules:
        a, b = adapter.tensors[f"{path}.lora_a"], adapter.tensors[f"{path}.lora_b"]
        linear = modules.get(path)
        if not isinstance(linear, (nn.Linear, nn.QuantizedLinear)):
            faults.append(Fault(where, path, "the model has no such linear layer"))
            continue
        outputs, inputs = dimensions(linear)
        if (a.shape[0], b.shape[1]) != (inputs, outputs):
            what = f"from {a.shape[0]} to {b.shape[1]}, but the model's is {inputs} to {outputs}"
            faults.append(Fault(where, path, what))
            continue
        kind = DoRALinear if f"{path}.m" in adapter.tensors else LoRALinear
        layer = kind(
            linear,
            rank=adapter.rank,
            scale=adapter.scale,
            dropout=adapter.dropout,
            key=mx.random.key(0),
        )
        layer.lora_a, layer.lora_b = a, b
        if isinstance(layer, DoRALinear):
            layer.m = adapter.tensors[f"{path}.m"]
        layers.append((path, layer))
    if faults:
        raise ModelError(*faults)
    model.freeze()
    model.update_modules(tree_unflatten(layers))


def named_as_in(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter by the names of MLX's modules; of Qwen3.5, PEFT knows them by others."""
    there = dict(model.named_modules())
    for theirs, ours in (("", ""), *_PLACES):
        tensors = {ours + n.removeprefix(theirs): t for n, t in adapter.tensors.items()}
        if all(name.rpartition(".")[0] in there for name in tensors):
            return replace(adapter, tensors=tensors)
    return adapter
