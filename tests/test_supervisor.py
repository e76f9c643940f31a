"""supervisor.py: the process that watches over training, with children that only pretend to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import some_slow

from mlx_tuner.runs import causes, place

EXIT_CODES = {"INT": 130, "TERM": 143, "HUP": 129}


def parent(settings: str) -> str:
    """A program that runs `mlx-tune run mine.toml`, whose child is child.py."""
    return f"""
import sys
from mlx_tuner import cli
from mlx_tuner.runs import peers, supervisor
supervisor._CHILD = "exec(open('child.py').read())"
{settings}
try:
    cli.main(["run", "mine.toml", *sys.argv[1:]])
finally:
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    assert not loaded & {{"mlx", "numpy", "pydantic", "rich", "transformers"}}, loaded
"""


PARENT = parent("""
supervisor.DELAYS = (0.01, 0.01, 0.01)
supervisor.TICK, supervisor.PATIENCE = 0.05, 0.5
""")
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from mlx_tuner.runs import pulse
own = pulse.take_over()
attempt = len(list(Path.cwd().glob("start-*")))
Path(f"start-{attempt}").write_text(json.dumps([os.getpid(), *sys.argv[2:]]))
"""
PATIENCE_SECONDS = 300
"""For what comes within a second unless the machine is busy."""


@pytest.fixture
def supervised(tmp_path):
    """Runs a command whose child is a script: exit code, lines on standard error, starts."""

    def run(script: str, *options: str) -> tuple[int, list[str], list[list[str]]]:
        process = start(tmp_path, script, *options)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, stderr.splitlines(), starts(tmp_path)

    return run


def start(folder: Path, script: str, *options: str) -> subprocess.Popen[str]:
    (folder / "child.py").write_text(CHILD + script)
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, *options], cwd=folder, stderr=subprocess.PIPE, text=True
    )


def starts(folder: Path) -> list[list[str]]:
    """What each child was told, after `run` and the recipe."""
    found = sorted(folder.glob("start-*"))
    return [json.loads(path.read_text())[2:] for path in found]


def wait_for(path: Path) -> None:
    wait_until(path.exists)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


METAL = "[METAL] Command buffer execution failed: "


@pytest.mark.parametrize(
    ("message", "said", "memory"),
    [
        (
            f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            "ran out of memory",
            True,
        ),
        ("[malloc] Unable to allocate 137438953472 bytes.", "ran out of memory", True),
        (
            "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum "
            "allowed buffer size of 8 bytes.",
            "ran out of memory",
            True,
        ),
        (
            f"{METAL}Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
            "let the display sleep",
            False,
        ),
        ("[metal::malloc] Resource limit (499000) exceeded.", "limit of buffers", False),
        (f"{METAL}Caused GPU Timeout Error (00000002:kIO…ErrorTimeout)", "took too long", False),
        (f"{METAL}Internal Error (0000000e:Internal Error)", "the GPU's work failed", False),
    ],
)
def test_what_metal_says_is_put_in_plain_words(message: str, said: str, memory: bool) -> None:
    cause = causes.of_message(message)
    assert cause is not None
    assert said in cause.sentence
    assert cause.memory == memory


def test_a_fault_of_ours_is_no_fault_of_the_machine() -> None:
    assert causes.of_message("'NoneType' object has no attribute 'step'") is None


@pytest.mark.slow
def test_a_child_that_ends_by_itself_decides_the_exit_code(supervised) -> None:
    for code in (0, 1, 2, 143):
        assert supervised(f"sys.exit({code})")[:2] == (code, [])


def test_a_child_that_dies_is_started_again_from_its_checkpoint(supervised, tmp_path) -> None:
    script = """
own.started(4096)
own.restarted(attempt)
if attempt == 0: os.kill(os.getpid(), signal.SIGSEGV)
own.saved(10)
if attempt == 1: os.kill(os.getpid(), signal.SIGKILL)
"""
    code, lines, told = supervised(script, "--set", "train.seed=3")
    assert code == 0
    assert [options[-1] for options in told] == ["--overwrite", "--overwrite", "--resume"]
    assert all("--set=train.seed=3" in options for options in told)
    assert [line.partition(";")[0] for line in lines] == [
        "mlx-tune: training died: it read memory that is not its own (segmentation fault)",
        "mlx-tune: training died: the system killed it, most likely for memory",
    ]
    assert "starts over" in lines[0]
    assert "goes on from its newest checkpoint" in lines[1]
    log = (tmp_path / "adapters" / "mine" / "crash.log").read_text()
    assert "Fatal Python error: Segmentation fault" in log


@pytest.mark.slow
def test_out_of_memory_is_tried_again_with_half_the_tokens_and_a_limit(supervised) -> None:
    script = f"""
own.started(4096 >> attempt)
sys.exit(own.crashed(RuntimeError("{METAL}Insufficient Memory (00000008:…)")))
"""
    code, lines, told = supervised(script)
    assert code == 1
    assert len(told) == 4
    assert [options[-1] for options in told[1:]] == [
        f"--set=train.micro_batch_tokens={tokens}" for tokens in (2048, 1024, 512)
    ]
    assert "with half the micro_batch_tokens, 2,048" in lines[0]
    assert "error: " in lines[-1]
    assert not any("Traceback" in line for line in lines)


