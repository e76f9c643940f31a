"""Rows are found where a plain reader finds them, whatever the file looks like."""

import gzip
import json
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples

from mlx_tuner.data import sources
from mlx_tuner.data.scan import RowFile
from mlx_tuner.data.sources import Source
from mlx_tuner.errors import DataError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "mlx-tune"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and rows of a few bytes, so that a small file has every border."""

    def use(size: int, row: int = 1 << 20) -> None:
        monkeypatch.setattr(sources, "_BLOCK_BYTES", size)
        monkeypatch.setattr(sources, "MAX_ROW_BYTES", row)

    return use


def open_rows(path: Path, **options) -> RowFile:
    return RowFile(Source(path), **options)


def write(folder: Path, content: bytes | str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def all_rows(rows: RowFile) -> list[tuple[int, bytes]]:
    return [(rows.line(i), rows[i]) for i in range(len(rows))]


def refused(path: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_rows(path, **options)
    (fault,) = caught.value.faults
    assert fault.where.startswith(str(path))
    return str(fault).removeprefix(str(path))


# --- Lines --------------------------------------------------------------------------------------


def test_rows_are_the_lines_with_their_numbers(tmp_path):
    rows = open_rows(write(tmp_path, '{"a": 1}\n{"b": 2}\n'))
    assert all_rows(rows) == [(1, b'{"a": 1}'), (2, b'{"b": 2}')]
    assert rows.where(1) == f"{tmp_path}/rows.jsonl:2"


@pytest.mark.parametrize(
    "content",
    ["1\n2\n3", "1\r\n2\r\n3\r\n", "\ufeff1\n2\n3\n", "1\n2\n3\n\n\n", "  1\t\n2 \n\t3"],
)
def test_line_ends_blanks_at_the_end_space_and_a_mark_at_the_start_do_not_matter(tmp_path, content):
    rows = open_rows(write(tmp_path, content))
    assert all_rows(rows) == [(1, b"1"), (2, b"2"), (3, b"3")]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    rows = open_rows(write(tmp_path, "\n1\n \t\r\n\n2\n3\n"))
    assert all_rows(rows) == [(2, b"1"), (5, b"2"), (6, b"3")]


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path):
    content = "\u2028\u2029\x85\x0b\x0c".encode()
    assert open_rows(write(tmp_path, b"1" + content + b"\n2\n"))[0] == b"1" + content


@settings(max_examples=examples(80))
@given(
    lines=st.lists(st.text('ab{}[]",\\ \t\r\u2028', max_size=9), max_size=12),
    block=st.integers(1, 40),
    ends_with_newline=st.booleans(),
)
def test_any_lines_are_found_as_a_plain_reader_finds_them(
    tmp_path_factory, lines, block, ends_with_newline
):
    content = "\n".join(lines) + "\n" * ends_with_newline
    expected = [
        (number, line.strip(" \t\r").encode())
        for number, line in enumerate(content.split("\n"), 1)
        if line.strip(" \t\r")
    ]
    path = write(tmp_path_factory.mktemp("rows"), content)
    if not expected or expected[0][1].startswith(b"["):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BLOCK_BYTES", block)
        rows = open_rows(path)
        assert all_rows(rows) == expected
        for limit in range(1, len(expected)):
            assert all_rows(open_rows(path, limit=limit)) == expected[:limit]


# --- Arrays -------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\,[]{}:\n\u00e9\U0001f600'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\,]'), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=examples(80))
@given(
    values=st.lists(JSON_VALUES, min_size=1, max_size=6),
    block=st.integers(1, 60),
    indent=st.sampled_from([None, 0, 1, 2]),
    ascii_only=st.booleans(),
    before=st.sampled_from(["", "\ufeff", " \n\t\r\n"]),
)
def test_any_array_is_cut_at_its_elements(
    tmp_path_factory, values, block, indent, ascii_only, before
):
    content = before + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n"
    path = write(tmp_path_factory.mktemp("rows"), content, "rows.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BLOCK_BYTES", block)
        rows = open_rows(path)
        assert [json.loads(rows[i]) for i in range(len(rows))] == values
        for limit in range(1, len(values)):
            assert all_rows(open_rows(path, limit=limit)) == all_rows(rows)[:limit]
    lines = content.split("\n")
    for i in range(len(rows)):
        first_line = rows[i].split(b"\n")[0].decode()
        assert first_line in lines[rows.line(i) - 1]


def test_the_lines_of_an_array_are_those_where_its_elements_begin(tmp_path):
    content = '\n[{"a": 1}, {"b":\n2},\n\n  {"c": 3}\n,\n4]'
    rows = open_rows(write(tmp_path, content, "rows.json"))
    assert [rows.line(i) for i in range(4)] == [2, 2, 5, 7]


def test_real_rows_as_an_array_are_the_same_as_by_line(shared):
    array = open_rows(shared / "codealpaca" / "code_alpaca.json")
    lines = open_rows(shared / "codealpaca" / "train.jsonl")
    assert len(array) == 1500
    for i in range(1400):
        assert json.loads(array[i]) == json.loads(lines[i])
    assert [array.line(i) for i in range(3)] == [2, 7, 12]


def test_objects_by_line_in_a_file_named_json_are_rows(tmp_path):
    assert len(open_rows(write(tmp_path, '{"a": 1}\n{"b": 2}\n', "rows.json"))) == 2


def test_an_array_that_is_cut_short_is_refused_at_its_last_row(tmp_path):
    content = '[{"a": 1},\n{"b": 2},\n{"c": "x'
    assert refused(write(tmp_path, content, "rows.json")).startswith(":3: the array is not closed")


def test_a_number_of_any_length_is_left_to_whoever_reads_its_row(tmp_path):
    """Here in an array that is broken later, which Python's parser is to find."""
    digits = "1" * 5_000
    content = f'[{{"text": "a", "x": {digits}}},\n{{"text": NaN}},\n]'
    path = write(tmp_path, content, "rows.json")
    assert refused(path) == ":3: column 1: a trailing comma before ]; remove it"


