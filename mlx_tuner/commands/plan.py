"""What a run would do and need, from the recipe, the rows and the model's shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_tuner.commands import links
from mlx_tuner.data.dataset import Dataset, ShowTask, untold
from mlx_tuner.models import model as models
from mlx_tuner.models.architecture import parameter_count
from mlx_tuner.models.folder import check_folder, has_tokenizer
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.training import assembly, needs


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
    """Whether all rows were encoded for these two; else they are estimated from the first ones."""
    trainable_parameters: int
    total_parameters: int
    steps: int
    steps_per_epoch: int
    eval_every: int | None
    """Steps between evaluations; None without validation rows."""
    micro_batch_tokens: int
    shared_prefix: int
    """Tokens that all rows begin with, which a step computes once."""
    padding_avoided: float
    """Tokens that padding rows to their step's longest would add, as a part of the rows' own."""
    memory_gb: dict[str, float]
    """Of a step at its peak, by what it is for: an estimate, in 10⁹ bytes."""
    peak_memory_gb: float
    """Their sum."""
    budget_gb: float
    """What this machine can give."""
    longest_row_that_fits: int
    """Tokens of a row that it could train on."""
    largest_micro_batch_tokens: int
    """What "auto" takes for the rows as they are."""
    advice: str | None
    """The one setting to change where it does not fit."""
    seconds: float | None
    """Of all steps, evaluations left out."""
    seconds_by: str
    """How that is known."""
    machines: int
    """That share each step's rows."""
    sum_seconds: float
    """A step, for the machines to add up their gradients: part of `seconds`."""
    sum_by: str
    """How that is known."""
    disk_gb: float
    """Of checkpoints and adapter."""
    learning_rates: list[float]
    """One a step."""
    notes: list[str]
    """What should be known of the rows."""


def plan(
    recipe: Recipe, task: ShowTask = untold, *, machines: int = 1, link: str = "thunderbolt"
) -> Plan:
    """Count what the recipe asks for. Loads the tokenizer and the rows, but no weights.

    Args:
        task: shows what is under way.
        machines: as fast as this one, that are to share the steps.
        link: between them, by its name in `links`.

    Raises:
        TunerError: whatever would stop the run before its first step.
    """
    folder = models.resolve(recipe.model.path, recipe.model.revision)
    config = check_folder(folder)
    with_tokenizer = has_tokenizer(folder)
    tokenizer = folder if with_tokenizer else models.resolve("builtin:tiny-qwen")
    data = assembly.open_data(recipe, models.load_tokenizer(tokenizer), task)
    rates = assembly.learning_rates(recipe, len(data.train))

    model = needs.skeleton(recipe, config)
    rows, surveyed = len(data.train), data.train.survey
    memory = needs.memory_of(recipe, model, config, data.train)
    step = needs.step_memory(recipe, model, config)
    trainable = assembly.trainable_parameters(model)
    total = parameter_count(model)
    epoch = schedule.steps_per_epoch(rows, recipe.train.batch_size)
    seconds, by = needs.seconds_of(
        recipe, tokens=data.train.tokens * len(rates) // epoch, total_parameters=total
    )
    known = links.measured(link)
    # The gradient, in fp32; what goes with it is a few bytes.
    summing = known.sum_seconds(4 * trainable, machines) if machines > 1 else 0.0
    if seconds is not None:
        tokens = [lengths.tolist() for lengths in tokens_of_steps(recipe, data.train)]
        seconds = seconds * links.largest_share(tokens, machines) + summing * len(rates)
    return Plan(
        recipe=recipe.name,
        model=recipe.model.path,
        tokenizer=recipe.model.path if with_tokenizer else "builtin:tiny-qwen",
        rows=rows,
        valid_rows=len(data.valid) if data.valid is not None else 0,
        tokens=data.train.tokens,
        target_tokens=data.train.target_tokens,
        is_counted=data.train.survey.is_complete,
        eval_every=assembly.eval_every(recipe, rows) if data.valid is not None else None,
        notes=data.train.notes,
        trainable_parameters=trainable,
        total_parameters=total,
        steps=len(rates),
        steps_per_epoch=epoch,
        micro_batch_tokens=assembly.micro_batch_tokens(
            recipe, step, memory.budget, surveyed.longest
        ),
        shared_prefix=len(surveyed.prefix),
        padding_avoided=padding(recipe, data.train),
        memory_gb={part: size / 1e9 for part, size in memory.parts.items()},
        peak_memory_gb=memory.peak / 1e9,
        budget_gb=memory.budget / 1e9,
        longest_row_that_fits=step.longest_row(memory.budget),
        largest_micro_batch_tokens=step.micro_batch_tokens(memory.budget, surveyed.longest),
        advice=None if memory.fits else memory.advice,
        seconds=seconds,
        seconds_by=by,
        machines=machines,
        sum_seconds=summing,
        sum_by=known.by,
        disk_gb=needs.disk_bytes(trainable) / 1e9,
        learning_rates=rates,
    )


def padding(recipe: Recipe, rows: Dataset) -> float:
    """How many tokens, over those of the rows, padding to a step's longest row would add."""
    steps = list(tokens_of_steps(recipe, rows))
    padded = sum(len(step) * int(step.max()) for step in steps)
    return padded / sum(int(step.sum()) for step in steps) - 1


def tokens_of_steps(recipe: Recipe, rows: Dataset) -> Iterator[np.ndarray]:
    """Tokens of each row of each of an epoch's steps, as far as rows are surveyed."""
    lengths = rows.survey.tokens[rows.survey.usable]
    steps = schedule.steps_per_epoch(len(lengths), recipe.train.batch_size)
    for step in assembly.row_order(recipe, len(lengths), 0, steps):
        yield lengths[list(step)]
