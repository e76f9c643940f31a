"""The real command line: exit codes, what goes to which stream, and no traceback for anyone."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_tuner.cli import main
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.show.progress import Display
from mlx_tuner.training.finetune import finetune

PROMPT = "Write a Python function `twice` that doubles a number."

RECIPE = """\
[model]
path = "builtin:tiny-qwen"
[data]
train = "rows.jsonl"
[lora]
rank = 2
[train]
max_steps = 2
batch_size = 2
log_every = 1
"""

ROWS = """\
{"instruction": "Double a number.", "output": "def double(x):\\n    return 2 * x"}
{"instruction": "Halve a number.", "output": "def halve(x):\\n    return x / 2"}
"""


@dataclass(frozen=True)
class Done:
    """What a command left on its streams."""

    returncode: int
    stdout: str
    stderr: str


class Here:
    """Runs commands in this process, which saves their imports; the streams are the real ones."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *arguments: object) -> Done:
        self.capture.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments], prog_name="mlx-tune")
        code = end.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, *self.capture.readouterr())

    def refused(self, exit_code: int, *arguments: object) -> list[str]:
        """The lines of a command that fails with nothing on standard output."""
        done = self(*arguments)
        assert done.returncode == exit_code, done.stderr
        assert done.stdout == ""
        return done.stderr.splitlines()


@pytest.fixture
def mlx_tune(capfd: pytest.CaptureFixture[str]) -> Here:
    return Here(capfd)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good recipe and good rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "small.toml").write_text(RECIPE)
    run = folder / "adapters" / "small"
    with Display() as display:
        finetune(load_recipe(folder / "small.toml"), run, display)
    return run


# ---- a wrong command line or recipe: 2 ---------------------------------------------------------


def test_without_a_command_the_help_is_shown(mlx_tune: Here) -> None:
    assert "Commands:" in mlx_tune.refused(2)


@pytest.mark.parametrize("name", list(main.commands))
def test_each_commands_help_ends_with_an_example_that_it_takes(name: str, mlx_tune: Here) -> None:
    done = mlx_tune(name, "-h")
    heading, example = done.stdout.splitlines()[-2:]
    assert heading.strip() == "Example:"
    program, given, *arguments = shlex.split(example.split(">")[0])
    assert (program, given) == ("mlx-tune", name)
    main.commands[name].make_context(name, arguments)  # refuses what is missing, wrong or unknown


def test_unknown_commands_and_options_are_refused(mlx_tune: Here) -> None:
    for arguments, what in (
        (["trian"], "No such command 'trian'; see `mlx-tune --help`"),
        (["run", "--epochs", 3], "No such option '--epochs'; see `mlx-tune run --help`"),
        (["run"], "Missing argument 'RECIPE'; see `mlx-tune run --help`"),
    ):
        assert mlx_tune.refused(2, *arguments) == [f"mlx-tune: error: {what}"]


@pytest.mark.slow
def test_a_missing_recipe_is_refused_by_name(mlx_tune: Here, folder: Path) -> None:
    for command in ("run", "plan"):
        [line] = mlx_tune.refused(2, command, "missing.toml")
        assert line.startswith("mlx-tune: error: missing.toml: cannot be read (No such file")


def test_every_fault_of_a_recipe_is_a_line_with_its_place(mlx_tune: Here, folder: Path) -> None:
    (folder / "small.toml").write_text(
        RECIPE.replace("rank = 2", "r = 2\nalhpa = 4").replace("log_every", "iters")
    )
    lines = mlx_tune.refused(2, "run", "small.toml")
    assert [line.rsplit("; ")[0] for line in lines] == [
        "mlx-tune: error: small.toml:6: lora.r: unknown key",
        "mlx-tune: error: small.toml:7: lora.alhpa: unknown key",
        "mlx-tune: error: small.toml:11: train.iters: unknown key",
    ]
    assert lines[0].endswith("; here it is `lora.rank`")
    assert lines[1].endswith("; did you mean `alpha`?")
    assert "`train.max_steps`" in lines[2]
    assert not (folder / "adapters").exists()


@pytest.mark.slow
def test_overrides_are_checked_like_a_recipe(mlx_tune: Here, folder: Path) -> None:
    overrides = ["--set", "lora.rank=zero", "--set", "train.max_steps=0"]
    lines = mlx_tune.refused(2, "run", "small.toml", *overrides)
    assert [line.split(": ")[2] for line in lines] == ["--set lora.rank", "--set train.max_steps"]


