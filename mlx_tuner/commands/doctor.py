"""What this machine has for training, what is missing, and what to do about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from mlx_tuner.system import install
from mlx_tuner.words import ram, size

if TYPE_CHECKING:
    from mlx_tuner.system.device import Machine, Probe

EXTRAS = {
    "cuda": "training on NVIDIA GPUs",
    "gguf": "`mlx-tune export --to gguf`",
    "parquet": "rows in Parquet files",
    "tensorboard": '`[report] to = ["tensorboard"]`',
    "mlflow": '`[report] to = ["mlflow"]`',
    "wandb": '`[report] to = ["wandb"]`',
    "trackio": '`[report] to = ["trackio"]`',
    "torch": "comparisons with PEFT on torch",
}
SMALLEST_BUDGET_GB = 2.0
"""Memory below which not even a 0.5B model trains in bf16 (1.0 GB of weights, and its step)."""
SPACE_FOR_A_MODEL_GB = 5.0
"""Free disk below which the download of a 1.5B model in bf16 (3.1 GB) and a run are a risk."""

Level = Literal["ok", "note", "warn", "fix"]
_SIGNS: dict[Level, str] = {"ok": "✓", "note": "·", "warn": "!", "fix": "✗"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    level: Level
    """ok; note = good to know; warn = something could be better; fix = nothing can train."""
    subject: str
    what: str
    advice: str = ""
    """What to do, where there is something to do: always, where it warns or is to be fixed."""


@dataclass(frozen=True)
class Report:
    """All that was found. `machine` is None where MLX cannot be imported."""

    machine: Machine | None
    findings: tuple[Finding, ...]

    @property
    def can_train(self) -> bool:
        """False only when nothing can train here."""
        return all(finding.level != "fix" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """`{"can_train", "machine", "findings"}`, plain values."""
        return {
            "can_train": self.can_train,
            "machine": self.machine.to_json() if self.machine else None,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        width = max(len(finding.subject) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{_SIGNS[finding.level]} {finding.subject:<{width}}  {finding.what}")
            lines.extend(" " * (width + 4) + line for line in finding.advice.splitlines())
        lines.append("")
        lines.append("ready to train" if self.can_train else "nothing can train here yet")
        return "\n".join(lines)


def examine(probe: Probe | None = None) -> Report:
    """Look at packages, device, memory, disk and Hub. Downloads and changes nothing."""
    findings = list(_packages())
    try:
        from mlx_tuner.system import device
    except ImportError as error:
        command = install.packages("--force-reinstall mlx")
        advice = f"MLX needs macOS 14+ on Apple silicon, or Linux: {command}"
        findings.append(Finding("fix", "MLX", f"cannot be imported: {error}", advice))
        return Report(None, tuple(findings))
    probe = probe or device.Probe()
    machine = device.facts(probe)
    findings.extend(_device(machine, probe))
    findings.extend(_memory(machine, device.memory_budget(probe)))
    if machine.backend == "cpu":
        findings.extend(_cpu_backend(probe))
    findings.extend(_hub())
    findings.extend(_caches())
    findings.extend(_extras())
    return Report(machine, tuple(findings))


def _packages() -> Iterator[Finding]:
    """The package's own requirements, as its metadata states them."""
    for requirement in _requirements():
        installed = _installed(requirement.name)
        if installed is None:
            what = "missing"
        elif not requirement.specifier.contains(installed, prereleases=True):
            what = f"{installed} is installed, {requirement.specifier} is needed"
        else:
            if requirement.name in ("mlx", "mlx-lm", "transformers"):
                yield Finding("ok", requirement.name, installed)
            continue
        name = f'"{requirement.name}{requirement.specifier}"'
        yield Finding("fix", requirement.name, what, install.packages(f"-U {name}"))


def _device(machine: Machine, probe: Probe) -> Iterator[Finding]:
    from mlx_tuner.system import device

    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    bandwidth = machine.bandwidth_gb_per_second
    speed = f", {bandwidth} GB/s" if bandwidth else ""
    chip = f"{machine.chip}{cores}{speed}"
    try:
        gflops = device.gemm_tflops(512, seconds=0.1) * 1000
    except (RuntimeError, ValueError) as error:
        package = "'mlx[cuda13]'" if machine.backend == "cuda" else "mlx"
        what = f"{chip}: {machine.backend} cannot multiply: {error}"
        yield Finding("fix", "device", what, install.packages(f"--force-reinstall {package}"))
        return
    yield Finding("ok", "system", f"{machine.os}, Python {machine.python}")
    yield Finding("ok", "device", f"{chip}; backend {machine.backend}")
    yield Finding("ok", "fp32 products", f"{gflops:,.0f} GFLOP/s measured")
    if probe.system == "Darwin" and machine.backend == "cpu":
        arm = "`python -c 'import platform; print(platform.machine())'` must say arm64"
        advice = f"{arm}, and on the Mac itself, not in a virtual machine"
        yield Finding("warn", "Metal", "not available: training on the CPU", advice)
    for note in machine.notes:
        yield Finding("note", "device", note)


