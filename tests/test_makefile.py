"""Makefile: a Python that is too old is told of, and leaves nothing that a later one trips over."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A folder with the Makefile, and with programs in place of those that it would find."""
    shutil.copy(root / "Makefile", tmp_path)
    (tmp_path / "programs").mkdir()
    for name in ("sh", "sed"):
        (tmp_path / "programs" / name).symlink_to(str(shutil.which(name)))
    return tmp_path


def program(clone: Path, name: str, does: str) -> None:
    path = clone / "programs" / name
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)


def python(clone: Path, name: str, version: tuple[int, int, int]) -> None:
    """A Python of that version, whose `-m venv` does not take seconds."""
    code = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    makes = f"/bin/mkdir -p $3/bin; echo {name} >$3/bin/python"
    program(
        clone, name, f'if [ $1 = -m ]; then {makes}; else {sys.executable} -c "{code}" "$2"; fi'
    )


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(shutil.which("make")), ".venv/bin/python", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS")}
    environment["PATH"] = str(clone / "programs")
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", [(3, 9, 6), (3, 10, 19)])
def test_a_python_that_is_too_old_is_named_and_the_next_one_is_taken(clone, version):
    python(clone, "python3", version)
    python(clone, "python3.12", (3, 12, 0))
    told = make(clone)
    assert told.returncode != 0
    assert "python3 is not Python 3.11 or newer" in told.stdout
    assert "PYTHON=python3.12" in told.stdout
    assert make(clone, "PYTHON=python3.12").returncode == 0
    assert (clone / ".venv" / "bin" / "python").read_text() == "python3.12\n"


def test_the_oldest_python_that_will_do_is_taken(clone):
    python(clone, "python3", (3, 11, 0))
    assert make(clone).returncode == 0
    assert (clone / ".venv" / "bin" / "python").exists()


def test_an_environment_that_was_not_completed_is_made_again(clone):
    """As where Debian has no python3-venv: `python` is there, pip is not."""
    does = "if [ $1 = -m ]; then /bin/mkdir -p $3/bin; echo half >$3/bin/python; exit 1; fi"
    program(clone, "python3", does)
    assert make(clone).returncode != 0
    python(clone, "python3", (3, 12, 0))
    assert make(clone).returncode == 0
    assert (clone / ".venv" / "bin" / "python").read_text() == "python3\n"


def test_uv_chooses_a_python_where_none_is_named(clone):
    python(clone, "python3", (3, 9, 6))
    python(clone, "python3.12", (3, 12, 0))
    program(clone, "uv", 'echo "$@" >>uv.txt; /bin/mkdir -p .venv/bin; : >.venv/bin/python')
    assert make(clone).returncode == 0
    assert "--python >=3.11 .venv" in (clone / "uv.txt").read_text()
    shutil.rmtree(clone / ".venv")
    assert make(clone, "PYTHON=python3.12").returncode == 0
    assert (clone / ".venv" / "bin" / "python").read_text() == "python3.12\n"
