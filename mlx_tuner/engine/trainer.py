"""The training step and the loop over it. Plain numbers and arrays in, results out, no files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from mlx_tuner.engine import batching, lora, optimizer
from mlx_tuner.engine.batching import Example, ShapeTable, Step
from mlx_tuner.engine.forward import (
    Layout,
    PrefixState,
    head_of,
    hidden_at_targets,
    prefix_states,
)
from mlx_tuner.engine.loss import linear_cross_entropy
from mlx_tuner.engine.optimizer import State

GROUP_OVERHEAD = 20_000
"""Attention scores a head that another attention group must save (`batching.group`)."""

ONE_GROUP = 2**40
"""No saving is worth another group: a compiled shape has one."""


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
    """All that the step took; what was done between two results is not in it."""
    waited: float
    """Of them, spent waiting for rows: the first step's, and the next one's while it computed."""


class Trainer:
    """A model with adapters, and what it takes to train them.

    Args:
        model: with LoRA layers attached (`lora.attach`), all else frozen.
        micro_batch_tokens: flat tokens of a forward and backward pass at most.
        seed: of dropout; masks are a function of it and of the step.
        checkpointing: recompute each block in the backward pass.
        compile: pad micro-batches to a few shapes and compile the pass for each. It pays on a
            GPU; MLX's CPU backend takes half a minute a shape.
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
        compile: bool = False,
    ) -> None:
        self.model = model
        self.micro_batch_tokens = micro_batch_tokens
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm or math.inf
        self.seed = seed
        self.checkpointing = checkpointing
        start = lora.trainable(model)
        self.shapes = optimizer.Shapes(start)
        self.state = State.start(self.shapes.flatten(start))
        self.dropout = any(layer.dropout for layer in lora.adapted_modules(model).values())
        self._gradients = mx.value_and_grad(self._loss, argnums=(0, 1))
        self._update = self._clip_and_update
        self._table = None
        if compile:
            self._table = ShapeTable()
            self._compiled = mx.compile(self._gradients)
            self._update = mx.compile(self._clip_and_update)

    @property
    def adapter(self) -> dict[str, mx.array]:
        """The factors as they are now, fp32 arrays by name."""
        return self.shapes.unflatten(self.state.parameters)

    def make_micro_batches(self, rows: Sequence[Example]) -> Step:
        """The rows of one step as micro-batches."""
        compiled = self._table is not None
        step = batching.make_micro_batches(
            rows,
            self.micro_batch_tokens,
            # With dropout, rows draw masks of their own also for the tokens that they share.
            share_prefix=not self.dropout,
            prefix_unit=8 if compiled else 1,
            group_overhead=ONE_GROUP if compiled else GROUP_OVERHEAD,
        )
        if self._table is None:
            return step
        return replace(step, micro_batches=tuple(map(self._table.fit, step.micro_batches)))

    def step(self, step: Step, number: int, learning_rate: float) -> tuple[mx.array, ...]:
        """One update from the micro-batches of a step, left to be evaluated.

        Args:
            number: 0-based; with the seed it decides the dropout masks.

        Returns:
            Scalars: mean loss, gradient norm before clipping, whether both were finite.
        """
        loss, gradient = self.sum_of_micro_batches(step, number)
        targets = mx.array(step.target_tokens, mx.float32)
        self.state, *results = self._update(
            self.state, loss / targets, gradient / targets, mx.array(learning_rate, mx.float32)
        )
        return tuple(results)

    def rehearse(self, rows: Sequence[Example]) -> None:
        """Run a step's largest micro-batch and drop the result: out of memory now or never."""
        step = self.make_micro_batches(rows)
        largest = replace(step, micro_batches=step.micro_batches[:1])
        mx.eval(self.sum_of_micro_batches(largest, 0))

    def sum_of_micro_batches(self, step: Step, number: int) -> tuple[mx.array, mx.array]:
        """Sums, over the step's target tokens, of the loss and of its gradient (a vector)."""
        self.model.train()
        parameters = self.adapter
        past = self._prefix_states(step)
        prefix_gradients = tree_map(mx.zeros_like, past)
        losses, total = [], mx.zeros_like(self.state.parameters)
        for i, batch in enumerate(step.micro_batches):
            outside = past if batch.past else []
            carried = prefix_gradients if batch.prefix else []
            gradients_of = self._compiled if batch.bucketed else self._gradients
            (_, loss), (gradients, of_past) = gradients_of(
                parameters, outside, Layout.of(batch), carried, self._dropout_key(number, i)
            )
            total = total + self.shapes.flatten(gradients)
            if outside:
                prefix_gradients = tree_map(mx.add, prefix_gradients, of_past)
            losses.append(loss)
            self.start(loss, total, prefix_gradients)
        self._set(parameters)
        return mx.stack(losses).sum(), total

    def start(
        self, loss: mx.array, gradient: mx.array, prefix_gradients: list[PrefixState]
    ) -> None:
        """Start on a micro-batch while the next one's graph is built. (A bench waits instead.)"""
        mx.async_eval(gradient, loss, prefix_gradients)

    def _loss(
        self,
        parameters: dict[str, mx.array],
        past: list[PrefixState],
        layout: Layout,
        prefix_gradients: list[PrefixState],
        dropout_key: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """What to differentiate, and the micro-batch's summed loss.

        Micro-batches that only attend to the prefix leave ``prefix_gradients``: the gradient of
        their loss with respect to its states. The one that holds the prefix adds the
        product of both, whose gradient goes on through the prefix's own computation.
        """
        self._set(parameters)
        if dropout_key is not None:
            lora.set_dropout_key(self.model, dropout_key)
        layout = Layout(*layout)
        hidden, inside = hidden_at_targets(
            self.model, layout, past, checkpointing=self.checkpointing
        )
        loss = linear_cross_entropy(hidden, head_of(self.model), layout.targets, layout.weights)
        others = mx.zeros(())
        for own, gradients in zip(inside, prefix_gradients, strict=False):
            for a, b in zip(own, gradients, strict=True):
                others = others + (a * b).astype(mx.float32).sum()
        return loss + others, loss

    def _prefix_states(self, step: Step) -> list[PrefixState]:
        """The states after a prefix that several micro-batches go on from."""
        if not len(step.prefix):
            return []
        self._set(self.adapter)
        return prefix_states(self.model, mx.array(step.prefix))

    def _dropout_key(self, number: int, micro_batch: int) -> mx.array | None:
        """A function of the seed, the step and the micro-batch, so that no state need be kept."""
        if not self.dropout:
            return None
        seeds = np.random.SeedSequence([self.seed, number, micro_batch])
        return mx.array(seeds.generate_state(2), mx.uint32)

    def _clip_and_update(
        self, state: State, loss: mx.array, gradient: mx.array, learning_rate: mx.array
    ) -> tuple[State, mx.array, mx.array, mx.array]:
        gradient, norm = optimizer.clip(gradient, self.max_grad_norm)
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        new = optimizer.adamw(state, gradient, learning_rate, weight_decay=self.weight_decay)
        return optimizer.choose(finite, new, state), loss, norm, finite

    def _set(self, parameters: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))

    def evaluate(self, batches: Iterable[Sequence[Example]]) -> float:
        """Mean loss over the target tokens of all rows, without dropout."""
        self.model.eval()
        parameters = self.adapter
        total, targets = 0.0, 0
        for rows in batches:
            step = batching.make_micro_batches(rows, self.micro_batch_tokens)
            past = self._prefix_states(step)
            losses = [
                self._loss(parameters, past if batch.past else [], Layout.of(batch), [])[1]
                for batch in step.micro_batches
            ]
            total += float(mx.stack(losses).sum().item())
            targets += step.target_tokens
        return total / targets


