"""The machine underneath: its chip, memory and limits.

The one seam to Metal and to the operating system. What a machine does not have is None, never an
error; every reading goes through `Probe`, so that tests can be any machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import mlx.core as mx

from mlx_tuner.system import blas

BackendName = Literal["metal", "cuda", "cpu"]

BUDGET_FRACTION = 0.9
"""Share of the device's memory that a run may use; also the share that Metal keeps wired."""
RAM_FRACTION = 0.8
"""Share of the available RAM that a run may use where there is no GPU: others live there too."""
CACHE_FRACTION = 0.25
"""Share of Metal's recommended working set that freed buffers may hold for reuse."""

# Chip families of Apple silicon: the GPU's top clock in GHz, and memory bandwidth in GB/s by GPU
# cores (the first entry whose cores are not exceeded). FP32 peak = cores x 128 ALUs x 2 FLOP (an
# FMA) x clock; fp16 and bf16 run at the same rate up to M4.
# Clocks: M1 1.278 GHz (M1 Pro and up 1.296), M2 1.398 and M4 1.578 GHz are what `powermetrics`
# reports as the top step, M3's are hmc-tech.com's; M5 and M5 Pro have no source. Checked against
# the TFLOPS that Apple published: M1 2.6, M1 Pro 5.2, M1 Max 10.4, M1 Ultra 21, M2 3.6,
# M2 Pro 6.8, M2 Max 13.6. Other sources give 1.47 GHz for M4, so read its peak as +0 % -7 %.
# Bandwidth: Apple's technical specifications of each Mac.
_CHIPS: Mapping[str, tuple[float | None, tuple[tuple[int, int], ...]]] = {
    "M1": (1.278, ((8, 68),)),
    "M1 Pro": (1.296, ((16, 200),)),
    "M1 Max": (1.296, ((32, 400),)),
    "M1 Ultra": (1.296, ((64, 800),)),
    "M2": (1.398, ((10, 100),)),
    "M2 Pro": (1.398, ((19, 200),)),
    "M2 Max": (1.398, ((38, 400),)),
    "M2 Ultra": (1.398, ((76, 800),)),
    "M3": (1.398, ((10, 100),)),
    "M3 Pro": (1.398, ((18, 150),)),
    "M3 Max": (1.380, ((30, 300), (40, 400))),
    "M3 Ultra": (1.398, ((80, 819),)),
    "M4": (1.578, ((10, 120),)),
    "M4 Pro": (1.578, ((20, 273),)),
    "M4 Max": (1.578, ((32, 410), (40, 546))),
    "M5": (None, ((10, 153),)),
    "M5 Pro": (None, ((20, 307),)),
    "M5 Max": (1.62, ((32, 460), (40, 614))),
}

_THERMAL_LEVELS = ("nominal", "moderate", "heavy", "trapping", "sleeping")
_PRESSURE_LEVELS = {"1": "normal", "2": "warning", "4": "critical"}


class Probe(blas.Probe):
    """Reads the machine. A test replaces the methods to be another one."""

    def backend(self) -> BackendName:
        """What MLX computes on by default."""
        if mx.default_device() == mx.cpu:
            return "cpu"
        return "metal" if mx.metal.is_available() else "cuda"

    def device_info(self) -> Mapping[str, str | int]:
        """MLX's own facts: `device_name` everywhere; on Metal also `memory_size` and
        `max_recommended_working_set_size`, on CUDA `total_memory` and `free_memory`, in bytes."""
        return mx.device_info()

    def command(self, *argv: str) -> str:
        """Standard output of a command; empty where it is missing, fails or takes over 5 s."""
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout

    def which(self, program: str) -> str | None:
        """Where a program is, if it is on the path."""
        return shutil.which(program)

    def os_version(self) -> str:
        """Such as "macOS 15.5" or "Linux 6.1"."""
        if self.system == "Darwin":
            return f"macOS {platform.mac_ver()[0]}"
        return f"{self.system} {'.'.join(platform.release().split('.')[:2])}"

    def physical_memory(self) -> int:
        """RAM in bytes."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Machine:
    """What a benchmark or a report says about the machine. Absent facts are None."""

    backend: BackendName
    chip: str
    gpu_cores: int | None
    cpu_cores: int
    memory_bytes: int
    working_set_bytes: int | None
    """Metal's recommended maximum working set."""
    bandwidth_gb_per_second: int | None
    peak_tflops: float | None
    """FP32 peak of the chip's shaders from the table; None for a chip that it does not have."""
    os: str
    python: str
    mlx: str
    mlx_lm: str
    openblas: str | None
    low_power_mode: bool | None
    on_battery: bool | None
    thermal_state: str | None
    """nominal, moderate, heavy, trapping or sleeping: above nominal the chip is slowed down."""
    memory_pressure: str | None
    """normal, warning or critical: macOS's own view of the RAM that is left."""
    notes: tuple[str, ...] = field(default=())
    """What to keep in mind when reading this machine's figures."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for a result file."""
        return asdict(self)


