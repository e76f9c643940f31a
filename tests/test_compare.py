"""compare.py: runs side by side, whatever state they are in."""

import json
import math

import pytest
from click.testing import CliRunner
from run_records import begin, summary_of, train_record, users_run, validated

from mlx_tuner.cli import main
from mlx_tuner.commands.compare import compare, progression
from mlx_tuner.errors import RunError

RECIPE = (
    "[model]\npath = 'builtin:tiny-qwen'\n[data]\ntrain = 'gone.jsonl'\n"
    "[lora]\nrank = 8\n[train]\nepochs = 3\n"
)


def make_run(path, records, summary=None):
    with begin(path, RECIPE) as run:
        for record in records:
            run.append(record)
        if summary:
            run.write_summary(summary)
    return path


@pytest.fixture
def runs(tmp_path):
    """A finished run, one with validation, and one that was killed."""
    first = make_run(tmp_path / "codealpaca", users_run(), summary_of(users_run()))
    records = validated([1.0, 0.7, 0.9], base=1.3)
    second = make_run(
        tmp_path / "tuned|2",
        records,
        summary_of(records, rows=1000, rank=4, status="stopped early"),
    )
    return [first, second, make_run(tmp_path / "killed", users_run()[:2])]


def table(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("|").replace(r"\|", "¦").split("|") for line in markdown.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_finished_stopped_and_killed_runs_stand_side_by_side(runs):
    rows = table(compare(runs).to_markdown())
    assert rows[""] == ["codealpaca", "tuned¦2", "killed"]
    assert rows["status"] == ["finished", "stopped early", "interrupted"]
    assert rows["rows"] == ["100", "1,000", "–"]
    assert rows["rank"] == ["16", "4", "8"]  # the killed run's is its recipe's
    assert rows["steps"] == ["30", "30", "20"]
    assert rows["first log line's loss"] == ["1.1542", "2.0000", "1.1542"]
    assert rows["last log line's loss"] == ["0.7703", "0.6667", "0.9250"]
    assert rows["best validation loss"] == ["–", "0.7000 at step 20", "–"]
    assert rows["gradient norm"] == [
        "0.617 → 0.456, falling",
        "0.500 → 0.500, steady",
        "0.619 → 0.611, steady",
    ]
    assert rows["samples/s"] == ["6.1", "6.1", "6.1"]


def test_a_run_under_way_is_said_to_be_running(tmp_path):
    with begin(tmp_path / "now", RECIPE) as run:
        (facts,) = compare([run.path]).runs
        assert (facts.status, facts.steps, facts.samples_per_second) == ("running", 0, None)
        run.append(train_record(10, 1.0))
        assert compare([run.path]).runs[0].final_loss == 1.0


def test_every_column_of_the_table_is_as_wide_as_its_rule(runs):
    lines = compare(runs).to_markdown().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"|", "-", " "}


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / place / "first", users_run()) for place in ("a", "b")]
    names = [run.name for run in compare(paths).runs]
    assert names == [str(path) for path in paths]
    names = [run.name for run in compare([paths[0], paths[0]]).runs]
    assert names == [str(paths[0]), f"{paths[0]} (2)"]


@pytest.mark.parametrize(
    ("norms", "trend"),
    [
        ([math.nan], None),
        ([1.0, 0.5], "falling"),
        ([1.0, 1.05], "steady"),
        ([1, 1, 1.5, 2, 2, 2], "rising"),
    ],
)
def test_the_trend_of_the_gradient_norm_is_from_the_first_epoch_to_the_last(tmp_path, norms, trend):
    records = [train_record(n, 1.0, grad_norm=norm, epoch=n / 2) for n, norm in enumerate(norms, 1)]
    assert compare([make_run(tmp_path / "run", records)]).runs[0].grad_norm_trend == trend


def test_all_that_is_no_run_is_named_at_once(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (runs[0] / "metrics.jsonl").write_text("nonsense\n")
    (runs[2] / "recipe.toml").write_text("[model\n")
    with pytest.raises(RunError) as caught:
        compare([*runs, tmp_path / "gone", tmp_path / "empty"])
    assert caught.value.exit_code == 1
    wheres = [fault.where for fault in caught.value.faults]
    assert wheres[0] == f"{runs[0]}/metrics.jsonl:1"
    assert wheres[1].startswith(f"{runs[2]}/recipe.toml:1")
    assert wheres[2:] == [str(tmp_path / "gone"), str(tmp_path / "empty")]


def test_a_loss_that_is_not_finite_is_a_dash_and_null(tmp_path):
    path = make_run(tmp_path / "run", [train_record(1, math.nan)])
    comparison = compare([path])
    assert table(comparison.to_markdown())["first log line's loss"] == ["–"]
    json.dumps(comparison.to_json(), allow_nan=False)


def test_the_words_of_the_progression_agree_with_its_numbers(runs):
    names, rows = progression(compare(runs).runs)
    assert names == ["version", "dataset", "loss", "quality", "status"]
    # The first epoch has 10 steps of 1.1542 and 3 of 0.925, the last 3 of 0.925 and 10 of 0.7703.
    assert rows[0][2:] == ["1.1013 → 0.8060 (-26.8 %)", "no validation", "finished"]
    assert rows[1][3:] == ["rising, 0.7000", "stopped early"]


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_only_into_a_folder_that_is_given(
    runs, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    here = tmp_path / "here"
    monkeypatch.chdir(here)
    result = CliRunner().invoke(main, ["compare", *map(str, runs)])
    assert result.exit_code == 0, result.output
    assert table(result.stdout)["rank"] == ["16", "4", "8"]
    assert (result.stderr, list(here.iterdir())) == ("", [])
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["compare", "--json", *map(str, runs), "-o", str(out)])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["files"] == [str(out / "compare.html"), str(out / "compare.png")]
    assert [run["status"] for run in values["runs"]] == ["finished", "stopped early", "interrupted"]
    assert values["runs"][1]["best_step"] == 20
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "compare.html").read_text()
    for cell in ("1.1013 → 0.8060 (-26.8 %)", "rising, 0.7000", "0.617 → 0.456, falling"):
        assert f">{cell}</td>" in page


def test_the_command_without_runs_or_with_none_is_an_error(tmp_path):
    assert CliRunner().invoke(main, ["compare"]).exit_code == 2
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "gone")])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"mlx-tune: error: {tmp_path / 'gone'}: is not there; ")
