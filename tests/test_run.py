"""run.py: one process a run, nothing lost, nothing overwritten unasked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_records import begin, train_record

from mlx_tuner.errors import RunError, UsageError
from mlx_tuner.runs.checkpoints import newest
from mlx_tuner.runs.metrics import EvalRecord, Sample, TrainRecord
from mlx_tuner.runs.place import Claim, is_run, is_running
from mlx_tuner.runs.run import Run, read_records, read_samples, read_summary
from mlx_tuner.system import files

RECIPE = "[model]\npath = 'builtin:tiny-qwen'\n"


def logged(step: int) -> TrainRecord:
    return train_record(step, 1 / step)


def writer(text: str):
    """Stands in for adapter and optimizer files."""

    def write(folder: Path) -> None:
        (folder / "adapters.safetensors").write_text(text)
        (folder / "adapter_config.json").write_text("{}")

    return write


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_new_run_keeps_its_recipe_and_its_metrics(tmp_path):
    with begin(tmp_path / "adapters" / "first", RECIPE) as run:
        run.append(EvalRecord(step=0, epoch=0.0, val_loss=2.0))
        run.append(logged(10))
    assert (run.path / "recipe.toml").read_text() == RECIPE
    assert read_records(run.path) == [EvalRecord(step=0, epoch=0.0, val_loss=2.0), logged(10)]
    assert read_summary(run.path) is None
    assert is_run(run.path)


def test_an_earlier_run_is_not_replaced_unasked_and_both_ways_out_are_named(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        run.append(logged(1))
    before = content(run.path)
    with pytest.raises(UsageError, match=r"--resume.*--overwrite") as caught:
        begin(tmp_path / "run", "new")
    assert caught.value.exit_code == 2
    del before[".lock"]
    after = content(run.path)
    del after[".lock"]
    assert after == before
    begin(tmp_path / "empty", RECIPE).close()


def old_run(path: Path) -> dict[str, bytes]:
    """A run with all kinds of files, and a file that is none of a run's."""
    with begin(path, RECIPE) as run:
        run.append(logged(1))
        run.save_checkpoint(1, writer("old"), {})
        run.publish(writer("old"))
        (path / "tensorboard").mkdir()
        for name in ("loss.png", "quarantine.jsonl", "tasks.jsonl", "tensorboard/events"):
            (path / name).write_text("old")
        (path / "notes.txt").write_text("mine")
    return without_lock(path)


def without_lock(path: Path) -> dict[str, bytes]:
    found = content(path)
    del found[".lock"]
    return found


def test_an_overwritten_run_goes_with_the_first_checkpoint_of_the_new_one(tmp_path):
    old_run(tmp_path / "run")
    with begin(tmp_path / "run", "new", overwrite=True) as run:
        assert not (run.path / "adapters.safetensors").exists()
        assert (run.path / ".previous" / "adapters.safetensors").read_text() == "old"
        run.save_checkpoint(5, writer("new"), {})
    assert sorted(p.name for p in run.path.iterdir()) == [
        ".lock",
        "checkpoints",
        "notes.txt",
        "recipe.toml",
    ]
    assert newest(run.path)[0].step == 5


def test_an_overwritten_run_comes_back_where_the_new_one_saves_nothing(tmp_path):
    before = old_run(tmp_path / "run")
    with begin(tmp_path / "run", "new", overwrite=True) as run:
        run.append(logged(7))
        run.publish(writer("new"))
    assert without_lock(run.path) == before


def test_an_overwritten_run_comes_back_when_the_parent_of_a_killed_one_lets_go(tmp_path):
    before = old_run(tmp_path / "run")
    claim = Claim(tmp_path / "run", overwrite=True)
    killed = Run(tmp_path / "run", overwrite=True, held=os.dup(claim.descriptor))
    killed.begin("new")
    assert without_lock(tmp_path / "run") != before
    claim.release()
    assert without_lock(tmp_path / "run") == before


