"""`mlx-tune data` is judged by numbers that transformers, Python or a hand worked out."""

from __future__ import annotations

import io
import json
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer

from mlx_tuner.cli import main
from mlx_tuner.commands import data_report
from mlx_tuner.commands.inspect_data import Inspection, inspect
from mlx_tuner.data.survey import histogram
from mlx_tuner.models.model import load_tokenizer, resolve
from mlx_tuner.recipe.load import recipe_for
from mlx_tuner.show.progress import Display
from mlx_tuner.training.assembly import open_data

ROWS: list[dict[str, Any]] = [
    {"prompt": "Add 1 and 2", "completion": "3"},
    {"prompt": "Say hello\n\nin French", "completion": "Bonjour ! " * 9},
    {"prompt": "Add 1 and 2", "completion": "It is 3."},
]


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Any:
    return AutoTokenizer.from_pretrained(root / "mlx_tuner" / "builtin" / "tiny-qwen")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def look(file: Path, *overrides: str, show: int = 0, **named: Any) -> Inspection:
    named = {"recipe": None, "model": None, "valid": None} | named
    recipe = recipe_for(str(file), overrides=overrides, **named)
    with Display() as display:
        return inspect(recipe, display, show=show)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def ids_of(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def targets_of(tokenizer: Any, row: dict[str, Any]) -> int:
    return len(tokenizer.encode(row["completion"])) + 1


# --- Counts -------------------------------------------------------------------------------------


def test_rows_forms_tokens_and_steps_are_those_of_transformers(file: Path, tokenizer: Any) -> None:
    found = look(file, "train.batch_size=2")
    lengths = [len(ids_of(tokenizer, row)) for row in ROWS]
    assert found.train.rows == found.train.usable_rows == 3
    assert found.train.forms == {"prompt": 3}
    assert found.train.lengths.tolist() == lengths
    assert found.train.dataset.tokens == sum(lengths)
    assert found.train.dataset.target_tokens == sum(targets_of(tokenizer, row) for row in ROWS)
    assert found.steps_per_epoch == 2
    assert found.fault_count == 0


def test_the_prefix_that_all_rows_share_is_the_longest_one(file: Path, tokenizer: Any) -> None:
    columns = zip(*(ids_of(tokenizer, row) for row in ROWS), strict=False)
    prefix = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
    found = look(file)
    assert found.train.dataset.survey.prefix.tolist() == prefix
    assert found.train.prefix_text == tokenizer.decode(prefix)


def test_percentiles_are_lengths_that_rows_have(tmp_path: Path) -> None:
    rows = [{"text": "a " * count} for count in range(1, 21)]
    train = look(write(tmp_path / "rows.jsonl", rows)).train
    lengths = sorted(train.lengths.tolist())
    assert [train.percentile(p) for p in (50, 95, 100)] == [lengths[9], lengths[18], lengths[19]]


def test_truncation_is_counted_row_by_row(file: Path, tokenizer: Any) -> None:
    lengths = [len(ids_of(tokenizer, row)) for row in ROWS]
    limit = sorted(lengths)[1]
    found = look(file, f"data.max_seq_length={limit}")
    survey = found.train.dataset.survey
    assert (survey.truncated_rows, survey.truncated_tokens) == (1, max(lengths) - limit)
    assert found.train.dataset.tokens == sum(lengths) - survey.truncated_tokens
    assert found.train.lengths.tolist() == lengths
    assert found.fault_count == 0
    (note,) = (note for note in found.notes() if "lost" in note)
    assert f"data.max_seq_length = {max(lengths)} keeps all" in note


def test_rows_too_long_are_skipped_or_refused_by_policy(file: Path, tokenizer: Any) -> None:
    limit = sorted(len(ids_of(tokenizer, row)) for row in ROWS)[1]
    settings = f"data.max_seq_length={limit}"
    skipped = look(file, settings, "data.on_long_row=skip")
    assert (skipped.train.usable_rows, skipped.train.problems["too long"]) == (2, 1)
    assert skipped.fault_count == 0
    refused = look(file, settings, "data.on_long_row=error")
    (fault,) = refused.faults
    assert fault.where == f"{file}:2"
    assert f"more than data.max_seq_length = {limit}" in fault.what


def test_rows_without_targets_are_refused_or_skipped_by_policy(tmp_path: Path) -> None:
    long_question = {"prompt": "why? " * 200, "completion": "so"}
    file = write(tmp_path / "rows.jsonl", [*ROWS, long_question])
    refused = look(file, "data.max_seq_length=150")
    assert refused.train.problems["without a target"] == 1
    assert [str(fault).startswith(f"{file}:4: no target") for fault in refused.faults] == [True]
    skipped = look(file, "data.max_seq_length=150", "data.on_bad_row=skip")
    assert (skipped.train.usable_rows, skipped.fault_count) == (3, 0)


def test_a_fraction_is_held_out_by_content(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(400)] * 2
    found = look(write(tmp_path / "rows.jsonl", rows), valid="0.25")
    assert 120 < found.train.held_out_rows < 280
    assert found.train.held_out_rows % 2 == 0  # equal rows are on the same side
    assert found.train_rows == 800 - found.train.held_out_rows


def test_a_fraction_that_leaves_a_side_empty_is_refused(file: Path) -> None:
    (fault,) = look(file, valid="1e-9").faults
    assert (fault.where, fault.field) == (str(file), "data.valid")
    assert "leaves no row for validation" in fault.what


def test_what_is_reported_is_what_a_run_would_open(file: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n % 17}", "completion": "so " * n} for n in range(90)]
    file = write(tmp_path / "many.jsonl", [*rows, {"prompt": ""}])
    overrides = ("data.on_bad_row=skip", "data.max_seq_length=80", "data.on_long_row=skip")
    found = look(file, *overrides, valid="0.3")
    recipe = recipe_for(str(file), recipe=None, model=None, valid="0.3", overrides=overrides)
    opened = open_data(recipe, load_tokenizer(resolve("builtin:tiny-qwen")))
    assert opened.valid is not None
    assert (found.train_rows, found.train.held_out_rows) == (len(opened.train), len(opened.valid))
    parts = (opened.train, opened.valid)
    assert found.train.dataset.tokens == sum(part.tokens for part in parts)
    assert found.train.dataset.target_tokens == sum(part.target_tokens for part in parts)
    counts = opened.train.left_out.counts
    assert found.train.problems["too long"] == counts["too long"] > 9
    assert found.train.bad_rows == counts["cannot be read"]


def test_duplicates_are_named_by_their_lines_however_they_are_written(tmp_path: Path) -> None:
    again = {"id": 7, "completion": "3", "tools": None, "prompt": "Add 1 and 2"}
    file = tmp_path / "rows.jsonl"
    lines = [ROWS[0], ROWS[1], None, again, ROWS[2], ROWS[1], ROWS[0]]
    file.write_text("".join(f"{json.dumps(row) if row else ''}\n" for row in lines))
    found = look(file)
    assert found.repeats.rows == 3
    assert found.repeats.lines == [(4, 1), (6, 2), (7, 1)]


def test_validation_rows_that_are_trained_on_are_named(file: Path, tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", [{**ROWS[0], "prompt": "x"}, ROWS[2], ROWS[0]])
    found = look(file, valid=str(valid))
    assert found.leaks is not None
    assert found.leaks.lines == [(2, 3), (3, 1)]
    assert any(f"2 rows of {valid}" in note for note in found.notes())
    assert found.valid is not None
    assert found.valid.rows == 3


def test_a_row_of_another_form_than_the_first_is_refused(tmp_path: Path) -> None:
    found = look(write(tmp_path / "rows.jsonl", [ROWS[0], {"text": "a"}]))
    (fault,) = found.faults
    assert fault.where.endswith("rows.jsonl:2")
    assert "a `text` row, but the rows before it are `prompt` rows" in fault.what
    assert found.train.forms == {"prompt": 1}


def test_faults_of_the_validation_file_count_as_well(file: Path, tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", [{"text": ""}])
    assert [fault.where for fault in look(file, valid=str(valid)).faults] == [f"{valid}:1"]


def test_notes_say_what_to_look_at(tmp_path: Path) -> None:
    rows = [
        {"prompt": "plain", "completion": "answer"},
        {"prompt": "Say <|im_end|><|im_start|>", "completion": "", "id": 1, "source": "web"},
    ]
    notes = "\n".join(look(write(tmp_path / "rows.jsonl", rows)).notes())
    assert "1 row with 2 control tokens in its content, which are taken as text" in notes
    assert "1 row with an empty answer" in notes
    assert "id (1), source (1)" in notes
    assert "2 rows, fewer than train.batch_size = 8: one step an epoch" in notes


# --- The recipe's eyes --------------------------------------------------------------------------


def test_a_recipe_decides_and_the_command_line_has_the_last_word(
    file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[model]\npath = "some/model"\n[data]\ntrain = "elsewhere.jsonl"\nlimit = 2\n'
        'system_prompt = "Be brief."\n[train]\nepochs = 1\nbatch_size = 4\n'
    )
    found = look(file, "train.batch_size=1", recipe=recipe, model="builtin:tiny-qwen", show=9)
    assert (found.train.rows, found.steps_per_epoch) == (2, 2)
    assert all("Be brief." in row.parts[0][0] for row in found.train.shown)


def test_a_file_may_be_called_like_a_number_or_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("true", "12", 'a "b" c', "[x]"):
        write(tmp_path / name, ROWS)
        assert look(Path(name)).train.rows == 3


# --- Output -------------------------------------------------------------------------------------


def test_shown_rows_are_the_models_text_with_targets_in_brackets(file: Path) -> None:
    result = command(file, "--show", 1)
    assert result.exit_code == 0
    assert "line 1: " in result.stdout
    assert "<|im_start|>assistant" in result.stdout
    assert "⟦3<|im_end|>⟧" in result.stdout
    assert "line 2: " not in result.stdout


def test_a_file_below_the_current_folder_is_shown_as_it_was_typed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    shown = [line.split() for line in command(file.name).stdout.splitlines()]
    assert ["file", file.name] in shown
    assert json.loads(command(file.name, "--json").stdout)["file"] == str(file)


def test_on_a_terminal_targets_are_coloured_instead(file: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=80)
    console.print(data_report.report(look(file, show=1), colour=True))
    assert "\x1b[1;32m3<|im_end|>\x1b[0m" in stream.getvalue()
    assert "⟦" not in stream.getvalue()


def test_rows_cannot_steer_the_terminal(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"prompt": "a\x1b[2J", "completion": "b\x07"}])
    result = command(file, "--show", 1)
    assert "a\\x1b[2J" in result.stdout
    assert not {"\x1b", "\x07"} & set(result.stdout)


def test_json_is_one_object_and_nothing_else(file: Path) -> None:
    result = command(file, "--json", "--show", "2")
    found = json.loads(result.stdout)
    assert (found["rows"], found["forms"], found["faults"]) == (3, {"prompt": 3}, [])
    assert sum(part["rows"] for part in found["lengths"]["histogram"]) == 3
    assert [row["line"] for row in found["shown"]] == [1, 2]
    assert found["steps_per_epoch"] == 1


def test_the_built_in_tokenizer_says_so(file: Path) -> None:
    assert "builtin:tiny-qwen (name your model with --model" in command(file).stdout


def test_a_plot_is_written_and_nothing_else(file: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "lengths.png"
    assert command(file, "--plot", plot).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "plots"}


def test_faults_are_listed_twenty_at_once_after_the_report(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [*ROWS, *({"text": ""} for _ in range(1_300))])
    result = command(file)
    assert result.exit_code == 1
    assert "1,303 (3 prompt); 1,300 cannot be trained on" in result.stdout
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("mlx-tune: error: ")]
    assert errors[0].startswith(f"mlx-tune: error: {file}:4: text: empty; ")
    assert len(errors) == 20
    more = "1,300 rows like these; correct them, or let the recipe skip them"
    assert errors[-1] == f"mlx-tune: error: {file}: {more}"


# --- The histogram ------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=60))
def test_a_histogram_holds_every_row_in_ranges_that_adjoin(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths, np.int32))
    assert sum(rows for *_, rows in bins) == len(lengths)
    assert bins[0][2] > 0
    assert bins[-1][1] >= max(lengths)
    assert 1 <= len(bins) <= 13
    assert all(last + 1 == first for (_, last, _), (first, *_) in pairwise(bins))
    for first, last, rows in bins:
        assert rows == sum(first <= length <= last for length in lengths)


def test_one_long_row_does_not_flatten_the_histogram() -> None:
    bins = histogram(np.array([*range(1, 101), 9_000], np.int32))
    assert len(bins) > 6
    assert bins[-1][1:] == (9_000, 1)
