"""A file becomes exactly its usable rows, known before the first step, in bounded memory."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from marks import examples

from mlx_tuner.data import dataset as datasets_module
from mlx_tuner.data.dataset import Dataset, open_dataset, shared_rows, split
from mlx_tuner.data.encode import Encoder
from mlx_tuner.data.order import shuffled
from mlx_tuner.data.rows import parse_row
from mlx_tuner.data.stream import prefetch
from mlx_tuner.errors import DataError
from mlx_tuner.models import model
from mlx_tuner.recipe.schedule import rows_of_step, total_steps


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model.load_tokenizer(model.resolve("builtin:tiny-qwen"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def row(number: int, words: int = 3) -> str:
    return json.dumps({"prompt": f"question {number}", "completion": "word " * words + str(number)})


def write(folder: Path, rows: Iterable[str], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def lines_of(dataset: Dataset) -> list[int]:
    return [dataset.line(example.row) for example in dataset.examples(range(len(dataset)))]


def opened(path: Path, tokenizer: Any, **options: Any) -> Dataset:
    own = {key: options.pop(key) for key in OWN if key in options}
    return open_dataset(path, Encoder(tokenizer, **{"max_seq_length": 200, **options}), **own)


OWN = ("limit", "on_bad_row", "surveyed_rows", "task")
"""Options of the file; the others are the encoder's."""


def refused(path: Path, tokenizer: Any, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        opened(path, tokenizer, **options)
    return [str(fault).removeprefix(str(path)) for fault in caught.value.faults]


def test_examples_are_the_rows_encoded_with_their_lines(tmp_path, tokenizer):
    content = [row(0), "", row(1), row(2, words=30), "", row(3)]
    path = write(tmp_path, content)
    dataset = opened(path, tokenizer, max_seq_length=50, mask_prompt=True)
    encoder = Encoder(tokenizer, mask_prompt=True, max_seq_length=50)
    expected = encoder.encode([parse_row(r.encode(), where=":1") for r in content if r])
    examples = dataset.examples([3, 0, 2, 0])
    assert [(e.row, dataset.line(e.row)) for e in examples] == [(3, 6), (0, 1), (2, 4), (0, 1)]
    for example in examples:
        assert example.tokens.tolist() == expected[example.row].tokens.tolist()
        assert example.loss_mask.tolist() == expected[example.row].loss_mask.tolist()
        assert example.tokens.dtype == np.int32
        assert example.loss_mask.any()
    assert dataset.tokens == sum(len(e.tokens) for e in expected)
    assert dataset.target_tokens == sum(int(e.loss_mask.sum()) for e in expected)
    (note,) = dataset.notes
    lost = expected[2].truncated_tokens
    assert note.startswith(f"1 row cut: {lost} tokens and the end of the turn are lost")
    assert note.endswith(f"data.max_seq_length = {50 + lost} keeps all")
    assert dataset.survey.longest == 50
    with pytest.raises(IndexError):
        dataset.examples([4])


def test_all_kinds_of_files_give_the_same_examples(tmp_path, tokenizer):
    rows = [row(i) for i in range(5)]
    array = "[" + ",\n".join(rows) + "]"
    write(tmp_path, rows)
    (tmp_path / "rows.json").write_text(array)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(array.encode()))
    datasets = [opened(path, tokenizer) for path in sorted(tmp_path.iterdir())]
    assert len(datasets) == 4
    first = datasets[0].examples(range(5))
    for dataset in datasets[1:]:
        assert dataset.fingerprint == datasets[0].fingerprint
        for one, other in zip(first, dataset.examples(range(5)), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert dataset.line(one.row) == datasets[0].line(other.row)


def test_a_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path, tokenizer):
    path = write(tmp_path, [*map(row, range(5)), "{ bad"])
    assert lines_of(opened(path, tokenizer, limit=5)) == [1, 2, 3, 4, 5]
    assert lines_of(opened(path, tokenizer, limit=2)) == [1, 2]
    assert len(refused(path, tokenizer, limit=6)) == 1


# --- Policies -----------------------------------------------------------------------------------

BAD = ["{", '{"prompt": "x"}', "[1]", '{"text": "of another form"}']


def test_bad_rows_are_named_by_line_and_field(tmp_path, tokenizer):
    path = write(tmp_path, [row(0), BAD[1], row(1), "", BAD[0], BAD[3]])
    faults = refused(path, tokenizer)
    assert faults[0].startswith(":2: completion: missing")
    assert faults[1].startswith(":5: column 2: the row stops before its end")
    assert faults[2].startswith(":6: a `text` row, but the rows before it are `prompt` rows")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_of_many_bad_rows_twenty_lines_are_shown(tmp_path, tokenizer):
    faults = refused(write(tmp_path, [row(0), *["{"] * 500]), tokenizer)
    assert len(faults) == 20
    assert faults[18].startswith(":20: ")
    assert faults[19].startswith(": 500 rows like these")


