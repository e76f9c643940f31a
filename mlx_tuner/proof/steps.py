"""Whole training steps: against the CPU in fp32, made twice, resumed, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.trainer import default_loss

from mlx_tuner.bench import model as random
from mlx_tuner.bench.workload import Workload, adapted, compute_dtype
from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example, Step
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.models import model as models
from mlx_tuner.models.architecture import skeleton
from mlx_tuner.models.folder import check_folder
from mlx_tuner.proof.operations import LENGTHS, PREFIX, relative
from mlx_tuner.proof.sides import DTYPES, TRUTH, Outcome, Side

STEPS, LEARNING_RATE = 20, 1e-3
MOST_OF_THE_ESTIMATE = 1.15


class RowByRow(Trainer):
    """Takes mlx-lm's own loss, a row at a time, in place of our passes."""

    def make_micro_batches(self, rows: Sequence[Example]) -> Step:
        self._waiting = [*getattr(self, "_waiting", ()), rows]
        return super().make_micro_batches(rows)

    def sum_of_micro_batches(self, step: Step, number: int) -> tuple[mx.array, mx.array]:
        self.model.train()
        loss_and_gradient = nn.value_and_grad(self.model, default_loss)
        losses, total = [], mx.zeros_like(self.state.parameters)
        self._set(self.adapter)
        for row in self._waiting.pop(0):
            batch = mx.array(row.tokens)[None]
            lengths = mx.array([[int(row.loss_mask.argmax()), len(row.tokens)]])
            (loss, targets), gradient = loss_and_gradient(self.model, batch, lengths)
            total = total + targets * self.shapes.flatten(dict(tree_flatten(gradient)))
            losses.append(targets * loss)
            mx.async_eval(total, losses[-1])
        return mx.stack(losses).sum(), total


def check_training(side: Side, name: str, dtype: str) -> Outcome:
    """Twenty steps: every loss and the first gradient, against the CPU in fp32.

    Passed where the errors are at most twice those of mlx-lm's forward pass, or very small.
    """
    truth = _trajectory(TRUTH, name, "fp32")
    ours, theirs = (_trajectory(side, name, dtype, kind) for kind in (Trainer, RowByRow))

    def errors(found: Trajectory) -> tuple[float, float]:
        losses = max(abs(a / b - 1) for a, b in zip(found.losses, truth.losses, strict=True))
        return losses, relative(found.gradient, truth.gradient)

    (loss, gradient), (their_loss, their_gradient) = errors(ours), errors(theirs)
    floor = {"fp32": (1e-4, 1e-4), "bf16": (2e-3, 2e-2)}[dtype]
    falls = ours.losses[-1] < ours.losses[0]
    ok = loss <= max(2 * their_loss, floor[0]) and gradient <= max(2 * their_gradient, floor[1])
    told = (
        f"loss {loss:.1e} (mlx-lm {their_loss:.1e}), gradient {gradient:.1e} "
        f"(mlx-lm {their_gradient:.1e}), {ours.losses[0]:.3f} → {ours.losses[-1]:.3f}"
    )
    return ok and falls, told


@dataclass(frozen=True)
class Trajectory:
    """Losses of `STEPS` steps, and the first one's gradient."""

    losses: list[float]
    gradient: np.ndarray


@cache
def _trajectory(side: Side, name: str, dtype: str, kind: type[Trainer] = Trainer) -> Trajectory:
    with side.here():
        trainer = _trainer(side, name, dtype, kind=kind)
        rows = _rows(trainer.model)
        _, gradient = trainer.sum_of_micro_batches(trainer.make_micro_batches(rows), 0)
        first = np.array(gradient)
        results = list(train(trainer, repeat(rows, STEPS), repeat(LEARNING_RATE)))
    return Trajectory([result.loss for result in results], first)


