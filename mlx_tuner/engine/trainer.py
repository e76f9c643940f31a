"""The training step and the loop over it. Plain numbers and arrays in, results out, no files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_tuner.engine import batching, lora, optimizer
from mlx_tuner.engine.backend import CPU, Backend
from mlx_tuner.engine.batching import Example, MicroBatch, Step
from mlx_tuner.engine.forward import (
    Layout,
    PrefixState,
    head_of,
    hidden_at_targets,
    prefix_states,
)
from mlx_tuner.engine.loss import linear_cross_entropy, linear_cross_entropy_value
from mlx_tuner.engine.noise import Noise
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.ranks import Ranks


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
    """Since the result before, without what the caller did in between."""
    waited: float
    """Of these seconds, those that were spent waiting for rows."""
    stop: bool = False
    """Whether some rank had been asked to stop when the step was sent to the device."""


class Trainer:
    """A model with adapters, and what it takes to train them.

    Args:
        model: with LoRA layers attached (`lora.attach`), all else frozen.
        micro_batch_tokens: flat tokens of a forward and backward pass at most.
        lora_plus_ratio: the learning rate of all factors but A over A's (Hayou et al. 2024,
            arXiv:2402.12354).
        neftune_noise: alpha of the noise on the embeddings (`noise`).
        seed: of dropout and noise, which are functions of it and of the step.
        checkpointing: recompute each block in the backward pass.
        backend: the machine's numbers.
        ranks: the processes that share the rows of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        micro_batch_tokens: int,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        lora_plus_ratio: float = 1.0,
        neftune_noise: float = 0.0,
        seed: int = 0,
        checkpointing: bool = False,
        backend: Backend = CPU,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.micro_batch_tokens = micro_batch_tokens
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm or math.inf
        self.neftune_noise = neftune_noise
        self.seed = seed
        self.checkpointing = checkpointing
        self.backend = backend
        self.ranks = ranks or Ranks()
        start = lora.trainable(model)
        self.shapes = optimizer.Shapes(start)
        self.state = State.start(self.shapes.flatten(start))
        self._rates: mx.array | float = 1.0
        if lora_plus_ratio != 1:
            by_name = {
                name: mx.full(value.shape, 1.0 if name.endswith("lora_a") else lora_plus_ratio)
                for name, value in start.items()
            }
            self._rates = self.shapes.flatten(by_name)
        lora.number_layers(model)
        self.dropout = any(layer.dropout for layer in lora.adapted_modules(model).values())
        self._gradients = mx.value_and_grad(self._loss, argnums=(0, 1))

    @property
    def adapter(self) -> dict[str, mx.array]:
        """The factors as they are now, fp32 arrays by name."""
        return self.shapes.unflatten(self.state.parameters)

    def make_micro_batches(self, rows: Sequence[Example]) -> Step:
        """This rank's share of the rows of one step, as micro-batches."""
        return self._laid_out(self._own(rows))

    def _laid_out(self, rows: Sequence[Example]) -> Step:
        return batching.make_micro_batches(
            rows,
            self.micro_batch_tokens,
            # With dropout or noise, rows draw their own also for the tokens that they share.
            share_prefix=not (self.dropout or self.neftune_noise),
            backend=self.backend,
        )

    def step(self, step: Step, number: int, learning_rate: float, *, stop: bool = False) -> Scalars:
        """One update from the micro-batches of a step, left to be evaluated.

        Args:
            step: where it is empty on all ranks, nothing is updated.
            number: 0-based; with the seed it decides the dropout masks and the noise.
            stop: tell all ranks that this one is to stop.
        """
        loss, gradient = self.sum_of_micro_batches(step, number)
        own = gradient[-1] + 0  # a copy, so that the vector need not be kept
        # fp32 counts up to 2²⁴ one by one.
        counts = mx.array([step.target_tokens, step.rows, step.tokens, stop], mx.float32)
        gradient, sums = self.ranks.sum(gradient, mx.concatenate([loss[None], counts]))
        loss, targets = sums[0], sums[1]
        loss, gradient = loss / targets, gradient / targets
        gradient, norm = optimizer.clip(gradient, self.max_grad_norm)
        finite = mx.isfinite(loss) & mx.isfinite(norm)
        rates = learning_rate * self._rates
        new = optimizer.adamw(self.state, gradient, rates, weight_decay=self.weight_decay)
        self.state = optimizer.choose(finite, new, self.state)
        return Scalars(loss, norm, finite | (targets == 0), sums[1:], own)

    def rehearse(self, rows: Sequence[Example]) -> int:
        """Compute all rows of a step and drop the result: out of memory now or never.

        Returns:
            The peak of memory, bytes.
        """
        mx.reset_peak_memory()
        mx.eval(self.sum_of_micro_batches(self._laid_out(rows), 0))
        return mx.get_peak_memory()

    def sum_of_micro_batches(self, step: Step, number: int) -> tuple[mx.array, mx.array]:
        """Sums, over the step's target tokens, of the loss and of its gradient (a vector)."""
        self.model.train()
        parameters = self.adapter
        past = self._prefix_states(step)
        prefix_gradients = tree_map(mx.zeros_like, past)
        losses, total = [], mx.zeros_like(self.state.parameters)
        for batch in step.micro_batches:
            outside = past if batch.past else []
            carried = prefix_gradients if batch.prefix else []
            layout = self._layout(batch, number)
            (_, loss), (gradients, of_past) = self._gradients(parameters, outside, layout, carried)
            total = total + self.shapes.flatten(gradients)
            if outside:
                prefix_gradients = tree_map(mx.add, prefix_gradients, of_past)
            losses.append(loss)
            # Started on while the next one's graph is built.
            mx.async_eval(total, loss, prefix_gradients)
        self._set(parameters)
        return mx.stack(losses or [mx.zeros(())]).sum(), total

    def _loss(
        self,
        parameters: dict[str, mx.array],
        past: list[PrefixState],
        layout: Layout,
        prefix_gradients: list[PrefixState],
    ) -> tuple[mx.array, mx.array]:
        """What to differentiate, and the micro-batch's summed loss.

        Micro-batches that only attend to the prefix leave ``prefix_gradients``: the gradient of
        their loss with respect to its states. The one that holds the prefix adds the
        product of both, whose gradient goes on through the prefix's own computation.
        """
        self._set(parameters)
        layout = Layout(*layout)  # value_and_grad hands it on as a plain tuple
        hidden, inside = hidden_at_targets(
            self.model, layout, past, checkpointing=self.checkpointing
        )
        loss = linear_cross_entropy(
            hidden, head_of(self.model), layout.targets, layout.weights, backend=self.backend
        )
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
        return prefix_states(self.model, mx.array(step.prefix), self.backend)

    def _layout(self, batch: MicroBatch, number: int) -> Layout:
        """A micro-batch on the device, with the dropout keys and noise of step ``number``."""
        tokens, keys, noise = (self.seed, number, batch.rows, batch.positions), None, None
        if self.dropout:
            keys = lora.token_keys(*tokens)
        if self.neftune_noise:
            noise = Noise.of(self.neftune_noise, *tokens, batch.lengths)
        return Layout.of(batch, self.backend, keys, noise)

    def _set(self, parameters: dict[str, mx.array]) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))

    def tuned(self) -> nn.Module:
        """The model with its factors as they are now, without dropout: to answer with."""
        self._set(self.adapter)
        return self.model.eval()

    def evaluate(
        self, batches: Iterable[Sequence[Example]], on_micro_batch: Callable[[], None] | None = None
    ) -> float:
        """Mean loss over the target tokens of all rows, without dropout and gradients.

        Args:
            on_micro_batch: called each time another micro-batch is computed.
        """
        self.model.eval()
        self._set(self.adapter)
        total, targets = 0.0, 0
        for rows in batches:
            step = batching.make_micro_batches(
                self._own(rows), self.micro_batch_tokens, backend=self.backend
            )
            if step.empty:
                continue
            past = self._prefix_states(step)
            losses = []
            for batch in step.micro_batches:
                layout = Layout.of(batch, self.backend)
                hidden, _ = hidden_at_targets(self.model, layout, past if batch.past else [])
                head, wanted = head_of(self.model), (layout.targets, layout.weights)
                loss = linear_cross_entropy_value(hidden, head, *wanted, backend=self.backend)
                losses.append(loss)
                mx.async_eval(loss)
                if on_micro_batch:
                    mx.eval(losses[-2:-1])
                    on_micro_batch()
            total += float(mx.stack(losses).sum().item())
            targets += step.target_tokens
        loss, count = self.ranks.total([total, targets])
        return loss / count if count else math.nan

    def _own(self, rows: Sequence[Example]) -> list[Example]:
        """This rank's share of some rows."""
        return [rows[i] for i in self.ranks.share([row.inputs for row in rows])]


