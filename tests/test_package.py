"""The wheel, alone: built from the sdist, installed beside what it requires, far from a clone."""

import itertools
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("hatchling")

MOST_BYTES = 6_000_000


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command, in a folder and an environment that know nothing of the clone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_requirement_has_a_tested_version_within_its_range(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = {
        canonicalize_name(pin.name): pin.specifier
        for line in (root / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
        for pin in [Requirement(line)]
    }
    stated = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in map(Requirement, itertools.chain(*stated)):
        (pin,) = pins[canonicalize_name(requirement.name)]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an installer does: from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    run(*build, "-t", "sdist", cwd=root)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(*build, "-t", "wheel", cwd=folder / sdist.name.removesuffix(".tar.gz"))
    [made] = folder.glob("*.whl")
    return made


def required(requirements: list[str], extras: frozenset[str] = frozenset({""})) -> set[str]:
    """Names of the installed distributions that the requirements need, and theirs, and so on."""
    names: set[tuple[str, frozenset[str]]] = set()

    def visit(lines: list[str], extras: frozenset[str]) -> None:
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            found = distribution(requirement.name)
            key = (found.name, frozenset(requirement.extras))
            if key not in names:
                names.add(key)
                visit(found.requires or [], frozenset({"", *requirement.extras}))

    visit(requirements, extras)
    return {name for name, _ in names}


@pytest.fixture(scope="module")
def tune(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `mlx-tune` of an environment with the wheel and what its metadata requires, no more."""
    environment = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=environment)
    [site] = environment.glob("lib/python*/site-packages")
    metadata = run(
        python,
        "-c",
        "import importlib.metadata as m, json; print(json.dumps(m.requires('mlx-lora-tuner')))",
        cwd=environment,
    )
    for name in required(json.loads(metadata.stdout)):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
    return environment / "bin" / "mlx-tune"


@pytest.mark.slow
def test_the_wheel_is_small_and_has_what_a_clone_has(wheel: Path, root: Path) -> None:
    assert wheel.name.startswith("mlx_lora_tuner-")
    assert wheel.stat().st_size <= MOST_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "mlx_tuner/py.typed" in names
    for folder in ("recipes", "data"):
        there = {f"mlx_tuner/shipped/{folder}/{path.name}" for path in (root / folder).iterdir()}
        assert there <= names
    modules = {str(path.relative_to(root)) for path in (root / "mlx_tuner").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


@pytest.mark.slow
def test_the_installed_wheel_does_the_main_job_with_what_it_requires(
    tune: Path, tmp_path: Path
) -> None:
    assert "quickstart" in run(tune, "recipes", cwd=tmp_path).stdout
    few = ["--set", "train.max_steps=3", "--set", "train.warmup_steps=0"]
    told = run(tune, "run", "quickstart", *few, "--json", cwd=tmp_path)
    assert json.loads(told.stdout)["steps"] == 3
    answer = run(tune, "generate", "adapters/quickstart", "Add.", "--max-tokens", 4, cwd=tmp_path)
    assert answer.stdout.strip()
    assert (tmp_path / "adapters" / "quickstart" / "loss.png").is_file()
    run(tune, "init", "first", "-o", "mine", cwd=tmp_path)
    tiny = ["--set", "model.path=builtin:tiny-qwen"]
    assert "6, 2 an epoch" in run(tune, "plan", "mine/first.toml", *tiny, cwd=tmp_path).stdout
    assert "ready to train" in run(tune, "doctor", cwd=tmp_path).stdout
