"""The two sides of each comparison: a device with its numbers, and the truth."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_tuner.engine.backend import CPU, GPU, Backend
from mlx_tuner.training import assembly

DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}

Outcome = tuple[bool, str]
"""Whether a check has passed, and its figures."""


@dataclass(frozen=True)
class Side:
    """A device, and the numbers that a training step takes there."""

    device: mx.Device
    backend: Backend

    def here(self) -> AbstractContextManager[object]:
        """Compute on this device."""
        return mx.stream(self.device)


TRUTH = Side(mx.Device(mx.cpu), CPU)


def trial() -> Side:
    """What is tested: the default device; without a GPU, its numbers on the CPU.

    (The CPU backend would call a C++ compiler for fused kernels.)
    """
    if assembly.on_gpu():
        return Side(mx.default_device(), assembly.backend())
    return Side(mx.default_device(), replace(GPU, fused=False))
