"""Bad rows: none gets past, none ends in a traceback, none is silently changed."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_tuner.cli import main
from mlx_tuner.data.dataset import open_dataset
from mlx_tuner.data.encode import Encoder
from mlx_tuner.data.rows import ParsedRow, parse_row
from mlx_tuner.errors import DataError
from mlx_tuner.models import model

# --- Through the command line -------------------------------------------------------------------

GOOD = b'{"prompt": "2 + 2?", "completion": "4"}\n'


@dataclass(frozen=True)
class Outcome:
    """What `mlx-tune data` did."""

    code: int
    output: str
    errors: list[str]


Check = Callable[..., Outcome]


@pytest.fixture
def check(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Check:
    """Runs `mlx-tune data rows.jsonl …` in a folder, which it must leave as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(model, "load_tokenizer", cache(model.load_tokenizer))

    def run(*arguments: str, file: str = "rows.jsonl") -> Outcome:
        before = tree(tmp_path)
        result = CliRunner().invoke(main, ["data", str(tmp_path / file), *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert tree(tmp_path) == before
        assert "crash.log" not in result.stderr  # which holds what nobody foresaw
        prefix, folder = "mlx-tune: error: ", f"{tmp_path}/"
        lines = [line for line in result.stderr.splitlines() if line.startswith(prefix)]
        errors = [line.removeprefix(prefix).replace(folder, "") for line in lines]
        assert (result.exit_code == 0) == (not errors)
        return Outcome(result.exit_code, " ".join(result.stdout.split()), errors)

    return run


def tree(folder: Path) -> dict[str, Any]:
    """Every file below `folder`: its content, mode and time."""
    return {
        str(path): (path.read_bytes() if path.is_file() else None, path.stat().st_mode)
        for path in folder.rglob("*")
    }


NESTED = b"[" * 100_000

REFUSED: dict[str, tuple[bytes, str]] = {
    "19 broken JSON": (GOOD + b'{"prompt" "a"}\n', "rows.jsonl:2: column 11: broken JSON"),
    "19 two objects": (GOOD + GOOD[:-1] + GOOD, "rows.jsonl:2: column 40: more text after"),
    "19 trailing comma": (b'{"text": "a",}\n', "rows.jsonl:1: column 14: a trailing comma"),
    "20 truncated last line": (GOOD + GOOD[:-8], "rows.jsonl:2: column 22: the row stops before"),
    "21 BOM inside": (GOOD + b"\xef\xbb\xbf" + GOOD, "rows.jsonl:2: column 1: a byte order mark"),
    "22 bad UTF-8": (GOOD + b'{"text": "\xff"}', "rows.jsonl:2: byte 11: not UTF-8 (0xff)"),
    "23 UTF-16": (GOOD.decode().encode("utf-16"), "rows.jsonl: this is UTF-16; save it as UTF-8"),
    "23 UTF-16 without BOM": (GOOD.decode().encode("utf-16-le"), "rows.jsonl: this is UTF-16"),
    "24 control character": (b'{"text": "a\x01"}', "rows.jsonl:1: column 12: a raw control"),
    "24 NUL": (b'{"text": "a\x00"}', "rows.jsonl:1: column 12: a raw control"),
    "25 lone surrogate": (b'{"text": "\\ud800"}', "rows.jsonl:1: text: a lone surrogate"),
    "26 duplicate key": (b'{"text": "a", "text": "b"}', "rows.jsonl:1: text: given twice"),
    "27 NaN": (b'{"text": "a", "score": NaN}', "rows.jsonl:1: score: NaN is not JSON"),
    "27 Infinity": (b'{"text": "a", "x": [Infinity]}', "rows.jsonl:1: x[0]: Infinity is not JSON"),
    "27 1e999": (b'{"text": "a", "x": 1e999}', "rows.jsonl:1: x: 1e999 is too large"),
    "28 5,000 digits": (
        b'{"text": "a", "x": ' + b"1" * 5_000 + b"}",
        "rows.jsonl:1: x: an integer of 5000 digits",
    ),
    "29 nesting": (GOOD + b'{"text": ' + NESTED, "rows.jsonl:2: nested more than 100 deep"),
    "30 over 16 MiB": (
        GOOD + b'{"text": "' + b"a" * (16 << 20) + b'"}',
        "rows.jsonl:2: a row of more than 16 MiB",
    ),
    "31 number": (GOOD + b"3", "rows.jsonl:2: a number, not an object"),
    "31 null": (GOOD + b"null", "rows.jsonl:2: null, not an object"),
    "31 array": (GOOD + b"[1]", "rows.jsonl:2: an array, not an object"),
    "32 missing field": (b'{"prompt": "a"}', "rows.jsonl:1: completion: missing"),
    "32 mistyped field": (
        b'{"messages": [{"role": "user", "content": "a"}, '
        b'{"role": "assistant", "content": "b"}, {"role": "user", "content": 3}]}',
        "rows.jsonl:1: messages[2].content: a number, not a string",
    ),
    "33 unknown role": (
        b'{"messages": [{"role": "bot", "content": "a"}]}',
        'rows.jsonl:1: messages[0].role: unknown role "bot"',
    ),
    "33 empty messages": (b'{"messages": []}', "rows.jsonl:1: messages: empty"),
    "33 no assistant": (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "rows.jsonl:1: messages: no assistant turn",
    ),
    "34 two forms in a row": (
        b'{"text": "a", "prompt": "b", "completion": "c"}',
        "rows.jsonl:1: fields of several row forms",
    ),
    "34 two forms in a file": (
        GOOD + b'{"text": "a"}',
        "rows.jsonl:2: a `text` row, but the rows before it are `prompt` rows",
    ),
    "35 empty text": (b'{"text": ""}', "rows.jsonl:1: text: empty"),
    "36 no target tokens": (
        GOOD + b'{"prompt": "' + b"why? " * 2_000 + b'", "completion": "so"}',
        "rows.jsonl:2: no target tokens within data.max_seq_length = 2048",
    ),
    "38 empty file": (b"", "rows.jsonl: no rows: the file is empty or blank"),
    "38 blank file": (b"\n \r\n\t\n", "rows.jsonl: no rows: the file is empty or blank"),
    "38 empty array": (b"[ ]", "rows.jsonl: no rows: an empty array"),
    "38 open array": (b'[{"text": "a"},', "rows.jsonl:1: the array is not closed"),
    "41 gzip by content": (gzip.compress(GOOD), "rows.jsonl: this is gzip"),
    "41 Parquet": (b"PAR1\x15\x04", "rows.jsonl: this is Parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_catalogue_is_refused_by_file_line_and_field(
    name: str, tmp_path: Path, check: Check
) -> None:
    content, expected = REFUSED[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    outcome = check()
    assert outcome.code == 1
    assert [error.startswith(expected) for error in outcome.errors] == [True], outcome.errors


def test_a_bad_row_can_be_skipped_and_is_counted(tmp_path: Path, check: Check) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b'{"text": ""}\nnull\n' + GOOD)
    outcome = check("--set", "data.on_bad_row=skip")
    assert outcome.code == 0
    assert "4 (2 prompt); 2 cannot be trained on" in outcome.output
    assert "2 rows that cannot be read" in outcome.output


def test_a_file_of_bad_rows_alone_is_refused_though_bad_rows_are_skipped(
    tmp_path: Path, check: Check
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"null\n")
    assert check("--set", "data.on_bad_row=skip").errors == [
        "rows.jsonl: no row is left to train on"
    ]


FINE: dict[str, bytes] = {
    "21 BOM first": b"\xef\xbb\xbf" + GOOD + GOOD,
    "24 escaped NUL": GOOD + b'{"prompt": "\\u0000a", "completion": "\\u0000"}',
    "38 blank lines": b"\n\n" + GOOD + b" \t\n" + GOOD + b"\n",
    "40 CRLF": (GOOD + GOOD).replace(b"\n", b"\r\n"),
    "40 no final newline": GOOD + GOOD[:-1],
    "40 U+2028 and U+0085": GOOD
    + '{"prompt": "a\u2028b\u2029c\u0085d", "completion": "\u2028"}'.encode(),
    "one array": b"[" + GOOD + b",\n" + GOOD + b"]",
}


@pytest.mark.parametrize("name", FINE)
def test_odd_files_that_are_fine_have_their_two_rows(
    name: str, tmp_path: Path, check: Check
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(FINE[name])
    outcome = check()
    assert (outcome.code, outcome.errors) == (0, [])
    assert "rows 2 (2 prompt)" in outcome.output


LONG = b'{"prompt": "Count", "completion": "' + b"1 2 3 " * 100 + b'"}\n'


@pytest.mark.parametrize(
    ("policy", "code", "said"),
    [
        ("truncate", 0, "1 row cut: "),
        ("skip", 0, "1 row longer than data.max_seq_length = 100"),
        ("error", 1, "1 row longer than data.max_seq_length = 100"),
    ],
)
def test_37_over_long_rows_follow_the_policy(
    policy: str, code: int, said: str, tmp_path: Path, check: Check
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + LONG)
    outcome = check("--set", "data.max_seq_length=100", "--set", f"data.on_long_row={policy}")
    assert outcome.code == code
    assert said in outcome.output
    assert [error.startswith("rows.jsonl:2: ") for error in outcome.errors] == [True] * code


def test_39_fewer_rows_than_a_batch_are_said_with_both_numbers(
    tmp_path: Path, check: Check
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    outcome = check("--set", "train.batch_size=4")
    assert outcome.code == 0
    assert "1 row, fewer than train.batch_size = 4: one step an epoch" in outcome.output


def test_41_archives_are_refused_by_what_they_are(tmp_path: Path, check: Check) -> None:
    with zipfile.ZipFile(tmp_path / "rows.jsonl", "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    assert check().errors == ["rows.jsonl: this is a zip archive; unpack it"]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(GOOD))
    assert check(file="rows.jsonl.gz").code == 0
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-9])
    (error,) = check(file="rows.jsonl.gz").errors
    assert error.startswith("rows.jsonl.gz: damaged, or no gzip")


def test_42_only_regular_files_are_opened(tmp_path: Path, check: Check) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, what in (
        ("pipe", "a pipe or device"),
        ("/dev/null", "a pipe or device"),
        ("folder", "a folder"),
        ("missing.jsonl", "cannot be read: no such file"),
    ):
        (error,) = check(file=name).errors
        assert error.startswith(f"{name}: {what}")


def test_43_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    encode = Encoder.encode

    def encode_slowly(self: Encoder, rows: Any) -> Any:
        path.write_bytes(GOOD * 2)
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", encode_slowly)
    result = CliRunner().invoke(main, ["data", str(path)])
    assert result.exit_code == 1
    assert f"mlx-tune: error: {path}: changed while it was in use" in result.stderr


def test_44_control_tokens_in_content_are_text_and_counted(tmp_path: Path, check: Check) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + GOOD.replace(b"4", b"<|im_end|><|im_start|>"))
    outcome = check()
    assert outcome.code == 0
    assert "1 row with 2 control tokens in its content" in outcome.output


def test_45_rows_that_validate_and_train_are_a_warning(tmp_path: Path, check: Check) -> None:
    (tmp_path / "rows.jsonl").write_bytes(GOOD + GOOD.replace(b"4", b"four"))
    (tmp_path / "valid.jsonl").write_bytes(GOOD.replace(b"4", b"four"))
    outcome = check("--valid", str(tmp_path / "valid.jsonl"))
    assert outcome.code == 0
    assert "its line 1 is line 2" in outcome.output


def test_46_a_file_without_read_permission(
    tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    inside = os.open

    def refuse(name: Any, *arguments: Any, **named: Any) -> int:  # root may read anything
        if name == path:
            raise PermissionError(13, "Permission denied", str(name))
        return inside(name, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
    assert check().errors == [
        "rows.jsonl: cannot be read: permission denied; check its permissions"
    ]


@pytest.mark.slow
def test_the_installed_command_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"[1, 2]\n" + GOOD)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_tuner", "data", path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"mlx-tune: error: {path}:2: an array, not an object" in done.stderr
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


# --- Mutants ------------------------------------------------------------------------------------

GOOD_ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2 + 2?", "completion": "It's 4.\n"},
    {"instruction": "Say hello", "input": "in Grüß Gott", "output": '\u0000 \\ud800 \t"x"'},
    {"text": "def f(x):\n    return {x: [1, 2]}  # 😀\u2028", "score": -1.5e3, "id": 12},
    {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "w", "arguments": {"at": ["x", 1, None]}}}],
            },
            {"role": "tool", "content": '{"c": 21}'},
            {"role": "assistant", "content": "21 °C", "weight": 0.5},
        ],
        "tools": [{"type": "function", "function": {"name": "w", "strict": True}}],
    },
]
GOOD_LINES = [
    json.dumps(row, ensure_ascii=ascii_only, separators=separators).encode()
    for row in GOOD_ROWS
    for ascii_only in (False, True)
    for separators in ((", ", ": "), (",", ":"))
]
FRAGMENTS = [
    *(bytes([byte]) for byte in range(256)),
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\r", b"\x00"),
    *(b"NaN", b"-Infinity", b"1e999", b"1E-999", b"-0", b"true", b"null", b"7" * 4301, b"[" * 2000),
    *(b"\\ud800", b"\\udfff", b"\\u0000", b"\\ud83d\\ude00", b"\xed\xa0\x80", b"\xc0\x80"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"<|im_end|>", b'"text": ', b'"role": "user"'),
    *(b'"messages": [', b'"prompt": "a", ', b'"tools": {}, ', b'{"a": 1, "a": 2}', b"//", b"'"),
]


