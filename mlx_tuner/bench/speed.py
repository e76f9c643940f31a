"""How fast training and generation are, phase by phase, here and with mlx-lm's own trainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.generate import generate_step

from mlx_tuner.bench import synthetic
from mlx_tuner.bench.measure import Measures, Spread, interleave, ratio, spreads
from mlx_tuner.bench.peer import MlxLmTrainer
from mlx_tuner.bench.workload import LEARNING_RATE, RANK, SCALE, TARGET_MODULES, Workload
from mlx_tuner.data.stream import prefetch
from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example, Step
from mlx_tuner.engine.forward import PrefixState
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.runs.metrics import Meter
from mlx_tuner.system import files
from mlx_tuner.system.device import Machine


@dataclass(frozen=True)
class Training:
    """How fast training is."""

    samples_per_second: Spread
    tokens_per_second: Spread
    """Tokens of the rows, padding not counted."""
    steps_per_second: Spread
    peak_memory_gb: float
    gemm_tflops: float
    """Of a large square product, measured in the training's dtype and quantisation."""
    flops_per_step: float | None
    tflops: float | None
    peak_tflops: float
    peak_source: str
    """"table" (the chip's FP32 shaders) or "measured" (large products, not quantised)."""
    percent_of_peak: float | None


@dataclass(frozen=True)
class Phases:
    """Seconds of one step by what they go to, from steps that wait after each phase.

    Rows are token ids already; `mlx-tune data` says how fast a run's thread makes them.
    """

    data: float
    """Waiting for the rows and laying them out."""
    graph: float
    """Python building the graph, before anything is computed."""
    forward: float
    backward: float
    update: float
    """Clipping and AdamW, and what of the gradient was left."""
    logging: float
    step: float
    """All of such a step, measured around the phases."""
    step_undisturbed: float
    """The median of the steps that do not wait."""

    @property
    def by_name(self) -> dict[str, float]:
        """The phases in their order; together they are the step."""
        names = ("data", "graph", "forward", "backward", "update", "logging")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Limit:
    """What a step's time is made of, as parts of 1, and which of it is the most."""

    products: float
    """The matrix products alone, at their measured speed."""
    weights: float | None
    """Reading the weights once forward and once backward, at the chip's bandwidth."""
    data: float
    python: float
    other: float
    """Element-wise kernels, attention's softmax, launches: what the rest does not explain."""
    verdict: str
    """"FLOPs", "bandwidth", "data", "Python" or "other kernels"."""


@dataclass(frozen=True)
class Generation:
    """Tokens a second of one model."""

    prompt_tokens_per_second: Spread
    decode_tokens_per_second: Spread


@dataclass
class Stopwatch:
    """Seconds since the last `lap`, by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """What has passed since the last lap went to this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class WatchedTrainer(Trainer):
    """A trainer that, while it has a stopwatch, waits after each phase of a step."""

    stopwatch: Stopwatch | None = None

    def make_micro_batches(self, rows: Sequence[Example]) -> Step:
        """The rows of one step as micro-batches."""
        step = super().make_micro_batches(rows)
        if self.stopwatch:
            self.stopwatch.lap("data")
        return step

    def start(
        self, loss: mx.array, gradient: mx.array, prefix_gradients: list[PrefixState]
    ) -> None:
        """Compute a micro-batch: at once in the background, or phase by phase."""
        if self.stopwatch is None:
            super().start(loss, gradient, prefix_gradients)
            return
        self.stopwatch.lap("graph")
        mx.eval(loss)
        self.stopwatch.lap("forward")
        mx.eval(gradient, prefix_gradients)
        self.stopwatch.lap("backward")


class Given:
    """Rows that are token ids already, as `prefetch` asks for them."""

    def __init__(self, batches: Sequence[Sequence[Example]]) -> None:
        rows = [row for batch in batches for row in batch]
        self._rows = [row._replace(row=i) for i, row in enumerate(rows)]
        ends = list(accumulate(map(len, batches), initial=0))
        self.steps = [range(*pair) for pair in pairwise(ends)]

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """The rows at the positions."""
        return [self._rows[position] for position in positions]


def steps_of_a_run(trainer: Trainer, batches: Sequence[Sequence[Example]]) -> Iterator[None]:
    """A pass over the batches as a run makes it, rows from its thread, a log line a step.

    Yields before and after each log line.
    """
    given = Given(batches)
    rows = prefetch(given, given.steps)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "metrics.jsonl"
        for number, result in enumerate(train(trainer, rows, [LEARNING_RATE] * len(batches))):
            yield
            meter.step(result)
            peak = mx.get_peak_memory() / 1e9
            record = meter.record(number, 0.0, memory_gb=peak, peak_memory_gb=peak)
            files.append_line(log, record.model_dump_json())
            yield


