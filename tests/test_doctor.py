"""What the doctor says of made-up machines, and of this one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import pytest
from click.testing import CliRunner
from test_device import FakeLinux, FakeMac

from mlx_tuner.cli import main
from mlx_tuner.commands import doctor

OPENBLAS = "/usr/lib/x86_64-linux-gnu/libopenblas.so.0"
MAPPED = "7f00-7f01 r--p 0000 00:00 12 /usr/lib/openblas-pthread/libopenblasp-r0.3.so\n"


class Linux(FakeLinux):
    """A Linux machine with given programs."""

    programs: Mapping[str, str] = {"g++": "/usr/bin/g++"}

    def which(self, program: str) -> str | None:
        return self.programs.get(program)


def _find(report: doctor.Report, subject: str) -> doctor.Finding:
    return next(finding for finding in report.findings if finding.subject == subject)


def test_this_machine_can_train() -> None:
    report = doctor.examine()
    assert report.can_train
    assert str(report).endswith("ready to train")
    assert _find(report, "mlx").level == "ok"


def test_an_unused_openblas_comes_with_the_line_that_lets_it_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    finding = _find(doctor.examine(Linux({OPENBLAS: ""})), "OpenBLAS")
    assert finding.level == "warn"
    assert "40 times" in finding.what
    assert finding.advice == "unset MLX_TUNE_NO_PRELOAD"


def test_a_missing_openblas_comes_with_its_package() -> None:
    finding = _find(doctor.examine(Linux({})), "OpenBLAS")
    assert "libopenblas0-pthread" in finding.advice


def test_a_preloaded_openblas_is_fine() -> None:
    assert _find(doctor.examine(Linux({"/proc/self/maps": MAPPED})), "OpenBLAS").level == "ok"


def test_a_missing_compiler_is_only_a_note() -> None:
    probe = Linux({})
    probe.programs = {}
    report = doctor.examine(probe)
    assert _find(report, "g++").level == "note"
    assert report.can_train


def test_a_mac_hears_of_its_chip_and_of_what_slows_it_down() -> None:
    probe = FakeMac("Apple M4 Pro", 20, {"pmset -g": " lowpowermode 1\n"})
    report = doctor.examine(probe)
    assert report.can_train
    text = str(report)
    assert "Apple M4 Pro, 20 GPU cores, 273 GB/s; backend metal" in text
    assert "low power mode is on" in text
    assert "OpenBLAS" not in text
    assert "36.2 GB" in text  # 90 % of the recommended working set


def test_a_device_that_cannot_multiply_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> float:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("mlx_tuner.system.device.gemm_tflops", fail)
    report = doctor.examine()
    assert not report.can_train
    assert "no kernel" in _find(report, "device").what


def test_without_mlx_nothing_can_train(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_tuner.system

    monkeypatch.delattr(mlx_tuner.system, "device", raising=False)
    monkeypatch.setitem(sys.modules, "mlx_tuner.system.device", None)
    report = doctor.examine()
    assert not report.can_train
    assert report.machine is None
    assert "cannot be imported" in str(report)


@pytest.mark.parametrize("found", [None, "0.1.0"])
def test_a_package_that_is_missing_or_too_old_comes_with_its_command(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: found if n == "mlx-lm" else real(n))
    report = doctor.examine()
    assert not report.can_train
    assert 'pip install -U "mlx-lm>=' in _find(report, "mlx-lm").advice


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the extra is for Linux")
def test_the_cuda_extra_counts_as_installed_with_its_backend_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = doctor._installed
    absent = {"mlx-cuda-13"}
    monkeypatch.setattr(doctor, "_installed", lambda n: None if n in absent else real(n) or "1")
    assert _find(doctor.examine(), "extra cuda").level == "note"
    absent.clear()
    assert _find(doctor.examine(), "extra cuda").level == "ok"


def test_the_hubs_token_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    report = doctor.examine()
    assert "with a token" in _find(report, "Hub").what
    assert "hf_secret" not in json.dumps(report.to_json()) + str(report)


def test_offline_mode_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline" in _find(doctor.examine(), "Hub").what


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10**9

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    finding = _find(doctor.examine(), "disk")
    assert (finding.level, finding.what[:6]) == ("warn", "1.0 GB")


@pytest.mark.slow
def test_whatever_warns_or_is_to_be_fixed_comes_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> float:
        raise RuntimeError("no kernel")

    class Full:
        free = 10**9

    mac = FakeMac("Apple M4", 10)
    monkeypatch.setattr(mac, "backend", lambda: "cpu")
    found = [*doctor.examine(Linux({OPENBLAS: ""})).findings, *doctor.examine(mac).findings]
    monkeypatch.setattr("os.access", lambda *args: False)
    found += doctor.examine(Linux({})).findings
    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    monkeypatch.setattr("mlx_tuner.system.device.memory_budget", lambda probe: 10**9)
    monkeypatch.setattr("mlx_tuner.system.device.gemm_tflops", fail)
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    found += doctor.examine(Linux({}, "cuda")).findings
    wrong = [finding for finding in found if finding.level in ("warn", "fix")]
    subjects = {"OpenBLAS", "Metal", "memory", "device", "disk", "model cache", "mlx"}
    assert subjects <= {finding.subject for finding in wrong}
    assert all(finding.advice for finding in wrong)


@pytest.mark.slow
def test_the_command_prints_one_json_object_and_its_exit_code_says_whether_anything_can_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["can_train"] is True
    assert told["machine"]["backend"] in ("cpu", "cuda", "metal")
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert "nothing can train here yet" in done.stdout


def test_caches_are_weighed_and_how_to_empty_them_is_said(tmp_path, monkeypatch):
    from mlx_tuner.commands.doctor import _caches
    from mlx_tuner.system import cache

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(cache, "user_folder", lambda: tmp_path / "rows")
    assert list(_caches()) == []
    (tmp_path / "rows" / "bench").mkdir(parents=True)
    (tmp_path / "rows" / "bench" / "bench-x.json").write_bytes(b"x" * 10_000)  # kept: it tells time
    assert list(_caches()) == []
    (tmp_path / "rows" / "a-0-0.rows").write_bytes(b"x" * 20_000_000)
    (found,) = _caches()
    assert (found.level, found.what) == ("note", f"20.0 MB in {tmp_path / 'rows'}")
    assert found.advice == f"to empty it: remove {tmp_path / 'rows'}/*.rows"
