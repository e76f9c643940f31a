"""All rows of a file are checked, in however many processes, and once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_tuner.data import check
from mlx_tuner.data.check import Checked
from mlx_tuner.data.index import RowFile, open_rows
from mlx_tuner.data.rows import parse_row
from mlx_tuner.errors import DataError, RunError

GOOD = {"prompt": "a question", "completion": "an answer"}


def lines(count: int, changed: dict[int, str] | None = None) -> str:
    rows = [json.dumps({**GOOD, "completion": f"answer {i}"}) for i in range(count)]
    for i, text in (changed or {}).items():
        rows[i] = text
    return "\n".join(rows) + "\n"


def opened(folder: Path, content: str, name: str = "rows.jsonl") -> RowFile:
    path = folder / name
    path.write_text(content)
    return open_rows(path, cache_dir=folder / "cache")


def checked(folder: Path, content: str, name: str = "rows.jsonl") -> Checked:
    return check.check(opened(folder, content, name), folder / "cache")


BAD = {3: "{", 7: '{"text": "of another form"}', 8: "[]", 40: '{"prompt": "a"}', 49: "\ufeff"}


@pytest.fixture
def in_processes(monkeypatch):
    """Rows are checked in two child processes, however few; never in this one."""
    monkeypatch.setattr(check, "SPLIT_FROM_BYTES", 0)
    monkeypatch.setattr(check, "_cores", lambda: 2)
    monkeypatch.setattr(check, "_check", None)


def test_rows_that_cannot_be_read_or_are_of_another_form_are_bad(tmp_path):
    result = checked(tmp_path, lines(50, BAD))
    assert result.form == "prompt"
    assert result.bad.tolist() == list(BAD)
    assert np.flatnonzero(result.digests == 0).tolist() == list(BAD)


def test_child_processes_find_the_same(tmp_path, monkeypatch, in_processes):
    in_children = checked(tmp_path, lines(50, BAD))
    monkeypatch.undo()
    here = checked(tmp_path, lines(50, BAD))
    assert in_children.bad.tolist() == here.bad.tolist()
    assert in_children.digests.tolist() == here.digests.tolist()


def test_a_large_file_goes_through_the_pipes_whole(tmp_path, in_processes):
    result = checked(tmp_path, lines(30_000, {29_999: "{"}))
    assert result.bad.tolist() == [29_999]
    assert np.count_nonzero(result.digests) == 29_999


def test_a_child_that_fails_costs_time_only(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SPLIT_FROM_BYTES", 0)
    monkeypatch.setattr(check, "_CHILD", "raise SystemExit(3)")
    assert checked(tmp_path, lines(50, BAD)).bad.tolist() == list(BAD)


def test_an_interrupt_that_reaches_the_children_ends_the_check(tmp_path, monkeypatch, in_processes):
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    monkeypatch.setattr(check, "_CHILD", stop)
    with pytest.raises(RunError, match="stopped by signal 2"):
        checked(tmp_path, lines(5))


def test_children_import_nothing_from_the_folder_they_are_started_in(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "_check", None)
    file = opened(tmp_path, lines(5))
    bad, digests = check._check_in_child(file, 0, 5, "prompt")
    assert (len(bad), len(digests)) == (0, 5)


def test_children_import_no_more_than_they_need():
    loaded = "import mlx_tuner.data.check, sys; print(*sys.modules)"
    names = subprocess.check_output([sys.executable, "-c", loaded], text=True).split()
    assert not {"mlx", "transformers", "tokenizers", "pydantic", "rich"} & set(names)


def test_a_file_without_a_good_row_is_bad_from_end_to_end(tmp_path):
    result = checked(tmp_path, "{\n[]\n1\n")
    assert result.form is None
    assert result.bad.tolist() == [0, 1, 2]


def test_faults_name_the_line_and_the_field(tmp_path):
    file = opened(tmp_path, "\n" + lines(50, BAD))
    found = [str(check.faults(file, row, "prompt")[0]) for row in (7, 8, 40)]
    path = file.path
    assert found[0].startswith(f"{path}:9: a `text` row, but the rows before it are `prompt` rows")
    assert found[1].startswith(f"{path}:10: an array, not an object")
    assert found[2].startswith(f"{path}:42: completion: missing")
    assert check.faults(file, 0, "prompt") == ()


def test_digests_and_fingerprint_are_of_the_content_not_of_its_spelling(tmp_path):
    first = checked(
        tmp_path, '{"prompt": "a", "completion": "é"}\n{"prompt": "b", "completion": ""}'
    )
    spelled = (
        '[{"completion":"\\u00e9", "prompt":"a", "id": 7},\n{"prompt": "b", "completion": ""}]'
    )
    second = checked(tmp_path, spelled, "rows.json")
    assert first.digests.tolist() == second.digests.tolist()
    assert first.fingerprint == second.fingerprint
    content = parse_row(b'{"prompt": "a", "completion": "\xc3\xa9"}', where=":1").content()
    assert first.digests[0] == check.digest(content)
    swapped = checked(
        tmp_path, '{"prompt": "b", "completion": ""}\n{"prompt": "a", "completion": "é"}'
    )
    assert swapped.fingerprint != first.fingerprint


def test_a_large_file_is_checked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "CACHED_FROM_BYTES", 0)
    first = checked(tmp_path, lines(50, BAD))
    file = open_rows(tmp_path / "rows.jsonl", cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(check, "_check", None)
        again = check.check(file, tmp_path / "cache")
        assert again.bad.tolist() == first.bad.tolist()
        assert again.fingerprint == first.fingerprint
        patch.setattr(check, "_rules", lambda: "others")
        with pytest.raises(TypeError, match="not callable"):
            check.check(file, tmp_path / "cache")
    assert checked(tmp_path, lines(50)).bad.tolist() == []


def test_a_file_that_changes_while_it_is_checked_is_refused(tmp_path, monkeypatch):
    file = opened(tmp_path, lines(5))
    file.path.write_text(lines(6))
    with pytest.raises(DataError, match="changed while it was in use"):
        check.check(file, tmp_path / "cache")
