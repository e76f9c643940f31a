"""The machine's facts, from made-up machines, and Metal's limits, on made-up setters."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mlx_tuner.system import device


class FakeMac(device.Probe):
    """A Mac with a given chip, as its own commands would describe it."""

    system = "Darwin"

    def __init__(self, chip: str, cores: int, commands: Mapping[str, str] = {}) -> None:
        self.chip = chip
        self.commands = {
            "ioreg": f'  | |   "gpu-core-count" = {cores}\n',
            "pmset -g": " lowpowermode         0\n",
            "pmset -g batt": "Now drawing from 'AC Power'\n",
            "notifyutil": "com.apple.system.thermalpressurelevel 0\n",
            "sysctl": "1\n",
            **commands,
        }

    def backend(self) -> device.BackendName:
        return "metal"

    def device_info(self) -> Mapping[str, str | int]:
        return {
            "device_name": self.chip,
            "architecture": "applegpu_g16s",
            "memory_size": 51_539_607_552,
            "max_recommended_working_set_size": 40_200_896_512,
            "max_buffer_length": 28_991_029_248,
            "resource_limit": 499_000,
        }

    def command(self, *argv: str) -> str:
        for length in range(len(argv), 0, -1):
            if (output := self.commands.get(" ".join(argv[:length]))) is not None:
                return output
        return ""

    def os_version(self) -> str:
        return "macOS 15.5"


class FakeLinux(device.Probe):
    """A Linux machine with given files."""

    system = "Linux"

    def __init__(self, files: Mapping[str, str], backend: device.BackendName = "cpu") -> None:
        self.files = files
        self._backend: device.BackendName = backend

    def backend(self) -> device.BackendName:
        return self._backend

    def device_info(self) -> Mapping[str, str | int]:
        if self._backend == "cuda":
            return {"device_name": "GPU", "total_memory": 80_000, "free_memory": 50_000}
        return {"device_name": "CPU", "architecture": "x86_64"}

    def command(self, *argv: str) -> str:
        return ""

    def text(self, path: str) -> str:
        return self.files.get(path, "")

    def exists(self, path: str) -> bool:
        return path in self.files


# Published TFLOPS (FP32) and GB/s of each chip: Apple's figures for M1 and M2, and for the others
# those that chip databases list (M4 as a range, because they disagree about its clock).
@pytest.mark.parametrize(
    ("chip", "cores", "tflops", "bandwidth"),
    [
        ("Apple M1", 8, (2.6, 2.65), 68),
        ("Apple M1 Pro", 16, (5.2, 5.35), 200),
        ("Apple M1 Max", 32, (10.4, 10.7), 400),
        ("Apple M1 Ultra", 64, (20.8, 21.3), 800),
        ("Apple M2", 10, (3.5, 3.6), 100),
        ("Apple M2 Pro", 19, (6.75, 6.85), 200),
        ("Apple M2 Max", 38, (13.5, 13.7), 400),
        ("Apple M2 Ultra", 76, (27.0, 27.3), 800),
        ("Apple M3", 10, (3.5, 3.6), 100),
        ("Apple M3 Pro", 18, (6.3, 6.5), 150),
        ("Apple M3 Max", 30, (10.5, 10.7), 300),
        ("Apple M3 Max", 40, (14.0, 14.2), 400),
        ("Apple M3 Ultra", 80, (28.4, 28.7), 819),
        ("Apple M4", 10, (3.8, 4.05), 120),
        ("Apple M4 Pro", 16, (6.0, 6.5), 273),
        ("Apple M4 Pro", 20, (7.5, 8.1), 273),
        ("Apple M4 Max", 32, (12.0, 13.0), 410),
        ("Apple M4 Max", 40, (15.0, 16.2), 546),
        ("Apple M5", 10, None, 153),
        ("Apple M5 Pro", 20, None, 307),
        ("Apple M5 Max", 40, (16.5, 16.7), 614),
    ],
)
def test_each_chip_family_has_its_published_peak_and_bandwidth(
    chip: str, cores: int, tflops: tuple[float, float] | None, bandwidth: int
) -> None:
    machine = device.facts(FakeMac(chip, cores))
    assert (machine.chip, machine.gpu_cores) == (chip, cores)
    if tflops is None:  # no source for its clock
        assert machine.peak_tflops is None
    else:
        assert machine.peak_tflops is not None
        assert tflops[0] <= machine.peak_tflops <= tflops[1]
    assert machine.bandwidth_gb_per_second == bandwidth


def test_a_chip_that_the_table_does_not_have_has_no_peak() -> None:
    machine = device.facts(FakeMac("Apple M9 Extreme", 160))
    assert machine.peak_tflops is None
    assert machine.bandwidth_gb_per_second is None


def test_without_a_core_count_there_is_no_peak_but_the_bandwidth_is_known() -> None:
    machine = device.facts(FakeMac("Apple M4 Pro", 20, {"ioreg": ""}))
    assert machine.gpu_cores is None
    assert machine.peak_tflops is None
    assert machine.bandwidth_gb_per_second == 273


def test_core_count_falls_back_to_system_information() -> None:
    commands = {"ioreg": "", "system_profiler": "      Total Number of Cores: 20\n"}
    assert device.facts(FakeMac("Apple M4 Pro", 20, commands)).gpu_cores == 20


def test_a_slowed_down_mac_says_so() -> None:
    commands = {
        "pmset -g": " lowpowermode         1\n",
        "pmset -g batt": "Now drawing from 'Battery Power'\n",
        "notifyutil": "com.apple.system.thermalpressurelevel 2\n",
        "sysctl": "4\n",
    }
    machine = device.facts(FakeMac("Apple M4 Pro", 20, commands))
    assert (machine.low_power_mode, machine.on_battery) == (True, True)
    assert machine.thermal_state == "heavy"
    assert machine.memory_pressure == "critical"
    assert len(machine.notes) == 4


@pytest.mark.parametrize(("mode", "low"), [(0, False), (1, True), (2, False)])
def test_a_mac_with_a_high_power_mode_tells_of_low_power_too(mode: int, low: bool) -> None:
    commands = {"pmset -g": f" powernap             1\n powermode            {mode}\n"}
    assert device.facts(FakeMac("Apple M4 Pro", 20, commands)).low_power_mode is low


def test_facts_that_a_mac_does_not_tell_are_none() -> None:
    silent = {
        "ioreg": "",
        "pmset -g": "",
        "pmset -g batt": "",
        "notifyutil": "no such key",
        "sysctl": "",
    }
    machine = device.facts(FakeMac("Apple M4 Pro", 20, silent))
    assert machine.low_power_mode is None
    assert machine.on_battery is None
    assert machine.thermal_state is None
    assert machine.memory_pressure is None
    assert machine.notes == ()


def test_linux_has_none_of_a_macs_facts() -> None:
    machine = device.facts(FakeLinux({}))
    assert machine.backend == "cpu"
    assert machine.gpu_cores is None
    assert machine.working_set_bytes is None
    assert machine.thermal_state is None
    assert machine.memory_bytes > 0


def test_this_machine_can_be_described() -> None:
    assert device.facts().to_json()["mlx"]


def test_a_mac_may_use_nine_tenths_of_the_recommended_working_set() -> None:
    assert device.memory_budget(FakeMac("Apple M4 Pro", 20)) == int(0.9 * 40_200_896_512)


def test_a_gpu_may_use_nine_tenths_of_its_free_memory() -> None:
    assert device.memory_budget(FakeLinux({}, "cuda")) == 45_000


def test_a_cpu_may_use_four_fifths_of_the_available_ram() -> None:
    assert device.memory_budget(FakeLinux({"/proc/meminfo": "MemAvailable:  1000 kB\n"})) == 819_200


def test_a_containers_limit_counts_as_the_available_ram() -> None:
    files = {
        "/proc/meminfo": "MemAvailable:  1000 kB\n",
        "/sys/fs/cgroup/memory.max": "600000\n",
        "/sys/fs/cgroup/memory.current": "100000\n",
    }
    assert device.memory_budget(FakeLinux(files)) == 400_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert device.memory_budget(FakeLinux(files)) == 819_200


class FakeCore:
    """MLX's three setters: each returns the limit before, as MLX's do."""

    def __init__(self, has_wired_memory: bool = True) -> None:
        self.now = {"memory": 60, "cache": 60, "wired": 0}
        self.has_wired_memory = has_wired_memory

    def _set(self, name: str, limit: int) -> int:
        before, self.now[name] = self.now[name], limit
        return before

    def set_memory_limit(self, limit: int) -> int:
        return self._set("memory", limit)

    def set_cache_limit(self, limit: int) -> int:
        return self._set("cache", limit)

    def set_wired_limit(self, limit: int) -> int:
        if not self.has_wired_memory:
            raise ValueError("only on macOS 15")
        return self._set("wired", limit)


def test_metals_limits_hold_inside_and_are_put_back_after_an_exception() -> None:
    core = FakeCore()
    before = dict(core.now)

    def run() -> None:
        with device.limits(FakeMac("Apple M4 Pro", 20), core):
            assert core.now == {
                "memory": 40_200_896_512,
                "cache": 10_050_224_128,
                "wired": int(0.9 * 40_200_896_512),
            }
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert core.now == before


def test_a_macos_without_wired_memory_still_gets_the_other_limits() -> None:
    core = FakeCore(has_wired_memory=False)
    before = dict(core.now)
    with device.limits(FakeMac("Apple M4 Pro", 20), core):
        assert core.now["memory"] == 40_200_896_512
        assert core.now["wired"] == 0
    assert core.now == before


def test_other_backends_keep_their_limits() -> None:
    core = FakeCore()
    before = dict(core.now)
    with device.limits(FakeLinux({}), core):
        assert core.now == before


def test_a_matrix_product_has_a_measurable_speed() -> None:
    assert 0 < device.gemm_tflops(64, seconds=0.01) < 1000
    assert 0 < device.gemm_tflops(64, bits=4, seconds=0.01) < 1000