def facts(probe: Probe | None = None) -> Machine:
    """Everything that can be known about this machine without measuring."""
    probe = probe or Probe()
    backend = probe.backend()
    info = probe.device_info()
    is_mac = probe.system == "Darwin"
    chip = str(info.get("device_name") or platform.processor() or "unknown")
    cores = gpu_cores(probe) if is_mac else None
    peak, bandwidth = chip_peak(chip, cores) if backend == "metal" else (None, None)
    thermal = thermal_state(probe) if is_mac else None
    pressure = memory_pressure(probe) if is_mac else None
    low_power = low_power_mode(probe) if is_mac else None
    power_source = probe.command("pmset", "-g", "batt") if is_mac else ""
    on_battery = "'Battery Power'" in power_source if power_source else None
    return Machine(
        backend=backend,
        chip=chip,
        gpu_cores=cores,
        cpu_cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(backend, info, probe),
        working_set_bytes=_working_set(info) if backend == "metal" else None,
        bandwidth_gb_per_second=bandwidth,
        peak_tflops=peak,
        os=probe.os_version(),
        python=platform.python_version(),
        mlx=_package_version("mlx"),
        mlx_lm=_package_version("mlx-lm"),
        openblas=blas.find(probe).loaded,
        low_power_mode=low_power,
        on_battery=on_battery,
        thermal_state=thermal,
        memory_pressure=pressure,
        notes=tuple(_notes(chip, low_power, on_battery, thermal, pressure)),
    )


def chip_peak(chip: str, cores: int | None) -> tuple[float | None, int | None]:
    """(FP32 peak in TFLOP/s, memory bandwidth in GB/s) of an Apple chip such as "Apple M4 Pro".

    peak = cores x 128 x 2 x clock. A chip that is not in the table, or whose core count cannot be
    read, has no peak: measure one with `gemm_tflops`.
    """
    row = _CHIPS.get(chip.removeprefix("Apple ").strip())
    if row is None:
        return None, None
    clock_ghz, bandwidths = row
    if cores is None:
        return None, bandwidths[0][1] if len(bandwidths) == 1 else None
    bandwidth = next((gb for most, gb in bandwidths if cores <= most), None)
    peak = None if clock_ghz is None else cores * 128 * 2 * clock_ghz / 1000
    return peak, bandwidth


def gpu_cores(probe: Probe) -> int | None:
    """GPU cores of a Mac: the I/O registry answers at once, System Information takes a second."""
    for argv, pattern in (
        (("ioreg", "-rc", "AGXAccelerator", "-d", "1"), r'"gpu-core-count"\s*=\s*(\d+)'),
        (("system_profiler", "SPDisplaysDataType"), r"Total Number of Cores:\s*(\d+)"),
    ):
        if found := re.search(pattern, probe.command(*argv)):
            return int(found[1])
    return None


def low_power_mode(probe: Probe) -> bool | None:
    """Whether macOS saves energy, or None where that cannot be read.

    Macs that have a high power mode, too, tell of a `powermode`: 0 automatic, 1 low, 2 high.
    """
    found = re.search(r"^\s*(?:low)?powermode\s+(\d)", probe.command("pmset", "-g"), re.MULTILINE)
    return found[1] == "1" if found else None


def thermal_state(probe: Probe) -> str | None:
    """How far macOS slows the chip down for heat, or None where that cannot be read."""
    key = "com.apple.system.thermalpressurelevel"
    found = re.search(rf"{re.escape(key)}\s+(\d+)", probe.command("notifyutil", "-g", key))
    if found is None or int(found[1]) >= len(_THERMAL_LEVELS):
        return None
    return _THERMAL_LEVELS[int(found[1])]


def memory_pressure(probe: Probe) -> str | None:
    """How short of RAM macOS finds itself, or None where that cannot be read."""
    level = probe.command("sysctl", "-n", "kern.memorystatus_vm_pressure_level").strip()
    return _PRESSURE_LEVELS.get(level)


