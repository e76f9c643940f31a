"""A trainer's adapter and optimizer, to the files of a run and back."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.models import adapter
from mlx_tuner.models.adapter import Adapter
from mlx_tuner.models.adapter_config import ALL_LAYERS
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.recipe.tables import Recipe

OPTIMIZER = "optimizer.safetensors"


def adapter_bytes(trainer: Trainer) -> int:
    """What an adapter takes on the disk, but for its config."""
    return int(trainer.state.parameters.nbytes)


def checkpoint_bytes(trainer: Trainer) -> int:
    """What a checkpoint takes on the disk, but for small files: an adapter and its two moments."""
    return 3 * adapter_bytes(trainer)


def write_adapter(folder: Path, trainer: Trainer, recipe: Recipe, base: str) -> None:
    """Write the adapter as it is now.

    Args:
        base: fingerprint of the base model's weights.
    """
    lora, layers = recipe.lora, recipe.lora.num_layers
    trained = Adapter(
        trainer.adapter,
        rank=lora.rank,
        scale=lora.scale,
        dropout=lora.dropout,
        num_layers=ALL_LAYERS if layers is None else layers,
        base=recipe.model.path,
        revision=recipe.model.revision,
        fingerprint=base,
    )
    adapter.write_adapter(folder, trained)


def write_optimizer(folder: Path, trainer: Trainer) -> None:
    """Write the optimizer's moments as they are now."""
    state = trainer.state
    moments = {
        "first_moment": state.first_moment,
        "second_moment": state.second_moment,
        "updates": state.updates,
    }
    adapter.write_tensors(folder / OPTIMIZER, moments, "mlx", None)


def restore(folder: Path, trainer: Trainer) -> None:
    """Put adapter and optimizer back as they were written."""
    kept = read_adapter(folder)
    moments = mx.load(str(folder / OPTIMIZER))
    trainer.state = State(trainer.shapes.flatten(kept.tensors), **moments)
    mx.eval(trainer.state)