@pytest.mark.slow
def test_restarts_go_on_as_long_as_checkpoints_do(supervised) -> None:
    script = """
if attempt % 3 == 0: own.saved(10 * attempt)
if attempt < 11: os.kill(os.getpid(), signal.SIGABRT)
"""
    code, _, told = supervised(script)
    assert (code, len(told)) == (0, 12)


def test_a_fault_of_ours_is_one_line_and_a_crash_log_and_no_second_try(supervised, tmp_path):
    code, lines, told = supervised("sys.exit(own.crashed(KeyError('step')))")
    log = tmp_path / "adapters" / "mine" / "crash.log"
    assert (code, len(told)) == (1, 1)
    [line] = lines
    assert line.startswith("mlx-tune: error: adapters/mine: training died: 'step'; see adapters")
    assert "KeyError: 'step'" in log.read_text()


def test_without_restarts_the_first_death_is_the_end(supervised) -> None:
    code, lines, told = supervised("os.kill(os.getpid(), signal.SIGBUS)", "--no-restart")
    assert (code, len(told), len(lines)) == (1, 1, 1)


@pytest.mark.slow
def test_a_child_that_hangs_between_steps_is_started_again(supervised) -> None:
    script = """
if attempt == 0:
    time.sleep(1)  # what comes before the first step may take its time
    own.step()
    own.saved(1)
    time.sleep(60)
"""
    code, lines, told = supervised(script)
    assert (code, len(told)) == (0, 2)
    assert "it hung: nothing happened for" in lines[0]


@pytest.mark.slow
def test_a_child_that_somebody_has_stopped_does_not_hang(tmp_path) -> None:
    """For twice as long as one may be silent, and then it ends at once."""
    stop = "Path('ready').touch(); os.kill(os.getpid(), signal.SIGSTOP); os._exit(0)"
    process = start(tmp_path, f"own.step(); {stop}")
    wait_for(tmp_path / "ready")
    child = json.loads((tmp_path / "start-0").read_text())[0]
    wait_until(lambda: state(child) == "T")
    time.sleep(1)
    os.kill(child, signal.SIGCONT)
    assert process.communicate(timeout=PATIENCE_SECONDS) == (None, "")
    assert process.returncode == 0


@pytest.mark.parametrize("sent", some_slow(EXIT_CODES, ["TERM", "HUP"]))
def test_a_signal_is_handed_on_once_and_decides_the_exit_code(tmp_path, sent) -> None:
    script = f"""
came = []
def keep(number, frame):
    Path(f"signal-{{time.monotonic_ns()}}").touch()
    came.append(number)
signal.signal(signal.SIG{sent}, keep)
Path("ready").touch()
while not came:
    time.sleep(0.01)
time.sleep(0.5)  # a second one would come at once
sys.exit({EXIT_CODES[sent]})
"""
    process = start(tmp_path, script)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.Signals[f"SIG{sent}"])
    assert process.wait(timeout=PATIENCE_SECONDS) == EXIT_CODES[sent]
    assert len(list(tmp_path.glob("signal-*"))) == 1
    process.stderr.close()


def test_a_killed_parent_takes_its_child_along_and_the_folder_is_free(tmp_path) -> None:
    process = start(tmp_path, "Path('ready').touch(); time.sleep(600)")
    wait_for(tmp_path / "ready")
    child = json.loads((tmp_path / "start-0").read_text())[0]
    assert place.is_running(tmp_path / "adapters" / "mine")
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)
    wait_until(lambda: state(child) in ("", "Z"))
    place.Claim(tmp_path / "adapters" / "mine", overwrite=True).release()


def state(pid: int) -> str:
    """Of a process: "S" sleeps, "T" is stopped, "Z" has left its exit code; "" is gone."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout[:1]


@pytest.mark.slow
def test_of_many_starts_at_once_one_trains_and_the_others_name_it(tmp_path) -> None:
    script = "Path('ready').touch(); time.sleep(600)"
    processes = [start(tmp_path, script) for _ in range(8)]
    try:
        wait_until(lambda: sum(process.poll() is None for process in processes) == 1)
        (winner,) = [process for process in processes if process.poll() is None]
        for loser in processes:
            if loser is not winner:
                assert loser.returncode == 1
                assert f"in use by process {winner.pid}, started" in loser.stderr.read()
        wait_for(tmp_path / "ready")
        assert len(starts(tmp_path)) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_parent_takes_little_memory_and_hardly_any_time(tmp_path) -> None:
    script = "Path('ready').touch()\nfor _ in range(100): own.step(); time.sleep(0.02)"
    process = start(tmp_path, script)
    wait_for(tmp_path / "ready")
    time.sleep(0.2)

    def hundredths() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    before = hundredths()
    time.sleep(1)
    assert int(peak.split()[1]) < 30_000
    assert hundredths() - before <= 2  # at fifty steps a second
    assert process.communicate(timeout=PATIENCE_SECONDS) == (None, "")


def test_nothing_is_left_of_a_run_that_is_refused(supervised, tmp_path) -> None:
    assert supervised("sys.exit(2)")[0] == 2
    assert not (tmp_path / "adapters").exists()


def test_a_child_that_cannot_even_start_is_told_of_in_a_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CHILD", "")
    process = start(tmp_path, "raise ImportError('libmlx.so: cannot open shared object file')")
    [line] = process.communicate(timeout=PATIENCE_SECONDS)[1].splitlines()
    assert process.returncode == 1
    assert "ImportError: libmlx.so: cannot open shared object file; see adapters/mine" in line
    assert "Traceback" in (tmp_path / "adapters" / "mine" / "crash.log").read_text()
