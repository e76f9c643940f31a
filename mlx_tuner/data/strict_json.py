"""JSON as its standard has it: a value, or every fault of the text by place.

msgspec reads a row; it refuses all that the standard does but a key that is given twice, which
shows in the number of quotes. Python's parser then says what is wrong, and where.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from mlx_tuner.errors import DataError, Fault
from mlx_tuner.words import printable, shortened

MAX_DEPTH = 100
"""Levels of nesting that are taken: far above any real row, below Python's stack."""

MAX_INT_DIGITS = 4300
"""Digits of an integer: Python's own limit for reading and writing one."""

_fast = msgspec.json.Decoder().decode


def decode(raw: bytes, where: str) -> Any:
    """The value that the UTF-8 JSON text `raw` holds.

    `where` is FILE:LINE of its first line. Raises `DataError` with all that is wrong with it.
    """
    try:
        value = _fast(raw)
        if not has_repeats(raw, count_strings(value)):
            return value
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors too
        pass
    return _decode_carefully(raw, where)


def count_strings(value: Any) -> int:
    """Strings in a JSON value, the keys of its objects too."""
    kind = type(value)
    if kind is dict:
        count, items = len(value), value.values()
    elif kind is list:
        count, items = 0, value
    else:
        return 1 if kind is str else 0
    for item in items:
        kind = type(item)
        if kind is str:
            count += 1
        elif kind is dict or kind is list:
            count += count_strings(item)
    return count


def has_repeats(raw: bytes, strings: int) -> bool:
    """Whether the JSON text of a value with so many strings gives a key of an object twice."""
    quotes = raw.count(b'"')
    if quotes == 2 * strings:
        return False
    if b'\\\\"' in raw:  # Its quote ends the string, where the backslash before is escaped.
        raw = raw.replace(b"\\\\", b"")
        quotes = raw.count(b'"')
    return quotes - raw.count(b'\\"') != 2 * strings


def _decode_carefully(raw: bytes, where: str) -> Any:
    try:
        value = _marked(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError(_bad_encoding(raw, where, error)) from None
    except json.JSONDecodeError as error:
        raise DataError(_bad_syntax(where, error)) from None
    except RecursionError:
        what = f"nested more than {MAX_DEPTH} deep; flatten it"
        raise DataError(Fault(where, "", what)) from None
    if faults := _faults_within(value, where):
        raise DataError(*faults)
    return value


class _Mark:
    """Stands in a tree for a value that Python's parser takes and strict JSON does not."""

    def __init__(self, what: str) -> None:
        self.what = what


class _Repeated(dict):
    """An object that gives `keys_twice` more than once."""

    keys_twice: list[str]


def _mark_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(plain := dict(pairs)) == len(pairs):
        return plain
    found = _Repeated(pairs)
    times = Counter(key for key, _ in pairs)
    found.keys_twice = [key for key, count in times.items() if count > 1]
    return found


def _mark_infinite(digits: str) -> float | _Mark:
    number = float(digits)
    return (
        number
        if number - number == 0.0
        else _Mark(f"{digits[:20]} is too large; use a number or null")
    )


def _mark_long(digits: str) -> int | _Mark:
    if len(digits) <= MAX_INT_DIGITS:
        return int(digits)
    return _Mark(f"an integer of {len(digits)} digits, more than {MAX_INT_DIGITS}; shorten it")


def _mark_constant(name: str) -> _Mark:
    return _Mark(f"{name} is not JSON; use a number or null")


_marked = json.JSONDecoder(
    object_pairs_hook=_mark_repeated,
    parse_float=_mark_infinite,
    parse_int=_mark_long,
    parse_constant=_mark_constant,
).decode


def _faults_within(value: Any, where: str) -> list[Fault]:
    """What strict JSON refuses below `value`: marks, repeated keys, lone surrogates."""
    faults = []
    for path, item in _walk(value):
        if isinstance(item, _Mark):
            faults.append(Fault(where, path, item.what))
        elif isinstance(item, _Repeated):
            faults += [
                Fault(where, join(path, key), "given twice; keep one") for key in item.keys_twice
            ]
        elif isinstance(item, str) and (code := _lone_surrogate(item)):
            what = f"a lone surrogate, \\u{code:x}, is no character; remove it or write the pair"
            faults.append(Fault(where, path, what))
    return faults


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a JSON tree (keys too), in order, with its path. Needs no call stack."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, item = todo.pop()
        yield path, item
        if isinstance(item, dict):
            for key, child in reversed(item.items()):
                todo += [(join(path, key), child), (join(path, key), key)]
        elif isinstance(item, list):
            todo += [(f"{path}[{i}]", item[i]) for i in reversed(range(len(item)))]


def join(path: str, key: str) -> str:
    return f"{path}.{shown(key)}" if path else shown(key)


def _lone_surrogate(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return None


def _bad_encoding(raw: bytes, where: str, error: UnicodeDecodeError) -> Fault:
    what = f"not UTF-8 (0x{raw[error.start]:02x}); save the file as UTF-8"
    return Fault(where, f"byte {error.start + 1}", what)


def _bad_syntax(where: str, error: json.JSONDecodeError) -> Fault:
    file, _, line = where.rpartition(":")
    where = f"{file}:{int(line) + error.lineno - 1}"
    return Fault(where, f"column {error.colno}", syntax_in_words(error))


def syntax_in_words(error: json.JSONDecodeError) -> str:
    """What is wrong where Python's parser stopped, and what to do."""
    if not error.doc.strip():
        return "nothing between two commas of the array; remove one"
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if error.msg == "Extra data":
        if after.startswith(","):
            return "a comma after the row; rows of JSONL are parted by line breaks alone"
        return "more text after the row's end; put each row on a line of its own"
    if "control character" in error.msg:
        code = ord(error.doc[error.pos])
        return f"a raw control character in a string; write it as \\u{code:04x}"
    if "Unterminated" in error.msg or not after:
        return "the row stops before its end (a file cut short?); complete or remove it"
    if "trailing comma" in error.msg or (before.endswith(",") and after[0] in "}]"):
        return f"a trailing comma before {after.lstrip(',').lstrip()[:1]}; remove it"
    if "BOM" in error.msg or after.startswith("\ufeff"):
        return "a byte order mark inside the file; remove it"
    if after.startswith("'"):
        return "single quotes; JSON strings take double quotes"
    return f"broken JSON: {error.msg[0].lower()}{error.msg[1:]}"


def shown(text: str) -> str:
    """A string of the user's, printable and short enough for one line."""
    return printable(shortened(text, 40))