class Scalars(NamedTuple):
    """What a step tells of itself, still to be computed."""

    loss: mx.array
    grad_norm: mx.array
    """From before clipping."""
    finite: mx.array
    counts: mx.array
    """Over all ranks: target tokens, rows, tokens, and how many ranks are to stop."""
    own: mx.array
    """There when this rank's part of the sum of gradients is."""


def train(
    trainer: Trainer,
    batches: Iterable[Sequence[Example]],
    learning_rates: Iterable[float],
    *,
    first_step: int = 0,
    pause_after: Callable[[int], bool] = lambda steps: False,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[StepResult]:
    """One optimizer step for each batch of rows, its result after it is done.

    While a step is computed, the next one is sent to the device and the rows of the one after are
    taken, so that the device has no pause. Between two results the trainer's state is that of the
    step whose result was last: save, evaluate, stop.

    Args:
        pause_after: whether the device is to be idle while a result is handed out, by how many
            steps are then done: where something else is to be computed, and timed, in between.
        stopping: whether this rank is to stop, which all of them then learn from a step's result.
    """
    clock = _Clock()
    ahead = (
        (learning_rate, trainer.make_micro_batches(rows))
        for learning_rate, rows in zip(learning_rates, clock.waiting_for(batches), strict=False)
    )
    upcoming = next(ahead, None)
    number = first_step
    under_way: list[tuple[float, Scalars, State]] = []
    while upcoming is not None:
        learning_rate, step = upcoming
        scalars = trainer.step(step, number, learning_rate, stop=stopping())
        mx.async_eval(scalars, trainer.state)
        under_way.append((learning_rate, scalars, trainer.state))
        number += 1
        upcoming = next(ahead, None)  # laid out while this step is computed
        newest = trainer.state
        while len(under_way) > 1 or (
            under_way and (upcoming is None or pause_after(number - len(under_way) + 1))
        ):
            learning_rate, scalars, trainer.state = under_way.pop(0)
            trainer.ranks.meet(scalars.own)
            mx.eval(scalars, trainer.state)
            targets, row_count, tokens, stops = map(int, scalars.counts.tolist())
            seconds, waited = clock.lap()
            yield StepResult(
                loss=float(scalars.loss.item()),
                grad_norm=float(scalars.grad_norm.item()),
                learning_rate=learning_rate,
                rows=row_count,
                tokens=tokens,
                target_tokens=targets,
                finite=bool(scalars.finite.item()),
                stop=bool(stops),
                seconds=seconds,
                waited=waited,
            )
            if not under_way:
                clock.lap()  # what happened meanwhile is no part of a step
        trainer.state = newest


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
