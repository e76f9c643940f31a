"""blas.py: OpenBLAS is found, and preloaded where it helps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_tuner.system import blas


class FakeLinux:
    system = "Linux"

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def text(self, path: str) -> str:
        return self.files.get(path, "")

    def exists(self, path: str) -> bool:
        return path in self.files


MAPS = "7f00-7f01 r--p 0000 00:00 12 /{}\n"


def test_openblas_is_found_where_it_is_mapped() -> None:
    path = "usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblasp-r0.3.21.so"
    assert blas.find(FakeLinux({"/proc/self/maps": MAPS.format(path)})).loaded == f"/{path}"


def test_the_openblas_inside_numpy_does_not_count() -> None:
    maps = MAPS.format("lib/python3/site-packages/numpy.libs/libscipy_openblas64_-99b71e71.so")
    assert blas.find(FakeLinux({"/proc/self/maps": maps})).loaded is None


def _installed(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(blas.platform, "machine", lambda: "x86_64")
    return "/usr/lib/x86_64-linux-gnu/libopenblas.so.0"


def test_an_installed_openblas_is_preloaded_into_children(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _installed(monkeypatch)
    environ: dict[str, Any] = {"LD_PRELOAD": "/other.so", "HOME": "/"}
    child = blas.environment(environ, FakeLinux({path: ""}))
    assert child == {"LD_PRELOAD": f"{path}:/other.so", "HOME": "/"}
    assert blas.environment(environ, FakeLinux({})) == environ
    assert blas.environment(child, FakeLinux({path: ""})) == child


def test_a_gpu_needs_no_openblas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = _installed(monkeypatch)
    driver = FakeLinux({path: "", "/proc/driver/nvidia/version": ""})
    (tmp_path / "mlx_cuda_13-1.0.dist-info").mkdir()
    for has_cuda, folder in ((True, tmp_path / "mlx"), (False, tmp_path / "other" / "mlx")):
        spec = SimpleNamespace(submodule_search_locations=[str(folder)])
        monkeypatch.setattr(blas, "find_spec", lambda name, spec=spec: spec)
        assert ("LD_PRELOAD" not in blas.environment({}, driver)) == has_cuda
    assert "LD_PRELOAD" in blas.environment({}, FakeLinux({path: ""}))


def test_preloading_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _installed(monkeypatch)
    environ = {"MLX_TUNE_NO_PRELOAD": "1"}
    assert blas.environment(environ, FakeLinux({path: ""})) == environ


@pytest.mark.slow
@pytest.mark.skipif(not blas.find().available, reason="no OpenBLAS is installed here")
def test_a_command_that_computes_starts_itself_again_with_openblas() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for off, used in (("", True), ("1", False)):
        done = subprocess.run(
            [sys.executable, "-m", "mlx_tuner", "doctor", "--json"],
            capture_output=True,
            check=True,
            env=environ | {"MLX_TUNE_NO_PRELOAD": off},
        )
        assert (json.loads(done.stdout)["machine"]["openblas"] is not None) == used
