"""Bad rows: none gets past, none stops anything with a traceback, none is silently changed."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from mlx_tuner.errors import DataError
from mlx_tuner.rows import Row, parse_row

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


def assert_unchanged(row: Row, value: dict[str, Any]) -> None:
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
