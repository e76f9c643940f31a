"""What a run needs of this machine: memory by part, time and disk, before it is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_tuner.data.dataset import Dataset
from mlx_tuner.engine import memory
from mlx_tuner.engine.batching import MIN_SHARED_PREFIX, Sizes, sizes_of
from mlx_tuner.engine.memory import StepMemory
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.errors import Fault, ModelError, TunerError
from mlx_tuner.models import architecture
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.runs.checkpoints import MOST_AT_ONCE
from mlx_tuner.runs.metrics import Summary
from mlx_tuner.runs.place import SUMMARY
from mlx_tuner.runs.run import read_summary
from mlx_tuner.show import story
from mlx_tuner.system import cache, device
from mlx_tuner.training import agreement, assembly
from mlx_tuner.words import size

_SHORTER = (1024, 512, 256)
"""Tokens of a row that are tried where a longer one does not fit."""
_FLOPS_A_PARAMETER = 4
"""For each token: forward and backward without gradients of the frozen weights."""
_EFFICIENCY = 0.5
"""Part of a chip's peak that is assumed where nothing was measured."""
_LARGEST = 16
"""How many steps of the most tokens, and how many of the longest rows, are compared."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a step at its peak, by what they are for."""

    parts: dict[str, int]
    budget: int
    """What this machine can give."""
    advice: str
    """The one setting to change where it does not fit."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget

    def require(self, name: str) -> None:
        """Refuse a run that cannot fit.

        Raises:
            ModelError: what it needs, what there is, and what to change.
        """
        if not self.fits:
            need, have = size(self.peak), size(self.budget)
            what = f"needs about {need} of memory, and {have} can be had; {self.advice}, or --force"
            raise ModelError(Fault(name, "", what))


def skeleton(recipe: Recipe, config: dict[str, Any], kept: Path | None = None) -> nn.Module:
    """The recipe's model with its adapter, of the right shapes and types, never computed.

    Args:
        kept: as of `assembly.attach_adapter`.
    """
    model = architecture.skeleton(config)
    model.set_dtype(getattr(mx, architecture.config_dtype(config) or "float32"))
    assembly.attach_adapter(model, recipe, kept)
    return model


def memory_of(recipe: Recipe, model: nn.Module, config: dict[str, Any], rows: Dataset) -> Memory:
    """What a step takes, and how to make it take less where that is too much.

    Args:
        model: of the recipe, with its adapter; its arrays need not be computed.
    """
    budget = device.memory_budget()

    def parts(recipe: Recipe, longest: int) -> dict[str, int]:
        step = step_memory(recipe, model, config)
        tokens = assembly.micro_batch_tokens(recipe, step, budget, longest)
        return step.parts(largest_step(recipe, rows, step, tokens, longest)[1])

    def changed(longest: int, **train: Any) -> int:
        table = recipe.train.model_copy(update=train)
        return sum(parts(replace(recipe, train=table), longest).values())

    def remedies() -> Iterator[tuple[str, int]]:
        longest = rows.survey.longest
        smallest = memory.SMALLEST
        yield (
            f"set train.micro_batch_tokens = {smallest}",
            changed(longest, micro_batch_tokens=smallest),
        )
        yield (
            "set train.gradient_checkpointing = true",
            changed(longest, gradient_checkpointing=True, micro_batch_tokens=smallest),
        )
        for shorter in (length for length in _SHORTER if length < longest):
            yield (
                f"set data.max_seq_length = {shorter}",
                changed(shorter, gradient_checkpointing=True, micro_batch_tokens=shorter),
            )

    advice = (text for text, peak in remedies() if peak <= budget)
    otherwise = "take a smaller model, or convert this one with --quantize 4"
    return Memory(parts(recipe, rows.survey.longest), budget, next(advice, otherwise))


def step_memory(recipe: Recipe, model: nn.Module, config: dict[str, Any]) -> StepMemory:
    """A step's bytes as the recipe trains, for any sizes of its micro-batches."""
    return assembly.step_memory(model, config, checkpointing=recipe.train.gradient_checkpointing)


