"""All rows of a file are checked, found and hashed in one pass."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_tuner.data.rows import parse_row
from mlx_tuner.data.scan import RowFile
from mlx_tuner.data.sources import Source
from mlx_tuner.errors import DataError

GOOD = {"prompt": "a question", "completion": "an answer"}


def lines(count: int, changed: dict[int, str] | None = None) -> str:
    rows = [json.dumps({**GOOD, "completion": f"answer {i}"}) for i in range(count)]
    for i, text in (changed or {}).items():
        rows[i] = text
    return "\n".join(rows) + "\n"


def opened(folder: Path, content: str, name: str = "rows.jsonl") -> RowFile:
    path = folder / name
    path.write_text(content)
    return RowFile(Source(path))


BAD = {3: "{", 7: '{"text": "of another form"}', 8: "[]", 40: '{"prompt": "a"}', 49: "\ufeff"}


def test_rows_that_cannot_be_read_or_are_of_another_form_are_bad(tmp_path):
    file = opened(tmp_path, lines(50, BAD))
    assert file.form == "prompt"
    assert file.bad.tolist() == list(BAD)
    assert np.flatnonzero(file.digests == 0).tolist() == list(BAD)


def test_a_file_without_a_good_row_is_bad_from_end_to_end(tmp_path):
    file = opened(tmp_path, "{\n[]\n1\n")
    assert file.form is None
    assert file.bad.tolist() == [0, 1, 2]


def test_faults_name_the_line_and_the_field(tmp_path):
    file = opened(tmp_path, "\n" + lines(50, BAD))
    found = [str(file.faults(row)[0]) for row in (7, 8, 40)]
    path = file.path
    assert found[0].startswith(f"{path}:9: a `text` row, but the rows before it are `prompt` rows")
    assert found[1].startswith(f"{path}:10: an array, not an object")
    assert found[2].startswith(f"{path}:42: completion: missing")
    assert file.faults(0) == ()


def test_digests_are_of_the_content_not_of_its_spelling(tmp_path):
    first = opened(
        tmp_path, '{"prompt": "a", "completion": "é"}\n{"prompt": "b", "completion": ""}'
    )
    spelled = (
        '[{"completion":"\\u00e9", "prompt":"a", "id": 7},\n{"prompt": "b", "completion": ""}]'
    )
    second = opened(tmp_path, spelled, "rows.json")
    assert first.digests.tolist() == second.digests.tolist()
    content = parse_row(b'{"prompt": "a", "completion": "\xc3\xa9"}', where=":1").digest()
    assert first.digests[:1].tobytes() == content


def test_what_is_read_is_told_byte_by_byte(tmp_path):
    (tmp_path / "rows.jsonl").write_text(text := lines(30_000))
    told: list[int] = []
    file = RowFile(Source(tmp_path / "rows.jsonl"), advance=told.append)
    assert len(file) == 30_000
    assert len(told) == 3
    assert 0.6 * len(text) < sum(told) <= len(text)


def test_a_file_that_changes_while_it_is_checked_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(5))
    source = Source(tmp_path / "rows.jsonl")
    source.path.write_text(lines(6))
    with pytest.raises(DataError, match="changed while it was in use"):
        RowFile(source)
