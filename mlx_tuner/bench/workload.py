"""The work of a benchmark: a model and steps that fit this machine, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner.bench import model as random
from mlx_tuner.engine import batching, flops, lora, memory
from mlx_tuner.engine.batching import Example, Step
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.errors import Fault, ModelError, UsageError
from mlx_tuner.models import architecture
from mlx_tuner.models import model as models
from mlx_tuner.system import device
from mlx_tuner.training import assembly

RANK, SCALE, LEARNING_RATE = 16, 2.0, 2e-4
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")

MOST_STEPS = 8
EFFICIENCY = 0.5
"""Part of its matrix product speed that a machine is expected to reach, to plan the time."""
PEER_COST = 4
"""Times that mlx-lm's step is expected to take longer than ours, to plan the time."""


@dataclass(frozen=True)
class Settings:
    """What to measure; the defaults are the baseline's work. None: what the machine can do."""

    model: str | None = None
    """A shape of `model.SHAPES`, a model folder, or a Hub name."""
    quantize: int | None = None
    rows: int = 100
    """Different rows to take batches from."""
    seq: int | None = None
    """Tokens of every row; None for CodeAlpaca's lengths."""
    batch_size: int = 8
    steps: int | None = None
    """Steps of one pass."""
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
    def passes(self) -> float:
        """Passes over the steps in units of one of ours: the forward ones, mlx-lm's, warm-ups."""
        return (self.repeats + 1) * (1.5 + PEER_COST * self.peer)


BASELINE_MODEL = "qwen2.5-1.5b"
"""Shape of the recorded run's model (`show.story.PEFT_BASELINE`)."""
DEFAULT_MODELS = (BASELINE_MODEL, "qwen2.5-0.5b", "builtin:tiny-qwen")
"""What is measured without --model: the first of them that this machine can do in the time."""


@dataclass(frozen=True)
class Workload:
    """A model and the batches to train it on."""

    name: str
    config: dict[str, Any]
    folder: Path | None
    """Of its weights; random ones without."""
    batches: list[list[Example]]
    notes: tuple[str, ...] = field(default=())

    def build(self) -> nn.Module:
        """The model without adapters, in memory."""
        if self.folder is None:
            return random.random_model(self.config, compute_dtype())
        model = models.load(self.folder).model
        quantised = any(isinstance(m, nn.QuantizedLinear) for m in model.modules())
        if (quantization := self.config.get("quantization")) and not quantised:
            nn.quantize(model, **quantization)
        mx.eval(model.parameters())
        return model

    def trainer(self, model: nn.Module) -> Trainer:
        """Ours, on a model with adapters, with the micro-batches that a run would take here."""
        needs = assembly.step_memory(model, self.config)
        tokens = needs.micro_batch_tokens(device.memory_budget(), self._longest_row)
        return Trainer(model, micro_batch_tokens=tokens, backend=assembly.backend())

    @cached_property
    def needed_bytes(self) -> int:
        """What training needs at least, with the smallest micro-batches that rows allow."""
        model = adapted(architecture.skeleton(self.config))
        model.set_dtype(compute_dtype())
        return self.step_bytes(model, max(memory.SMALLEST, self._longest_row))

    def step_bytes(self, model: nn.Module, micro_batch_tokens: int) -> int:
        """Estimated peak memory of a step, the model included."""
        needs = assembly.step_memory(model, self.config)
        return needs.peak(needs.most(micro_batch_tokens, self._longest_row))

    def fits(self) -> bool:
        """Whether this machine has the memory for it."""
        return self.needed_bytes <= memory.HEADROOM * device.memory_budget()

    def flops(self, micro_batch_tokens: int = memory.LARGEST) -> int | None:
        """FLOP of one pass over the batches; None for a family that is not counted.

        Of exact micro-batches: what a device pads them to is no work that anybody asked for.
        """
        if self.config["model_type"] not in flops.DENSE_FAMILIES:
            return None
        shape = flops.ModelDims.from_config(self.config)
        adapters = flops.Adapters(RANK, TARGET_MODULES, shape.layers)
        steps = self.steps(micro_batch_tokens)
        return sum(flops.step_flops(shape, step, adapters) for step in steps)

    def steps(self, micro_batch_tokens: int) -> list[Step]:
        """The batches as micro-batches."""
        return [batching.make_micro_batches(rows, micro_batch_tokens) for rows in self.batches]

    def step_seconds(self, gemm: float) -> float:
        """About how long a step takes here, from its FLOPs."""
        return (self.flops() or 0) / len(self.batches) / (EFFICIENCY * gemm * 1e12)

    def describe(self, trainer: Trainer, settings: Settings) -> dict[str, Any]:
        """The work of a pass over the batches, as a result file has it."""
        steps = self.steps(trainer.micro_batch_tokens)
        return {
            "model": self.name,
            "config": self.config,
            "dtype": str(architecture.dtype_of(trainer.model)).removeprefix("mlx.core."),
            "quantize": settings.quantize,
            "batch_size": settings.batch_size,
            "seq": settings.seq,
            "steps": len(steps),
            "rows": sum(step.rows for step in steps),
            "tokens": sum(step.tokens for step in steps),
            "target_tokens": sum(step.target_tokens for step in steps),
            "micro_batch_tokens": trainer.micro_batch_tokens,
            "flops": self.flops(trainer.micro_batch_tokens),
            "weight_bytes": assembly.weight_bytes(trainer.model),
            "passes_over_weights": 2 * sum(len(step.micro_batches) for step in steps),
        }

    @property
    def _longest_row(self) -> int:
        return max(len(row.tokens) for batch in self.batches for row in batch)