def _trainer(
    side: Side, name: str, dtype: str, *, dropout: float = 0.0, kind: type[Trainer] = Trainer
) -> Trainer:
    """A trainer on an adapter that is not zero; micro-batches so small that there are several."""
    config, weights, factors = _weights(name)
    model = skeleton(config)
    model.update(tree_map(lambda x: x.astype(DTYPES[dtype]), weights))
    lora.attach(model, rank=4, scale=2.0, dropout=dropout, target_modules="all-linear")
    model.update(tree_unflatten(list(factors.items())))
    mx.eval(model.parameters())
    return kind(model, micro_batch_tokens=40, backend=side.backend)


@cache
def _weights(name: str) -> tuple[dict[str, Any], Any, dict[str, mx.array]]:
    """Config, weights rounded to bf16, an adapter's factors: made on the CPU for both sides."""
    with TRUTH.here():
        if name.startswith(models.BUILTIN):
            folder = models.resolve(name)
            config, model = check_folder(folder), models.load(folder).model
        else:
            config = random.tiny_config(name, vocab_size=256)
            model = random.random_model(config, mx.float32)
        rounded = tree_map(lambda x: x.astype(mx.bfloat16).astype(mx.float32), model.parameters())
        lora.attach(model, rank=4, scale=2.0, target_modules="all-linear")
        factors = {
            key: 0.02 * mx.random.normal(value.shape, key=mx.random.key(i))
            for i, (key, value) in enumerate(lora.trainable(model).items())
        }
        mx.eval(rounded, factors)
    return config, rounded, factors


def _rows(model: nn.Module) -> list[Example]:
    """Rows of every length of `LENGTHS` after a shared prefix; the second half is learned."""
    drawn = np.random.default_rng(0)
    shared = drawn.integers(0, 256, PREFIX)
    rows = []
    for i, length in enumerate((*LENGTHS, 17)):
        tokens = np.concatenate([shared, drawn.integers(0, 256, length)]).astype(np.int32)
        mask = np.arange(len(tokens)) >= PREFIX + length // 2
        rows.append(Example(tokens, mask, i))
    return rows


def check_repeatability(side: Side, name: str, dtype: str) -> Outcome:
    """The same three steps, twice: bit for bit."""
    with side.here():
        first, second = (_states(side, name, dtype, (3,)) for _ in range(2))
    return _same(first, second)


def check_resume(side: Side, name: str, dtype: str) -> Outcome:
    """Six steps with dropout, and three, saved and gone on from: bit for bit."""
    with side.here():
        whole, resumed = (_states(side, name, dtype, parts) for parts in ((6,), (3, 3)))
    return _same(whole, resumed)


def _states(side: Side, name: str, dtype: str, parts: Sequence[int]) -> list[np.ndarray]:
    """The state after so many steps in parts, each with a trainer of its own."""
    state, done = None, 0
    for steps in parts:
        trainer = _trainer(side, name, dtype, dropout=0.1)
        if state is not None:
            trainer.state = State(*map(mx.array, state))
        rows = _rows(trainer.model)
        list(train(trainer, repeat(rows, steps), repeat(LEARNING_RATE), first_step=done))
        state, done = [np.array(part) for part in trainer.state], done + steps
    assert state is not None
    return state


def _same(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> Outcome:
    different = sum(int((a != b).sum()) for a, b in zip(left, right, strict=True))
    return not different, "bit for bit" if not different else f"{different:,} numbers differ"


def check_memory(side: Side) -> Outcome:
    """A step's peak memory, against the estimate that a run is planned with."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64, "vocab_size": 8192}
    config = random.tiny_config("qwen3", **sizes, num_hidden_layers=3)
    tokens = 1024
    work = Workload("", config, None, [random.rows(8, 8192, length=tokens // 8)])
    with side.here():
        before = mx.get_active_memory()
        model = adapted(random.random_model(config, compute_dtype()))
        trainer = Trainer(model, micro_batch_tokens=tokens, backend=side.backend)
        mx.reset_peak_memory()
        list(train(trainer, work.batches, [LEARNING_RATE]))
        measured = (mx.get_peak_memory() - before) / 1e9
        estimate = work.step_bytes(model, tokens) / 1e9
    told = f"{measured:.2f} GB of {estimate:.2f} GB estimated"
    return measured <= MOST_OF_THE_ESTIMATE * estimate, told
