"""What a run would do and need, from the recipe, the rows and the model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_tuner import assembly
from mlx_tuner.data.dataset import Task, untold
from mlx_tuner.engine import memory
from mlx_tuner.models import model as models
from mlx_tuner.models.folder import has_tokenizer
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe


@dataclass(frozen=True)
class Plan:
    """A run before it is run."""

    recipe: str
    model: str
    tokenizer: str
    """The model's, or the built-in one where the model folder has none."""
    rows: int
    valid_rows: int
    tokens: int
    """Of an epoch, as they are in the rows."""
    target_tokens: int
    is_counted: bool
    """Whether all rows were encoded for these two, or the first ones and the rest is estimated."""
    trainable_parameters: int
    total_parameters: int
    steps: int
    steps_per_epoch: int
    eval_every: int | None
    """Steps between evaluations; None without validation rows."""
    micro_batch_tokens: int
    peak_memory_gb: float
    """An estimate, in 10⁹ bytes."""
    learning_rates: list[float]
    """One a step."""
    notes: list[str]
    """What should be known of the rows."""


def plan(recipe: Recipe, task: Task = untold) -> Plan:
    """Count what the recipe asks for. Loads the tokenizer and the rows, but no weights.

    Raises:
        TunerError: whatever would stop the run before its first step.
    """
    folder = models.resolve(recipe.model.path, recipe.model.revision)
    config = models.read_config(folder)
    with_tokenizer = has_tokenizer(folder)
    tokenizer = folder if with_tokenizer else models.resolve("builtin:tiny-qwen")
    data = assembly.open_data(recipe, models.load_tokenizer(tokenizer), task)
    rates = assembly.learning_rates(recipe, len(data.train))

    model = models.skeleton(config)
    model.set_dtype(getattr(mx, config.get("torch_dtype") or config.get("dtype") or "float32"))
    assembly.attach_adapter(model, recipe)
    rows, surveyed = len(data.train), data.train.survey
    trainable = assembly.trainable_parameters(model)
    cap = assembly.micro_batch_tokens(recipe, model, config, surveyed.longest)
    epoch = schedule.steps_per_epoch(rows, recipe.train.batch_size)
    lengths = surveyed.tokens[surveyed.usable]
    steps = schedule.steps_per_epoch(len(lengths), recipe.train.batch_size)
    order = assembly.row_order(recipe, len(lengths), 0, min(steps, len(rates)))
    largest = min(cap, max(int(lengths[step].sum()) for step in map(list, order)))
    largest = max(largest, surveyed.longest)
    token_bytes = assembly.token_bytes(recipe, model, config, surveyed.longest)
    peak = memory.step_bytes(assembly.weight_bytes(model), trainable, largest, token_bytes)
    return Plan(
        recipe=recipe.name,
        model=recipe.model.path,
        tokenizer=recipe.model.path if with_tokenizer else "builtin:tiny-qwen",
        rows=rows,
        valid_rows=len(data.valid) if data.valid is not None else 0,
        tokens=data.train.tokens,
        target_tokens=data.train.target_tokens,
        is_counted=data.train.is_counted,
        eval_every=assembly.eval_every(recipe, rows) if data.valid is not None else None,
        notes=data.train.notes,
        trainable_parameters=trainable,
        total_parameters=models.parameter_count(model),
        steps=len(rates),
        steps_per_epoch=epoch,
        micro_batch_tokens=cap,
        peak_memory_gb=peak / 1e9,
        learning_rates=rates,
    )