def test_resume_and_overwrite_exclude_each_other(mlx_tune: Here, folder: Path) -> None:
    [line] = mlx_tune.refused(2, "run", "small.toml", "--resume", "--overwrite")
    assert line == "mlx-tune: error: --resume and --overwrite exclude each other; give one"


def test_a_run_is_not_replaced_without_being_asked(
    mlx_tune: Here, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent.parent)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("[!.]*")}
    lines = mlx_tune.refused(2, "run", "small.toml")
    assert lines[-1].startswith("mlx-tune: error: adapters/small: ")
    assert "--resume" in lines[-1]
    assert "--overwrite" in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("[!.]*")} == before


# ---- wrong data or model: 1 --------------------------------------------------------------------


@pytest.mark.slow
def test_bad_rows_are_told_with_their_lines_and_leave_no_run(mlx_tune: Here, folder: Path) -> None:
    (folder / "rows.jsonl").write_text(ROWS + '{"instruction": "no answer"}\nnot json\n')
    lines = mlx_tune.refused(1, "run", "small.toml")
    faults = [line for line in lines if line.startswith("mlx-tune: error: ")]
    assert ["rows.jsonl:3: " in faults[0], "rows.jsonl:4: " in faults[1]] == [True, True]
    assert len(faults) == 2
    assert not (folder / "adapters").exists()


def test_data_exits_with_0_on_good_rows_and_with_1_on_bad_ones(
    mlx_tune: Here, folder: Path
) -> None:
    done = mlx_tune("data", "rows.jsonl", "--json")
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), dict)
    (folder / "rows.jsonl").write_text(ROWS + "[]\n")
    done = mlx_tune("data", "rows.jsonl")
    assert done.returncode == 1
    assert "rows.jsonl:3: " in done.stderr


