"""From a recipe to the parts of a run: data, schedule, adapter, micro-batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_tuner.data.dataset import Dataset, ShowTask, open_dataset, split, untold
from mlx_tuner.data.encode import Encoder
from mlx_tuner.data.order import shuffled
from mlx_tuner.data.stream import prefetch
from mlx_tuner.engine import lora, memory
from mlx_tuner.engine.backend import CPU, GPU, Backend
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.dora import DoRALinear
from mlx_tuner.engine.memory import StepMemory
from mlx_tuner.errors import Fault, RecipeError
from mlx_tuner.models import adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.answers import prompt_tokens
from mlx_tuner.models.architecture import dtype_of
from mlx_tuner.models.model import Loaded
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import DataTable, LoraTable, Recipe
from mlx_tuner.words import plural

HUB = "hub:"

EVALUATION_ROWS = 64
"""Validation rows that are read and cut into micro-batches at once."""


@dataclass(frozen=True)
class Data:
    """The rows of a run."""

    train: Dataset
    valid: Dataset | None


def open_data(recipe: Recipe, tokenizer: Any, task: ShowTask = untold) -> Data:
    """Open, check and survey the recipe's training and validation rows.

    Args:
        task: shows what is under way, such as `Display.task`.

    Raises:
        DataError: a file or row is wrong.
        ModelError: the tokenizer has no chat template that rows need.
    """
    table = recipe.data
    rows = open_file(table, table.train, tokenizer, table.limit, task)
    if isinstance(table.valid, float):
        return Data(*split(rows, table.valid, recipe.train.seed))
    return Data(rows, open_file(table, table.valid, tokenizer, task=task) if table.valid else None)


def open_file(
    table: DataTable,
    source: str,
    tokenizer: Any,
    limit: int | None = None,
    task: ShowTask = untold,
) -> Dataset:
    """Open and check the rows of one file, read as the recipe's `table` says.

    Raises:
        DataError, ModelError: as `open_data` does.
    """
    path = local_file(source)
    rows = open_dataset(
        path, encoder(table, tokenizer), limit=limit, on_bad_row=table.on_bad_row, task=task
    )
    if source.startswith(HUB):
        rows.origin = f"{source}: the rows of {path.name}"
    return rows


def encoder(table: DataTable, tokenizer: Any) -> Encoder:
    """What makes tokens of rows as the recipe's `table` says."""
    return Encoder(
        tokenizer,
        mask_prompt=table.mask_prompt,
        max_seq_length=table.max_seq_length,
        system_prompt=table.system_prompt,
        template_variables=table.chat_template,
        on_long_row=table.on_long_row,
    )


def local_file(source: str) -> Path:
    """The file of a path, or of ``hub:OWNER/NAME[/FILE]``, downloaded where needed."""
    if not source.startswith(HUB):
        return Path(source)
    from mlx_tuner.system import hub

    return hub.download_dataset_file(source.removeprefix(HUB))


def learning_rates(recipe: Recipe, rows: int) -> list[float]:
    """The learning rate of every step.

    Raises:
        RecipeError: the warm-up is longer than the run.
    """
    table = recipe.train
    steps = schedule.total_steps(rows, table.batch_size, table.epochs, table.max_steps)
    if table.warmup_steps > steps:
        what = f"{table.warmup_steps} steps, but the run has {steps}; lower it"
        raise RecipeError(Fault(recipe.name, "train.warmup_steps", what))
    return [
        schedule.learning_rate(
            step,
            peak=table.learning_rate,
            total_steps=steps,
            warmup_steps=table.warmup_steps,
            schedule=table.lr_schedule,
        )
        for step in range(steps)
    ]


def eval_every(recipe: Recipe, rows: int) -> int:
    """Steps between evaluations: ``train.eval_every``, or half an epoch."""
    half = schedule.steps_per_epoch(rows, recipe.train.batch_size) // 2
    return recipe.train.eval_every or max(1, half)


def row_order(recipe: Recipe, rows: int, first_step: int, steps: int) -> Iterator[Sequence[int]]:
    """The rows of each step from ``first_step`` on: a function of seed, epoch and position."""
    for step in range(first_step, steps):
        epoch, first, last = schedule.rows_of_step(step, rows, recipe.train.batch_size)
        if recipe.data.shuffle:
            yield shuffled(recipe.train.seed, epoch, rows)[first:last].tolist()
        else:
            yield range(first, last)