def test_a_run_that_was_copied_without_hidden_files_is_a_run(tmp_path):
    old_run(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    with Run(tmp_path / "run", resume=True) as run:
        assert run.checkpoint.step == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_a_crash_log_of_the_overwritten_run_goes_and_one_of_this_run_stays(tmp_path, restarted):
    old_run(tmp_path / "run")
    log = tmp_path / "run" / "crash.log"
    log.write_text("why")
    with Run(log.parent, overwrite=True) as run:
        run.begin("new", restarted=restarted)
    assert log.exists() == restarted


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_an_overwritten_run_comes_back_whatever_moment_the_new_one_is_killed_at(
    tmp_path, monkeypatch
):
    """Killed at each rename and flush in turn, and again at each while it is put back."""
    rename = files._rename
    for first in range(1, 40):
        path = tmp_path / str(first)
        before = old_run(path)
        ended = killed_at(first, monkeypatch, lambda path=path: start_over(path))
        for again in range(1, 6):
            killed_at(again, monkeypatch, lambda path=path: Run(path, resume=True).close())
        assert files._rename is rename
        with Run(path, resume=True) as run:
            if ended:
                assert run.checkpoint.step == 9
                break
            assert run.checkpoint.step in (1, 9)
            if run.checkpoint.step == 1:
                assert without_lock(path) == before
    assert ended


def start_over(path: Path) -> None:
    with begin(path, "new", overwrite=True) as run:
        run.append(logged(9))
        run.save_checkpoint(9, writer("new"), {})


def killed_at(call: int, monkeypatch, operation) -> bool:
    """Do it up to a rename, whose process dies there; whether it came to its end."""
    count = 0
    rename = files._rename

    def counting(source, target):
        nonlocal count
        count += 1
        if count >= call:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_rename", counting)
        # What a dying process does not do any more:
        patch.setattr(files.shutil, "rmtree", lambda *a, **k: None)
        try:
            operation()
        except Killed:
            return False
    return True


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path, overwrite):
    (tmp_path / "recipe.toml").write_text("the user's own")
    with pytest.raises(UsageError, match="not a run"):
        begin(tmp_path, RECIPE, overwrite=overwrite)
    assert content(tmp_path) == {"recipe.toml": b"the user's own"}


def test_a_run_is_not_written_into_models_or_data(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "file").write_text("x")
    for place in (model, model / "runs" / "first", tmp_path / "link" / "first"):
        with pytest.raises(UsageError, match=f"is where {model} is"):
            begin(place, RECIPE, overwrite=True, keep_out_of=[model])
    with pytest.raises(UsageError, match="is not a folder"):
        begin(tmp_path / "file", RECIPE)
    assert list(model.iterdir()) == []
    begin(tmp_path / "model-2", RECIPE, keep_out_of=[model]).close()


