"""Writes a model's folder: weights one tensor at a time, config, tokenizer."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner.errors import Fault, ModelError, RunError, UsageError
from mlx_tuner.models.folder import CODE_KEYS, CONFIG, TOKENIZER_CONFIG, read_optional
from mlx_tuner.models.model_files import ModelFiles
from mlx_tuner.models.weights import write_weights
from mlx_tuner.system import files
from mlx_tuner.system.foreign import COMPANIONS

if TYPE_CHECKING:
    from mlx_tuner.show.progress import Display

CARD = "README.md"
DROPPED = {*CODE_KEYS, "_name_or_path", "vision_config"}  # mlx-lm converts the language model


class Work:
    """What a model's folder will hold: config, and tensors that are computed while it is written.

    Attributes:
        source: the checked model that it is made from.
        form: dtypes, or bits and group size, in words.
        weights: the tensors that are not written yet, by name.
        bytes: of all weights.
    """

    def __init__(
        self, source: ModelFiles, config: dict[str, Any], weights: dict[str, mx.array], form: str
    ) -> None:
        self.source, self.config, self.weights, self.form = source, config, weights, form
        self.bytes = sum(value.nbytes for value in weights.values())

    def compute(self, name: str) -> mx.array:
        """Take a tensor out of `weights`, computed.

        Raises:
            ModelError: it is not finite.
        """
        value = self.weights.pop(name)
        mx.eval(value)
        self.check(name, value)
        return value

    def check(self, name: str, value: mx.array) -> None:
        """Raise ModelError for a computed tensor that must not be written."""

    @contextmanager
    def written(self, output: Path, display: Display, doing: str) -> Iterator[Path]:
        """The folder in the making; at the end of the block it is the new folder `output`.

        Args:
            doing: what is shown meanwhile, before the form.
        """
        require_space(output, self.bytes)
        with files.staging(output) as folder:
            with display.task(f"{doing} {self.form}", self.bytes) as advance:
                write_weights(folder, self.weights, self.compute, advance)
            copy_companions(self.source.folder, folder)
            files.write_json(folder / CONFIG, self.config)
            yield folder


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


def require_outside(output: Path, folder: Path, whose: str) -> None:
    """Refuse an output within the folder of the model that it is made from."""
    if output.resolve().is_relative_to(folder.resolve()):
        what = f"lies in the {whose}'s own folder {folder}; choose another"
        raise UsageError(Fault(str(output), "", what))


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


def card_table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values as lines of Markdown."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