def test_text_after_an_array_is_refused(tmp_path):
    assert refused(write(tmp_path, "[1]\n\n[2]\n")).startswith(
        ":3: more text after the array's end"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("[1,,2]", ":1: column 4: broken JSON: expecting value"),
        ("[1,\n2,]", ":2: column 3: a trailing comma before ]"),
        ("[1\n2]", ":2: broken JSON: a comma or ] is missing"),
        ('[{"a": 1},\n{"b": oops}]', ":2: column 7: broken JSON: expecting value"),
        ('[1,\n"\x01"]', ":2: column 2: a raw control character"),
        ("[" * 100_000, ":1: nested more than 100 deep"),
    ],
)
def test_a_broken_array_is_refused_where_it_breaks(tmp_path, content, what):
    assert refused(write(tmp_path, content, "rows.json")).startswith(what)


def test_an_array_that_is_not_utf8_is_refused_at_its_byte(tmp_path):
    content = b'[{"text": "a"},\n{"text": "\xff"}]'
    assert open_rows(write(tmp_path, content, "rows.json")).bad.tolist() == [1]
    broken = write(tmp_path, content[:-1], "rows.json")
    assert refused(broken).startswith(":2: byte 27: not UTF-8 (0xff)")


def test_elements_that_only_python_takes_are_rows_to_be_refused_by_name(tmp_path):
    content = '\ufeff[{"text": "é"},\n{"text": NaN}, {"text": "\\ud800"},\n {"text": "ü"}]'
    rows = open_rows(write(tmp_path, content, "rows.json"))
    assert rows.bad.tolist() == [1, 2]
    assert [rows.line(i) for i in range(4)] == [1, 2, 2, 3]
    assert [rows[i].decode() for i in (0, 1, 3)] == [
        '{"text": "é"}',
        '{"text": NaN}',
        '{"text": "ü"}',
    ]
    assert "NaN is not JSON" in str(rows.faults(1)[0])


# --- What is no file of rows ----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf", b"[]", b"\n[ \n]\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    assert refused(write(tmp_path, content, "rows.json")).startswith(": no rows")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"PK\x03\x04....", "zip archive"),
        (b"PAR1......", "Parquet"),
        (b"ARROW1\0\0", "Arrow"),
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-be"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, content, named):
    assert named in refused(write(tmp_path, content))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe or device" in refused(tmp_path / "pipe.jsonl")
    assert "pipe or device" in refused(Path("/dev/null"))
    assert "a folder" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "absent.jsonl")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "1\n")
    path.chmod(0)
    if os.access(path, os.R_OK):  # The superuser may read anything.
        monkeypatch.setattr(os, "open", _raise(PermissionError(13, "Permission denied")))
    assert "permission denied; check its permissions" in refused(path)


def _raise(error: Exception):
    def function(*args: object, **named: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_a_row_that_is_too_long_is_refused_at_its_line(tmp_path, small_blocks, block):
    small_blocks(block, row=100)
    fits, too_long = "x" * 100, "x" * 101
    assert len(open_rows(write(tmp_path, f"1\n{fits}\n2\n{fits}"))) == 4
    assert refused(write(tmp_path, f"1\n\n{too_long}\n2")).startswith(":3: a row of more than")
    assert refused(write(tmp_path, f"1\n{too_long}")).startswith(":2: a row of more than")
    array = f'[1,\n\n"{too_long}",\n2]'
    assert refused(write(tmp_path, array, "a.json")).startswith(":3: a row of more than")


def test_nothing_is_read_on_behind_the_limit_of_a_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 34)  # 16 GiB of NULs that take no room.
        file.write(b'{"a": "')
    read = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        read.append(offset + size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert refused(path).startswith(":1: a row of more than 16 MiB")
    assert max(read) < 2 * sources.MAX_ROW_BYTES


# --- A file that changes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("3\n"),
        lambda path: os.truncate(path, 1),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.unlink(),
        lambda path: write(path.parent, "1\n2\n", "other").replace(path),
    ],
    ids=["rewritten", "cut", "touched", "removed", "replaced"],
)
def test_a_file_that_changes_while_in_use_is_noticed(tmp_path, change):
    rows = open_rows(write(tmp_path, "1\n2\n"))
    rows.source.check_unchanged()
    change(rows.path)
    with pytest.raises(DataError, match="changed while it was in use"):
        rows.source.check_unchanged()