def largest_step(
    recipe: Recipe, rows: Dataset, step: StepMemory, micro_batch_tokens: int, longest: int
) -> tuple[list[int], Sizes]:
    """Positions of the rows of the surveyed step that takes most, and its largest micro-batch.

    Args:
        longest: tokens that rows are cut to.
    """
    lengths = np.minimum(rows.survey.tokens[rows.survey.usable], longest)
    own = recipe.lora.dropout or recipe.train.neftune_noise  # no prefix is shared then
    prefix = 0 if own else min(len(rows.survey.prefix), int(lengths.min()) - 1)
    prefix = prefix if prefix >= MIN_SHARED_PREFIX else 0
    count = schedule.steps_per_epoch(len(lengths), recipe.train.batch_size)
    steps = [list(each) for each in assembly.row_order(recipe, len(lengths), 0, count)]
    # Only those of the most tokens and those of the longest rows are worth laying out.
    candidates = {
        i
        for measure in (np.sum, np.max)
        for i in np.argsort([-int(measure(lengths[each])) for each in steps])[:_LARGEST].tolist()
    }
    backend = assembly.backend()
    found = [
        (step.peak(sizes), i, sizes)
        for i in candidates
        for sizes in sizes_of(lengths[steps[i]].tolist(), prefix, micro_batch_tokens, backend)
    ]
    _, i, sizes = max(found)
    return steps[i], sizes


def rehearse(
    recipe: Recipe, trainer: Trainer, rows: Dataset, step: StepMemory, budget: int
) -> None:
    """Run the largest step once, so that memory fails here, and hold the estimate to its peak.

    Where "auto" then promises more than there is, micro-batches are halved. Ranks then compute some
    of its rows once more, all the same, to see how fast each of them is.
    """
    longest = rows.survey.longest
    positions, sizes = largest_step(recipe, rows, step, trainer.micro_batch_tokens, longest)
    examples = rows.examples(positions)
    step = step.measured(sizes, trainer.rehearse(examples))
    while (
        recipe.train.micro_batch_tokens == "auto"
        and trainer.micro_batch_tokens > memory.SMALLEST
        and step.peak(step.most(trainer.micro_batch_tokens, longest)) > budget
    ):
        trainer.micro_batch_tokens = max(memory.SMALLEST, trainer.micro_batch_tokens // 2)
    if trainer.ranks.size > 1:
        start = time.perf_counter()
        trainer.rehearse(examples[:: trainer.ranks.size])
        trainer.ranks.speeds = agreement.speeds(trainer.ranks, time.perf_counter() - start)


def disk_bytes(trainable_parameters: int) -> int:
    """The most that a run takes on the disk: its adapter, and checkpoints of that and two moments.

    All are fp32. Small files are left out.
    """
    return 4 * trainable_parameters * (3 * MOST_AT_ONCE + 1)


def seconds_of(recipe: Recipe, *, tokens: int, total_parameters: int) -> tuple[float | None, str]:
    """How long a run's steps will take, and by what that is known.

    Args:
        tokens: of all its steps.
    """
    machine = device.facts()
    chip = story.machine(machine)["chip"]
    if longest := _longest_run(recipe.model.path, chip):
        run, summary = longest
        ranks = int(summary.machine.get("ranks", 1))
        return tokens * ranks / summary.tokens_per_second, f"by the run in {run}"
    flops = _FLOPS_A_PARAMETER * total_parameters * tokens
    for file, found in cache.results("bench*.json"):
        if tflops := _bench_tflops(found, machine.chip):
            return flops / (tflops * 1e12), f"by `mlx-tune bench`, {file}"
    if machine.peak_tflops:
        share = f"{100 * _EFFICIENCY:.0f} % of the chip's peak"
        return flops / (_EFFICIENCY * machine.peak_tflops * 1e12), f"a guess: at {share}"
    return None, "unknown; `mlx-tune bench` measures this machine"


def _longest_run(model: str, chip: object) -> tuple[Path, Summary] | None:
    """Of the runs beside this one, of the same model and chip: a short one says little of time."""
    found = []
    for path in Path("adapters").glob(f"*/{SUMMARY}"):
        with suppress(TunerError):  # of a file that another program or version wrote
            summary = read_summary(path.parent)
            if summary and (summary.model, summary.machine.get("chip")) == (model, chip):
                found.append((path.parent, summary))
    longest = max(found, key=lambda each: each[1].tokens, default=None)
    return longest if longest and longest[1].tokens else None


def _bench_tflops(found: Any, chip: str) -> float | None:
    """What a bench result reached, if it is one and of this chip."""
    try:
        if found["benchmark"] == "bench" and found["machine"]["chip"] == chip:
            return float(found["training"]["tflops"])
    except (ValueError, KeyError, TypeError):
        pass
    return None
