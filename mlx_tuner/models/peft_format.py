"""PEFT's adapter folders, in and out.

PEFT (https://huggingface.co/docs/peft, "LoRA checkpoint format") stores ``lora_A`` (r, I) and
``lora_B`` (O, r), and scales by alpha / r, or by alpha / √r (rsLoRA). Written is
``lora_alpha = r``, an integer, with our scale folded into ``lora_B`` where that rounds nothing (the
scale is a power of two, as it mostly is), so that readers which take alpha as an integer only get
the same model; elsewhere ``lora_alpha = scale · r``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlx_tuner.engine.lora import split_block
from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.adapter import (
    Adapter,
    load_tensors,
    unusable,
    unusable_magnitude,
    write_tensors,
)
from mlx_tuner.models.adapter_config import CONFIG, PeftConfig, read_config
from mlx_tuner.models.tensors import TensorInfo
from mlx_tuner.system import files

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

_STEM = "language_model."
"""Where MLX keeps the blocks of Qwen3.5. transformers' `AutoModelForCausalLM` has no such part."""

_MAX_MATCHING = 10**9
"""Steps that matching the patterns may take at worst, a few seconds."""

_MAX_PADDING = 16
_SMALL = 100_000_000
"""Numbers that padding unequal ranks may make: this many, or 16 times those that are stored."""

_Value = TypeVar("_Value")


# ---- out ---------------------------------------------------------------------------------------


def write_peft(directory: Path, adapter: Adapter) -> None:
    """Write the adapter as `peft.PeftModel.from_pretrained` reads it.

    What PEFT has no field for goes into the tensors' metadata, from which `read_peft` restores the
    adapter exactly.
    """
    stem = _STEM if all(path.startswith(_STEM) for path in adapter.modules) else ""
    note = {
        "stem": stem,
        "scale": adapter.scale,
        "num_layers": adapter.num_layers,
        "fingerprint": adapter.fingerprint,
    }
    short = {name.removeprefix(stem): tensor for name, tensor in adapter.tensors.items()}
    adapter = replace(adapter, tensors=short)
    factor = adapter.scale if _folds_exactly(adapter) else 1.0
    tensors: dict[str, mx.array] = {}
    for path in adapter.modules:
        a, b = short[f"{path}.lora_a"], short[f"{path}.lora_b"]
        tensors[_PREFIX + path + _A] = mx.contiguous(a.T)
        tensors[_PREFIX + path + _B] = mx.contiguous((b * factor).T)
        if adapter.is_dora:
            tensors[_PREFIX + path + _M] = short[f"{path}.m"]
    targets, layers = _selection(adapter)
    alpha = adapter.scale * adapter.rank
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank if factor != 1.0 else int(alpha) if alpha % 1 == 0 else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": adapter.is_dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    write_tensors(directory / WEIGHTS, tensors, "pt", note)
    files.write_json(directory / CONFIG, config)


def _folds_exactly(adapter: Adapter) -> bool:
    """Whether multiplying `lora_b` by the scale, and dividing again, changes no bit."""
    if abs(math.frexp(adapter.scale)[0]) != 0.5:  # no power of two
        return False
    return _survives(adapter, adapter.scale)


def _survives(adapter: Adapter, factor: float) -> bool:
    factors = [tensor for name, tensor in adapter.tensors.items() if name.endswith(".lora_b")]
    return all(mx.array_equal(b * factor / factor, b).item() for b in factors)


