"""One pass over a work's batches, or one generation, timed: what `measure.interleave` repeats."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.generate import generate_step

from mlx_tuner.bench.measure import Measures
from mlx_tuner.bench.model import twin
from mlx_tuner.bench.peer import MlxLmTrainer
from mlx_tuner.bench.workload import LEARNING_RATE
from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.trainer import Trainer, train

PROMPT_TOKENS = 128


def train_pass(trainer: Trainer, batches: Sequence[Sequence[Example]]) -> Measures:
    """Speed and peak memory of training, and seconds a step in which Python was busy."""
    mx.reset_peak_memory()
    start, busy = time.perf_counter(), time.thread_time()
    for _ in train(trainer, batches, repeat(LEARNING_RATE)):
        pass
    python = (time.thread_time() - busy) / len(batches)
    return {**_speeds(batches, time.perf_counter() - start), "python_seconds": python}


def forward_pass(trainer: Trainer, batches: Sequence[Sequence[Example]]) -> Measures:
    """Seconds a step of evaluating the batches, and of laying their rows out alone."""
    start = time.perf_counter()
    for rows in batches:
        trainer.make_micro_batches(rows)
    laid_out = time.perf_counter()
    for rows in batches:
        trainer.evaluate([rows])
    end = time.perf_counter()
    rows_seconds = (laid_out - start) / len(batches)
    return {
        "rows_seconds": rows_seconds,
        "forward_seconds": (end - laid_out) / len(batches) - rows_seconds,
    }


def peer_pass(peer: MlxLmTrainer, batches: Sequence[Sequence[Example]]) -> Measures:
    """Speed and peak memory of mlx-lm's trainer, and the tokens that it computes for each one."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    computed = sum(peer.step(rows)[1] for rows in batches)
    seconds = time.perf_counter() - start
    tokens = sum(len(row.tokens) for rows in batches for row in rows)
    return {**_speeds(batches, seconds), "computed_per_token": computed / tokens}


def _speeds(batches: Sequence[Sequence[Example]], seconds: float) -> Measures:
    """Padding is not counted as tokens."""
    rows = [row for batch in batches for row in batch]
    return {
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": sum(len(row.tokens) for row in rows) / seconds,
        "steps_per_second": len(batches) / seconds,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }


def generation_pass(model: nn.Module, vocabulary: int, count: int) -> Measures:
    """Greedy tokens after a random prompt, whatever they are, with mlx-lm's own loop."""
    prompt = mx.array(np.random.default_rng(0).integers(0, vocabulary, PROMPT_TOKENS))
    start = time.perf_counter()
    tokens = generate_step(prompt, model, max_tokens=count + 1)
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return {
        "prompt_tokens_per_second": prompt.size / (first - start),
        "decode_tokens_per_second": count / (time.perf_counter() - first),
    }


def fused(base: nn.Module, adapted: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The base with the adapter merged in; a quantised base's layers are quantised again.

    So all three read as many bytes a token.
    """
    quantization = config.get("quantization", {})
    options = {k: quantization[k] for k in ("group_size", "bits", "mode") if k in quantization}
    layers = {path: layer.fuse() for path, layer in lora.adapted_modules(adapted).items()}
    if quantization:
        layers = {p: nn.QuantizedLinear.from_linear(x, **options) for p, x in layers.items()}
    merged = twin(base, config)
    merged.update_modules(tree_unflatten(list(layers.items())))
    mx.eval(merged.parameters())
    return merged