def slow_blas(probe: Probe | None = None) -> bool:
    """Whether products run on the reference BLAS of MLX's wheel: on Linux, without a GPU."""
    probe = probe or Probe()
    return probe.system == "Linux" and probe.backend() == "cpu" and blas.find(probe).loaded is None


def memory_budget(probe: Probe | None = None) -> int:
    """Bytes that a run may use on this machine.

    Metal: 90 % of the recommended working set. CUDA: 90 % of the free memory. CPU: 80 % of the
    RAM that is available now, within the container's limit where there is one.
    """
    probe = probe or Probe()
    backend = probe.backend()
    info = probe.device_info()
    if backend == "metal" and (working_set := _working_set(info)) is not None:
        return int(BUDGET_FRACTION * working_set)
    if backend == "cuda" and (free := info.get("free_memory") or info.get("total_memory")):
        return int(BUDGET_FRACTION * int(free))
    return int(RAM_FRACTION * _available_ram(probe))


@contextmanager
def limits(probe: Probe | None = None, core: Any = mx) -> Iterator[None]:
    """Metal's memory limits for a run, put back as they were at the end.

    Wired limit: 90 % of the recommended working set, so that weights are never paged out. Memory
    limit: the working set, so that MLX waits for buffers rather than swap. Cache limit: a quarter
    of it, in place of clearing the cache each step. Other backends are left as they are.
    `core` is `mlx.core`, or a stand-in for it.
    """
    probe = probe or Probe()
    working_set = _working_set(probe.device_info()) if probe.backend() == "metal" else None
    with ExitStack() as restore:
        if working_set is not None:
            for setter, limit in (
                (core.set_memory_limit, working_set),
                (core.set_cache_limit, int(CACHE_FRACTION * working_set)),
                (core.set_wired_limit, int(BUDGET_FRACTION * working_set)),
            ):
                try:
                    restore.callback(setter, setter(limit))
                except (RuntimeError, ValueError):
                    # macOS before 15 has no wired memory, and a system limit may be lower than
                    # ours: the run is as correct without, only less protected from paging.
                    continue
        yield


def gemm_tflops(
    size: int = 1024,
    dtype: mx.Dtype = mx.float32,
    *,
    bits: int | None = None,
    seconds: float = 0.5,
) -> float:
    """Measured speed in TFLOP/s of a (size, size) by (size, size) product: the best of several.

    A product of n x n matrices is 2 n^3 FLOP. The smaller `size`, the more overhead is in it.

    Args:
        bits: 4 or 8 for a quantised second matrix, as frozen weights are.
        seconds: time for it, after a product to warm up.
    """
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    quantised = mx.quantize(b, bits=bits) if bits else ()

    def product() -> mx.array:
        return mx.quantized_matmul(a, *quantised, bits=bits) if bits else a @ b

    mx.eval(a, b, *quantised, product())
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        mx.eval(product())
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best / 1e12


def _working_set(info: Mapping[str, str | int]) -> int | None:
    value = info.get("max_recommended_working_set_size")
    return int(value) if value else None


def _memory_bytes(backend: BackendName, info: Mapping[str, str | int], probe: Probe) -> int:
    size = info.get("total_memory" if backend == "cuda" else "memory_size")
    return int(size) if size else probe.physical_memory()


def _available_ram(probe: Probe) -> int:
    found = re.search(r"MemAvailable:\s*(\d+) kB", probe.text("/proc/meminfo"))
    available = int(found[1]) * 1024 if found else probe.physical_memory()
    limit = probe.text("/sys/fs/cgroup/memory.max").strip()
    used = probe.text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        available = min(available, max(0, int(limit) - int(used)))
    return available


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _notes(
    chip: str,
    low_power: bool | None,
    on_battery: bool | None,
    thermal: str | None,
    pressure: str | None,
) -> list[str]:
    notes = []
    if chip == "Apple M5 Max":
        notes.append("the peak counts the shaders only: M5's matrix units can exceed it")
    if low_power:
        off = "sudo pmset -a lowpowermode 0"
        notes.append(f"low power mode is on: figures are below what this machine can do; {off}")
    if on_battery:
        notes.append("running on battery")
    if thermal not in (None, "nominal"):
        notes.append(f"thermal pressure is {thermal}: the chip is slowed down")
    if pressure not in (None, "normal"):
        notes.append(f"memory pressure is {pressure}: other programs hold the RAM")
    return notes
