"""OpenBLAS for MLX's CPU backend on Linux, whose wheel links the slow reference BLAS.

OpenBLAS multiplies fp32 matrices some 40 times faster. It has to be preloaded: a process that finds
itself without it starts itself again. Nothing here loads MLX.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

OFF = "MLX_TUNE_NO_PRELOAD"
"""Environment variable that turns preloading off."""

_FILES = (
    "/usr/lib/{arch}-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/{arch}-linux-gnu/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/lib/libopenblas.so.0",
    "/usr/lib/libopenblas.so",
)


class Probe:
    """What is asked of the machine here. A test replaces the methods; `device.Probe` asks more."""

    system: str = platform.system()

    def text(self, path: str) -> str:
        """A small text file; empty where it cannot be read."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return Path(path).is_file()


@dataclass(frozen=True)
class Blas:
    """Which OpenBLAS there is. Elsewhere than on Linux: none."""

    loaded: str | None
    """The library that this process runs with."""
    available: str | None
    """One that is installed and could be preloaded."""


def find(probe: Probe | None = None) -> Blas:
    """Look for OpenBLAS. The one that numpy and scipy bundle has other symbol names."""
    probe = probe or Probe()
    if probe.system != "Linux":
        return Blas(None, None)
    mapped = re.findall(r"(/\S*openblas\S*)$", probe.text("/proc/self/maps"), re.MULTILINE)
    loaded = next((path for path in mapped if ".libs/" not in path), None)
    files = (path.format(arch=platform.machine()) for path in _FILES)
    return Blas(loaded, next((path for path in files if probe.exists(path)), None))


def environment(environ: Mapping[str, str], probe: Probe | None = None) -> dict[str, str]:
    """`environ` for another process, with OpenBLAS preloaded where that helps and is possible."""
    found = find(probe)
    preloaded = environ.get("LD_PRELOAD", "")
    if (
        environ.get(OFF)
        or found.available is None
        or "openblas" in preloaded
        or _has_gpu(probe or Probe())
    ):
        return dict(environ)
    return {**environ, "LD_PRELOAD": ":".join(filter(None, (found.available, preloaded)))}


def preload() -> None:
    """Start this process again with OpenBLAS, if it runs without one that there is."""
    environ = environment(os.environ)
    if environ.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def _has_gpu(probe: Probe) -> bool:
    """Whether MLX computes on an NVIDIA GPU here, told from its wheel and the driver."""
    if not probe.exists("/proc/driver/nvidia/version"):
        return False
    spec = find_spec("mlx")
    folders = spec.submodule_search_locations if spec else None
    return any(list(Path(folder).parent.glob("mlx_cuda*")) for folder in folders or ())
