"""progress.py: a live display on a terminal, plain lines elsewhere, never a reason to stop."""

import io
import math
import os
import re
import subprocess
import sys

import pytest
from run_records import FACTS, evaluation, train_record

from mlx_tuner.engine.trainer import StepResult
from mlx_tuner.runs.metrics import EvalRecord, Sample
from mlx_tuner.show import progress
from mlx_tuner.show.progress import Display, sparkline


def start(display: Display, steps: int = 39, first_step: int = 0) -> None:
    display.start(FACTS.model_copy(update={"total_steps": steps}), first_step=first_step)


STEP = StepResult(
    loss=1.2,
    grad_norm=0.5,
    learning_rate=2e-4,
    rows=8,
    tokens=800,
    target_tokens=200,
    finite=True,
    seconds=2.0,
    waited=0.1,
)


class Terminal(io.StringIO):
    """A terminal of 100 columns."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def plain(text: str) -> str:
    """Without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_without_a_terminal_there_is_a_plain_line_a_record(capsys):
    with Display() as display:
        start(display)
        display.record(EvalRecord(step=0, epoch=0.0, val_loss=1.35))
        for _ in range(10):
            display.step(STEP)
        display.record(train_record(10, 1.1542, epoch=0.8, grad_norm=0.619, rate=1.8e-4))
        display.record(EvalRecord(step=10, epoch=0.8, val_loss=0.93), best=True)
        display.note("checkpoint: step 10")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == (
        "codealpaca: 39 steps on 100 rows, "
        "4,358,144 of 1,548,072,448 parameters trainable (0.2815 %)"
    )
    assert lines[1] == "step 0/39  epoch 0.00  val loss 1.3500  before training"
    assert lines[2].startswith(
        "step 10/39  epoch 0.80  loss 1.1542  grad norm 0.619  LR 1.8e-4  "
        "6.1 samples/s  742 tokens/s  "
    )
    assert lines[2].endswith(" left")
    assert lines[3] == "step 10/39  epoch 0.80  val loss 0.9300  ★ best so far"
    assert lines[4:] == ["checkpoint: step 10"]
    assert "\x1b" not in captured.err


def test_on_a_terminal_a_bar_shows_loss_speeds_and_what_is_left(terminal):
    with Display(terminal) as display:
        start(display)
        for _ in range(13):
            display.step(STEP)
        display._live.refresh()
        display.record(train_record(13, 1.0))
    text = plain(terminal.getvalue())
    assert "13/39 33 %" in text
    assert " left" in text
    # 13 × 8 rows and 13 × 800 tokens in 13 × 2 s
    lines = [" ".join(line.strip("│ ").split()) for line in text.splitlines()]
    assert {"grad norm 0.500 LR 2e-4", "speed 4 samples/s 400 tokens/s"} <= set(lines)
    assert "step 13/39  epoch 1.30  loss 1.0000" in text


def test_the_panel_has_the_best_validation_the_real_memory_and_restarts(terminal):
    with Display(terminal) as display:
        display.start(FACTS, first_step=19, restarts=2)
        display.step(STEP)
        display.record(train_record(20, 1.0))
        display.record(evaluation(20, 0.91), best=True)
        display.record(evaluation(30, 0.93))
        terminal.truncate(0)
        display._live.refresh()
    lines = [" ".join(line.strip("│ ").split()) for line in plain(terminal.getvalue()).splitlines()]
    assert "validation 0.9300 ★ best 0.9100 at step 20" in lines
    assert "memory 6.10 GB active and cached 5.40 GB at most" in lines
    assert "restarts 2" in lines


def test_the_small_curve_goes_from_highest_to_lowest_and_keeps_to_its_width():
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, math.nan, 1.0]) == "▁▁"
    assert sparkline([float(n) for n in range(960)])[::47] == "▁█"
    assert len(sparkline([1.0] * 961)) <= 48


def test_an_answer_is_a_line_and_a_long_one_is_cut(capsys):
    with Display() as display:
        display.sample(Sample(step=1, prompt="Why?", answer="Because\n\nit is.", stopped=True))
        display.sample(Sample(step=1, prompt="Why?", answer="no " * 1000, stopped=False))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "  Why? → Because it is."
    assert second.endswith("no n …")
    assert len(second) < 450


def test_quiet_shows_nothing(capsys):
    with Display(quiet=True) as display:
        start(display)
        display.record(evaluation(0, 1.0))
        display.note("something")
    assert capsys.readouterr() == ("", "")


def test_the_time_left_is_that_of_the_latest_steps(terminal, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    display = Display(terminal)
    start(display, steps=100)
    for number in range(1, 31):
        now += 50.0 if number <= 10 else 3.0  # the first steps are slow
        display.step(STEP)
    assert display._training.seconds_left == 70 * 3.0


def test_tasks_show_a_bar_or_a_spinner_while_they_last(terminal):
    with Display(terminal) as display:
        with display.task("Tokenising", 200) as advance:
            advance(50)
            display._live.refresh()
        with display.task("Loading the model"):
            display._live.refresh()
        before = len(terminal.getvalue())
        display._live.refresh()
        after = plain(terminal.getvalue()[before:])
    text = plain(terminal.getvalue())
    assert "50/200" in text
    assert "Loading the model" in text
    assert "Loading" not in after


def test_a_task_without_a_terminal_is_announced_and_then_told_of_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Display() as display, display.task("Tokenising", 1000) as advance:
        for _ in range(10):
            now += 4.0
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "Tokenising …",
        "Tokenising: 400 of 1,000, 16.0 s",
        "Tokenising: 800 of 1,000, 32.0 s",
    ]


def test_evaluations_while_training_leave_no_lines_of_their_own(capsys):
    with Display() as display:
        start(display)
        with display.task("Evaluating", 5) as advance:
            advance(5)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_task_ends_with_an_exception_too(terminal):
    with Display(terminal) as display:
        with pytest.raises(ZeroDivisionError), display.task("Loading"):
            raise ZeroDivisionError
        assert display._bars.tasks == []


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Display(terminal) as display:
        start(display)
        display.step(STEP)
        display.record(train_record(1, 1.0))
    assert "\x1b[" not in re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert len(terminal.getvalue().splitlines()) == 2


def test_a_resumed_run_goes_on_counting(terminal):
    with Display(terminal) as display:
        start(display, steps=40, first_step=30)
        display.step(STEP)
        display._live.refresh()
    assert "31/40" in plain(terminal.getvalue())


TRAINING = """
import sys
from mlx_tuner.runs.metrics import EvalRecord
from mlx_tuner.show.progress import Display
with Display() as display:
    for number in range(2000):
        display.record(EvalRecord(step=number, epoch=0.5, val_loss=1.0))
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path):
    done = tmp_path / "done"
    command = [sys.executable, "-c", TRAINING, str(done)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        process.stderr.readline()
        process.stderr.close()
    assert process.returncode == 0
    assert done.read_text() == "went on"


@pytest.mark.slow
def test_a_closed_terminal_does_not_stop_the_run(tmp_path):
    done = tmp_path / "done"
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", TRAINING, str(done)]
    with subprocess.Popen(command, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        os.read(ours, 10)
        os.close(ours)
    assert process.returncode == 0
    assert done.read_text() == "went on"
