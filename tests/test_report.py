"""report.py: the user's own report, by itself."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from run_records import summary_of, train_record, users_run, validated

from mlx_tuner.runs.metrics import EvalRecord
from mlx_tuner.show.report import report
from mlx_tuner.show.terminal import console

RUN = Path("adapters/codealpaca")


def text_of(records, width=100, run=RUN, **changes) -> str:
    out = Console(file=io.StringIO(), width=width)
    out.print(report(records, summary_of(records, **changes), run))
    return out.file.getvalue()


def test_the_users_table_is_there_digit_by_digit():
    text = text_of(users_run(), steps=39, epochs=3.0)
    rows = [line.split() for line in text.splitlines()]
    assert ["step", "epoch", "loss", "grad", "norm", "LR"] in rows
    assert ["10", "0.80", "1.1542", "0.619", "1.8e-4"] in rows
    assert ["20", "1.56", "0.9250", "0.611", "1.379e-4"] in rows
    assert ["30", "2.32", "0.7703", "0.410", "6.897e-5"] in rows


def test_a_run_of_one_epoch_compares_its_halves():
    text = " ".join(text_of(users_run(), epochs=1).split())
    assert "% lower (first half to last; average" in text


def test_everything_the_user_wrote_down_by_hand_is_there():
    text = " ".join(text_of(users_run(), steps=39, epochs=3.0).split())
    for part in (
        "codealpaca finished: 39 steps, 3 epochs, 3 min 24 s",
        "4,358,144 of 1,548,072,448 parameters trained (0.2815 %)",
        "1.1013 → 0.8060 26.8 % lower (first epoch to last; average 0.9498, last 0.7703)",
        "3 min 24 s: 39.4 s training, 10.0 s evaluating, 4.3 s saving",
        "16.4 s an epoch, 1.0 s a step",
        "6.1 samples/s, 0.99 steps/s, 742 tokens/s",
        "tokenisation 8,123 rows/s",
        "5.40 GB at most",
        # 10 × 100 rows × 39.375 s / 240 rows × 3 epochs = 492 s
        "ten times the rows (1,000), 3 epochs: about 8 min 12 s",
        # 240 rows / 39.375 s / 1.468
        "4.15 × as fast as PEFT on an M4 Pro: 1.468 samples/s, 3 min 24 s",
        "★ lowest 0.7703, step 30",
        "adapters/codealpaca/adapters.safetensors after the last step",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "changes", [{"recipe": "first"}, {"rows": 1000}, {"trainable_parameters": 1}]
)
def test_the_baseline_is_shown_for_the_same_work_only(changes):
    assert "PEFT" not in text_of(users_run(), **changes)


def test_the_best_evaluation_is_marked_in_table_and_chart():
    text = text_of(validated([1.0, 0.7, 0.9, 1.0], base=1.3))
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "0.00", "1.3000", "start"] in rows
    (best,) = [row for row in rows if row[-2:] == ["★", "best"]]
    assert best[:4] == ["20", "2.00", "1.0000", "0.7000"]
    assert "★ best 0.7000, step 20" in text
    assert sum(line.count("★") for line in text.splitlines() if "│" in line or "┤" in line) == 1
    assert "Overfitting since step 20" in " ".join(text.split())
    assert "the best by validation loss" in text


def test_a_long_trajectory_is_thinned_and_keeps_first_last_and_best():
    values = [1.0 + abs(i - 37) / 100 for i in range(1, 101)]
    text = text_of(validated(values, base=3.0))
    steps = [
        int(m[1].replace(",", "")) for m in re.finditer(r"(?m)^\s+([\d,]+)\s+\d+\.\d\d ", text)
    ]
    assert {0, 370, 1000} <= set(steps)
    assert len(steps) <= 22
    assert f"{len(steps)} of 101 lines; all of them are in metrics.jsonl" in text


def test_a_stopped_run_says_how_far_it_came_and_how_to_go_on():
    text = text_of(users_run(), run=Path("my runs/x"), status="stopped", total_steps=39)
    assert "codealpaca stopped: 30 of 39 steps" in text
    assert "mlx-tune run 'my runs/x'/recipe.toml --run-dir 'my runs/x' --resume" in text
    assert "--resume" not in text_of(users_run())


def test_steps_that_were_left_out_are_told():
    assert "2 steps left out" in text_of(users_run(), nonfinite_steps=2)


def test_restarts_are_told_where_there_were_any():
    assert "restarts" not in text_of(users_run())
    assert "restarts      3: training died" in text_of(users_run(), restarts=3)
    assert "left out" not in text_of(users_run())


def test_a_loss_that_rose_is_said_to_be_higher():
    records = [train_record(10, 1.0), train_record(20, 1.5)]
    assert "50.0 % higher" in text_of(records)


def test_a_run_without_log_lines_still_has_a_report():
    summary = summary_of(users_run(), first_loss=1.0, final_loss=1.0)
    out = Console(file=io.StringIO(), width=80)
    out.print(report([], summary, RUN))
    assert "codealpaca finished" in out.file.getvalue()
    out.print(report([EvalRecord(step=0, epoch=0.0, val_loss=1.0)], summary, RUN))
    out.print(report([train_record(10, float("nan"))] * 2, summary, RUN))


def test_names_are_text_and_not_markup():
    text = text_of(users_run(), run=Path("adapters/[bold]x"), model="org/[red]model", recipe="[b]")
    assert "adapters/[bold]x/adapters.safetensors" in text
    assert "org/[red]model" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_it_fits_the_terminal(width):
    text = text_of(validated([1.0, 0.7, 0.9, 1.0], base=1.3), width=width)
    assert max(map(len, text.splitlines())) <= width


def test_it_survives_an_ascii_locale():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    records = validated([1.0, 0.7, 0.9, 1.0], base=1.3)
    console(stream).print(report(records, summary_of(records), RUN))
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "* best" in text
    assert "?" not in text
