"""A model in Hugging Face layout becomes an MLX folder: cast or quantised, streamed and verified.

mlx-lm does the work on the model. Here the input is checked before a byte is written, the weights
pass through memory a tensor at a time, and the result's logits are compared with the source's.
"""

from __future__ import annotations

import io
import math
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner import __version__
from mlx_tuner.conversion.logits import load_in_float32, logits_of, mean_loss
from mlx_tuner.errors import Fault, ModelError, RunError, UsageError
from mlx_tuner.models.folder import (
    CODE_KEYS,
    COMPANIONS,
    CONFIG,
    TOKENIZER_CONFIG,
    read_optional,
)
from mlx_tuner.models.model import load_tokenizer, resolve
from mlx_tuner.models.model_files import ModelFiles, check_model_folder
from mlx_tuner.models.weights import is_finite, write_weights
from mlx_tuner.system import files

if TYPE_CHECKING:
    from mlx_tuner.show.progress import Display

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
CARD = "README.md"

DROPPED = {*CODE_KEYS, "_name_or_path", "vision_config"}  # mlx-lm converts the language model
_DTYPE_KEYS = ("dtype", "torch_dtype")

PROMPT = '''def fibonacci(n):
    """Return the n-th Fibonacci number."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
'''
"""What both models read; short, since they read it in float32."""

_TOLERANCE: dict[str | int, float] = {
    "exact": 1e-5,
    "float16": 0.01,
    "bfloat16": 0.05,
    8: 0.2,
    4: 1.0,
}
"""Largest root mean square of the logits' error, in standard deviations of the logits.

Rounding to 2^-9 (bfloat16), 2^-12 (float16), or to 1/255 or 1/15 of a group's range errs by 0.1 %,
0.015 %, about 0.7 % or about 10 % of a weight's size, and some ten such errors add up on the way
through a deep model. Beyond that a result is broken: two unrelated models differ by 1.4.
"""


@dataclass(frozen=True)
class Check:
    """The result's logits against the source's on `PROMPT`, both computed in float32."""

    max_error: float
    mean_error: float
    relative_error: float
    """Root mean square of the error, in standard deviations of the source's logits."""
    source_perplexity: float
    perplexity: float

    def rows(self) -> list[tuple[str, str]]:
        """What it found, as names and values to show."""
        change = 100 * (self.perplexity / self.source_perplexity - 1)
        return [
            ("largest error of a logit", f"{self.max_error:.3g}"),
            ("mean error of a logit", f"{self.mean_error:.3g}"),
            ("error, in standard deviations", f"{self.relative_error:.3g}"),
            ("perplexity of the source", f"{self.source_perplexity:.4g}"),
            ("perplexity", f"{self.perplexity:.4g} ({change:+.2f} %)"),
        ]


@dataclass(frozen=True)
class Conversion:
    """What was made."""

    folder: Path
    model: str
    commit: str | None
    """Of a Hub model."""
    form: str
    """Dtype, or bits and group size, in words."""
    bytes: int
    """Of the weights."""
    check: Check | None
    notes: tuple[str, ...]


def convert(
    model: str,
    output: Path,
    display: Display,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    revision: str | None = None,
    verify: bool = True,
) -> Conversion:
    """Convert a model into the new folder `output`, which is then complete or not there at all.

    Args:
        model: Hub name, folder, or ``builtin:NAME``.
        bits: 4 or 8 to quantise.
        group_size: weights that share a scale.
        dtype: of what is not quantised; as the config says by default.
        verify: compare the logits, and refuse a result beyond its dtype's expected error.

    Raises:
        UsageError: `output` cannot be a new folder.
        ModelError: the model cannot be converted, or the result differs from it.
        RunError: the disk is too small, or writing failed.
    """
    output = output.absolute()
    files.require_new(output)
    source = check_model_folder(resolve(model, revision))
    if output.resolve().is_relative_to(source.folder.resolve()):
        what = f"lies in the model's own folder {source.folder}; choose another"
        raise UsageError(Fault(str(output), "", what))
    tokenizer = load_tokenizer(source.folder)
    work = _Work(source, dtype, bits, group_size)
    require_space(output, work.bytes)
    with files.staging(output) as folder:
        with display.task(f"converting {model} to {work.form}", work.bytes) as advance:
            write_weights(folder, work.weights, work.compute, advance)
        copy_companions(source.folder, folder)
        files.write_json(folder / CONFIG, work.config)
        check = None
        if verify:
            with display.task("comparing the result with the source"):
                check = compare_logits(source.folder, folder, tokenizer.encode(PROMPT))
            if not check.relative_error <= work.tolerance:
                what = (
                    f"the logits are {check.relative_error:.2g} standard deviations off, where "
                    f"{work.form} explains {work.tolerance:g}; the result was not kept"
                )
                raise ModelError(Fault(str(output), "", what))
        commit = source.folder.name if source.folder.parent.name == "snapshots" else None
        made = Conversion(output, model, commit, work.form, work.bytes, check, source.notes)
        files.write_text(folder / CARD, _card(made))
    return made


# ---- the model ---------------------------------------------------------------------------------