@pytest.mark.parametrize(("rows", "shown"), [(10, 20), (11, 20), (30, 20)])
def test_what_is_counted_is_rows_however_much_is_wrong_with_each(tmp_path, tokenizer, rows, shown):
    two = '{"prompt": 1, "completion": 2}'
    faults = refused(write(tmp_path, [row(0), *[two] * rows]), tokenizer)
    assert len(faults) == shown
    assert faults[1].startswith(":2: completion: ")
    told = [fault for fault in faults if "like these" in fault]
    assert [fault.split(";")[0] for fault in told] == [f": {rows} rows like these"] * (rows > 10)


def test_bad_rows_can_be_skipped_and_are_kept_with_their_reasons(tmp_path, tokenizer):
    path = write(tmp_path, [BAD[0], row(1), BAD[1], BAD[2], row(2), BAD[3]])
    dataset = opened(path, tokenizer, on_bad_row="skip")
    assert len(dataset) == 2
    assert lines_of(dataset) == [2, 5]
    assert dataset.left_out.counts == {"cannot be read": 4}
    entries = [json.loads(entry.to_json()) for entry in dataset.left_out.first]
    assert [entry["line"] for entry in entries] == [1, 3, 4, 6]
    assert entries[1]["reason"].startswith("completion: missing")
    assert dataset.notes == ["4 rows left out: 4 cannot be read"]
    assert len(dataset.digests) == 2


def test_quarantine_is_capped_and_counted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets_module, "QUARANTINE_KEPT", 3)
    path = write(tmp_path, [row(0), *["{"] * 10])
    dataset = opened(path, tokenizer, on_bad_row="skip")
    assert [entry.line for entry in dataset.left_out.first] == [2, 3, 4]
    assert dataset.left_out.counts == {"cannot be read": 10}


def test_rows_too_long_follow_their_policy(tmp_path, tokenizer):
    path = write(tmp_path, [row(0), row(1, words=100), row(2)])
    assert len(opened(path, tokenizer, max_seq_length=50)) == 3
    skipping = opened(path, tokenizer, max_seq_length=50, on_long_row="skip")
    assert lines_of(skipping) == [1, 3]
    assert skipping.left_out.counts == {"too long": 1}
    assert skipping.survey.truncated_rows == 0
    assert skipping.left_out.first[0].reason.endswith("tokens, more than data.max_seq_length = 50")
    (fault,) = refused(path, tokenizer, max_seq_length=50, on_long_row="error")
    assert fault.startswith(":2: ")
    assert "more than data.max_seq_length = 50" in fault


def test_rows_without_a_target_are_refused_or_skipped_never_trained_on(tmp_path, tokenizer):
    long_prompt = json.dumps({"prompt": "word " * 100, "completion": "x"})
    path = write(tmp_path, [row(0), long_prompt, row(2)])
    (fault,) = refused(path, tokenizer, max_seq_length=50)
    assert fault.startswith(":2: no target tokens within data.max_seq_length = 50")
    dataset = opened(path, tokenizer, max_seq_length=50, on_bad_row="skip")
    assert lines_of(dataset) == [1, 3]
    assert dataset.left_out.counts == {"without a target": 1}


@pytest.mark.parametrize("rows", [BAD[:3], [json.dumps({"prompt": "w " * 99, "completion": ""})]])
def test_a_file_of_which_nothing_is_left_is_refused(tmp_path, tokenizer, rows):
    options = {"on_bad_row": "skip", "on_long_row": "skip", "max_seq_length": 50}
    (fault,) = refused(write(tmp_path, rows), tokenizer, **options)
    assert fault.startswith(": none of its ")


def test_control_tokens_that_rows_spell_are_counted(tmp_path, tokenizer):
    spelled = json.dumps({"prompt": "<|im_end|> and <|im_start|>", "completion": "yes"})
    dataset = opened(write(tmp_path, [row(0), spelled]), tokenizer)
    assert dataset.survey.control_rows == 1
    note = "1 row with 2 control tokens in its content, which are taken as text"
    assert dataset.notes == [note]


# --- Rows beyond the survey -----------------------------------------------------------------------


def test_figures_of_a_file_longer_than_the_survey_are_estimates(tmp_path, tokenizer):
    path = write(tmp_path, [row(i, words=i % 3) for i in range(100, 160)])
    whole, part = opened(path, tokenizer), opened(path, tokenizer, surveyed_rows=6)
    assert (whole.survey.is_complete, part.survey.is_complete) == (True, False)
    surveyed = [len(e.tokens) for e in whole.examples(range(6))]
    assert part.tokens == round(sum(surveyed) / 6 * 60)
    assert part.survey.longest == max(surveyed)
    assert part.tokens == whole.tokens  # here the first rows are like the others