def train(
    trainer: Trainer,
    batches: Iterable[Sequence[Example]],
    learning_rates: Iterable[float],
    *,
    first_step: int = 0,
) -> Iterator[StepResult]:
    """One optimizer step for each batch of rows, its result after it is done.

    Between two results the trainer's state is that of a finished step: save, evaluate, stop. The
    rows of one more step are taken then already.
    """
    clock = _Clock()
    ahead = (
        (learning_rate, trainer.make_micro_batches(rows))
        for learning_rate, rows in zip(learning_rates, clock.waiting_for(batches), strict=False)
    )
    upcoming = next(ahead, None)
    for number in count(first_step):
        if upcoming is None:
            return
        learning_rate, step = upcoming
        loss, norm, finite = trainer.step(step, number, learning_rate)
        mx.async_eval(loss, norm, finite, trainer.state)
        upcoming = next(ahead, None)  # cut while this step is computed
        mx.eval(loss, norm, finite, trainer.state)
        seconds, waited = clock.lap()
        yield StepResult(
            loss=float(loss.item()),
            grad_norm=float(norm.item()),
            learning_rate=learning_rate,
            rows=step.rows,
            tokens=step.tokens,
            target_tokens=step.target_tokens,
            finite=bool(finite.item()),
            seconds=seconds,
            waited=waited,
        )
        clock.lap()  # what happens between two steps is neither's


class _Clock:
    """Seconds since the last lap, and how many of them went into waiting for rows."""

    def __init__(self) -> None:
        self._last, self._waited = time.perf_counter(), 0.0

    def waiting_for(self, batches: Iterable[Sequence[Example]]) -> Iterator[Sequence[Example]]:
        """The batches, with the time that each one takes to come."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            rows = next(batches, None)
            self._waited += time.perf_counter() - asked
            if rows is None:
                return
            yield rows

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        seconds, waited = now - self._last, self._waited
        self._last, self._waited = now, 0.0
        return seconds, waited