class _Work:
    """What a conversion writes: config, and tensors that are computed one by one and let go."""

    def __init__(
        self, source: ModelFiles, dtype: str | None, bits: int | None, group_size: int
    ) -> None:
        if "quantization" in source.config:
            what = "is quantised already; convert the model that it was made from"
            raise ModelError(Fault(str(source.folder), "", what))
        model, _ = mlx_lm_utils.load_model(source.folder, lazy=True)
        self._folder = source.folder
        self._sources = dict(tree_flatten(model.parameters()))
        self.config = {k: v for k, v in source.config.items() if k not in DROPPED}
        self.dtype = dtype or _config_dtype(self.config)
        if self.dtype is not None:
            _cast(model, DTYPES[self.dtype])
            _set_config_dtype(self.config, self.dtype)
        self._dense = dict(tree_flatten(model.parameters()))
        lossless = all(
            value.dtype in (self._sources[name].dtype, mx.float32)
            for name, value in self._dense.items()
        )
        self.form = self.dtype or "the dtypes of the source"
        self.tolerance = _TOLERANCE["exact" if lossless else self.form]
        if bits is not None:
            self.config = quantise(model, self.config, bits, group_size, source.folder)
            self.form = f"{bits} bits in groups of {group_size}"
            self.tolerance = _TOLERANCE[bits]
        self.weights = dict(tree_flatten(model.parameters()))
        self.bytes = sum(value.nbytes for value in self.weights.values())

    def compute(self, name: str) -> mx.array:
        """Take a tensor out of `weights`, computed.

        Raises:
            ModelError: it is not finite.
        """
        result, source = self.weights.pop(name), self._sources.pop(name, None)
        # A layer is looked at before it is quantised: scales could hide what is not finite.
        dense = self._dense.pop(name, None)
        mx.eval([value for value in (result, dense) if value is not None])
        if dense is not None and not is_finite(dense):
            if source is not None and is_finite(source):
                what = f"holds numbers too large for {self.dtype}; take --dtype bfloat16"
            else:
                what = "holds NaN or infinity; the model is damaged, download it again"
            raise ModelError(Fault(str(self._folder), name, what))
        return result


def _config_dtype(config: dict[str, Any]) -> str | None:
    tables = (config, config.get("text_config", {}))
    found = [table.get(key) for table in tables for key in _DTYPE_KEYS]
    return next((value for value in found if value in DTYPES), None)


def _set_config_dtype(config: dict[str, Any], dtype: str) -> None:
    tables = [config]
    if "text_config" in config:
        config["text_config"] = dict(config["text_config"])
        tables.append(config["text_config"])
    keys = [(table, key) for table in tables for key in _DTYPE_KEYS if key in table]
    for table, key in keys or [(config, "torch_dtype")]:
        table[key] = dtype


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    takes = getattr(model, "cast_predicate", lambda _: True)
    model.update(
        tree_map_with_path(
            lambda path, value: value.astype(dtype) if takes(path) else value, model.parameters()
        )
    )


def quantise(
    model: nn.Module, config: dict[str, Any], bits: int, group_size: int, folder: Path
) -> dict[str, Any]:
    """Quantise the model's layers; returns the config that says so."""
    takes = getattr(model, "quant_predicate", None) or (lambda path, layer: True)
    faults = [
        Fault(
            str(folder),
            path,
            f"{layer.weight.shape[-1]} columns are not divisible by the group "
            f"size {group_size}; choose another --group-size, or do not quantise",
        )
        for path, layer in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
        if hasattr(layer, "to_quantized")
        and layer.weight.shape[-1] % group_size
        and takes(path, layer)
    ]
    if faults:
        raise ModelError(*faults)
    with redirect_stdout(io.StringIO()):  # mlx-lm prints
        _, config = mlx_lm_utils.quantize_model(model, config, group_size, bits)
    return config


# ---- files -------------------------------------------------------------------------------------


def require_space(output: Path, needed: int) -> None:
    """Refuse to begin what will not fit on the disk of `output`; `needed` is in bytes."""
    place = next(path for path in output.parents if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        what = f"needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; make room"
        raise RunError(Fault(str(output), "", what))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a model needs besides config and weights, without any mention of code."""
    for name in COMPANIONS:
        path = source / name
        if not path.exists():
            continue
        settings = read_optional(path) if name == TOKENIZER_CONFIG else {}
        if settings.keys() & set(CODE_KEYS):
            kept = {k: v for k, v in settings.items() if k not in CODE_KEYS}
            files.write_json(folder / name, kept)
        else:
            shutil.copyfile(path, folder / name)


def _card(made: Conversion) -> str:
    """The folder's model card. It has no date and no path, so that it is the same every time."""
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    name, commit = Path(made.model).name, ""
    if made.commit is not None:
        lines += [f"base_model: {made.model}"]
        name, commit = made.model, f" at commit {made.commit}"
    lines += ["---", "", f"# {name} in {made.form}", ""]
    lines += [f"{name}{commit}, converted for MLX by mlx-tune {__version__}.", ""]
    if made.check is not None:
        lines += [
            "Compared with its source on a fixed prompt, both computed in float32:",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in made.check.rows()),
            "",
        ]
    lines += ["```sh", "mlx_lm.generate --model . --prompt hello", "```", ""]
    return "\n".join(lines)


# ---- comparison --------------------------------------------------------------------------------


def compare_logits(source: Path, result: Path, tokens: list[int]) -> Check:
    """Compare two checked folders of a model; each passes through memory a layer at a time."""
    batch, every = np.array([tokens]), np.arange(len(tokens))
    expected, found = (
        logits_of(lambda folder=folder: load_in_float32(folder), batch, every)  # type: ignore[misc]
        for folder in (source, result)
    )
    error = np.abs(found - expected)
    spread = float(np.sqrt(expected.var(axis=-1).mean()))
    rms = float(np.sqrt(np.mean(np.square(error))))
    return Check(
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        relative_error=rms / spread if rms else 0.0,
        source_perplexity=math.exp(mean_loss(expected[:-1], batch[0, 1:])),
        perplexity=math.exp(mean_loss(found[:-1], batch[0, 1:])),
    )
