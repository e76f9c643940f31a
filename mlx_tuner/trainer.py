"""The training step and the loop over it. Plain numbers and arrays in, results out, no files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_tuner import batching, lora, optimizer
from mlx_tuner.batching import MicroBatch, Row, Step
from mlx_tuner.forward import (
    KeysValues,
    Layout,
    head_of,
    hidden_at_targets,
    is_flat,
    prefix_states,
)
from mlx_tuner.loss import linear_cross_entropy


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as it was."""

    loss: float
    """Mean over the step's target tokens."""
    grad_norm: float
    """Global L2 norm before clipping."""
    learning_rate: float
    rows: int
    tokens: int
    target_tokens: int
    finite: bool
    """False where the loss or gradient was not finite, and the update was left out."""
    seconds: float
    """From the rows to the updated weights, waiting for rows not counted."""
    waited: float
    """Seconds spent waiting for the rows."""


class Trainer:
    """A model with adapters, and what it takes to train them.

    Args:
        model: with LoRA layers attached (`lora.attach`), all else frozen.
        micro_batch_tokens: flat tokens of a forward and backward pass at most.
        seed: of dropout; masks are a function of it and of the step.
        checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        micro_batch_tokens: int,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.micro_batch_tokens = micro_batch_tokens
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.checkpointing = checkpointing
        start = lora.trainable(model)
        self.shapes = optimizer.Shapes(start)
        self.state = optimizer.State.start(self.shapes.flatten(start))
        self.dropout = any(layer.dropout for layer in lora.adapted_modules(model).values())
        # Rows draw masks of their own with dropout, also for the tokens that they share.
        self.share_prefix = is_flat(model) and not self.dropout
        self._gradients = mx.value_and_grad(self._loss, argnums=(0, 1))

    @property
    def adapter(self) -> dict[str, mx.array]:
        """The factors as they are now, fp32 arrays by name."""
        return self.shapes.unflatten(self.state.parameters)

    def cut(self, rows: Sequence[Row]) -> Step:
        """The rows of one step as micro-batches."""
        return batching.cut(rows, self.micro_batch_tokens, share_prefix=self.share_prefix)

    def step(self, step: Step, number: int, learning_rate: float) -> tuple[mx.array, ...]:
        """One update from the micro-batches of a step, left to be evaluated.

        Args:
            number: 0-based; with the seed it decides the dropout masks.

        Returns:
            Scalars: mean loss, gradient norm before clipping, whether both were finite.
        """
        self.model.train()
        if self.dropout:
            key = mx.random.split(mx.random.key(self.seed), 2)[1] + mx.array(
                [number >> 32, number & 0xFFFFFFFF], mx.uint32
            )
            lora.set_dropout_key(self.model, key)
        loss, gradient = self._sum_over_micro_batches(step)
        loss, gradient = loss / step.target_tokens, gradient / step.target_tokens
        gradient, norm = optimizer.clip(gradient, self.max_grad_norm)
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        new = optimizer.adamw(
            self.state, gradient, learning_rate, weight_decay=self.weight_decay
        )
        self.state = optimizer.choose(finite, new, self.state)
        return loss, norm, finite

    def _sum_over_micro_batches(self, step: Step) -> tuple[mx.array, mx.array]:
        """Sums, over the step's target tokens, of the loss and of its gradient (a vector)."""
        parameters = self.adapter
        past = self._prefix_states(parameters, step.prefix) if len(step.prefix) else []
        debt = tree_map(mx.zeros_like, past)
        losses, total = [], None
        for batch in step.micro_batches:
            layout = Layout.of(batch)
            outside = past if batch.past else []
            repay = debt if batch.prefix else []
            (_, loss), (gradients, owed) = self._gradients(parameters, outside, layout, repay)
            gradient = self.shapes.flatten(gradients)
            total = gradient if total is None else total + gradient
            if outside:
                debt = tree_map(mx.add, debt, owed)
            losses.append(loss)
            # Start on this micro-batch now, so that at most two of them are ever in memory.
            mx.async_eval(total, loss, debt)
        self._set(parameters)
        return mx.stack(losses).sum(), total

    def _loss(
        self,
        parameters: dict[str, mx.array],
        past: list[KeysValues],
        layout: Layout,
        debt: list[KeysValues],
    ) -> tuple[mx.array, mx.array]:
        """What to differentiate, and the micro-batch's summed loss.

        Micro-batches that only attend to the prefix leave a ``debt``: the gradient of their loss
        with respect to its keys and values. The one that holds the prefix adds their product,
        whose gradient carries the debt through the prefix's own computation.
        """
        self._set(parameters)
        hidden, inside = hidden_at_targets(
            self.model, layout, past, checkpointing=self.checkpointing
        )
        loss = linear_cross_entropy(hidden, head_of(self.model), layout.targets, layout.weights)
        owed = sum(
            (a * b).astype(mx.float32).sum()
            for own, other in zip(inside, debt, strict=bool(debt))
            for a, b in zip(own, other, strict=True)
        )
        return loss + owed, loss

    def _prefix_states(
        self, parameters: dict[str, mx.array], tokens: Any
    ) -> list[KeysValues]:
        self._set(parameters)
        return prefix_states(self.model, mx.array(tokens))

    def _set(self, parameters: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))

    def evaluate(self, batches: Iterable[Sequence[Row]]) -> float:
        """Mean loss over the target tokens of all rows, without dropout."""
        self.model.eval()
        self._set(self.adapter)
        total, targets = 0.0, 0
        for rows in batches:
            step = batching.cut(rows, self.micro_batch_tokens, share_prefix=is_flat(self.model))
            past = prefix_states(self.model, mx.array(step.prefix)) if len(step.prefix) else []
            losses = [
                self._loss({}, past if batch.past else [], Layout.of(batch), [])[1]
                for batch in step.micro_batches
            ]
            total += mx.stack(losses).sum().item()
            targets += step.target_tokens
        return total / targets


def train(
    trainer: Trainer,
    batches: Iterable[Sequence[Row]],
    learning_rates: Iterable[float],
    *,
    first_step: int = 0,
) -> Iterator[StepResult]:
    """One optimizer step for each batch of rows, its result after it is done.

    Between two results the trainer's state is that of a finished step: save, evaluate, stop.
    """
    batches = iter(batches)
    for number, learning_rate in enumerate(learning_rates, first_step):
        asked = time.perf_counter()
        rows = next(batches, None)
        if rows is None:
            return
        started = time.perf_counter()
        step = trainer.cut(rows)
        loss, norm, finite = trainer.step(step, number, learning_rate)
        mx.eval(loss, norm, finite, trainer.state)
        yield StepResult(
            loss=loss.item(),
            grad_norm=norm.item(),
            learning_rate=learning_rate,
            rows=step.rows,
            tokens=step.tokens,
            target_tokens=step.target_tokens,
            finite=bool(finite.item()),
            seconds=time.perf_counter() - started,
            waited=started - asked,
        )
