"""PEFT's adapter folders, in and out, without a rounding that cannot be undone.

PEFT (https://huggingface.co/docs/peft, "LoRA checkpoint format") stores ``lora_A`` (r, I) and
``lora_B`` (O, r), and scales by alpha / r, or by alpha / √r (rsLoRA). What is written here has
``lora_alpha = r``, an integer, and our scale folded into ``lora_B``: readers that know neither
rsLoRA nor patterns, or that take alpha as an integer only, get the same model.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models import adapter as adapters
from mlx_tuner.models.adapter import Adapter, number, split_block, text, whole_number
from mlx_tuner.models.tensors import TensorInfo, read_header
from mlx_tuner.system import files

CONFIG = adapters.CONFIG
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

_STEM = "language_model."
"""Where MLX keeps the blocks of Qwen3.5. transformers' `AutoModelForCausalLM` has no such part."""
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

# Fields that change what the adapter computes, in ways that a scaled product of two factors is not.
_MUST_BE_OFF = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("trainable_token_indices", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)

# Other ways to initialise (PiSSA, OLoRA, LoftQ, …) change the base's weights as well.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")

# Patterns come with the file: only those that no regular expression engine can take long over.
_PATTERN = re.compile(r"(?:[\w.^$|\\-]|\[[\w-]+\]|\([\w.|\\]+\)(?![*+?])|[*+?](?![*+?])){1,200}")
_MAX_REPEATS = 3


# ---- out ---------------------------------------------------------------------------------------


def export_peft(source: Path, output: Path) -> Adapter:
    """Write the adapter of a run, or any adapter, as the new PEFT folder `output`.

    Raises:
        UsageError: `output` cannot be a new folder.
        ModelError: as `adapter.read_adapter` does.
    """
    output = output.absolute()
    files.require_new(output)
    adapter = adapters.read_adapter(source)
    with files.staging(output) as folder:
        write_peft(folder, adapter)
    return adapter


def write_peft(directory: Path, adapter: Adapter) -> None:
    """Write the adapter as `peft.PeftModel.from_pretrained` reads it.

    An adapter that was imported comes out as it came in, bit for bit. Of any other, what PEFT has
    no field for (our scale, and how `lora_B` was rounded when it was folded in) goes into the
    tensors' metadata, from which `read_peft` restores it exactly.
    """
    config, tensors, note = _imported(adapter) or _folded(adapter)
    adapters.write_tensors(directory / WEIGHTS, tensors, "pt", note)
    files.write_json(directory / CONFIG, config)


def _folded(adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, Any] | None]:
    """The adapter with `lora_alpha = r`: its config, tensors and note."""
    stem = _STEM if all(path.startswith(_STEM) for path in adapter.modules) else ""
    short = {name.removeprefix(stem): tensor for name, tensor in adapter.tensors.items()}
    adapter = replace(adapter, tensors=short)
    tensors: dict[str, mx.array] = {}
    steps: dict[str, str] = {}
    for path in adapter.modules:
        b = adapter.tensors[f"{path}.lora_b"]
        folded, packed = _fold(b, adapter.scale)
        if packed is not None:
            steps[path] = packed
        tensors[_PREFIX + path + _A] = mx.contiguous(adapter.tensors[f"{path}.lora_a"].T)
        tensors[_PREFIX + path + _B] = mx.contiguous(folded.T)
    note = {
        **({"stem": stem} if stem else {}),
        "scale": adapter.scale,
        "num_layers": adapter.num_layers,
        "revision": adapter.revision,
        "fingerprint": adapter.fingerprint,
        "steps": steps,
    }
    targets, layers = _selection(adapter)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": adapter.dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return config, tensors, note


def _selection(adapter: Adapter) -> tuple[list[str], list[int] | None]:
    """`target_modules` and `layers_to_transform` that select the adapted modules and no other."""
    found = [split_block(path) for path in adapter.modules]
    blocks = sorted({block for block, _ in found})
    if len(found) != len(blocks) * len(adapter.keys):
        return adapter.modules, None
    targets = sorted({key.rpartition(".")[2] for key in adapter.keys})
    every_block = blocks == list(range(adapter.num_layers))
    return targets, None if every_block else blocks


def _imported(adapter: Adapter) -> tuple[dict[str, Any], dict[str, mx.array], None] | None:
    """The PEFT adapter that this one was imported from, or None if importing it gives another."""
    try:
        assert adapter.origin is not None
        config, dtypes = adapter.origin["config"], adapter.origin["dtypes"]
        steps = adapter.origin["steps"]
        source = Path(CONFIG)
        tensors = {}
        for path in adapter.modules:
            rank, scale = _rank_and_scale(config, path, source)
            a = adapter.tensors[f"{path}.lora_a"][:, :rank]
            b = adapter.tensors[f"{path}.lora_b"][:rank]
            b = _unfold(b, _ratio(scale, adapter.scale), steps.get(path))
            tensors[_PREFIX + path + _A] = mx.contiguous(a.T)
            tensors[_PREFIX + path + _B] = mx.contiguous(b.T)
        for name, dtype in dtypes.items():
            tensors[name] = tensors[name].astype(_DTYPES[dtype])
        again = _merge_scales(config, source, {n: t.astype(mx.float32) for n, t in tensors.items()})
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError, ModelError):
        return None
    same = (again.rank, again.scale) == (adapter.rank, adapter.scale) and _equal(
        again.tensors, adapter.tensors
    )
    return (config, tensors, None) if same else None


