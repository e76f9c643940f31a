"""The elements of one JSON array that is held in memory, and where each of them is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlx_tuner.data.strict_json import MAX_DEPTH, syntax_in_words
from mlx_tuner.errors import DataError, Fault

_decode = msgspec.json.Decoder(list[msgspec.Raw]).decode
_between = re.compile(rb"[ \t\r\n,]*").match
_space = re.compile(r"[ \t\r\n]*").match

Element = tuple[int, int, bytes]
"""Offset, line and bytes."""


def elements(path: Path, content: bytes, start: int) -> Iterator[Element]:
    """Each element of the array that begins, after white space, at `start` of a file's `content`.

    Raises `DataError` where the array is broken, or empty.
    """
    try:
        raws = _decode(memoryview(content)[start:])
    except (ValueError, RecursionError):  # Python's parser says where, or takes NaN and the like.
        yield from _carefully(path, content, start)
        return
    if not raws:
        raise DataError(Fault(str(path), "", "no rows: an empty array"))
    line, counted, end = 1, 0, content.index(b"[", start) + 1
    for raw in map(bytes, raws):
        offset = _between(content, end).end()  # type: ignore[union-attr]
        line += content.count(b"\n", counted, offset)
        yield offset, line, raw
        counted, end = offset, offset + len(raw)


def _carefully(path: Path, content: bytes, start: int) -> Iterator[Element]:
    def refused(what: str, at: int, field: str = "") -> DataError:
        return DataError(Fault(f"{path}:{text.count(chr(10), 0, at) + 1}", field, what))

    text = content[:start].decode("utf-8-sig") + content[start:].decode(errors="replace")
    if "\ufffd" in text:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            what = f"not UTF-8 (0x{content[error.start]:02x}); save the file as UTF-8"
            raise DataError(Fault(f"{path}:{line}", f"byte {error.start + 1}", what)) from None
    parse = json.JSONDecoder(parse_int=str).raw_decode  # of any length: its row is refused for it
    end = text.index("[") + 1
    offset, passed = start, 0
    while True:
        first = _space(text, end).end()  # type: ignore[union-attr]
        try:
            _, end = parse(text, first)
        except json.JSONDecodeError as error:
            if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg:
                raise refused(_OPEN, first) from None
            what = syntax_in_words(error)
            raise refused(what, error.pos, f"column {error.colno}") from None
        except RecursionError:
            raise refused(f"nested more than {MAX_DEPTH} deep; flatten it", first) from None
        offset += len(text[passed:first].encode())
        passed = first
        yield offset, text.count("\n", 0, first) + 1, text[first:end].encode()
        after = _space(text, end).end()  # type: ignore[union-attr]
        if after == len(text):
            raise refused(_OPEN, first)
        if text[after] == "]":
            break
        if text[after] != ",":
            raise refused("broken JSON: a comma or ] is missing", after)
        end = after + 1
    if rest := text[after + 1 :].lstrip():
        what = "more text after the array's end; a file is one array, or one object a line"
        raise refused(what, len(text) - len(rest))


_OPEN = (
    "the array is not closed: the file is cut short, or a quote or bracket is missing "
    "in the row that begins here"
)
