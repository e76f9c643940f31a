"""mlx-lm's own LoRA training step, on the same rows and weights, to compare ours with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_tuner.engine.batching import Example

MAX_SEQ_LENGTH = 2048
"""mlx-lm's default."""


class MlxLmTrainer:
    """Its adapters, loss, padding, optimizer and compiled step, as its trainer puts them together.

    Args:
        model: without adapters; frozen and given mlx-lm's.
        target_modules: last segments of module names in a block's attention.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int,
        scale: float,
        target_modules: Sequence[str],
        learning_rate: float,
    ) -> None:
        model.freeze()
        keys = [f"self_attn.{name}" for name in target_modules]
        parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(model, len(model.layers), parameters)
        model.train()
        optimizer = optim.AdamW(learning_rate)
        loss_and_gradient = nn.value_and_grad(model, default_loss)
        self._state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=self._state, outputs=self._state)
        def step(batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
            (loss, tokens), gradient = loss_and_gradient(model, batch, lengths)
            optimizer.update(model, gradient)
            return loss, tokens

        self._step = step
        mx.eval(self._state)

    def step(self, rows: Sequence[Example]) -> tuple[float, int]:
        """One update, with the prompts masked.

        Returns:
            Mean loss, and how many tokens were computed, padding included.
        """
        pairs = [(row.tokens.tolist(), int(row.loss_mask.argmax())) for row in rows]
        limit = max(MAX_SEQ_LENGTH, *(len(tokens) for tokens, _ in pairs))
        batch, lengths = next(iterate_batches(pairs, len(pairs), limit))
        loss, tokens = self._step(batch, lengths)
        mx.eval(self._state, loss, tokens)
        mx.clear_cache()  # as its trainer does after each step
        return float(loss.item()), batch.size
