"""In which line a TOML text sets each key, which tomllib does not tell.

The text is scanned once, in linear time, and may be broken TOML: what is found up to the fault is
returned. Nesting is bounded here because tomllib recurses into brackets and takes quadratic time
over dotted keys.
"""

import re
from collections.abc import Iterator

MAX_NESTING = 64
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_IGNORED = re.compile(r"[ \t\r]+|#[^\n]*")


class NestingError(ValueError):
    """Brackets or a dotted key nested deeper than any sensible file needs; has its `line`."""

    def __init__(self, line: int) -> None:
        super().__init__(f"nested deeper than {MAX_NESTING} levels")
        self.line = line


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The 1-based line that first sets each table and each table's key.

    Keys are `(table,)` and `(table, key)`, whether written under a header, dotted or inline.
    Raises NestingError.
    """
    lines: dict[tuple[str, ...], int] = {}
    header: tuple[str, ...] = ()
    path: tuple[str, ...] = ()  # the key whose value is being read
    parts: list[str] = []  # of the key being read
    opened: list[tuple[str, tuple[str, ...]]] = []  # brackets around here, with the key they fill
    reading = "key"  # or "header" or "value"

    for kind, name, line in _tokens(text):
        if kind == "\n":
            if not opened:
                reading, parts = "key", []
        elif reading == "header":
            if kind == "]":
                header = tuple(parts)
                _record(lines, header, line)
            elif kind == "name":
                parts.append(name)
        elif reading == "key" and kind == "[" and not opened:
            reading = "header"
        elif reading == "key" and kind == "=":
            path = (opened[-1][1] if opened else header) + tuple(parts)
            _record(lines, path, line)
            reading = "value"
        elif kind in ("[", "{"):
            opened.append((kind, path))
            reading, parts = ("key" if kind == "{" else "value"), []
        elif kind in ("]", "}"):
            opened = opened[:-1]
            reading = "value"
        elif kind == "," and opened and opened[-1][0] == "{":
            reading, parts = "key", []
        elif reading == "key" and kind == "name":
            parts.append(name)
        if max(len(opened), len(parts)) > MAX_NESTING:
            raise NestingError(line)
    return lines


def _record(lines: dict[tuple[str, ...], int], key: tuple[str, ...], line: int) -> None:
    for length in range(1, min(len(key), 2) + 1):
        lines.setdefault(key[:length], line)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, text, line) of each token; kind is "name" for words and strings, else the text."""
    position, line = 0, 1
    while position < len(text):
        if text[position] in "\"'":
            try:
                content, end = _string(text, position)
            except ValueError:  # never closed: tomllib says so better
                return
            yield "name", content, line
            line += text.count("\n", position, end)
        elif match := _WORD.match(text, position):
            yield "name", match.group(), line
            end = match.end()
        elif match := _IGNORED.match(text, position):
            end = match.end()
        else:
            yield text[position], text[position], line
            line += text[position] == "\n"
            end = position + 1
        position = end


def _string(text: str, start: int) -> tuple[str, int]:
    """The content of the string that opens at `start`, and where the text goes on after it."""
    quote = text[start]
    closing = quote * 3 if text.startswith(quote * 3, start) else quote
    first = end = start + len(closing)
    while True:
        end = text.index(closing, end)
        backslashes = end
        while quote == '"' and backslashes > first and text[backslashes - 1] == "\\":
            backslashes -= 1
        if (end - backslashes) % 2 == 0:
            break
        end += 1  # an escaped quote
    while len(closing) == 3 and text.startswith(quote, end + 3):
        end += 1  # up to two quotes may stand before the closing three
    return text[first:end], end + len(closing)
