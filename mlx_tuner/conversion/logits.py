"""Logits in float32 of a model that passes through memory a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner.engine import sums
from mlx_tuner.engine.forward import head_of


def load_in_float32(folder: Path) -> nn.Module:
    """The model of a checked folder, dense and in float32, whose weights are not read yet."""
    return in_float32(mlx_lm_utils.load_model(folder, lazy=True)[0])


def in_float32(model: nn.Module) -> nn.Module:
    """The same model, dense and in float32; nothing is computed yet."""
    model.set_dtype(mx.float32)
    return mlx_lm_utils.dequantize_model(model)


def logits_of(
    load: Callable[[], nn.Module], tokens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Logits (positions, vocabulary) of the model that `load` gives, whose weights are lazy.

    Args:
        tokens: (B, T).
        positions: flat into (B, T).
    """
    model = load()
    free_blocks_after_use(model)
    language = getattr(model, "language_model", model)
    hidden = language.model(mx.array(tokens))
    hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]
    head = head_of(model)
    logits = head.as_linear(hidden) if isinstance(head, nn.Embedding) else head(hidden)
    # With nobody else holding the weights, each is freed as soon as the graph is past it.
    del model, language, head
    return np.array(logits)


def mean_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean negative log-likelihood of the targets, one a row of logits."""
    scores = mx.array(logits)
    chosen = mx.take_along_axis(scores, mx.array(targets)[:, None], axis=-1)[:, 0]
    return float((sums.logsumexp(scores) - chosen).mean().item())


class _FreedAfterUse:
    """A block that lets go of its weights once it has computed with them."""

    def __init__(self, block: nn.Module) -> None:
        self._block: nn.Module | None = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, *inputs: Any, **options: Any) -> mx.array:
        assert self._block is not None, "a second pass"
        output = self._block(*inputs, **options)
        mx.eval(output)
        self._block = None
        return output


def free_blocks_after_use(model: nn.Module) -> None:
    """Let a lazily loaded model need the memory of one block at a time, in its only pass."""
    for _, module in model.named_modules():
        if "layers" in module:
            module.layers = [_FreedAfterUse(block) for block in module.layers]
