"""Rows a step × tokens a row × quantisation: which setting is the fastest that fits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner import assembly
from mlx_tuner.bench import synthetic
from mlx_tuner.bench.workload import (
    LEARNING_RATE,
    RANK,
    SCALE,
    TARGET_MODULES,
    Settings,
    Subject,
    choose,
    find,
    gemm_tflops,
    subject_of,
)
from mlx_tuner.engine import lora
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.models import model as models
from mlx_tuner.show.progress import Display
from mlx_tuner.system import device
from mlx_tuner.system.device import Machine

SCHEMA_VERSION = 1
CELL_SECONDS, QUICK_CELL_SECONDS = 20.0, 5.0
"""A setting whose step is expected to take longer is left out."""

_NOT_QUANTISED = "quantised weights left out: on the CPU backend they are a hundred times slower"


@dataclass(frozen=True)
class Cell:
    """One setting."""

    quantize: int | None
    batch_size: int
    seq: int
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    peak_memory_gb: float | None = None
    micro_batch_tokens: int | None = None
    skipped: str = ""
    """Why it was not measured."""


@dataclass(frozen=True)
class Sweep:
    """All settings of a model on this machine. As JSON it is a result file."""

    machine: Machine
    model: str
    dtype: str
    quantizations: tuple[int | None, ...]
    batch_sizes: tuple[int, ...]
    seqs: tuple[int, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    command: str
    date: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    schema_version: int = SCHEMA_VERSION
    benchmark: str = "sweep"

    def cell(self, quantize: int | None, batch_size: int, seq: int) -> Cell:
        """The cell of a setting."""
        wanted = (quantize, batch_size, seq)
        return next(c for c in self.cells if (c.quantize, c.batch_size, c.seq) == wanted)

    @property
    def fastest(self) -> Cell | None:
        """The cell of the most tokens a second."""
        measured = [cell for cell in self.cells if cell.tokens_per_second]
        return max(measured, key=lambda cell: cell.tokens_per_second or 0.0, default=None)

    def recipe_lines(self) -> str:
        """The fastest setting as lines of a recipe; empty where nothing was measured."""
        best = self.fastest
        if best is None:
            return ""
        # A shape is no model that a recipe could name.
        name = synthetic.hub_name(self.model) if self.model in synthetic.SHAPES else self.model
        quantised = f"  # mlx-tune convert {name} --quantize {best.quantize} -o …"
        return "\n".join(
            (
                "[model]",
                f'path = "{name}"' if best.quantize is None else f'path = "…"{quantised}',
                "[data]",
                f"max_seq_length = {best.seq}  # the rows' length here: longer ones are cut to it",
                "[train]",
                f"batch_size = {best.batch_size}",
                f"micro_batch_tokens = {best.micro_batch_tokens}",
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the fastest cell beside them."""
        best = self.fastest
        return {**asdict(self), "fastest": asdict(best) if best else None}


def measure(settings: Settings, display: Display, *, command: str) -> Sweep:
    """Measure every setting of the grid that fits into memory and a little time.

    `settings` says the model, its quantisation (all where None), and whether to be quick.
    """
    with device.limits():
        name = choose(replace(settings, quick=True), gemm_tflops(settings.quantize)).name
        quantizations, left_out = _quantizations(name, settings)
        batch_sizes, seqs = _grid(settings.quick)
        cells: list[Cell] = []
        total = len(quantizations) * len(batch_sizes) * len(seqs)
        with display.task(f"sweeping {name}", total) as advance:
            for quantize in quantizations:
                quantised = replace(settings, quantize=quantize)
                gemm = gemm_tflops(quantize)
                model = _build(subject_of(name, quantised, steps=1))
                for seq in seqs:
                    for batch_size in batch_sizes:
                        setting = replace(quantised, batch_size=batch_size, seq=seq)
                        subject = subject_of(name, setting, steps=1)
                        cells.append(_measure_cell(model, subject, setting, gemm))
                        advance(1)
        dtype = models.dtype_of(model)
    machine = device.facts()
    return Sweep(
        machine=machine,
        model=name,
        dtype=str(dtype).removeprefix("mlx.core."),
        quantizations=quantizations,
        batch_sizes=batch_sizes,
        seqs=seqs,
        cells=tuple(cells),
        notes=(*machine.notes, *left_out),
        command=command,
    )


def _quantizations(name: str, settings: Settings) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    """What to try, and a note on what the backend is too slow for."""
    if settings.quantize:
        return (settings.quantize,), ()
    if "quantization" in find(name)[0]:
        return (None,), ()
    if not assembly.on_gpu():
        return (None,), (_NOT_QUANTISED,)
    return ((None,) if settings.quick else (None, 4, 8)), ()


def _grid(quick: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows a step and tokens a row."""
    if assembly.on_gpu() and not quick:
        return (1, 2, 4, 8, 16), (128, 256, 512, 1024, 2048)
    return (1, 4, 8), (64, 128, 256)


def _build(subject: Subject) -> nn.Module:
    model = subject.build()
    lora.attach(model, rank=RANK, scale=SCALE, target_modules=TARGET_MODULES)
    mx.eval(model.parameters())
    return model


def _measure_cell(model: nn.Module, subject: Subject, setting: Settings, gemm: float) -> Cell:
    """The faster of two steps, after one to warm up."""
    (batch,) = subject.batches
    assert setting.seq is not None
    cell = Cell(setting.quantize, setting.batch_size, setting.seq)
    if not subject.fits():
        return replace(cell, skipped="too large")
    limit = QUICK_CELL_SECONDS if setting.quick else CELL_SECONDS
    if subject.step_seconds(gemm) > limit:
        return replace(cell, skipped="too slow")
    tokens = subject.micro_batch_tokens(model)
    trainer = Trainer(model, micro_batch_tokens=tokens, compile=assembly.on_gpu())
    try:
        list(train(trainer, [batch], [LEARNING_RATE]))
        mx.reset_peak_memory()
        seconds = min(_seconds(trainer, batch) for _ in range(2))
    except RuntimeError:  # what MLX raises for an allocation that the system refuses
        mx.clear_cache()
        return replace(cell, skipped="out of memory")
    return replace(
        cell,
        tokens_per_second=sum(len(row.tokens) for row in batch) / seconds,
        samples_per_second=len(batch) / seconds,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
        micro_batch_tokens=tokens,
    )


def _seconds(trainer: Trainer, batch: list[Any]) -> float:
    start = time.perf_counter()
    list(train(trainer, [batch], [LEARNING_RATE]))
    return time.perf_counter() - start