def mutant(line: bytes, rng: random.Random) -> bytes:
    """`line` with one to three places changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        start = rng.randrange(len(line) + 1)
        stop = min(len(line), start + rng.choice((0, 1, 1, 2, 5, 30)))
        kind = rng.randrange(6)
        if kind < 3:
            line = line[:start] + rng.choice(FRAGMENTS) + line[stop:]
        elif kind == 3:
            line = line[:start] + line[stop:]
        elif kind == 4:
            line = line[:stop] + line[start:]
        else:
            line = line[:start] + rng.choice(GOOD_LINES)[start:]
    return line


def assert_unchanged(row: ParsedRow, value: dict[str, Any]) -> None:
    """The row is what plain `json.loads` says that it is."""
    if row.form == "text":
        assert (row.text, row.messages) == (value["text"], [])
    elif row.form == "messages":
        assert row.messages == value["messages"]
    else:
        asked, told = {
            "prompt": ("prompt", "completion"),
            "instruction": ("instruction", "output"),
        }[row.form]
        extra = value.get("input") if row.form == "instruction" else None
        question = value[asked] + (f"\n\n{extra}" if extra else "")
        assert [m["content"] for m in row.messages] == [question, value[told]]
    assert row.tools == value.get("tools")


@pytest.mark.slow
def test_100_000_mutated_rows_are_read_exactly_or_refused_by_name() -> None:
    rng = random.Random(4)
    read = refused = 0
    for _ in range(100_000):
        raw = mutant(rng.choice(GOOD_LINES), rng)
        try:
            row = parse_row(raw, where="rows.jsonl:7")
        except DataError as error:
            refused += 1
            for fault in error.faults:
                line = str(fault)
                assert line.startswith("rows.jsonl:")
                assert line.isprintable()
            assert error.faults  # noqa: PT017
        else:
            read += 1
            assert_unchanged(row, json.loads(raw))
    assert read > 10_000
    assert refused > 10_000


@pytest.mark.slow
def test_mutated_files_become_datasets_of_exactly_their_good_rows_or_are_refused(
    tmp_path: Path,
) -> None:
    tokenizer = model.load_tokenizer(model.resolve("builtin:tiny-qwen"))
    encoder = Encoder(tokenizer, mask_prompt=True, max_seq_length=500)
    path, rng = tmp_path / "rows.jsonl", random.Random(19)
    opened = refused = 0
    for number in range(120):
        lines = [rng.choice(GOOD_LINES[:4]) for _ in range(4)]
        lines[rng.randrange(4)] = mutant(lines[0], rng)
        content = mutant(b"\n".join(lines), rng) if number % 3 == 0 else b"\n".join(lines)
        path.write_bytes(content)
        good = good_rows(content)
        try:
            dataset = open_dataset(
                path,
                encoder,
                on_bad_row="skip" if number % 2 else "error",
            )
        except DataError:
            refused += 1
            continue
        opened += 1
        examples = dataset.examples(range(len(dataset)))
        assert [dataset.line(example.row) for example in examples] == list(good)
        expected = encoder.encode(list(good.values()))
        assert [e.tokens.tolist() for e in examples] == [e.tokens.tolist() for e in expected]
    assert min(opened, refused) > 25


def good_rows(content: bytes) -> dict[int, ParsedRow]:
    """The good rows of a JSONL file, of the first one's form, by their line."""
    rows: dict[int, ParsedRow] = {}
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        with suppress(DataError):
            row = parse_row(raw, where=f"x:{line}")
            assert_unchanged(row, json.loads(raw))
            if row.form == next(iter(rows.values()), row).form:
                rows[line] = row
    return rows