def _memory(machine: Machine, budget: int) -> Iterator[Finding]:
    what = f"{ram(machine.memory_bytes)}, of which a run may use {budget / 1e9:.1f} GB"
    if budget / 1e9 < SMALLEST_BUDGET_GB:
        advice = "close other programs; what trains in less: mlx-tune run quickstart"
        yield Finding("warn", "memory", what, advice)
    else:
        yield Finding("ok", "memory", what)


def _cpu_backend(probe: Probe) -> Iterator[Finding]:
    from mlx_tuner.system import blas

    if probe.system == "Linux":
        found = blas.find(probe)
        slow = "MLX's wheel links the reference BLAS; OpenBLAS is about 40 times faster in fp32"
        if found.loaded:
            yield Finding("ok", "OpenBLAS", f"{found.loaded}, preloaded by each command")
        elif found.available:
            yield Finding("warn", "OpenBLAS", f"installed, not used: {slow}", f"unset {blas.OFF}")
        else:
            advice = "sudo apt-get install libopenblas0-pthread"
            yield Finding("warn", "OpenBLAS", f"not installed: {slow}", advice)
    compiler = probe.which("g++")
    what = compiler or "missing: only `mx.compile` on the CPU backend needs it; runs here do not"
    yield Finding("ok" if compiler else "note", "g++", what)


def _hub() -> Iterator[Finding]:
    """State of the Hub's client. Whether there is a token is said, the token never."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE to download models"
        yield Finding("note", "Hub", "offline mode: only what is in the cache", advice)
    elif get_token():
        yield Finding("ok", "Hub", "online mode, with a token")
    else:
        advice = "`hf auth login` for gated models and `--push`"
        yield Finding("note", "Hub", "online mode, without a token", advice)
    for subject, folder, elsewhere in (
        ("disk", Path.cwd(), "cd ~"),
        ("model cache", Path(constants.HF_HUB_CACHE), "export HF_HUB_CACHE=~/models"),
    ):
        free_gb = shutil.disk_usage(_existing(folder)).free / 1e9
        what = f"{free_gb:.1f} GB free at {folder}"
        if free_gb < SPACE_FOR_A_MODEL_GB:
            advice = "a 1.5B model takes 3.1 GB; make room: hf cache prune"
            yield Finding("warn", subject, what, advice)
        elif not os.access(_existing(folder), os.W_OK):
            yield Finding("warn", subject, f"{folder} cannot be written to", elsewhere)
        else:
            yield Finding("ok", subject, what)


def _caches() -> Iterator[Finding]:
    """What is kept for the next time, and how to be rid of it."""
    from huggingface_hub import constants

    from mlx_tuner.system import cache

    models, rows = Path(constants.HF_HUB_CACHE), cache.user_folder()
    for subject, folder, paths, empty in (
        ("models kept", models, models.rglob("*"), "`hf cache prune`, or `hf cache rm NAME`"),
        ("rows kept", rows, rows.glob("*.rows"), f"remove {rows}/*.rows"),
    ):
        kept = sum(p.stat().st_size for p in paths if p.is_file() and not p.is_symlink())
        if kept:
            what = f"{size(kept)} in {folder}"
            yield Finding("note", subject, what, f"to empty it: {empty}")


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        missing = [
            requirement
            for requirement in _requirements(extra)
            if not all(map(_installed, _distributions(requirement)))
        ]
        if missing:
            advice = f"for {purpose}: {install.extra(extra)}"
            yield Finding("note", f"extra {extra}", "not installed", advice)
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def _requirements(extra: str = "", of: str = install.DISTRIBUTION) -> list[Requirement]:
    """What a package requires on this platform: itself, or only because of one extra."""
    stated = [Requirement(line) for line in requires(of) or ()]

    def hold(extra: str) -> list[Requirement]:
        return [r for r in stated if r.marker is None or r.marker.evaluate({"extra": extra})]

    own = hold("")
    return [r for r in hold(extra) if r not in own] if extra else own


def _distributions(requirement: Requirement) -> list[str]:
    """The distributions behind a requirement: `mlx[cuda13]` is `mlx` and `mlx-cuda-13`."""
    if _installed(requirement.name) is None:
        return [requirement.name]
    behind = (_requirements(extra, requirement.name) for extra in requirement.extras)
    return [requirement.name, *(r.name for group in behind for r in group)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
