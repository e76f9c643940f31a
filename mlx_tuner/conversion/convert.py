"""A model in Hugging Face layout becomes an MLX folder: cast or quantised, streamed and verified.

mlx-lm does the work on the model. Here the input is checked before a byte is written, the weights
pass through memory a tensor at a time, and the result's logits are compared with the source's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner import __version__
from mlx_tuner.conversion.fidelity import PROMPT, LogitError, compare_logits
from mlx_tuner.conversion.work import CARD, DROPPED, Work, card_table, quantise, require_outside
from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.architecture import DTYPE_KEYS, config_dtype
from mlx_tuner.models.model import load_tokenizer, resolve
from mlx_tuner.models.model_files import ModelFiles, check_model_folder
from mlx_tuner.models.weights import is_finite
from mlx_tuner.system import files

if TYPE_CHECKING:
    from mlx_tuner.show.progress import Display


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
class Conversion:
    """What was made."""

    model: str
    commit: str | None
    """Of a Hub model."""
    form: str
    """Dtype, or bits and group size, in words."""
    bytes: int
    """Of the weights."""
    check: LogitError | None
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
    require_outside(output, source.folder, "model")
    tokenizer = load_tokenizer(source.folder)
    work = _Converted(source, dtype, bits, group_size)
    with work.written(output, display, f"converting {model} to") as folder:
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
        made = Conversion(model, commit, work.form, work.bytes, check, source.notes)
        files.write_text(folder / CARD, _card(made))
    return made


class _Converted(Work):
    """A model in another dtype or in fewer bits, and the largest error that this explains."""

    def __init__(
        self, source: ModelFiles, dtype: str | None, bits: int | None, group_size: int
    ) -> None:
        if "quantization" in source.config:
            what = "is quantised already; convert the model that it was made from"
            raise ModelError(Fault(str(source.folder), "", what))
        model, _ = mlx_lm_utils.load_model(source.folder, lazy=True)
        self._sources = dict(tree_flatten(model.parameters()))
        config = {k: v for k, v in source.config.items() if k not in DROPPED}
        self._dtype = dtype or config_dtype(config)
        if self._dtype is not None:
            _cast(model, getattr(mx, self._dtype))
            _set_config_dtype(config, self._dtype)
        self._dense = dict(tree_flatten(model.parameters()))
        lossless = all(
            value.dtype in (self._sources[name].dtype, mx.float32)
            for name, value in self._dense.items()
        )
        form = self._dtype or "the dtypes of the source"
        self.tolerance = _TOLERANCE["exact" if lossless else form]
        if bits is not None:
            config = quantise(model, config, bits, group_size, source.folder)
            form = f"{bits} bits in groups of {group_size}"
            self.tolerance = _TOLERANCE[bits]
        super().__init__(source, config, dict(tree_flatten(model.parameters())), form)

    def check(self, name: str, value: mx.array) -> None:
        # A layer is looked at before it is quantised: scales could hide what is not finite.
        source, dense = self._sources.pop(name, None), self._dense.pop(name, None)
        if dense is None or is_finite(dense):
            return
        if source is not None and is_finite(source):
            what = f"holds numbers too large for {self._dtype}; take --dtype bfloat16"
        else:
            what = "holds NaN or infinity; the model is damaged, download it again"
        raise ModelError(Fault(str(self.source.folder), name, what))


def _set_config_dtype(config: dict[str, Any], dtype: str) -> None:
    tables = [config]
    if "text_config" in config:
        config["text_config"] = dict(config["text_config"])
        tables.append(config["text_config"])
    keys = [(table, key) for table in tables for key in DTYPE_KEYS if key in table]
    for table, key in keys or [(config, "torch_dtype")]:
        table[key] = dtype


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    takes = getattr(model, "cast_predicate", lambda _: True)
    model.update(
        tree_map_with_path(
            lambda path, value: value.astype(dtype) if takes(path) else value, model.parameters()
        )
    )


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
            *card_table(made.check.lines()),
            "",
        ]
    lines += ["```sh", "mlx_lm.generate --model . --prompt hello", "```", ""]
    return "\n".join(lines)