def sample_prompts(recipe: Recipe, loaded: Loaded) -> list[list[int]]:
    """The recipe's prompts as the model is asked them, token ids.

    Raises:
        ModelError: there are some, and the model has no chat template.
    """
    system = recipe.data.system_prompt
    before = [{"role": "system", "content": system}] if system else []
    return [
        prompt_tokens(
            loaded.tokenizer,
            [*before, {"role": "user", "content": prompt}],
            loaded.path,
            recipe.data.chat_template,
        )
        for prompt in recipe.sample.prompts
    ]


def attach_adapter(model: nn.Module, recipe: Recipe, kept: Path | None = None) -> None:
    """Put the recipe's adapter onto a model, new or as ``lora.init_from`` left it.

    Args:
        kept: a checkpoint of the run, which stands in for ``lora.init_from``.

    Raises:
        ModelError: it does not fit the model.
        RecipeError: its rank or modules are not the recipe's.
    """
    table = recipe.lora
    if table.init_from is None:
        lora.attach(
            model,
            rank=table.rank,
            scale=table.scale,
            dropout=table.dropout,
            target_modules=table.target_modules,
            num_layers=table.num_layers,
            seed=recipe.train.seed,
            layer=DoRALinear if table.variant == "dora" else lora.LoRALinear,
        )
        return
    start = read_adapter(kept or Path(table.init_from))
    if (start.rank, start.scale) != (table.rank, table.scale):
        what = (
            f"is of rank {start.rank} and scale {start.scale:g}, the recipe of rank {table.rank} "
            f"and scale {table.scale:g}; set lora.rank and lora.alpha to match"
        )
        raise RecipeError(Fault(table.init_from, "lora.init_from", what))
    if start.is_dora != (table.variant == "dora"):
        kind, other = ("dora", table.variant) if start.is_dora else ("lora", "dora")
        what = f'is of the variant {kind}, the recipe of {other}; set lora.variant = "{kind}"'
        raise RecipeError(Fault(table.init_from, "lora.init_from", what))
    # A recipe that says nothing of modules takes the adapter's.
    default = LoraTable.model_fields["target_modules"].default
    wanted = None
    if table.target_modules != default or table.num_layers is not None:
        wanted = lora.find_targets(model, table.target_modules, table.num_layers)
    adapter.apply(model, start)
    found = list(lora.adapted_modules(model))
    if wanted is not None and set(found) != set(wanted):
        what = (
            f"adapts {_modules(found)}, the recipe {_modules(wanted)}; "
            "set lora.target_modules and lora.num_layers to match, or leave both out"
        )
        raise RecipeError(Fault(table.init_from, "lora.init_from", what))
    for layer in lora.adapted_modules(model).values():
        layer.dropout = table.dropout


def _modules(paths: Sequence[str]) -> str:
    """Such as "q_proj v_proj of 28 blocks"."""
    names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    blocks = {lora.split_block(path)[0] for path in paths}
    return f"{' '.join(names)} of {plural(len(blocks), 'block')}"


def in_order(dataset: Dataset) -> Iterator[list[Example]]:
    """All rows of a dataset, some at a time."""
    firsts = range(0, len(dataset), EVALUATION_ROWS)
    chunks = (range(first, min(first + EVALUATION_ROWS, len(dataset))) for first in firsts)
    yield from filter(None, prefetch(dataset, chunks))


def step_memory(model: nn.Module, config: Any, *, checkpointing: bool = False) -> StepMemory:
    """What a training step of a model with its adapter takes on this machine."""
    adapted = lora.adapted_modules(model)
    outputs = sum(layer.kept_outputs for layer in adapted.values())
    return memory.step_memory(
        config,
        dtype_of(model).size,
        weights=weight_bytes(model),
        trainable_parameters=trainable_parameters(model),
        target_modules={path.rpartition(".")[2] for path in adapted},
        kept_outputs=outputs / len(model.layers),
        checkpointing=checkpointing,
        backend=backend(),
    )


def micro_batch_tokens(
    recipe: Recipe, needs: StepMemory, budget: int, longest_row: int, kept: int | None = None
) -> int:
    """``train.micro_batch_tokens``, or what this machine's memory allows.

    Args:
        budget: bytes that there are for everything.
        longest_row: tokens of the longest row, or more.
        kept: what the run had before it was resumed, which "auto" stays at.
    """
    table = recipe.train
    if table.micro_batch_tokens != "auto":
        return table.micro_batch_tokens
    return kept or needs.micro_batch_tokens(budget, longest_row)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, the adapter's included."""
    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def trainable_parameters(model: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(value.size for value in lora.trainable(model).values())


def backend() -> Backend:
    """The numbers of the machine that MLX computes on."""
    return GPU if on_gpu() else CPU


def on_gpu() -> bool:
    """Whether MLX computes on Metal or CUDA."""
    return bool(mx.default_device().type == mx.gpu)
