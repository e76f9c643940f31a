"""What a benchmark trains: a model and steps that fit this machine, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner import assembly
from mlx_tuner.bench import synthetic
from mlx_tuner.engine import batching, flops, lora, memory
from mlx_tuner.engine.batching import Example, Step
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.errors import Fault, ModelError, UsageError
from mlx_tuner.models import model as models
from mlx_tuner.system import device

JOB = "qwen2.5-1.5b"
"""The user's: `recipes/codealpaca.toml` on Qwen2.5-Coder-1.5B-Instruct."""
JOB_ROWS, JOB_BATCH_SIZE = 100, 8
RANK, SCALE, LEARNING_RATE = 16, 2.0, 2e-4
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")

SMALLER = (JOB, "qwen2.5-0.5b", "builtin:tiny-qwen")
"""What is measured without --model: the first of them that this machine can do in the time."""

MOST_STEPS = 8
EFFICIENCY = 0.5
"""Part of its matrix product speed that a machine is expected to reach, to plan the time."""
PEER_COST = 4
"""Times that mlx-lm's step is expected to take longer than ours, to plan the time."""


@dataclass(frozen=True)
class Settings:
    """What to measure. None: chosen by what the machine can do."""

    model: str | None = None
    """A shape of `synthetic.SHAPES`, a model folder, or a Hub name."""
    quantize: int | None = None
    rows: int = JOB_ROWS
    """Different rows to take batches from."""
    seq: int | None = None
    """Tokens of every row; None for CodeAlpaca's lengths."""
    batch_size: int = JOB_BATCH_SIZE
    steps: int | None = None
    """Steps of one repeat."""
    quick: bool = False
    peer: bool = False
    """Measure mlx-lm's trainer, too."""

    @property
    def repeats(self) -> int:
        """Measured passes over the same steps."""
        return 3 if self.quick else 5

    @property
    def training_seconds(self) -> float:
        """About how long all passes together may take."""
        return 90 if self.quick else 150

    @property
    def decoded_tokens(self) -> int:
        """Tokens of one generation: few where each takes long."""
        return 64 if assembly.on_gpu() and not self.quick else 8

    @property
    def passes(self) -> int:
        """Passes over the steps, in the time that one of ours takes: warm-ups, phases, mlx-lm."""
        return (self.repeats + 1) * (2 + PEER_COST * self.peer)


@dataclass(frozen=True)
class Subject:
    """A model that can be built, and the batches to train it on."""

    name: str
    config: dict[str, Any]
    folder: Path | None
    """Of its weights; random ones without."""
    batches: list[list[Example]]
    notes: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The model without adapters, in memory."""
        if self.folder is None:
            return synthetic.random_model(self.config, compute_dtype())
        model = models.load(self.folder).model
        if (quantization := self.config.get("quantization")) and not _is_quantized(model):
            nn.quantize(model, **quantization)
        mx.eval(model.parameters())
        return model

    def micro_batch_tokens(self, model: nn.Module) -> int:
        """What a run with `micro_batch_tokens = "auto"` would take here."""
        return memory.auto_micro_batch_tokens(
            device.memory_budget(),
            assembly.weight_bytes(model),
            assembly.trainable_parameters(model),
            self.token_bytes(model),
        )

    def token_bytes(self, model: nn.Module) -> int:
        """Bytes that one token of a forward pass keeps."""
        longest = max(len(row.tokens) for batch in self.batches for row in batch)
        itemsize = models.dtype_of(model).size
        return memory.activation_bytes(
            self.config, itemsize, row_tokens=longest, checkpointing=False
        )

    def needed_bytes(self) -> int:
        """What training needs at least, with the smallest micro-batches that rows allow."""
        model = models.skeleton(self.config)
        model.set_dtype(compute_dtype())
        lora.attach(model, rank=RANK, scale=SCALE, target_modules=TARGET_MODULES)
        longest = max(len(row.tokens) for batch in self.batches for row in batch)
        return memory.step_bytes(
            assembly.weight_bytes(model),
            assembly.trainable_parameters(model),
            max(memory.SMALLEST, longest),
            self.token_bytes(model),
        )

    def fits(self) -> bool:
        """Whether this machine has the memory for it."""
        return self.needed_bytes() <= memory.HEADROOM * device.memory_budget()

    def step_seconds(self, gemm: float) -> float:
        """About how long a step takes here, from its FLOPs."""
        if not (shape := dense_shape(self.config)):
            return 0.0
        steps = [batching.make_micro_batches(batch, memory.LARGEST) for batch in self.batches]
        count = sum(count_flops(shape, step) for step in steps) / len(steps)
        return count / (EFFICIENCY * gemm * 1e12)


def choose(settings: Settings, gemm: float) -> Subject:
    """The model of the settings, or the largest of `SMALLER` that there is memory and time for.

    The number of steps in a pass is what the time allows, unless the settings have it.

    Args:
        gemm: speed of large products in the settings' form, in TFLOP/s.

    Raises:
        ModelError: the settings' model does not fit into memory.
    """
    passed_over: list[str] = []
    for name in (settings.model,) if settings.model else SMALLER:
        subject = subject_of(name, settings, steps=settings.steps or MOST_STEPS)
        a_step = subject.step_seconds(gemm)
        seconds = settings.passes * (settings.steps or 1) * a_step
        if not subject.fits():
            needed, budget = subject.needed_bytes() / 1e9, device.memory_budget() / 1e9
            passed_over.append(f"{name}: needs {needed:.1f} GB, {budget:.1f} GB can be used")
        elif settings.model is None and name != SMALLER[-1] and seconds > settings.training_seconds:
            passed_over.append(f"{name}: would take about {seconds:,.0f} s")
        else:
            break
    else:
        what = f"{passed_over[-1].partition(': ')[2]}; try --quantize 4 or a smaller shape"
        raise ModelError(Fault(name, "--model", what))
    notes = [f"a smaller model than the default: {', '.join(passed_over)}"] if passed_over else []
    if settings.steps is None and a_step:
        steps = int(settings.training_seconds / (settings.passes * a_step))
        subject = subject_of(name, settings, steps=min(MOST_STEPS, max(1, steps)))
        if steps < MOST_STEPS:
            notes.append(f"{len(subject.batches)} of {MOST_STEPS} steps a pass, for time")
    if device.slow_blas():
        notes.append("without OpenBLAS this backend is far slower: see `mlx-tune doctor`")
    return replace(subject, notes=tuple(notes))


def subject_of(name: str, settings: Settings, *, steps: int) -> Subject:
    """The model by name, with batches of the settings' rows, cycled through for so many steps."""
    config, folder = find(name)
    if settings.quantize:
        if "quantization" in config:
            raise UsageError(Fault(name, "--quantize", "the model is quantised already"))
        config = config | {"quantization": {"group_size": 64, "bits": settings.quantize}}
    vocabulary = config.get("text_config", config)["vocab_size"]
    rows = synthetic.rows(settings.rows, vocabulary, length=settings.seq)
    starts = range(0, len(rows), settings.batch_size)
    pool = [rows[start : start + settings.batch_size] for start in starts]
    return Subject(name, config, folder, [pool[i % len(pool)] for i in range(steps)])