def test_a_row_of_a_file_that_was_cut_short_is_not_read_as_a_shorter_one(tmp_path):
    rows = open_rows(write(tmp_path, "111111\n222222\n"))
    os.truncate(rows.path, 10)
    with pytest.raises(DataError, match="changed while it was in use"):
        rows[1]


def test_dropping_it_gives_the_descriptor_back(tmp_path):
    rows = Source(write(tmp_path, "1\n"))
    descriptor = rows._descriptor
    assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    del rows
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_rows_are_read_from_several_threads_at_once(tmp_path):
    count = 2000
    rows = open_rows(write(tmp_path, "".join(f"{i}\n" for i in range(count))))
    wrong = []

    def read(first: int) -> None:
        wrong.extend(i for i in range(first, count, 3) if int(rows[i]) != i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- Kept between runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
def test_gzipped_rows_are_unpacked_once(tmp_path, cache_folder, name):
    content = b"[1,\n2]" if ".json." in name or name.endswith(".json") else b"1\n2\n"
    packed = gzip.compress(content) if name.endswith(".gz") else content
    path = write(tmp_path, packed, name)
    for _ in range(2):
        assert all_rows(open_rows(path)) == [(1, b"1"), (2, b"2")]
    assert list(tmp_path.iterdir()) == [path]
    if not name.endswith(".gz"):
        assert not cache_folder.exists()
        return
    (plain,) = cache_folder.glob("*.rows")
    first = plain.stat().st_ino
    open_rows(path)
    assert plain.stat().st_ino == first
    path.write_bytes(gzip.compress(b"3\n"))
    assert all_rows(open_rows(path)) == [(1, b"3")]
    assert len(list(cache_folder.iterdir())) == 1


@pytest.mark.parametrize("content", [b"{}", gzip.compress(b"{}" * 99, mtime=0)[:-9]])
def test_a_damaged_gzip_is_refused_and_leaves_nothing(tmp_path, cache_folder, content):
    path = write(tmp_path, content, "rows.jsonl.gz")
    assert "damaged, or no gzip" in refused(path)
    assert not list(cache_folder.glob("*.rows"))


def test_a_gzip_bomb_stops_at_the_cap(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_UNPACKED_BYTES", 1 << 20)
    path = write(tmp_path, gzip.compress(b"\n" * (2 << 20)), "rows.jsonl.gz")
    assert "unpacks to more than there is room for" in refused(path)
    assert not list(cache_folder.iterdir())


# --- Parquet --------------------------------------------------------------------------------------


def table(folder: Path, rows: list[dict], name: str = "rows.parquet") -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


def test_parquet_rows_are_the_tables_rows_and_kept(tmp_path, cache_folder):
    chat = [{"role": "user", "content": "é\n"}, {"role": "assistant", "content": "b", "name": "x"}]
    rows = [
        {"messages": chat, "id": 1, "score": 0.5},
        {"messages": chat[1:], "id": 2, "score": None},
    ]
    path = table(tmp_path, rows)
    found = open_rows(path)
    without_nulls = [rows[0], {"messages": chat[1:], "id": 2}]
    assert [json.loads(found[i]) for i in range(len(found))] == without_nulls
    assert (found.form, found.line(1), len(found.bad)) == ("messages", 2, 0)
    (kept,) = cache_folder.iterdir()
    first = kept.stat().st_ino
    assert len(open_rows(path)) == 2
    assert kept.stat().st_ino == first
    table(tmp_path, rows * 2)
    assert len(open_rows(path)) == 4
    assert len(list(cache_folder.iterdir())) == 1


def test_parquet_that_is_damaged_is_refused(tmp_path, cache_folder):
    path = table(tmp_path, [{"text": "a"}])
    path.write_bytes(path.read_bytes()[:-9])
    assert "damaged, or no Parquet" in refused(path)
    assert not list(cache_folder.glob("*.rows"))


def test_without_pyarrow_parquet_says_how_to_get_it(tmp_path, monkeypatch):
    path = table(tmp_path, [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'mlx-lora-tuner[parquet]'" in refused(path)