def adapted(model: nn.Module) -> nn.Module:
    """The model, with the baseline's adapters on it."""
    lora.attach(model, rank=RANK, scale=SCALE, target_modules=TARGET_MODULES)
    return model


def choose(settings: Settings, gemm: float) -> Workload:
    """The settings' model, or the first of `DEFAULT_MODELS` with memory and time for it.

    The number of steps in a pass is what the time allows, unless the settings have it.

    Args:
        gemm: speed of large products in the settings' form, in TFLOP/s.

    Raises:
        ModelError: the settings' model does not fit into memory.
    """
    passed_over: list[str] = []
    for name in (settings.model,) if settings.model else DEFAULT_MODELS:
        work = workload_of(name, settings, steps=settings.steps or MOST_STEPS)
        a_step = work.step_seconds(gemm)
        seconds = settings.passes * (settings.steps or 1) * a_step
        is_last = settings.model is not None or name == DEFAULT_MODELS[-1]
        if not work.fits():
            needed, budget = work.needed_bytes / 1e9, device.memory_budget() / 1e9
            passed_over.append(f"{name}: needs {needed:.1f} GB, {budget:.1f} GB can be used")
        elif seconds > settings.training_seconds and not is_last:
            passed_over.append(f"{name}: would take about {seconds:,.0f} s")
        else:
            break
    else:
        what = f"{passed_over[-1].partition(': ')[2]}; try --quantize 4 or a smaller shape"
        raise ModelError(Fault(name, "--model", what))
    notes = [f"a smaller model than the default: {', '.join(passed_over)}"] if passed_over else []
    if settings.steps is None and a_step:
        steps = int(settings.training_seconds / (settings.passes * a_step))
        work = workload_of(name, settings, steps=min(MOST_STEPS, max(1, steps)))
        if steps < MOST_STEPS:
            notes.append(f"{len(work.batches)} of {MOST_STEPS} steps a pass, for time")
    if device.slow_blas():
        notes.append("without OpenBLAS this backend is far slower: see `mlx-tune doctor`")
    return replace(work, notes=tuple(notes))


def workload_of(name: str, settings: Settings, *, steps: int) -> Workload:
    """A model by name, with batches of the settings' rows, cycled through for so many steps."""
    config, folder = random.find(name)
    if settings.quantize:
        if "quantization" in config:
            raise UsageError(Fault(name, "--quantize", "the model is quantised already"))
        config = config | {"quantization": {"group_size": 64, "bits": settings.quantize}}
    vocabulary = config.get("text_config", config)["vocab_size"]
    rows = random.rows(settings.rows, vocabulary, length=settings.seq)
    starts = range(0, len(rows), settings.batch_size)
    pool = [rows[start : start + settings.batch_size] for start in starts]
    return Workload(name, config, folder, [pool[i % len(pool)] for i in range(steps)])


def compute_dtype() -> mx.Dtype:
    """bf16 on a GPU. The CPU backend is forty times slower in it than in fp32."""
    return mx.bfloat16 if assembly.on_gpu() else mx.float32


def gemm_tflops(bits: int | None = None) -> float:
    """Speed of large products in TFLOP/s: of a size that fills the device, but takes a moment."""
    return device.gemm_tflops(4096 if assembly.on_gpu() else 1024, compute_dtype(), bits=bits)
