"""A file becomes exactly its usable rows, known before the first step, in bounded memory."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_tuner.data import dataset as datasets
from mlx_tuner.data.dataset import Dataset, open_dataset, shared_rows, split
from mlx_tuner.data.encode import Encoder
from mlx_tuner.data.order import Permutation
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


def refused(path: Path, tokenizer: Any, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_dataset(path, tokenizer, **{"max_seq_length": 200, **options})
    return [str(fault).removeprefix(str(path)) for fault in caught.value.faults]


def test_examples_are_the_rows_encoded_with_their_lines(tmp_path, tokenizer):
    content = [row(0), "", row(1), row(2, words=30), "", row(3)]
    path = write(tmp_path, content)
    dataset = open_dataset(path, tokenizer, max_seq_length=50, mask_prompt=True)
    encoder = Encoder(tokenizer, mask_prompt=True, max_seq_length=50)
    expected = encoder.encode([parse_row(r.encode(), where=":1") for r in content if r])
    examples = dataset.examples([3, 0, 2, 0])
    assert [(e.row, dataset.line(e.row)) for e in examples] == [(3, 6), (0, 1), (2, 4), (0, 1)]
    for example in examples:
        assert example.tokens.tolist() == expected[example.row].tokens.tolist()
        assert example.loss_mask.tolist() == expected[example.row].loss_mask.tolist()
        assert example.tokens.dtype == np.int32
        assert example.loss_mask.any()
    facts = dataset.facts
    assert facts.tokens == sum(len(e.tokens) for e in expected)
    assert facts.target_tokens == sum(int(e.loss_mask.sum()) for e in expected)
    assert (facts.truncated_rows, facts.truncated_tokens) == (1, expected[2].truncated_tokens)
    assert dataset.notes == [
        f"1 row cut short by {facts.truncated_tokens} tokens in all, the end of the turn among them"
    ]
    assert dataset.byte_lengths.argmax() == 2
    with pytest.raises(IndexError):
        dataset.examples([4])


def test_all_kinds_of_files_give_the_same_examples(tmp_path, tokenizer):
    rows = [row(i) for i in range(5)]
    array = "[" + ",\n".join(rows) + "]"
    write(tmp_path, rows)
    (tmp_path / "rows.json").write_text(array)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(array.encode()))
    opened = [
        open_dataset(path, tokenizer, max_seq_length=200) for path in sorted(tmp_path.iterdir())
    ]
    assert len(opened) == 4
    first = opened[0].examples(range(5))
    for dataset in opened[1:]:
        assert dataset.facts.fingerprint == opened[0].facts.fingerprint
        for one, other in zip(first, dataset.examples(range(5)), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert dataset.line(one.row) == opened[0].line(other.row)


def test_a_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path, tokenizer):
    path = write(tmp_path, [*map(row, range(5)), "{ bad"])
    assert lines_of(open_dataset(path, tokenizer, max_seq_length=200, limit=5)) == [1, 2, 3, 4, 5]
    assert lines_of(open_dataset(path, tokenizer, max_seq_length=200, limit=2)) == [1, 2]
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


def test_bad_rows_can_be_skipped_and_are_kept_with_their_reasons(tmp_path, tokenizer):
    path = write(tmp_path, [BAD[0], row(1), BAD[1], BAD[2], row(2), BAD[3]])
    dataset = open_dataset(path, tokenizer, max_seq_length=200, on_bad_row="skip")
    assert len(dataset) == 2
    assert lines_of(dataset) == [2, 5]
    assert dataset.facts.bad_rows == 4
    entries = [json.loads(entry.to_json()) for entry in dataset.quarantined]
    assert [entry["line"] for entry in entries] == [1, 3, 4, 6]
    assert entries[1]["reason"].startswith("completion: missing")
    assert dataset.notes == ["4 rows left out: 4 cannot be read"]
    assert len(dataset.byte_lengths) == len(dataset.digests) == 2


def test_quarantine_is_capped_and_counted(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "QUARANTINE_KEPT", 3)
    path = write(tmp_path, [row(0), *["{"] * 10])
    dataset = open_dataset(path, tokenizer, max_seq_length=200, on_bad_row="skip")
    assert [entry.line for entry in dataset.quarantined] == [2, 3, 4]
    assert dataset.facts.bad_rows == 10


def test_rows_too_long_follow_their_policy(tmp_path, tokenizer):
    path = write(tmp_path, [row(0), row(1, words=100), row(2)])
    assert len(open_dataset(path, tokenizer, max_seq_length=50)) == 3
    skipping = open_dataset(path, tokenizer, max_seq_length=50, on_long_row="skip")
    assert lines_of(skipping) == [1, 3]
    assert skipping.facts.long_rows == 1
    assert skipping.facts.truncated_rows == 0
    assert skipping.quarantined[0].reason.endswith("tokens, more than data.max_seq_length = 50")
    (fault,) = refused(path, tokenizer, max_seq_length=50, on_long_row="error")
    assert fault.startswith(":2: ")
    assert "more than data.max_seq_length = 50" in fault


def test_rows_without_a_target_are_refused_or_skipped_never_trained_on(tmp_path, tokenizer):
    long_prompt = json.dumps({"prompt": "word " * 100, "completion": "x"})
    path = write(tmp_path, [row(0), long_prompt, row(2)])
    (fault,) = refused(path, tokenizer, max_seq_length=50)
    assert fault.startswith(":2: no target tokens within data.max_seq_length = 50")
    dataset = open_dataset(path, tokenizer, max_seq_length=50, on_bad_row="skip")
    assert lines_of(dataset) == [1, 3]
    assert dataset.facts.no_target_rows == 1


@pytest.mark.parametrize("rows", [BAD[:3], [json.dumps({"prompt": "w " * 99, "completion": ""})]])
def test_a_file_of_which_nothing_is_left_is_refused(tmp_path, tokenizer, rows):
    options = {"on_bad_row": "skip", "on_long_row": "skip", "max_seq_length": 50}
    (fault,) = refused(write(tmp_path, rows), tokenizer, **options)
    assert fault.startswith(": none of its ")


def test_control_tokens_that_rows_spell_are_counted(tmp_path, tokenizer):
    spelled = json.dumps({"prompt": "<|im_end|> and <|im_start|>", "completion": "yes"})
    dataset = open_dataset(write(tmp_path, [row(0), spelled]), tokenizer, max_seq_length=200)
    assert dataset.facts.control_rows == 1
    assert dataset.notes == ["1 row with control tokens in the content: taken as text"]


# --- Files too large to encode before the first step --------------------------------------------


@pytest.fixture
def large(monkeypatch):
    """Any file is too large to be encoded whole; a template adds nothing to speak of."""

    def settle(bytes_of_rows: int) -> None:
        monkeypatch.setattr(datasets, "SETTLED_BYTES", bytes_of_rows)
        monkeypatch.setattr(datasets, "_TEMPLATE_TOKENS", 0)

    return settle


def test_of_a_large_file_only_rows_that_may_be_too_long_are_encoded(tmp_path, tokenizer, large):
    path = write(tmp_path, [row(0), row(1, 200), row(2, 20), row(3, 200), row(4)])
    large(2200)
    dataset = open_dataset(path, tokenizer, max_seq_length=200, on_long_row="skip")
    assert dataset.facts.encoded_rows == 2
    assert lines_of(dataset) == [1, 3, 5]


def test_beyond_the_budget_the_next_row_stands_in_for_one_that_is_unusable(
    tmp_path, tokenizer, large
):
    path = write(tmp_path, [row(0), row(1, 100), row(2, 100), row(3), row(4, 100)])
    large(0)
    dataset = open_dataset(path, tokenizer, max_seq_length=50, on_long_row="skip")
    assert len(dataset) == 5
    assert lines_of(dataset) == [1, 4, 4, 4, 1]
    assert dataset.replaced_rows == 4
    (faults, *_) = refused(path, tokenizer, max_seq_length=50, on_long_row="error")
    assert faults.startswith(":2: ")


def test_a_large_file_without_any_usable_row_is_refused_when_that_shows(tmp_path, tokenizer, large):
    path = write(tmp_path, [row(i, 100) for i in range(3)])
    large(0)
    dataset = open_dataset(path, tokenizer, max_seq_length=50, on_long_row="skip")
    with pytest.raises(DataError, match="none of its 3 rows can be trained on"):
        dataset.examples([0])


# --- A file that changes --------------------------------------------------------------------------


def test_a_file_that_changes_during_a_run_stops_it(tmp_path, tokenizer):
    path = write(tmp_path, [row(i) for i in range(10)])
    dataset = open_dataset(path, tokenizer, max_seq_length=200)
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
        dataset = open_dataset(path, tokenizer, max_seq_length=200, on_bad_row="skip")
        order = []
        for step in range(first, last):
            epoch, start, stop = rows_of_step(step, len(dataset), 4)
            order.append(Permutation(5, epoch, len(dataset)).slice(start, stop).tolist())
        steps_of = prefetch(dataset, order, window=7)
        return [dataset.line(example.row) for step in steps_of for example in step]

    whole = streamed(0, steps)
    cuts = [0, 1, 2, 5, 9, 11, 13, 16, steps]
    assert list(chain.from_iterable(streamed(a, b) for a, b in pairwise(cuts))) == whole
    every_line = [*range(1, 21), 22, 23, 24]
    assert [sorted(whole[i : i + 23]) for i in (0, 23, 46)] == [every_line] * 3


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    old=st.lists(st.integers(0, 30), min_size=12, max_size=40),
    new=st.lists(st.integers(0, 60), max_size=20),
    seed=st.integers(0, 50),
)
def test_equal_rows_are_on_one_side_and_new_rows_move_no_old_one(
    tmp_path, tokenizer, old, new, seed
):
    def sides(numbers: list[int]) -> tuple[set[bytes], set[bytes]] | None:
        dataset = open_dataset(write(tmp_path, map(row, numbers)), tokenizer, max_seq_length=200)
        try:
            parts = split(dataset, 0.3, seed)
        except DataError:
            return None
        assert sum(map(len, parts)) == len(numbers)
        assert shared_rows(*parts) == 0
        train, valid = (
            {e.tokens.tobytes() for e in part.examples(range(len(part)))} for part in parts
        )
        return train, valid

    before, after = sides(old), sides(new + old)
    for parts in (before, after):
        assert parts is None or not parts[0] & parts[1]
    if before and after:
        assert before[0] <= after[0]
        assert before[1] <= after[1]


def test_a_split_that_leaves_a_side_empty_is_refused(tmp_path, tokenizer):
    dataset = open_dataset(write(tmp_path, [row(0)] * 5), tokenizer, max_seq_length=200)
    with pytest.raises(DataError, match=r"data.valid: 0.5 of 5 rows leaves none for"):
        split(dataset, 0.5, 0)


def test_parts_of_a_file_with_bad_rows_are_its_good_ones(tmp_path, tokenizer):
    path = write(tmp_path, [BAD[0], *map(row, range(30)), BAD[1]])
    dataset = open_dataset(path, tokenizer, max_seq_length=200, on_bad_row="skip")
    train, valid = split(dataset, 0.3, 0)
    assert sorted(lines_of(train) + lines_of(valid)) == list(range(2, 32))
    assert min(len(train), len(valid)) > 3


def test_validation_rows_that_are_trained_on_are_counted(tmp_path, tokenizer):
    train = write(tmp_path, [row(i) for i in range(10)], "train.jsonl")
    valid = write(tmp_path, [row(3), row(50), row(7), row(7)], "valid.jsonl")
    opened = [open_dataset(path, tokenizer, max_seq_length=200) for path in (train, valid)]
    assert shared_rows(*opened) == 3


# --- Size -----------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
from mlx_tuner.models import model
from mlx_tuner.data.dataset import open_dataset, split
from mlx_tuner.data.order import Permutation
from mlx_tuner.data.stream import prefetch

def resident():
    # The highest so far, in bytes; macOS counts in bytes, Linux in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

folder = Path(sys.argv[1])
tokenizer = model.load_tokenizer(model.resolve("builtin:tiny-qwen"))
warm = open_dataset(folder / "small.jsonl", tokenizer, max_seq_length=256, cache_dir=folder)
warm.examples([0])
before = resident()
data, valid = split(
    open_dataset(folder / "rows.jsonl", tokenizer, max_seq_length=256, cache_dir=folder), 0.1, 1
)
order = Permutation(0, 0, len(data))
steps = (order.slice(i, i + 8).tolist() for i in range(0, 1600, 8))
for examples in prefetch(data, steps):
    assert len(examples) == 8
for row in data._file.scan(0, len(data._file)):
    pass
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