def _selection(adapter: Adapter) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that select the adapted modules and no other."""
    found = [split_block(path) for path in adapter.modules]
    blocks = sorted({block for block, _ in found})
    if len(found) != len(blocks) * len(adapter.keys):
        return adapter.modules, None
    targets = sorted({key.rpartition(".")[2] for key in adapter.keys})
    every_block = blocks == list(range(adapter.num_layers))
    return targets, None if every_block else blocks


# ---- in ----------------------------------------------------------------------------------------


def read_peft(directory: Path) -> Adapter:
    """Read a PEFT LoRA adapter for linear layers.

    Ranks that differ are padded with zeros to the largest. One scale for all modules stays as it
    is; of several, the most frequent one stays and the rest is folded into `lora_b`.

    Raises:
        ModelError: it is another kind of adapter, or its files are damaged or contradict each
            other; all faults of the tensors at once.
    """
    config = read_config(directory, PeftConfig)
    tensors, note = load_tensors(
        directory / WEIGHTS, lambda header: _check_header(header, config, directory)
    )
    ranks = {module: _rank(config, module) for module in sorted(map(_module, tensors))}
    scales = {module: _scale(config, module) for module in ranks}
    rank, scale = max(ranks.values()), Counter(scales.values()).most_common(1)[0][0]
    if not scale or not all(map(math.isfinite, scales.values())):
        raise ModelError(
            Fault(str(directory / CONFIG), "lora_alpha", "gives no scale to work with")
        )
    merged: dict[str, mx.array] = {}
    for module in ranks:
        a, b = tensors[_PREFIX + module + _A].T, tensors[_PREFIX + module + _B].T
        missing = rank - ranks[module]
        if scales[module] != scale:
            b = b * (scales[module] / scale)
        merged[f"{module}.lora_a"] = mx.contiguous(mx.pad(a, [(0, 0), (0, missing)]))
        merged[f"{module}.lora_b"] = mx.contiguous(mx.pad(b, [(0, missing), (0, 0)]))
        if config.use_dora:
            merged[f"{module}.m"] = tensors[_PREFIX + module + _M]
    adapter = Adapter(
        merged,
        rank=rank,
        scale=scale,
        dropout=config.lora_dropout,
        base=config.base_model_name_or_path or "",
        revision=config.revision,
        folder=directory,
    )
    return _restored(adapter, note or {})


def _restored(adapter: Adapter, note: Mapping[str, Any]) -> Adapter:
    """The adapter that was written with this note, or `adapter` if it says what is not there."""
    scale, layers, stem = (note.get(key) for key in ("scale", "num_layers", "stem"))
    fingerprint = note.get("fingerprint")
    if (
        not isinstance(scale, float)
        or type(layers) is not int
        or stem not in ("", _STEM)
        or not isinstance(fingerprint, str | None)
        or not math.isfinite(scale)
    ):
        return adapter
    tensors = dict(adapter.tensors)
    if adapter.scale == 1.0 and abs(math.frexp(scale)[0]) == 0.5:
        if not _survives(adapter, 1 / scale):
            return adapter
        for name in tensors:
            if name.endswith(".lora_b"):
                tensors[name] = tensors[name] / scale
    elif not math.isclose(adapter.scale, scale, rel_tol=1e-12):
        return adapter  # trained on with PEFT, or alpha was changed
    return replace(
        adapter,
        tensors={stem + name: tensor for name, tensor in tensors.items()},
        scale=scale,
        num_layers=layers,
        fingerprint=fingerprint,
    )


def _module(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B).removesuffix(_M)


def _rank(config: PeftConfig, module: str) -> int:
    return _of_pattern(config.rank_pattern, module, config.r)


def _scale(config: PeftConfig, module: str) -> float:
    rank = _rank(config, module)
    alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _of_pattern(patterns: Mapping[str, _Value] | None, module: str, default: _Value) -> _Value:
    """The value of the first pattern that a module's path ends with, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_header(
    header: Mapping[str, TensorInfo], config: PeftConfig, directory: Path
) -> Iterable[tuple[str, str]]:
    """What is wrong with PEFT's tensors by what their names, shapes and the config say."""
    faults = list(_name_faults(header, config))
    if not faults:
        _require_simple_patterns(header, config, directory)
        faults = list(_rank_faults(header, config))
    if not faults:
        rank = max(_rank(config, _module(name)) for name in header) if header else 0
        wide = sum(max(info.shape) for info in header.values())
        there = sum(math.prod(info.shape) for info in header.values())
        if rank * wide > max(_MAX_PADDING * there, _SMALL):
            what = f"of the largest rank, {rank:,}, would take {rank * wide * 4 / 1e9:.1f} GB"
            faults.append(("", f"ranks that differ: all modules {what}"))
    return faults


def _name_faults(header: Mapping[str, TensorInfo], config: PeftConfig) -> Iterable[tuple[str, str]]:
    for name, info in header.items():
        module = _module(name)
        if name.startswith(_PREFIX) and name.endswith(_M):
            b = header.get(_PREFIX + module + _B)
            if fault := unusable_magnitude(info, b, config.use_dora, axis=0):
                yield name, fault
        elif "lora_embedding_" in name:
            yield name, "adapts an embedding, which is not supported"
        elif not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
            yield name, f"not named {_PREFIX}….lora_A.weight or ….lora_B.weight"
        elif fault := unusable(module, info):
            yield name, fault
        elif (other := _PREFIX + module + (_B if name.endswith(_A) else _A)) not in header:
            yield name, f"there is no {other}"
        elif config.use_dora and _PREFIX + module + _M not in header:
            yield name, f"there is no {_PREFIX + module + _M}"
        elif not _selected(config, module):
            yield name, "adapts a module that target_modules and layers_to_transform leave out"


def _rank_faults(header: Mapping[str, TensorInfo], config: PeftConfig) -> Iterable[tuple[str, str]]:
    for name, info in header.items():
        if name.endswith(_M):
            continue
        rank = _rank(config, _module(name))
        if (found := info.shape[0 if name.endswith(_A) else 1]) != rank:
            yield name, f"rank {found}, but {CONFIG} says {rank}"


def _require_simple_patterns(
    header: Mapping[str, TensorInfo], config: PeftConfig, directory: Path
) -> None:
    """Refuse patterns that take long on these names: each repeat may begin anywhere in a name."""
    patterns = [*(config.rank_pattern or {}), *(config.alpha_pattern or {})]
    longest = max(map(len, header), default=0)
    steps = sum(longest ** (1 + sum(map(pattern.count, "*+"))) for pattern in patterns)
    if steps * len(header) > _MAX_MATCHING:
        what = "too many patterns for so many modules; write the modules' names"
        raise ModelError(Fault(str(directory / CONFIG), "rank_pattern", what))


def _selected(config: PeftConfig, module: str) -> bool:
    """Whether PEFT would adapt the module; a pattern as `target_modules` is taken on trust."""
    if not isinstance(config.target_modules, list):
        return True
    layers = config.layers_to_transform
    if isinstance(layers, int):
        layers = [layers]
    targets = tuple(f".{target}" for target in config.target_modules)
    return f".{module}".endswith(targets) and (not layers or split_block(module)[0] in layers)
