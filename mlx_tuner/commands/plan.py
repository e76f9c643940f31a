"""What a run would do and need, from the recipe, the rows and the model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_tuner import assembly
from mlx_tuner.data.dataset import Dataset
from mlx_tuner.engine import memory
from mlx_tuner.models import model as models
from mlx_tuner.models.folder import has_tokenizer
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe

CHUNK_ROWS = 256


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
    trainable_parameters: int
    total_parameters: int
    steps: int
    steps_per_epoch: int
    micro_batch_tokens: int
    peak_memory_gb: float
    """An estimate, in 10⁹ bytes."""
    learning_rates: list[float]
    """One a step."""


def plan(recipe: Recipe) -> Plan:
    """Count what the recipe asks for. Loads the tokenizer and the rows, but no weights.

    Raises:
        TunerError: whatever would stop the run before its first step.
    """
    folder = models.resolve(recipe.model.path, recipe.model.revision)
    config = models.read_config(folder)
    with_tokenizer = has_tokenizer(folder)
    tokenizer = folder if with_tokenizer else models.resolve("builtin:tiny-qwen")
    data = assembly.open_data(recipe, models.load_tokenizer(tokenizer))
    rates = assembly.learning_rates(recipe, len(data.train))

    model = models.skeleton(config)
    model.set_dtype(getattr(mx, config.get("torch_dtype") or config.get("dtype") or "float32"))
    assembly.attach_adapter(model, recipe)
    lengths, targets = _lengths(data.train)
    trainable = assembly.trainable_parameters(model)
    cap = assembly.micro_batch_tokens(recipe, model, config, int(lengths.max()))
    epoch = schedule.steps_per_epoch(len(lengths), recipe.train.batch_size)
    order = assembly.row_order(recipe, len(lengths), 0, min(epoch, len(rates)))
    largest = min(cap, max(int(lengths[step].sum()) for step in map(list, order)))
    largest = max(largest, int(lengths.max()))
    token_bytes = assembly.token_bytes(recipe, model, config, int(lengths.max()))
    peak = memory.step_bytes(assembly.weight_bytes(model), trainable, largest, token_bytes)
    return Plan(
        recipe=recipe.name,
        model=recipe.model.path,
        tokenizer=recipe.model.path if with_tokenizer else "builtin:tiny-qwen",
        rows=len(lengths),
        valid_rows=len(data.valid) if data.valid is not None else 0,
        tokens=int(lengths.sum()),
        target_tokens=int(targets.sum()),
        trainable_parameters=trainable,
        total_parameters=models.parameter_count(model),
        steps=len(rates),
        steps_per_epoch=epoch,
        micro_batch_tokens=cap,
        peak_memory_gb=peak / 1e9,
        learning_rates=rates,
    )


def _lengths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and target tokens of each row."""
    lengths = np.zeros(len(dataset), np.int32)
    targets = np.zeros(len(dataset), np.int32)
    for first in range(0, len(dataset), CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, len(dataset))
        examples = dataset.examples(range(first, last))
        lengths[first:last] = [len(example.tokens) for example in examples]
        targets[first:last] = [example.loss_mask.sum() for example in examples]
    return lengths, targets
