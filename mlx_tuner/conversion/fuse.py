"""Merges an adapter into its base, and compares the result with the adapter on its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner import __version__
from mlx_tuner.conversion.fidelity import ROWS, Fidelity, Rows, compare, fixed_rows, require_kept
from mlx_tuner.conversion.logits import load_in_float32
from mlx_tuner.conversion.work import CARD, DROPPED, Work, card_table, quantise, require_outside
from mlx_tuner.data.encode import END
from mlx_tuner.engine import lora
from mlx_tuner.errors import Fault, ModelError, TunerError
from mlx_tuner.models.adapter import Adapter, apply, named_as_in
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.base import check_base, resolve_base
from mlx_tuner.models.folder import CODE_KEYS, GENERATION, read_optional
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.models.model_files import ModelFiles, check_model_folder
from mlx_tuner.models.weights import is_finite
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.runs import own
from mlx_tuner.runs.place import LOSS_PLOT, RECIPE
from mlx_tuner.runs.run import read_summary
from mlx_tuner.system import files
from mlx_tuner.training import assembly

if TYPE_CHECKING:
    from mlx_tuner.runs.metrics import Summary
    from mlx_tuner.show.progress import Display

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Fused:
    """What was made."""

    source: Path
    base: str
    """As the user names it."""
    form: str
    """Dtypes, or bits and group size, in words."""
    bytes: int
    """Of the weights."""
    check: Fidelity


def fuse(
    source: Path,
    output: Path,
    display: Display,
    *,
    model: str | None = None,
    bits: int | None = None,
    group_size: int = 64,
) -> Fused:
    """Merge a run's adapter, or any adapter, into its base, as the new folder `output`.

    The weights are summed in float32 and written in the base's dtype, under the base's own names.
    A quantised base is dequantised. `output` is complete and checked, or not there at all.

    Args:
        model: the base; by default the one that the adapter names.
        bits: 4 or 8 to quantise the result.

    Raises:
        UsageError: `output` cannot be a new folder.
        ModelError: adapter or base cannot be used or do not belong together, or the result does
            not answer as the adapter does.
        RunError: the disk is too small, or writing failed.
    """
    output = output.absolute()
    files.require_new(output)
    adapter = read_adapter(source)
    base = open_base(adapter, model)
    require_outside(output, base.folder, "base")
    work = _Merged(base, adapter, bits, group_size)
    with work.written(output, display, "fusing into") as folder:
        _write_end_tokens(base, folder)
        with display.task("comparing the result with the adapter"):
            rows = rows_to_compare(source, base.folder)
            check = compare(
                rows, base.folder, adapter, lambda: load_in_float32(folder), work.quantise_alike
            )
        require_kept(check, output, quantised=bits is not None)
        made = Fused(source, model or adapter.base, work.form, work.bytes, check)
        _write_card(folder, made)
    return made


def open_base(adapter: Adapter, model: str | None = None) -> ModelFiles:
    """The checked base of an adapter, or `model` in its place.

    Raises:
        ModelError: it cannot be had, or is not the one that the adapter was trained on.
    """
    base = check_model_folder(resolve_base(adapter, model))
    check_base(adapter, base.folder)
    return base


# ---- the weights -------------------------------------------------------------------------------


def merge(base: Path, adapter: Adapter, dtype: mx.Dtype | None = None) -> nn.Module:
    """The base, dense, with the adapter in its weights; nothing is read or computed yet.

    Args:
        dtype: of the adapted layers; the base's by default.
    """
    model, _ = mlx_lm_utils.load_model(base, lazy=True)
    apply(model, adapter)
    lora.fuse_all(model, dtype)
    return mlx_lm_utils.dequantize_model(model)


class _Merged(Work):
    """An adapter in its base, under the base's own names unless it is quantised."""

    def __init__(
        self, base: ModelFiles, adapter: Adapter, bits: int | None, group_size: int
    ) -> None:
        model = merge(base.folder, adapter)
        self._fused = {f"{path}.weight" for path in named_as_in(model, adapter).modules}
        self.quantise_alike: Callable[[nn.Module], nn.Module] | None = None
        if bits is not None:
            config = {k: v for k, v in _dense_config(base.config).items() if k not in DROPPED}
            config = quantise(model, config, bits, group_size, base.folder)
            weights = dict(tree_flatten(model.parameters()))
            form = f"{bits} bits in groups of {group_size}"
            self.quantise_alike = lambda model: _rounded(model, base, bits, group_size)
        else:
            config = _dense_config(base.config)
            weights = self._named_as_in(base, model)
            dtypes = {str(v.dtype).rpartition(".")[2] for v in weights.values()}
            form = " and ".join(sorted(dtypes))
        super().__init__(base, config, weights, form)

    def _named_as_in(self, base: ModelFiles, model: nn.Module) -> dict[str, mx.array]:
        """The model's tensors as the base's files name them, which other programs know."""
        if "quantization" in base.config:
            return dict(tree_flatten(model.parameters()))  # made by MLX, so named by it
        tensors: dict[str, mx.array] = {}
        for shard in base.shards:
            tensors |= mx.load(str(shard))
        kept = model.sanitize(dict(tensors)) if hasattr(model, "sanitize") else tensors
        originals = {id(value): name for name, value in tensors.items()}
        names = {name: originals.get(id(value)) for name, value in kept.items()}
        fused = dict(tree_flatten(model.parameters()))
        for name in self._fused:
            if (original := names[name]) is None:
                what = (
                    "is stored in a form of its own in the base; convert the base with "
                    "mlx-tune convert, and train on that"
                )
                raise ModelError(Fault(str(base.folder), name, what))
            tensors[original] = fused[name]
        self._fused = {str(names[name]) for name in self._fused}
        return tensors

    def check(self, name: str, value: mx.array) -> None:
        if name in self._fused and mx.issubdtype(value.dtype, mx.floating) and not is_finite(value):
            what = f"is not finite in {value.dtype} once the adapter is in it"
            raise ModelError(Fault(str(self.source.folder), name, what))


