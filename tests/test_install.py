"""install.py: what a message tells its reader to type, wherever this program was installed."""

import shlex
import sys

import pytest

from mlx_tuner.system import install

TOOLS = "uv tool install 'mlx-lora-tuner[{}]' --with-executables-from mlx-lm,mlx,huggingface-hub"


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    """An environment that has the modules of two extras, and was made by nobody known."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name, module in install._MODULES.items():
        there = name in ("gguf", "parquet")
        monkeypatch.setitem(sys.modules, module, pytest if there else None)
    return tmp_path


def test_uv_is_told_the_extras_that_are_there_as_well_since_it_forgets_them(prefix, root):
    (prefix / "uv-receipt.toml").touch()
    assert install.extra("wandb") == TOOLS.format("gguf,parquet,wandb")
    assert install.extra("gguf") == TOOLS.format("gguf,parquet")
    assert install.extra("gguf") in (root / "README.md").read_text("utf-8")
    assert install.packages("-U mlx") == "uv tool upgrade --reinstall mlx-lora-tuner"


def test_pipx_adds_to_what_is_there(prefix):
    (prefix / "pipx_metadata.json").touch()
    assert install.extra("wandb") == "pipx install --force 'mlx-lora-tuner[wandb]'"
    assert install.packages("-U mlx") == "pipx reinstall mlx-lora-tuner"


def test_elsewhere_it_is_pip_of_the_python_that_runs_or_uv_where_that_has_none(prefix, monkeypatch):
    python = str(prefix / "a b" / "python")
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setitem(sys.modules, "pip", pytest)
    expected = [python, "-m", "pip", "install", "mlx-lora-tuner[wandb]"]
    assert shlex.split(install.extra("wandb")) == expected
    monkeypatch.setitem(sys.modules, "pip", None)
    expected = ["uv", "pip", "install", "--python", python, "-U", "mlx"]
    assert shlex.split(install.packages("-U mlx")) == expected