# ---- in ----------------------------------------------------------------------------------------


def read_peft(directory: Path) -> Adapter:
    """Read a PEFT LoRA adapter for linear layers.

    Ranks that differ are padded with zeros to the largest. One scale for all modules stays as it
    is; of several, the most frequent one stays and the rest is folded into `lora_b`.

    Raises:
        ModelError: it is another kind of adapter, or its files are damaged or contradict each
            other; all faults of the tensors at once.
    """
    path = directory / CONFIG
    config = adapters.read_config(directory)
    _check_config(config, path)
    header = read_header(directory / WEIGHTS)
    tensors, note = adapters.load_tensors(
        directory / WEIGHTS, lambda header: _check_header(header, config, path)
    )
    merged = _merge_scales(config, path, tensors)
    ours = replace(
        merged,
        dropout=number(path, "lora_dropout", config.get("lora_dropout", 0.0)),
        base=text(path, "base_model_name_or_path", config.get("base_model_name_or_path")) or "",
        revision=text(path, "revision", config.get("revision")),
        folder=directory,
    )
    if note is not None and (restored := _restored(ours, note)) is not None:
        return restored
    dtypes = {name: info.dtype for name, info in header.items() if info.dtype != "F32"}
    return replace(ours, origin={**(ours.origin or {}), "config": config, "dtypes": dtypes})


def _restored(folded: Adapter, note: Mapping[str, Any]) -> Adapter | None:
    """The adapter that `_folded` wrote with this note, or None if it would write another one."""
    if folded.scale != 1.0:
        return None
    try:
        where = folded.folder or Path(CONFIG)
        scale = number(where, "scale", note["scale"])
        steps = note["steps"]
        tensors = dict(folded.tensors)
        for path in folded.modules:
            name = f"{path}.lora_b"
            tensors[name] = _unfold(tensors[name], scale, steps.get(path))
            if not _equal({name: _fold(tensors[name], scale)[0]}, folded.tensors, [name]):
                return None
        stem = _STEM if note.get("stem") == _STEM else ""
        return replace(
            folded,
            tensors={stem + name: tensor for name, tensor in tensors.items()},
            scale=scale,
            num_layers=whole_number(where, "num_layers", note["num_layers"], adapters.ALL_LAYERS),
            fingerprint=text(where, "fingerprint", note["fingerprint"]),
            origin=None,
        )
    except (KeyError, TypeError, ValueError, ModelError):
        return None


def _merge_scales(
    config: Mapping[str, Any], path: Path, tensors: Mapping[str, mx.array]
) -> Adapter:
    """One rank and one scale for all modules; its origin says how the rest was folded in."""
    modules = sorted({_module(name) for name in tensors}, key=split_block)
    scales = {module: _rank_and_scale(config, module, path)[1] for module in modules}
    scale = Counter(scales.values()).most_common(1)[0][0]
    rank = max(tensors[_PREFIX + module + _A].shape[0] for module in modules)
    merged: dict[str, mx.array] = {}
    steps: dict[str, str] = {}
    for module in modules:
        a = tensors[_PREFIX + module + _A].T
        b = tensors[_PREFIX + module + _B].T
        b, packed = _fold(b, _ratio(scales[module], scale))
        if packed is not None:
            steps[module] = packed
        missing = rank - a.shape[1]
        merged[f"{module}.lora_a"] = mx.contiguous(mx.pad(a, [(0, 0), (0, missing)]))
        merged[f"{module}.lora_b"] = mx.contiguous(mx.pad(b, [(0, missing), (0, 0)]))
    return Adapter(merged, rank=rank, scale=scale, origin={"steps": steps})


def _module(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)