def find(name: str) -> tuple[dict[str, Any], Path | None]:
    """Config and folder of a folder or Hub name; the config alone of a shape."""
    if name.startswith(models.BUILTIN) or "/" in name or Path(name).is_dir():
        folder = models.resolve(name)
        return models.read_config(folder), folder
    return synthetic.config_of(name), None


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, nn.QuantizedLinear) for _, module in model.named_modules())


def dense_shape(config: Mapping[str, Any]) -> flops.Shape | None:
    """Sizes for counting FLOPs; None for a family that is not counted."""
    if config["model_type"] not in flops.DENSE_FAMILIES:
        return None
    return flops.Shape.from_config(config)


def count_flops(shape: flops.Shape, step: Step) -> int:
    """Of a step with the user's adapters on all blocks."""
    adapters = flops.Adapters(RANK, TARGET_MODULES, shape.layers)
    return flops.step_flops(shape, step, adapters).total


@dataclass(frozen=True)
class Workload:
    """A model and the steps to run on it."""

    model: str
    config: Mapping[str, Any]
    dtype: str
    quantize: int | None
    batch_size: int
    seq: int | None
    steps: int
    rows: int
    tokens: int
    target_tokens: int
    """Rows, tokens and targets of one pass over the steps."""
    micro_batch_tokens: int
    compiled: bool
    flops: int | None
    """Of one pass; None for a family that is not counted."""
    weight_bytes: int
    passes_over_weights: int
    """Forward and backward passes of the steps, each of which reads all weights."""

    @property
    def is_the_job(self) -> bool:
        """Whether the user's baseline is of the same work."""
        return (self.seq, self.batch_size, self.quantize) == (None, JOB_BATCH_SIZE, None) and all(
            self.config.get(key) == value for key, value in synthetic.config_of(JOB).items()
        )


def describe(subject: Subject, trainer: Trainer, settings: Settings) -> Workload:
    """The workload as it was cut into steps."""
    # Counted without the padding that compiled shapes add: that is no work anybody asked for.
    steps = [
        batching.make_micro_batches(batch, trainer.micro_batch_tokens) for batch in subject.batches
    ]
    shape = dense_shape(subject.config)
    return Workload(
        model=subject.name,
        config=subject.config,
        dtype=str(models.dtype_of(trainer.model)).removeprefix("mlx.core."),
        quantize=settings.quantize,
        batch_size=settings.batch_size,
        seq=settings.seq,
        steps=len(steps),
        rows=sum(step.rows for step in steps),
        tokens=sum(step.tokens for step in steps),
        target_tokens=sum(step.target_tokens for step in steps),
        micro_batch_tokens=trainer.micro_batch_tokens,
        compiled=assembly.on_gpu(),
        flops=sum(count_flops(shape, step) for step in steps) if shape else None,
        weight_bytes=assembly.weight_bytes(trainer.model),
        passes_over_weights=2 * sum(len(step.micro_batches) for step in steps),
    )


def compute_dtype() -> mx.Dtype:
    """bf16 on a GPU. The CPU backend is forty times slower in it than in fp32."""
    return mx.bfloat16 if assembly.on_gpu() else mx.float32


def gemm_tflops(bits: int | None = None) -> float:
    """Speed of large products in TFLOP/s: of a size that fills the device, but takes a moment."""
    return device.gemm_tflops(4096 if assembly.on_gpu() else 1024, compute_dtype(), bits=bits)