def train_pass(trainer: Trainer, batches: Sequence[Sequence[Example]]) -> Measures:
    """Speed and peak memory of one pass over the batches."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    for _ in steps_of_a_run(trainer, batches):
        pass
    return _speeds(batches, time.perf_counter() - start)


def phase_pass(trainer: WatchedTrainer, batches: Sequence[Sequence[Example]]) -> Measures:
    """One pass over the batches that waits after each phase: seconds a step of each, and of all."""
    start = end = time.perf_counter()
    watch = trainer.stopwatch = Stopwatch()
    try:
        for i, _ in enumerate(steps_of_a_run(trainer, batches)):
            watch.lap("logging" if i % 2 else "update")
            end = time.perf_counter()
    finally:
        trainer.stopwatch = None
    watch.seconds["step"] = end - start
    return {phase: spent / len(batches) for phase, spent in watch.seconds.items()}


def _speeds(batches: Sequence[Sequence[Example]], seconds: float) -> Measures:
    rows = [row for batch in batches for row in batch]
    return {
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": sum(len(row.tokens) for row in rows) / seconds,
        "steps_per_second": len(batches) / seconds,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }


def training_of(
    runs: Sequence[Measures], workload: Workload, machine: Machine, *, gemm: float, dense: float
) -> Training:
    """The passes' spreads, and the speed in FLOP/s that they amount to.

    Args:
        gemm: measured speed of large products with weights as the model's are, in TFLOP/s.
        dense: the same with weights that are not quantised.
    """
    spread = spreads(runs)
    per_step = workload.flops / workload.steps if workload.flops else None
    tflops = per_step * spread["steps_per_second"].median / 1e12 if per_step else None
    peak = machine.peak_tflops or dense
    return Training(
        samples_per_second=spread["samples_per_second"],
        tokens_per_second=spread["tokens_per_second"],
        steps_per_second=spread["steps_per_second"],
        peak_memory_gb=spread["peak_memory_gb"].high,
        gemm_tflops=gemm,
        flops_per_step=per_step,
        tflops=tflops,
        peak_tflops=peak,
        peak_source="table" if machine.peak_tflops else "measured",
        percent_of_peak=100 * tflops / peak if tflops else None,
    )


def phases_of(passes: Sequence[Measures], steps_per_second: float) -> Phases:
    """The phases of the pass that took the median time.

    Args:
        steps_per_second: of passes that do not wait between phases.
    """
    median = sorted(passes, key=lambda seconds: seconds["step"])[len(passes) // 2]
    return Phases(**median, step_undisturbed=1 / steps_per_second)


def limit_of(workload: Workload, training: Training, phases: Phases, machine: Machine) -> Limit:
    """What a step's time goes to, by what the machine was measured to be able to do."""
    step = phases.step_undisturbed
    products = (training.flops_per_step or 0.0) / (training.gemm_tflops * 1e12) / step
    weights = None
    if machine.bandwidth_gb_per_second:
        read = workload.weight_bytes * workload.passes_over_weights / workload.steps
        weights = read / (machine.bandwidth_gb_per_second * 1e9) / step
    python = (phases.graph + phases.logging) / step
    data = phases.data / step
    other = max(0.0, 1 - max(products, weights or 0.0) - python - data)
    parts = {
        "FLOPs": products,
        "bandwidth": weights or 0.0,
        "data": data,
        "Python": python,
        "other kernels": other,
    }
    return Limit(products, weights, data, python, other, max(parts, key=lambda k: parts[k]))


def peer_of(model: nn.Module) -> MlxLmTrainer:
    """mlx-lm's trainer on a model without adapters, with the settings of ours."""
    return MlxLmTrainer(
        model,
        rank=RANK,
        scale=SCALE,
        target_modules=TARGET_MODULES,
        learning_rate=LEARNING_RATE,
    )


def peer_pass(peer: MlxLmTrainer, batches: Sequence[Sequence[Example]]) -> Measures:
    """One pass of mlx-lm's trainer over the batches."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    computed = sum(peer.step(rows)[1] for rows in batches)
    seconds = time.perf_counter() - start
    tokens = sum(len(row.tokens) for rows in batches for row in rows)
    return {**_speeds(batches, seconds), "computed_per_token": computed / tokens}


def peer_ratios(runs: Mapping[str, Sequence[Measures]]) -> dict[str, Any]:
    """mlx-lm's own figures, and ours over them, pass by pass."""
    keys = ("samples_per_second", "tokens_per_second", "peak_memory_gb")
    return {
        "figures": spreads(runs["mlx-lm"]),
        "ratios": {key: ratio(runs["ours"], runs["mlx-lm"], key) for key in keys},
    }


def measure_generation(
    base: nn.Module, adapted: nn.Module, config: dict[str, Any], *, decoded: int, repeats: int
) -> dict[str, Generation]:
    """Prompt and decode speed of the base model, with the adapter, and with it fused in.

    A quantised base's fused layers are quantised again, so that all three read as many bytes.
    """
    adapted.eval()
    fused = synthetic.twin(base, config)
    quantization = config.get("quantization")
    layers = [
        (path, _quantized(layer.fuse(), quantization) if quantization else layer.fuse())
        for path, layer in lora.adapted_modules(adapted).items()
    ]
    fused.update_modules(tree_unflatten(layers))
    mx.eval(fused.parameters())
    vocabulary = config.get("text_config", config)["vocab_size"]
    prompt = mx.array(np.random.default_rng(0).integers(0, vocabulary, 128))
    runs = interleave(
        {
            name: partial(generate, model, prompt, decoded)
            for name, model in (("base", base), ("adapter", adapted), ("fused", fused))
        },
        repeats=repeats,
        warmups=1,
    )
    return {name: Generation(**spreads(turns)) for name, turns in runs.items()}


def _quantized(layer: nn.Linear, quantization: Mapping[str, Any]) -> nn.Module:
    options = {k: quantization[k] for k in ("group_size", "bits", "mode") if k in quantization}
    return nn.QuantizedLinear.from_linear(layer, **options)


def generate(model: nn.Module, prompt: mx.array, count: int) -> Measures:
    """Greedy tokens after a prompt, whatever they are, with mlx-lm's own loop."""
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