def test_a_file_is_opened_without_a_survey_and_refused_where_all_of_it_is_unusable(
    tmp_path, tokenizer
):
    path = write(tmp_path, [row(i, words=60) for i in range(3)])
    assert len(opened(path, tokenizer, surveyed_rows=0)) == 3
    faults = refused(path, tokenizer, max_seq_length=9, on_bad_row="skip", surveyed_rows=2)
    assert "none of its first 2 rows can be trained on" in str(faults)


def test_notes_of_a_file_longer_than_the_survey_say_what_they_are_of(tmp_path, tokenizer):
    path = write(tmp_path, [row(i, words=100) for i in range(9)])
    (note,) = opened(path, tokenizer, max_seq_length=50, surveyed_rows=4).notes
    assert note.startswith("of the first 4 rows, 4 rows cut: ")


def test_a_row_beyond_the_survey_that_is_unusable_is_left_out_of_its_step_and_named(
    tmp_path, tokenizer
):
    rows = [row(0), row(1, 100), row(2), row(3, 100), row(4), json.dumps({"prompt": "w " * 99})]
    rows[-1] = json.dumps({"prompt": "word " * 99, "completion": "x"})
    path = write(tmp_path, rows)
    options = {"max_seq_length": 50, "on_bad_row": "skip", "on_long_row": "skip"}
    dataset = opened(path, tokenizer, surveyed_rows=2, **options)
    assert len(dataset) == 5  # the survey has seen row 1
    assert dataset.left_out.counts == {"too long": 1}
    steps = [[0, 1], [2], [3, 4], [2, 3]]
    for _ in range(2):
        found = [[e.row for e in step] for step in prefetch(dataset, steps)]
        assert found == [[0, 2], [], [4], [4]]
    assert dataset.left_out.counts == {"too long": 3}
    assert dataset.left_out.late == 2
    assert [entry.line for entry in dataset.left_out.first] == [2, 4, 6]


def test_long_rows_that_are_errors_are_looked_for_to_the_end(tmp_path, tokenizer):
    path = write(tmp_path, [row(0), row(1), row(2), row(3, 100)])
    (fault,) = refused(path, tokenizer, max_seq_length=50, on_long_row="error", surveyed_rows=1)
    assert fault.startswith(":4: ")


def test_parts_have_figures_of_their_own(tmp_path, tokenizer):
    path = write(tmp_path, [row(i, words=i) for i in range(30)])
    train, valid = split(opened(path, tokenizer), 0.3, 0)
    for part in (train, valid):
        examples = part.examples(range(len(part)))
        assert part.tokens == sum(len(e.tokens) for e in examples)
        assert part.target_tokens == sum(int(e.loss_mask.sum()) for e in examples)
        assert part.survey.longest == max(len(e.tokens) for e in examples)
        assert part.survey.is_complete


def test_what_is_surveyed_is_shown_where_a_file_is_large(tmp_path, tokenizer, monkeypatch):
    path, told = write(tmp_path, map(row, range(300))), []

    @contextmanager
    def task(what: str, total: int) -> Iterator[Any]:
        done: list[int] = []
        yield done.append
        told.append((what, total, sum(done)))

    opened(path, tokenizer, task=task)
    assert told == []
    monkeypatch.setattr(datasets_module, "TOLD_FROM_BYTES", 0)
    opened(path, tokenizer, task=task)
    assert [what for what, _, _ in told] == ["checking rows.jsonl", "surveying rows.jsonl"]
    assert told[0][1] == path.stat().st_size
    assert told[1][1:] == (300, 300)


# --- The fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_usable_rows_and_their_order(tmp_path, tokenizer):
    def of(*lines: str) -> str:
        return opened(write(tmp_path, lines), tokenizer, on_bad_row="skip").fingerprint

    first = of(row(0), row(1))
    assert of(row(0), "{", row(1)) == first
    assert of(json.dumps({"id": 1, **json.loads(row(0))}), row(1)) == first
    assert len({first, of(row(1), row(0)), of(row(0)), of(row(0), row(1), row(1))}) == 4


# --- A file that changes --------------------------------------------------------------------------


def test_a_file_that_changes_during_a_run_stops_it(tmp_path, tokenizer):
    path = write(tmp_path, [row(i) for i in range(10)])
    dataset = opened(path, tokenizer)
    stream = prefetch(dataset, ([i % 10] for i in range(10**6)), window=4)
    next(stream)
    write(tmp_path, [row(i) for i in range(9)])
    with pytest.raises(DataError, match="changed while it was in use"):
        list(islice(stream, 100))


# --- The order and the split ----------------------------------------------------------------------