def _rank_and_scale(config: Mapping[str, Any], module: str, path: Path) -> tuple[int, float]:
    rank = _of_pattern(config, "rank_pattern", module, config.get("r"), path)
    rank = whole_number(path, "r", rank, least=1)
    alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), path)
    alpha = number(path, "lora_alpha", alpha)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(
    config: Mapping[str, Any], field: str, module: str, default: Any, path: Path
) -> Any:
    """The value of the first pattern that a module's path ends with, as PEFT looks it up."""
    for pattern, value in (config.get(field) or {}).items():
        repeats = sum(pattern.count(c) for c in "*+?")
        if not _PATTERN.fullmatch(pattern) or repeats > _MAX_REPEATS:
            what = f"the pattern {pattern!r} is too complicated; write the modules' names"
            raise ModelError(Fault(str(path), field, what))
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ModelError(Fault(str(path), field, f"{pattern!r}: {error}")) from None
    return default


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    faults = []
    if (kind := config.get("peft_type")) != "LORA":
        faults.append(Fault(str(path), "peft_type", f"{kind!r}; only 'LORA' is supported"))
    if (bias := config.get("bias", "none")) != "none":
        faults.append(Fault(str(path), "bias", f"{bias!r} trains biases, which is not supported"))
    faults += [
        Fault(str(path), field, "is set, which is not supported")
        for field in _MUST_BE_OFF
        if config.get(field)
    ]
    if (init := config.get("init_lora_weights")) not in _HARMLESS_INITS:
        what = (
            f"{init!r} changes the base's weights; save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
        faults.append(Fault(str(path), "init_lora_weights", what))
    if not isinstance(config.get("layers_to_transform"), (int, list, type(None))):
        faults.append(Fault(str(path), "layers_to_transform", "must be a list of numbers"))
    faults += [
        Fault(str(path), field, "must be a table")
        for field in ("rank_pattern", "alpha_pattern")
        if not isinstance(config.get(field) or {}, dict)
    ]
    if faults:
        raise ModelError(*faults)


def _check_header(
    header: Mapping[str, TensorInfo], config: Mapping[str, Any], path: Path
) -> Iterable[tuple[str, str]]:
    """What is wrong with PEFT's tensors by what their names, shapes and the config say."""
    for name, info in header.items():
        module = _module(name)
        if "lora_magnitude_vector" in name:
            yield name, "the magnitude of a DoRA adapter, which is not supported"
        elif "lora_embedding_" in name:
            yield name, "adapts an embedding, which is not supported"
        elif not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
            yield name, f"not named {_PREFIX}….lora_A.weight or ….lora_B.weight"
        elif fault := adapters.unusable(module, info):
            yield name, fault
        elif (other := _PREFIX + module + (_B if name.endswith(_A) else _A)) not in header:
            yield name, f"there is no {other}"
        elif not _selected(config, module):
            yield name, "adapts a module that target_modules and layers_to_transform leave out"
        else:
            rank, _ = _rank_and_scale(config, module, path)
            if (found := info.shape[0 if name.endswith(_A) else 1]) != rank:
                yield name, f"rank {found}, but {CONFIG} says {rank}"


def _selected(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt the module; a pattern as `target_modules` is taken on trust."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return True
    layers = config.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    return any(f".{module}".endswith(f".{target}") for target in targets) and (
        not layers or split_block(module)[0] in layers
    )


# ---- folding that can be undone ------------------------------------------------------------------


def _ratio(scale: float, common: float) -> float:
    return 1.0 if scale == common else scale / common


def _fold(b: mx.array, factor: float) -> tuple[mx.array, str | None]:
    """``factor · b`` in fp32, and the steps by which `_unfold` finds `b` again.

    Unless the factor is a power of two, rounding makes neighbouring values of `b` equal; dividing
    comes within a few representable numbers of `b`. The steps say how many, and which way; as text,
    about 2 bits each. None where all are zero.
    """
    if factor == 1.0:
        return b, None
    exact = np.array(b)
    with np.errstate(all="ignore"):
        folded = exact * np.float32(factor)
        near = folded / np.float32(factor)
    steps = exact.view(np.int32).astype(np.int64) - near.view(np.int32)
    small = np.abs(steps).max() <= 127  # they are 2 at most, but next to under- and overflow
    if not (small and steps.any()):
        return mx.array(folded), None
    packed = zlib.compress(steps.astype(np.int8).tobytes(), 9)
    return mx.array(folded), base64.b64encode(packed).decode("ascii")


def _unfold(folded: mx.array, factor: float, steps: str | None) -> mx.array:
    """The `b` that `_fold` was given.

    Raises:
        ValueError: the steps do not belong to it.
    """
    if factor == 1.0:
        return folded
    with np.errstate(all="ignore"):
        bits = (np.array(folded) / np.float32(factor)).view(np.int32)
    if steps is not None:
        try:
            # No more than is due, whatever the text would unpack to.
            raw = zlib.decompressobj().decompress(base64.b64decode(steps), bits.size)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        bits = bits + np.frombuffer(raw, np.int8).reshape(bits.shape)
    return mx.array(bits.view(np.float32))


def _equal(
    left: Mapping[str, mx.array], right: Mapping[str, mx.array], names: list[str] | None = None
) -> bool:
    """Whether the named tensors (all, by default) are equal bit for bit."""
    if names is None and left.keys() != right.keys():
        return False
    return all(
        left[name].shape == right[name].shape
        and np.array_equal(
            np.array(left[name]).view(np.int32), np.array(right[name]).view(np.int32)
        )
        for name in names or left
    )