def _dense_config(config: dict[str, Any]) -> dict[str, Any]:
    dropped = {*CODE_KEYS, "_name_or_path", "quantization", "quantization_config"}
    return {key: value for key, value in config.items() if key not in dropped}


def _rounded(model: nn.Module, base: ModelFiles, bits: int, group_size: int) -> nn.Module:
    """The model with its layers quantised."""
    quantise(model, _dense_config(base.config), bits, group_size, base.folder)
    return model


def _write_end_tokens(base: ModelFiles, folder: Path) -> None:
    """Give `generation_config.json` every token that ends an answer.

    A base model's may list the end of a text only; fine-tuned on chats, it ends turns as well.
    """
    path = folder / GENERATION
    settings = read_optional(path)
    tokenizer = load_tokenizer(base.folder)
    ends: list[int | None] = []
    for listed in (settings.get("eos_token_id"), base.config.get("eos_token_id")):
        ends += listed if isinstance(listed, list) else [listed]
    ends += sorted(tokenizer.eos_token_ids)
    if tokenizer.has_chat_template:
        ends.append(tokenizer.get_vocab().get(END))
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    files.write_json(path, settings | {"eos_token_id": unique})


# ---- what a run left ---------------------------------------------------------------------------


def recipe_of(source: Path) -> Recipe | None:
    """The recipe of a run; None for an adapter without one."""
    try:
        return load_recipe(source / RECIPE, check_paths=False)
    except TunerError:
        return None


def rows_to_compare(source: Path, base: Path) -> Rows:
    """Held-out rows of the run, or rows that it trained on; fixed prompts where it left none.

    Fixed prompts for a stranger's run as well, whose recipe may name any file or data set.
    """
    recipe = recipe_of(source) if own.is_own(source) else None
    if recipe is None:
        return fixed_rows(base)
    try:
        data = assembly.open_data(recipe, load_tokenizer(base))
        name = "training rows of the run" if data.valid is None else "held-out rows of the run"
        dataset = data.train if data.valid is None else data.valid
        examples = dataset.examples(range(min(ROWS, len(dataset))))
    except TunerError:  # the rows have moved, or changed
        return fixed_rows(base)
    rows = Rows.of(name, [(e.tokens.tolist(), e.loss_mask) for e in examples])
    return rows if len(rows.positions) else fixed_rows(base)


# ---- the card ----------------------------------------------------------------------------------


def _write_card(folder: Path, made: Fused) -> None:
    """The model card: what it is, its recipe, losses and plot. It has no date and no path."""
    named = made.base.count("/") == 1 and not Path(made.base).expanduser().exists()
    base = made.base if named else Path(made.base).name
    summary, recipe = _summary(made.source), recipe_of(made.source)
    library = "mlx" if "bits" in made.form else "transformers"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    lines += ["tags:", "- lora", "- mlx"]
    if named:
        lines += ["base_model:", f"- {base}"]
    lines += ["---", "", f"# {made.source.resolve().name}", ""]
    lines += [f"{base}, fine-tuned with LoRA and fused by mlx-tune {__version__}.", ""]
    if summary is not None:
        lines += ["## Training", "", *card_table(_training(summary)), ""]
    plot = made.source / LOSS_PLOT
    if plot.is_file() and (image := plot.read_bytes()).startswith(_PNG):
        files.write_bytes(folder / LOSS_PLOT, image)
        lines += [f"![Training and validation loss]({LOSS_PLOT})", ""]
    if recipe is not None:
        lines += ["## Recipe", "", "```toml", _without_places(recipe), "```", ""]
    lines += ["## Fusing", ""]
    lines += [f"Weights in {made.form}, compared with the adapter on its base in float32:", ""]
    lines += [*card_table(made.check.lines()), ""]
    files.write_text(folder / CARD, "\n".join(lines))


def _training(summary: Summary) -> list[tuple[str, str]]:
    rows = [
        ("rows", f"{summary.rows:,}"),
        ("steps", f"{summary.steps:,}"),
        ("epochs", f"{summary.epochs:g}"),
        ("trainable parameters", f"{summary.trainable_parameters:,}"),
        ("first loss", f"{summary.first_loss:.4f}"),
        ("final loss", f"{summary.final_loss:.4f}"),
    ]
    if summary.best_val_loss is not None:
        best = f"{summary.best_val_loss:.4f} at step {summary.best_step}"
        rows.append(("best validation loss", best))
    return rows


def _summary(source: Path) -> Summary | None:
    try:
        return read_summary(source)
    except TunerError:
        return None


def _without_places(recipe: Recipe) -> str:
    """The recipe as text, with the names of its files but not where they are."""

    def named(table: Any, *keys: str) -> Any:
        values = {key: getattr(table, key) for key in keys}
        names = {k: Path(v).name for k, v in values.items() if isinstance(v, str) and v[:1] == "/"}
        return table.model_copy(update=names)

    return (
        replace(
            recipe,
            model=named(recipe.model, "path"),
            data=named(recipe.data, "train", "valid"),
            lora=named(recipe.lora, "init_from"),
        )
        .to_toml()
        .strip()
    )