def test_a_model_that_is_not_there_is_an_error(mlx_tune: Here, folder: Path) -> None:
    lines = mlx_tune.refused(1, "generate", "./no-such-model", "hello")
    assert lines[-1].startswith("mlx-tune: error: ./no-such-model: ")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "missing from the tokenizer; take an instruct model"),
        ("{{ raise_exception('no!') }}", "refuses these messages: no!"),
    ],
)
def test_a_chat_template_that_cannot_ask_is_an_error(
    mlx_tune: Here, folder: Path, root: Path, template: str | None, said: str
) -> None:
    model = Path(shutil.copytree(root / "mlx_tuner" / "builtin" / "tiny-qwen", folder / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = mlx_tune.refused(1, "generate", model, "hello")
    assert lines[-1] == f"mlx-tune: error: {model}: chat_template: {said}"


# ---- what nobody foresaw: 1 --------------------------------------------------------------------

NO_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)\nand more"
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(NO_MEMORY), "the GPU or the machine ran out of memory; close other programs"),
        (RuntimeError("[METAL] Command buffer execution failed: x"), "the GPU's work failed; "),
        (KeyError("layers"), "KeyError: 'layers'; "),
        (
            PermissionError(13, "Permission denied", "/my/cuda"),
            "PermissionError: [Errno 13] Permission denied: '/my/cuda'; ",
        ),
    ],
)
def test_any_exception_is_a_line_that_names_the_file_with_its_traceback(
    mlx_tune: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def listed() -> None:
        raise error

    monkeypatch.setattr("mlx_tuner.commands.init.listed", listed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [line] = mlx_tune.refused(1, "recipes")
    assert line.startswith(f"mlx-tune: error: {said}")
    kept = Path(line.rpartition("; see ")[2]).read_text().splitlines()
    assert kept[0].startswith("Traceback")
    assert " in listed" in "".join(kept)
    (tmp_path / "mlx-tune" / "crash.log").unlink()
    (tmp_path / "mlx-tune").rmdir()
    (tmp_path / "mlx-tune").touch()  # a folder that cannot be made
    [line] = mlx_tune.refused(1, "recipes")
    assert line.startswith(f"mlx-tune: error: {said}")
    assert "crash.log" not in line


# ---- what goes where ---------------------------------------------------------------------------


@pytest.mark.slow
def test_run_json_prints_the_summary_and_nothing_else_on_stdout(
    mlx_tune: Here, folder: Path
) -> None:
    done = mlx_tune("run", "small.toml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(Path("adapters/small/summary.json").read_text())


@pytest.mark.slow
def test_a_recipe_may_be_called_like_an_option(mlx_tune: Here, folder: Path) -> None:
    (folder / "small.toml").rename(folder / "-x.toml")
    done = mlx_tune("run", "--quiet", "./-x.toml", "--run-dir", "x")
    assert (done.returncode, (folder / "x" / "summary.json").exists()) == (0, True)


@pytest.mark.slow
def test_without_a_terminal_progress_is_plain_lines_on_stderr_in_ascii_where_it_must_be(
    folder: Path,
) -> None:
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mlx_tuner", "run", "small.toml"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ascii_only},
    )
    assert done.returncode == 0, done.stderr
    assert not {"\x1b", "\r"} & set(done.stdout + done.stderr)
    assert [line[:8] for line in done.stderr.splitlines()[-2:]] == ["step 1/2", "step 2/2"]
    assert done.stdout.isascii()
    assert done.stderr.isascii()
    assert "small finished: 2 steps" in done.stdout


def test_dry_run_is_plan_and_leaves_nothing(mlx_tune: Here, folder: Path) -> None:
    planned = json.loads(mlx_tune("plan", "small.toml", "--json").stdout)
    dry = json.loads(mlx_tune("run", "small.toml", "--dry-run", "--json").stdout)
    for plan in (planned, dry):  # which depend on the memory that is free just now
        for key in ("micro_batch_tokens", "peak_memory_gb", "memory_gb", "budget_gb"):
            del plan[key]
        for key in ("longest_row_that_fits", "largest_micro_batch_tokens"):
            del plan[key]
    assert dry == planned
    assert dry["steps"] == 2
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl", "small.toml"}


@pytest.mark.slow
def test_plan_needs_no_weights_and_counts_what_the_user_recorded(
    mlx_tune: Here, shared: Path, root: Path, tmp_path: Path
) -> None:
    real = shared / "qwen2.5-coder"
    shutil.copyfile(real / "config-1.5B.json", tmp_path / "config.json")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(real / name, tmp_path / name)
    recipe = root / "recipes" / "first.toml"
    done = mlx_tune("plan", recipe, "--json", "--set", f"model.path={tmp_path}")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["trainable_parameters"] == 2_179_072
    assert plan["total_parameters"] == 1_545_893_376
    assert (plan["rows"], plan["steps"], plan["steps_per_epoch"]) == (5, 6, 2)
    logged = [2e-4, 1.67e-4, 1.33e-4, 1e-4, 6.7e-5, 3.3e-5]
    assert plan["learning_rates"] == pytest.approx(logged, abs=5e-7)  # he noted them rounded
    assert {"tokens", "target_tokens", "peak_memory_gb"} <= plan.keys()


def test_generate_prints_the_answer_alone(mlx_tune: Here, finished: Path) -> None:
    from mlx_tuner.commands.generate import answer, load

    done = mlx_tune("generate", finished, PROMPT, "--max-tokens", 12)
    chat = [{"role": "user", "content": PROMPT}]
    expected = "".join(answer(load(str(finished)), chat, max_tokens=12, temperature=0))
    assert (done.returncode, done.stdout) == (0, expected + "\n")


def test_a_chat_ends_with_its_input(
    mlx_tune: Here, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say something.\n"))
    done = mlx_tune("generate", finished, "--max-tokens", 4)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert done.stderr.count("you> ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_reader_that_leaves_causes_no_traceback(command: str, finished: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_tuner", command, finished, finished],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=finished.parent,
        )
    finally:
        os.close(writing)
    assert "crash.log" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_shell_is_given_its_completion() -> None:
    result = CliRunner().invoke(main, ["completion", "zsh"])
    assert result.exit_code == 0
    assert result.stdout.startswith("#compdef mlx-tune")


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_a_zsh_that_nobody_has_set_up_completes_too(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(CliRunner().invoke(main, ["completion", "zsh"]).stdout)
    for before in ("", "autoload -Uz compinit && compinit -i; "):
        done = subprocess.run(
            ["zsh", "-f", "-c", f"{before}source ./script; print $_comps[mlx-tune]"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        assert (done.stdout, done.stderr) == ("_mlx_tune_completion\n", "")