@pytest.mark.slow
def test_a_second_run_in_the_same_place_is_told_pid_and_start(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        for start in (
            lambda: begin(run.path, "new", overwrite=True),
            lambda: Run(run.path, resume=True),
        ):
            with pytest.raises(
                RunError, match=rf"in use by process {os.getpid()}, started 20"
            ) as e:
                start()
            assert e.value.exit_code == 1
        assert is_running(run.path)
    assert not is_running(run.path)
    assert (run.path / "recipe.toml").read_text() == RECIPE


STARTER = """
import sys, time
from pathlib import Path
from mlx_tuner.errors import TunerError
from mlx_tuner.runs.run import Run
sys.stdin.readline()
try:
    run = Run(Path(sys.argv[1]))
    run.begin("recipe")
except TunerError as error:
    print(error)
    sys.exit(error.exit_code)
print("running", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_of_many_starts_at_once_one_runs_and_a_kill_frees_the_run(tmp_path):
    command = [sys.executable, "-c", STARTER, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    starts = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(12)]
    try:
        for start in starts:
            start.stdin.write("go\n")
            start.stdin.close()
        winner = None
        deadline = time.monotonic() + 30
        while sum(s.poll() is not None for s in starts) < 11 and time.monotonic() < deadline:
            time.sleep(0.02)
        (winner,) = [start for start in starts if start.poll() is None]
        losers = [start for start in starts if start is not winner]
        assert [start.returncode for start in losers] == [1] * 11
        for start in losers:
            assert f"in use by process {winner.pid}," in start.stdout.read()
        winner.send_signal(signal.SIGKILL)
        winner.wait()
        begin(tmp_path / "run", "new", overwrite=True).close()
    finally:
        for start in starts:
            start.kill()
            start.wait()
            start.stdout.close()


def test_a_checkpoint_has_all_files_a_state_and_a_manifest_and_verifies(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        run.append(logged(10))
        run.save_checkpoint(10, writer("ten"), {"epoch": 0.8, "seed": 42})
    path = run.path / "checkpoints" / "step-00000010"
    assert sorted(content(path)) == [
        "MANIFEST.json",
        "adapter_config.json",
        "adapters.safetensors",
        "state.json",
    ]
    size = (run.path / "metrics.jsonl").stat().st_size
    state = {"step": 10, "metrics_bytes": size, "epoch": 0.8, "seed": 42}
    assert json.loads((path / "state.json").read_text()) == state
    checkpoint, rejected = newest(run.path)
    assert (checkpoint.path, checkpoint.step, checkpoint.state) == (path, 10, state)
    assert rejected == []


def test_the_two_newest_checkpoints_and_the_best_are_kept(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        for step in range(10, 70, 10):
            run.save_checkpoint(step, writer(str(step)), {}, best_step=20)
    assert checkpoints(run.path) == ["step-00000020", "step-00000050", "step-00000060"]


def test_saving_the_same_step_twice_writes_it_once(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        run.save_checkpoint(10, writer("a"), {})
        run.save_checkpoint(10, writer("b"), {})
    assert (run.path / "checkpoints/step-00000010/adapters.safetensors").read_text() == "a"


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(tmp_path):
    def full_disk(folder: Path) -> None:
        (folder / "adapters.safetensors").write_text("half")
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    with begin(tmp_path / "run", RECIPE) as run:
        run.save_checkpoint(10, writer("ten"), {})
        run.save_checkpoint(20, writer("twenty"), {})
        with pytest.raises(RunError, match="step-00000030"):
            run.save_checkpoint(30, full_disk, {})
    assert checkpoints(run.path) == ["step-00000010", "step-00000020"]


def test_a_damaged_newest_checkpoint_is_passed_over_and_said_so(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        for step in (10, 20):
            run.save_checkpoint(step, writer(str(step)), {})
    (run.path / "checkpoints/step-00000020/adapters.safetensors").write_text("damaged")
    resumed = Run(run.path, resume=True)
    assert resumed.checkpoint.step == 10
    assert resumed.rejected == [
        "step-00000020 is not used: adapters.safetensors: not the content that was written",
    ]
    # What is saved from here on must not be pruned in favour of the damaged one.
    with resumed:
        resumed.go_on(RECIPE)
        resumed.save_checkpoint(15, writer("15"), {})
    assert checkpoints(run.path) == ["step-00000010", "step-00000015"]


def test_resuming_without_any_good_checkpoint_says_why_each_was_rejected(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        for step in (10, 20):
            run.save_checkpoint(step, writer(str(step)), {})
    (run.path / "checkpoints/step-00000010/state.json").unlink()
    (run.path / "checkpoints/step-00000020/MANIFEST.json").unlink()
    before = content(run.path / "checkpoints")
    with pytest.raises(RunError) as caught:
        Run(run.path, resume=True)
    assert caught.value.exit_code == 1
    message = str(caught.value)
    assert "step-00000010 is not used: state.json: missing" in message
    assert "step-00000020 is not used: MANIFEST.json: No such file or directory" in message
    assert content(run.path / "checkpoints") == before
    assert not is_running(run.path)


def test_resuming_where_there_is_no_run_touches_nothing(tmp_path):
    with pytest.raises(RunError, match="no run to resume"):
        Run(tmp_path, resume=True)
    assert content(tmp_path) == {}


def test_resuming_sets_metrics_after_the_checkpoint_aside_and_sweeps(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        run.append(logged(10))
        run.save_checkpoint(10, writer("ten"), {})
        run.append(logged(20))
        run.append(logged(30))
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "train", "st')  # killed in the middle of a line
    (run.path / "checkpoints" / ".tmp-1").mkdir()
    (run.path / ".tmp-2.json").write_text("half")
    with Run(run.path, resume=True) as resumed:
        assert resumed.checkpoint.step == 10
        resumed.go_on(RECIPE)
        resumed.append(logged(20))
    assert read_records(run.path) == [logged(10), logged(20)]
    set_aside = (run.path / "metrics.discarded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in set_aside] == [20, 30]
    assert not list(run.path.rglob(".tmp-*"))


def test_a_run_that_goes_on_has_no_summary_yet_and_no_half_of_an_answer(tmp_path):
    first, second = (Sample(step=n, prompt="a", answer="b", stopped=True) for n in (1, 2))
    with begin(tmp_path / "run", RECIPE) as run:
        run.append(logged(1))
        run.append_sample(first)
        run.save_checkpoint(1, writer("one"), {})
    samples = run.path / "samples.jsonl"
    samples.write_bytes(samples.read_bytes() + b'{"step": 2, "pro')  # the power went
    (run.path / "summary.json").write_text("{}")  # of an earlier stop
    (run.path / "recipe.toml").unlink()
    with Run(run.path, resume=True) as resumed:
        resumed.go_on(RECIPE)
        resumed.append_sample(second)
    assert read_samples(run.path) == [first, second]
    assert read_summary(run.path) is None
    assert (run.path / "recipe.toml").read_text() == RECIPE


def test_a_damaged_checkpoint_is_never_published(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        for step in (1, 2):
            run.save_checkpoint(step, writer(str(step)), {}, best_step=1)
        run.publish_kept(1)
        assert (run.path / "adapters.safetensors").read_text() == "1"
        (run.path / "checkpoints" / "step-00000001" / "adapters.safetensors").write_text("x")
        run.publish_kept(1)
    assert (run.path / "adapters.safetensors").read_text() == "1"


def test_a_torn_last_line_is_not_a_record_and_a_broken_one_is_an_error(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        run.append(logged(10))
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole), 2 * len(whole)):
        path.write_bytes((whole + whole)[:size])
        assert read_records(run.path) == [logged(10)]
    path.write_bytes(whole + b"nonsense\n" + whole + b"[]\n" + b'{"event": "eval"}\n')
    with pytest.raises(RunError) as caught:
        read_records(run.path)
    assert [fault.where for fault in caught.value.faults] == [f"{path}:{n}" for n in (2, 4, 5)]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": 3}', "[" * 100_000, "\ud800"])
def test_a_summary_that_is_none_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "summary.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RunError, match=r"summary\.json: is not the summary of a run"):
        read_summary(tmp_path)


def test_published_adapters_replace_the_pair_at_the_root(tmp_path):
    with begin(tmp_path / "run", RECIPE) as run:
        run.publish(writer("first"))
        run.publish(writer("better"))
    assert (run.path / "adapters.safetensors").read_text() == "better"
    assert (run.path / "adapter_config.json").read_text() == "{}"
    assert not list(run.path.glob(".tmp-*"))


SAVER = """
import sys
from pathlib import Path
from mlx_tuner.runs.metrics import EvalRecord
from mlx_tuner.runs.run import Run
def write(folder):
    (folder / "adapters.safetensors").write_bytes(bytes(300_000))
path = Path(sys.argv[1])
resume = (path / "checkpoints").exists()
run = Run(path, resume=resume, overwrite=not resume)
step = run.checkpoint.step if resume else 0
run.go_on("recipe") if resume else run.begin("recipe")
while True:
    step += 1
    run.append(EvalRecord(step=step, epoch=0.5, val_loss=1.0))
    run.save_checkpoint(step, write, {})
    run.publish(write)
    print("published", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_resumes_at_a_checkpoint_that_verifies(tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-c", SAVER, str(path)]
    reached = 0
    for kill in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.06 + 0.0037 * kill)
            process.kill()
        checkpoint, rejected = newest(path)
        assert rejected == []
        assert checkpoint.step >= reached
        reached = checkpoint.step
        assert files.sha256(path / "adapters.safetensors") == files.sha256(
            checkpoint.path / "adapters.safetensors"
        )
        steps = [record.step for record in read_records(path)]
        assert steps == list(range(1, len(steps) + 1))
        assert reached <= len(steps) <= reached + 1
    assert reached >= 20