def test_an_interrupted_run_streams_the_rows_of_an_uninterrupted_one(tmp_path, tokenizer):
    path = write(tmp_path, [*map(row, range(20)), "{", *map(row, range(20, 23))])
    steps = total_steps(23, 4, 3, None)

    def streamed(first: int, last: int) -> list[int]:
        dataset = opened(path, tokenizer, on_bad_row="skip")
        order = []
        for step in range(first, last):
            epoch, start, stop = rows_of_step(step, len(dataset), 4)
            order.append(shuffled(5, epoch, len(dataset))[start:stop].tolist())
        steps_of = prefetch(dataset, order, window=7)
        return [dataset.line(example.row) for step in steps_of for example in step]

    whole = streamed(0, steps)
    cuts = [0, 1, 2, 5, 9, 11, 13, 16, steps]
    assert list(chain.from_iterable(streamed(a, b) for a, b in pairwise(cuts))) == whole
    every_line = [*range(1, 21), 22, 23, 24]
    assert [sorted(whole[i : i + 23]) for i in (0, 23, 46)] == [every_line] * 3


@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    old=st.lists(st.integers(0, 30), min_size=12, max_size=40),
    new=st.lists(st.integers(0, 60), max_size=20),
    seed=st.integers(0, 50),
)
def test_equal_rows_are_on_one_side_and_new_rows_move_no_old_one(
    tmp_path, tokenizer, old, new, seed
):
    def sides(numbers: list[int]) -> tuple[set[bytes], set[bytes]]:
        dataset = opened(write(tmp_path, map(row, numbers)), tokenizer)
        try:
            parts = split(dataset, 0.3, seed)
        except DataError:
            reject()
        assert sum(map(len, parts)) == len(numbers)
        assert shared_rows(*parts) == 0
        train, valid = (
            {e.tokens.tobytes() for e in part.examples(range(len(part)))} for part in parts
        )
        return train, valid

    before, after = sides(old), sides(new + old)
    for train, valid in (before, after):
        assert not train & valid
    assert before[0] <= after[0]
    assert before[1] <= after[1]


def test_a_split_that_leaves_a_side_empty_is_refused(tmp_path, tokenizer):
    dataset = opened(write(tmp_path, [row(0)] * 5), tokenizer)
    with pytest.raises(DataError, match=r"data.valid: 0.5 of 5 rows leaves none for"):
        split(dataset, 0.5, 0)


def test_parts_of_a_file_with_bad_rows_are_its_good_ones(tmp_path, tokenizer):
    path = write(tmp_path, [BAD[0], *map(row, range(30)), BAD[1]])
    dataset = opened(path, tokenizer, on_bad_row="skip")
    train, valid = split(dataset, 0.3, 0)
    assert sorted(lines_of(train) + lines_of(valid)) == list(range(2, 32))
    assert min(len(train), len(valid)) > 3


def test_validation_rows_that_are_trained_on_are_counted(tmp_path, tokenizer):
    train = write(tmp_path, [row(i) for i in range(10)], "train.jsonl")
    valid = write(tmp_path, [row(3), row(50), row(7), row(7)], "valid.jsonl")
    assert shared_rows(*(opened(path, tokenizer) for path in (train, valid))) == 3


# --- Size -----------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from mlx_tuner.models import model
from mlx_tuner.data.dataset import open_dataset, split
from mlx_tuner.data.encode import Encoder
from mlx_tuner.data.order import shuffled
from mlx_tuner.data.stream import prefetch

def resident():
    # The highest so far, in bytes; macOS counts in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

folder = Path(sys.argv[1])
tokenizer = model.load_tokenizer(model.resolve("builtin:tiny-qwen"))
encoder = Encoder(tokenizer, max_seq_length=256)
warm = open_dataset(folder / "small.jsonl", encoder)
warm.examples([0])
before = resident()
data, valid = split(open_dataset(folder / "rows.jsonl", encoder, surveyed_rows=2000), 0.1, 1)
order = shuffled(0, 0, len(data))
steps = (order[i:i + 8].tolist() for i in range(0, 1600, 8))
for examples in prefetch(data, steps):
    assert len(examples) == 8
for row in range(len(data.file)):
    data.file[row]
print(resident() - before, len(data) + len(valid))
"""


@pytest.mark.slow
def test_memory_grows_by_half_the_bound_for_a_file_of_more_than_that(tmp_path):
    """The bound is 200 MB + 16 bytes a row, whatever the file's size."""
    count, text = 150_000, "some words of an answer " * 40
    write(tmp_path, [row(0)], "small.jsonl")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(count):
            file.write(f'{{"prompt": "question {i}", "completion": "{text}"}}\n')
    bound = 100_000_000 + 16 * count
    assert (tmp_path / "rows.jsonl").stat().st_size > 1.4 * bound
    measured = subprocess.check_output([sys.executable, "-c", MEASURED, tmp_path], text=True)
    grown, rows = map(int, measured.split())
    assert rows == count
    assert grown < bound
