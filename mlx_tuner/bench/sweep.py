"""Rows a step × tokens a row × quantisation: which setting is the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tuner.bench import model as random
from mlx_tuner.bench.measure import result
from mlx_tuner.bench.speed import train_pass
from mlx_tuner.bench.workload import Settings, Workload, adapted, choose, gemm_tflops, workload_of
from mlx_tuner.models.architecture import dtype_of
from mlx_tuner.show.progress import Display
from mlx_tuner.system import device
from mlx_tuner.training import assembly

CELL_SECONDS, QUICK_CELL_SECONDS = 20.0, 5.0
"""A setting whose step is expected to take longer is left out."""

_NOT_QUANTISED = "quantised weights left out: on the CPU backend they are a hundred times slower"

Cell = dict[str, Any]
"""A setting and its figures; ``skipped`` says why it has none."""


def measure(settings: Settings, display: Display, *, command: str) -> dict[str, Any]:
    """Measure every setting of the grid that fits into memory and a little time.

    `settings` says the model, its quantisation (all where None), and whether to be quick.

    Returns:
        A result file's content.
    """
    with device.limits():
        name = choose(replace(settings, quick=True), gemm_tflops(settings.quantize)).name
        quantizations, notes = _quantizations(name, settings)
        batch_sizes, seqs = _grid(settings.quick)
        cells: list[Cell] = []
        total = len(quantizations) * len(batch_sizes) * len(seqs)
        with display.task(f"sweeping {name}", total) as advance:
            for quantize in quantizations:
                form = replace(settings, quantize=quantize)
                gemm = gemm_tflops(quantize)
                model = adapted(workload_of(name, form, steps=1).build())
                mx.eval(model.parameters())
                for seq in seqs:
                    for batch_size in batch_sizes:
                        setting = replace(form, batch_size=batch_size, seq=seq)
                        cells.append(
                            _cell(model, workload_of(name, setting, steps=1), setting, gemm)
                        )
                        advance(1)
    machine = device.facts()
    return {
        **result("sweep", command, machine),
        "workload": {
            "model": name,
            "dtype": str(dtype_of(model)).removeprefix("mlx.core."),
            "quantize": settings.quantize,
        },
        "quantizations": list(quantizations),
        "batch_sizes": list(batch_sizes),
        "seqs": list(seqs),
        "cells": cells,
        "fastest": max(
            (cell for cell in cells if not cell["skipped"]),
            key=lambda cell: cell["tokens_per_second"],
            default=None,
        ),
        "notes": [*machine.notes, *notes],
    }


def _quantizations(name: str, settings: Settings) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    """What to try, and a note on what the backend is too slow for."""
    if settings.quantize:
        return (settings.quantize,), ()
    if "quantization" in random.find(name)[0]:
        return (None,), ()
    if not assembly.on_gpu():
        return (None,), (_NOT_QUANTISED,)
    return ((None,) if settings.quick else (None, 4, 8)), ()


def _grid(quick: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows a step and tokens a row."""
    if assembly.on_gpu() and not quick:
        return (1, 2, 4, 8, 16), (128, 256, 512, 1024, 2048)
    return (1, 4, 8), (64, 128, 256)


def _cell(model: nn.Module, work: Workload, setting: Settings, gemm: float) -> Cell:
    """The faster of two steps, after one to warm up."""
    cell = {key: getattr(setting, key) for key in ("quantize", "batch_size", "seq")}
    if not work.fits():
        return {**cell, "skipped": "too large"}
    if work.step_seconds(gemm) > (QUICK_CELL_SECONDS if setting.quick else CELL_SECONDS):
        return {**cell, "skipped": "too slow"}
    trainer = work.trainer(model)
    try:
        turns = [train_pass(trainer, work.batches) for _ in range(3)][1:]
    except RuntimeError:  # what MLX raises for an allocation that the system refuses
        mx.clear_cache()
        return {**cell, "skipped": "out of memory"}
    best = max(turns, key=lambda measures: measures["tokens_per_second"])
    figures = {k: best[k] for k in ("tokens_per_second", "samples_per_second", "peak_memory_gb")}
    return {
        **cell,
        **figures,
        "micro_batch_tokens": trainer.micro_batch_tokens,
        "skipped": "",
    }


def tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[list[Cell]]]]:
    """For each quantisation its name, and the cells by rows a step and by tokens a row."""
    for bits in found["quantizations"]:
        cells = [cell for cell in found["cells"] if cell["quantize"] == bits]
        by_size = [[c for c in cells if c["batch_size"] == size] for size in found["batch_sizes"]]
        yield f"{bits} bit" if bits else found["workload"]["dtype"], by_size


def recipe_lines(found: Mapping[str, Any]) -> str:
    """The fastest setting as lines of a recipe; empty where nothing was measured."""
    best, name = found["fastest"], found["workload"]["model"]
    if best is None:
        return ""
    # A shape is no model that a recipe could name.
    name = random.hub_name(name) if name in random.SHAPES else name
    quantised = f"  # mlx-tune convert {name} --quantize {best['quantize']} -o …"
    return "\n".join(
        (
            "[model]",
            f'path = "{name}"' if best["quantize"] is None else f'path = "…"{quantised}',
            "[data]",
            f"max_seq_length = {best['seq']}  # the rows' length here: longer ones are cut to it",
            "[train]",
            f"batch_size = {best['batch_size']}",
            f"micro_batch_tokens = {best['micro_batch_tokens']}",
        )
    )


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Tokens a second as heat maps, a PNG."""
    from mlx_tuner.show.plots import heat_maps

    heat_maps(
        path,
        {
            f"{form}: tokens a second": [[c.get("tokens_per_second") for c in row] for row in rows]
            for form, rows in tables(found)
        },
        rows=[str(size) for size in found["batch_sizes"]],
        columns=[str(seq) for seq in found["seqs"]],
        ylabel="rows a step",
        xlabel="tokens a row",
    )
