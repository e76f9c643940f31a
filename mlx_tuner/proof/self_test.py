"""Whether this machine's device computes what its CPU computes: `mlx-tune doctor --self-test`.

The trial is the device that MLX computes on by default, with the numbers that training takes there.
The truth is the CPU in fp32 with the CPU's numbers, or a plain formula. Without a GPU the trial is
the CPU with a GPU's numbers. What an error may be is set by mlx-lm's own forward pass, a row at a
time, on the trial's device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_tuner.models.model import BUILTIN
from mlx_tuner.proof import operations, steps
from mlx_tuner.proof.sides import Outcome, Side, trial
from mlx_tuner.system import device
from mlx_tuner.system.device import Machine

MODELS = ("builtin:tiny-qwen", "qwen3", "qwen3_moe", "qwen3_5")
"""The built-in model, and families of which a tiny random one is made."""


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    name: str
    ok: bool
    what: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{'✓' if self.ok else '✗'} {self.name:<26}  {self.what}"


@dataclass(frozen=True)
class SelfTest:
    """All findings."""

    machine: Machine
    device: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all have passed."""
        return all(finding.ok for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        bad = sum(not finding.ok for finding in self.findings)
        if bad:
            return f"{bad} of {len(self.findings)} checks failed on {self.device}"
        return f"all {len(self.findings)} checks passed on {self.device}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"ok": self.ok, **asdict(self)}

    def to_markdown(self) -> str:
        """A report to paste into an issue."""
        facts = [f"- {key}: {value}" for key, value in self.machine.to_json().items() if value]
        rows = [
            f"| {'ok' if f.ok else '**not ok**'} | {f.name} | {f.what} | {f.seconds:.1f} |"
            for f in self.findings
        ]
        header = ["| | check | found | seconds |", "| --- | --- | --- | --- |"]
        title = ["# mlx-tune doctor --self-test", "", self.verdict, ""]
        return "\n".join((*title, *header, *rows, "", *facts, ""))


def run(on_finding: Callable[[Finding], None] = lambda finding: None) -> SelfTest:
    """Make all checks, and tell of each as it is done; an exception of MLX is a finding, too."""
    side, findings = trial(), []
    for name, check in checks(side).items():
        start = time.perf_counter()
        try:
            ok, what = check(side)
        except (RuntimeError, ValueError) as error:
            ok, what = False, f"{type(error).__name__}: {error}"
        findings.append(Finding(name, ok, what, time.perf_counter() - start))
        on_finding(findings[-1])
    told = "a GPU's numbers on the CPU" if side.device.type == mx.cpu else "the GPU"
    return SelfTest(device.facts(), told, tuple(findings))


def checks(side: Side) -> dict[str, Callable[[Side], Outcome]]:
    """Every check by its name; tests make the same ones.

    The CPU backend has no bf16 for experts and is slow in it, so there one model is enough.
    """
    on_gpu = side.device.type == mx.gpu
    halves = MODELS if on_gpu else ("qwen3",)
    found: dict[str, Callable[[Side], Outcome]] = {
        "swiglu and its gradient": operations.check_swiglu,
        "loss and its gradient": operations.check_loss,
        "gathers": operations.check_gathers,
        "attention, heads of 64": partial(operations.check_attention, head_size=64),
        "attention, heads of 128": partial(operations.check_attention, head_size=128),
        "products": operations.check_products,
        "4-bit products": operations.check_quantised_products,
        "memory": steps.check_memory,
    }
    for dtype, names in (("fp32", MODELS), ("bf16", halves)):
        for name in names:
            model = f"{name.removeprefix(BUILTIN)}, {dtype}"
            found[f"{steps.STEPS} steps, {model}"] = partial(
                steps.check_training, name=name, dtype=dtype
            )
    for name in MODELS:
        dtype = "bf16" if name in halves else "fp32"
        model = f"{name.removeprefix(BUILTIN)}, {dtype}"
        found[f"repeated, {model}"] = partial(steps.check_repeatability, name=name, dtype=dtype)
        found[f"resumed, {model}"] = partial(steps.check_resume, name=name, dtype=dtype)
    return found
