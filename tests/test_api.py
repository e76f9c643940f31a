"""What `import mlx_tuner` offers, as a person at a prompt uses it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from run_records import summary_of, train_record

import mlx_tuner
from mlx_tuner.cli import main
from mlx_tuner.errors import RecipeError, TunerError, UsageError
from mlx_tuner.runs.metrics import Summary
from mlx_tuner.system import interrupt

STEPS = ["train.max_steps=2", "train.batch_size=2", "data.limit=4", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = mlx_tuner.load_recipe("quickstart", overrides=[*STEPS, "lora.rank=2"])
    return mlx_tuner.finetune(recipe, tmp_path_factory.mktemp("runs") / "mine")


@pytest.mark.slow
def test_importing_loads_no_mlx_until_a_function_is_asked_for() -> None:
    code = (
        "import mlx_tuner, sys\n"
        "from mlx_tuner import load_recipe, Recipe\n"
        "assert not {'mlx', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "from mlx_tuner import finetune, generate\n"
        "import mlx_tuner.training.finetune\n"
        "assert callable(mlx_tuner.finetune) and callable(mlx_tuner.generate)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_public_is_there_and_nothing_else() -> None:
    assert all(callable(getattr(mlx_tuner, name)) for name in mlx_tuner.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = mlx_tuner.train


@pytest.mark.slow
def test_a_run_gives_the_numbers_of_its_summary_and_its_path(finished, capfd) -> None:
    kept = json.loads((finished.run / "summary.json").read_text())
    assert finished.to_json() == {**kept, "run": str(finished.run)}
    assert (finished.steps, finished.rank) == (2, 2)


@pytest.mark.slow
def test_nothing_is_shown_unless_it_is_asked_for(tmp_path: Path, capfd) -> None:
    recipe = mlx_tuner.load_recipe("quickstart", overrides=STEPS)
    mlx_tuner.finetune(recipe, tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    mlx_tuner.finetune(recipe, tmp_path / "loud", progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "quickstart: 2 steps on 4 rows" in shown.err


@pytest.mark.slow
def test_an_answer_is_the_commands(finished) -> None:
    said = mlx_tuner.generate(finished.run, "Add two numbers.", max_tokens=8, system="Be brief.")
    arguments = ["generate", str(finished.run), "Add two numbers.", "--max-tokens", "8"]
    done = CliRunner().invoke(main, [*arguments, "--system", "Be brief."])
    assert said + "\n" == done.stdout


@pytest.mark.slow
def test_an_error_is_an_exception_with_the_commands_text(finished, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[model]\npath = "builtin:tiny-qwen"\n[lora]\nr = 8\n')
    with pytest.raises(RecipeError) as caught:
        mlx_tuner.load_recipe(wrong)
    said = CliRunner().invoke(main, ["plan", str(wrong)]).stderr.splitlines()
    assert [f"mlx-tune: error: {line}" for line in str(caught.value).splitlines()] == said
    with pytest.raises(UsageError, match="--overwrite"):
        mlx_tuner.finetune(mlx_tuner.load_recipe("quickstart", overrides=STEPS), finished.run)
    with pytest.raises(TunerError, match="no-such"):
        mlx_tuner.generate(tmp_path / "no-such", "Hello")


def test_a_mac_is_kept_awake_as_long_as_it_trains(tmp_path: Path, monkeypatch) -> None:
    caffeinate = tmp_path / "caffeinate"
    caffeinate.write_text('#!/bin/sh\necho $$ "$@" > "$0.begun"\nexec sleep 60\n')
    caffeinate.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("mlx_tuner.system.awake.sys", SimpleNamespace(platform="darwin"))
    begun = tmp_path / "caffeinate.begun"

    def train(*_: object, **__: object) -> Summary:
        end = time.monotonic() + 30
        while time.monotonic() < end and not (begun.exists() and begun.read_text()):
            time.sleep(0.01)
        return summary_of([train_record(1, 1.0)])

    monkeypatch.setattr("mlx_tuner.api.training.finetune", train)
    recipe = mlx_tuner.load_recipe("quickstart", overrides=STEPS)
    mlx_tuner.finetune(recipe, tmp_path)
    pid, *given = begun.read_text().split()
    assert given == ["-is", "-w", str(os.getpid())]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_on_a_mac_the_display_may_wait_for_the_gpu_unless_the_user_says_otherwise() -> None:
    code = "import os, sys; sys.platform = 'darwin'; import mlx_tuner; print(os.environ[{!r}])"
    name = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    command = [sys.executable, "-c", code.format(name)]
    for given, expected in (({}, "1\n"), ({name: "0"}, "0\n")):
        environ = {key: value for key, value in os.environ.items() if key != name} | given
        assert subprocess.check_output(command, env=environ, text=True) == expected


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    """Where Python allows no handler: a server's worker, say."""
    found = []

    def work() -> None:
        with interrupt.deferred() as signal:
            found.append(signal.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.slow
def test_the_notebook_runs_from_rows_to_answers(root: Path, tmp_path: Path) -> None:
    """In a kernel of its own, as Jupyter runs it, away from the clone's folder."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(root / "docs" / "quickstart.ipynb", 4)
    assert len(notebook.cells) == 10
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    answer = text.rpartition("---\n")[2]
    assert "(a: float, b: float) -> float:\n    return a " in answer
    assert "step 24/24" in text
    assert "\x1b[1A" not in text  # a notebook has no cursor to move up
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
