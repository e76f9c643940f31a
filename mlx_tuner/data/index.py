"""Where the rows of a file are: one pass at disk speed, 8 bytes a row, rows read on demand.

A file holds one JSON object a line, or one JSON array of them, plain or gzipped. Rows are read with
`pread`, not through a mapping: pages of a mapping count as this process's memory for as long as it
lives, and a file that is cut short under a mapping kills the process instead of raising an error.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import weakref
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np

from mlx_tuner.errors import DataError, Fault
from mlx_tuner.system import cache, files

MAX_ROW_BYTES = 16 << 20
"""Longest row that is read; a longer one is refused as soon as that shows."""

MAX_UNPACKED_BYTES = 256 << 30
"""Most that a gzipped file may unpack to."""

FORMAT_VERSION = 1
"""Changes with the meaning of what is cached."""

CACHED_FROM_BYTES = 8 << 20
"""Smaller files are indexed each time: that is faster than looking for what is cached."""

_BLOCK_BYTES = 1 << 20
_FREE_BYTES_KEPT = 1 << 30
_BLANK = b" \t\r\n"
_SPACE = 0x20
_BOM = b"\xef\xbb\xbf"
_NEWLINE, _QUOTE, _BACKSLASH, _COMMA = b'\n"\\,'
_OPEN, _CLOSE = b"{}"
_BRACE_BIT = 0x20
"""Set, it makes `[` of `{` and `]` of `}`."""

_MAGIC = {
    b"\x1f\x8b": "gzip; name it .jsonl.gz or .json.gz",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet; convert it to JSONL",
    b"ARROW1": "Arrow; convert it to JSONL",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run `git lfs pull`",
}

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of the last change in ns: what shows that a file is another one."""


def open_rows(path: Path, *, cache_dir: Path | None = None, limit: int | None = None) -> RowFile:
    """Find the rows of a .jsonl or .json file, or of one with .gz after that.

    Args:
        cache_dir: where the index of a large file and the content of a gzipped one are kept for
            the next time; the user's cache folder by default.
        limit: look for the first rows only.

    Raises:
        DataError: it is not a file of rows, is damaged, has none, or has one over `MAX_ROW_BYTES`.
        RunError: a gzipped file's content cannot be written into `cache_dir`.
    """
    cache_dir = cache_dir or cache.user_folder()
    identity = _identity(path)
    packed = path.suffix.lower() == ".gz"
    plain = _unpacked(path, identity, cache_dir) if packed else path
    kept = cache.path_for(cache_dir, path, ".index")
    key = {"version": FORMAT_VERSION, "source": identity, "content": _identity(plain)}
    descriptor = _open(plain)
    try:
        is_large = os.fstat(descriptor).st_size >= CACHED_FROM_BYTES
        arrays = cache.load(kept, key) if is_large else None
        known = arrays is not None
        if arrays is None:
            arrays = _scan(path, descriptor, limit)
    except BaseException:
        os.close(descriptor)
        raise
    offsets, *lines = arrays
    if limit is not None:
        offsets = offsets[: limit + 1]
    rows = RowFile(path, identity, descriptor, offsets, lines[0] if lines else None)
    rows.check_unchanged()
    if is_large and not known and limit is None:
        cache.store(kept, key, arrays)
    return rows


class RowFile:
    """The rows of a file as raw bytes, by their number from 0.

    Safe to read from several threads. To be closed, as a context manager or by dropping it.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        descriptor: int,
        offsets: np.ndarray,
        lines: np.ndarray | None,
    ) -> None:
        self.path = path
        """The user's file."""
        self.identity = identity
        """Of the user's file, when it was indexed."""
        self.descriptor = descriptor
        """Open on the rows: the user's file, or its unpacked content."""
        self.offsets = offsets
        """Row i, and the byte that parts it from the next, is at offsets[i] to offsets[i + 1]:
        int64, shape (rows + 1,)."""
        self._lines = lines
        self._close = weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back; rows cannot be read any more."""
        self._close()

    @property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each row with the space around it: int64, shape (rows,)."""
        return np.diff(self.offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        """A row's bytes, without the space around them."""
        return self._read(row).strip(_BLANK)

    def line(self, row: int) -> int:
        """The line of the file, from 1, that a row begins on."""
        if self._lines is None:
            return row + 1
        # In an array the space before a row is its own, and may have line breaks.
        raw = self._read(row)
        space = len(raw) - len(raw.lstrip(_BLANK))
        return int(self._lines[row]) + raw[:space].count(b"\n")

    def where(self, row: int) -> str:
        """FILE:LINE of a row."""
        return f"{self.path}:{self.line(row)}"

    def scan(self, first: int, last: int) -> Iterator[bytes]:
        """The bytes of rows first..last-1 one after the other, read in large blocks."""
        return scan(self.descriptor, self.offsets[first : last + 1])

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file is not what it was when it was indexed."""
        try:
            unchanged = _identity(self.path) == self.identity
        except DataError:
            unchanged = False
        if not unchanged:
            what = "changed while it was in use; leave it as it is during a run, and start again"
            raise DataError(Fault(str(self.path), "", what))

    def _read(self, row: int) -> bytes:
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        raw = os.pread(self.descriptor, last - 1 - first, first)
        if len(raw) < last - 1 - first:
            self.check_unchanged()
            raise DataError(Fault(str(self.path), "", "cannot be read to its end"))
        return raw


def scan(descriptor: int, offsets: np.ndarray) -> Iterator[bytes]:
    """The bytes of the rows between `offsets`, without the space around them."""
    first = 0
    while first < len(offsets) - 1:
        start = int(offsets[first])
        last = int(np.searchsorted(offsets, start + _BLOCK_BYTES, side="right")) - 1
        last = max(last, first + 1)
        ends = (offsets[first : last + 1] - offsets[first]).tolist()
        block = os.pread(descriptor, ends[-1], start)
        for begin, end in pairwise(ends):
            yield block[begin : end - 1].strip(_BLANK)
        first = last


# --- The file -----------------------------------------------------------------------------------


def _refusal(path: Path, what: str, line: int | None = None) -> DataError:
    where = str(path) if line is None else f"{path}:{line}"
    return DataError(Fault(where, "", what))


def _identity(path: Path) -> Identity:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    if stat.S_ISDIR(found.st_mode):
        raise _refusal(path, "a folder, not a file; name a .jsonl or .json file")
    if not stat.S_ISREG(found.st_mode):
        raise _refusal(path, "a pipe or device; rows need a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    cause = (error.strerror or str(error)).lower()
    todo = "check its permissions" if isinstance(error, PermissionError) else "check the path"
    return _refusal(path, f"cannot be read: {cause}; {todo}")


def _check_content(path: Path, head: bytes) -> None:
    """Refuse what is not UTF-8 text by its first bytes."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise _refusal(path, f"this is {what}")
    if b"\0" in head[:2]:
        raise _refusal(path, "this is UTF-16 without a mark, or no text; save it as UTF-8")


def _unpacked(path: Path, identity: Identity, cache_dir: Path) -> Path:
    """The content of a gzipped file, unpacked into `cache_dir` unless it is there already."""
    plain = cache.path_for(cache_dir, path, ".rows")
    marker = cache.path_for(cache_dir, path, ".unpacked")

    def key() -> cache.Key:
        return {"version": FORMAT_VERSION, "source": identity, "content": _identity(plain)}

    with suppress(DataError):
        if cache.load(marker, key()) is not None:
            return plain
    os.close(_open(path))  # So that a file that cannot be read is not a fault of unpacking it.
    with files.replacing(plain) as temporary:
        allowed = shutil.disk_usage(plain.parent).free - _FREE_BYTES_KEPT
        allowed = min(allowed, MAX_UNPACKED_BYTES)
        try:
            with gzip.open(path) as packed, temporary.open("wb") as file:
                while block := packed.read(_BLOCK_BYTES):
                    allowed -= len(block)
                    if allowed < 0:
                        what = f"unpacks to more than there is room for in {plain.parent}"
                        raise _refusal(path, f"{what}; free some disk space")
                    file.write(block)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _refusal(path, f"damaged, or no gzip: {error}; pack it again") from None
    cache.store(marker, key(), [])
    return plain


# --- The passes ---------------------------------------------------------------------------------


def _scan(path: Path, descriptor: int, limit: int | None) -> list[np.ndarray]:
    """Offsets of the rows (int64) and, unless they are 1, 2, 3, …, their lines (uint32).

    With a `limit`, at least that many where there are so many.
    """
    head = os.pread(descriptor, 64, 0)
    _check_content(path, head)
    start = len(_BOM) if head.startswith(_BOM) else 0
    first, line = _first_character(descriptor, start)
    if first is None:
        raise _refusal(path, "no rows: the file is empty or blank")
    if os.pread(descriptor, 1, first) == b"[":
        return _scan_array(path, descriptor, first, line, limit)
    return _scan_lines(path, descriptor, start, limit)


def _blocks(descriptor: int, start: int) -> Iterator[tuple[int, bytes]]:
    while block := os.pread(descriptor, _BLOCK_BYTES, start):
        yield start, block
        start += len(block)


def _first_character(descriptor: int, start: int) -> tuple[int | None, int]:
    """The offset and line of the first byte that is no space."""
    line = 1
    for base, block in _blocks(descriptor, start):
        rest = block.lstrip(_BLANK)
        line += block[: len(block) - len(rest)].count(b"\n")
        if rest:
            return base + len(block) - len(rest), line
    return None, line


def _too_long(path: Path, line: int) -> DataError:
    what = f"a row of more than {MAX_ROW_BYTES >> 20} MiB; split or remove it"
    return _refusal(path, what, line)


def _scan_lines(path: Path, descriptor: int, start: int, limit: int | None) -> list[np.ndarray]:
    """Offsets of the lines that are not blank, and of the end; line numbers unless 1, 2, 3, …"""
    offsets: list[np.ndarray] = []
    lines: list[np.ndarray] = []
    found, line, line_start, end = 0, 1, start, start
    for base, block in _blocks(descriptor, start):
        end = base + len(block)
        content = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(content == _NEWLINE) + base
        if len(ends):
            starts = np.concatenate([[line_start], ends[:-1] + 1])
            long = np.flatnonzero(ends - starts > MAX_ROW_BYTES)
            if len(long):
                raise _too_long(path, line + int(long[0]))
            unsure = content[np.maximum(starts - base, 0)] <= _SPACE
            unsure[0] = True  # It may have begun in an earlier block.
            filled = np.ones(len(starts), bool)
            for i in np.flatnonzero(unsure).tolist():
                raw = os.pread(descriptor, int(ends[i] - starts[i]), int(starts[i]))
                filled[i] = bool(raw.strip(_BLANK))
            offsets.append(starts[filled])
            lines.append((line + np.flatnonzero(filled)).astype(np.uint32))
            found += len(offsets[-1])
            line += len(ends)
            line_start = int(ends[-1]) + 1
        if limit is not None and found > limit:
            break
        if end - line_start > MAX_ROW_BYTES:
            raise _too_long(path, line)
    else:
        if os.pread(descriptor, end - line_start, line_start).strip(_BLANK):
            offsets.append(np.array([line_start]))
            lines.append(np.array([line], np.uint32))
            line_start = end + 1  # No line break parts this row from the end.
    offsets.append(np.array([line_start]))
    numbers = np.concatenate(lines)
    is_gapless = int(numbers[-1]) == len(numbers)
    return [np.concatenate(offsets), *([] if is_gapless else [numbers])]


def _scan_array(
    path: Path, descriptor: int, bracket: int, line: int, limit: int | None
) -> list[np.ndarray]:
    """Offsets behind the bracket, each comma that parts elements, and the end; their lines.

    Only quotes and brackets are looked at: whether an element is JSON shows when it is read.
    """
    row_start, row_line = bracket + 1, line
    offsets = [np.array([row_start])]
    lines = [np.array([row_line], np.uint32)]
    depth, in_string, found = 1, False, 0
    held = b""
    for block_start, block in _blocks(descriptor, bracket + 1):
        # Backslashes at a block's end belong to the quote that may follow them.
        base, joined = block_start - len(held), held + block
        held = joined[len(joined.rstrip(b"\\")) :]
        content = np.frombuffer(joined, np.uint8)[: len(joined) - len(held)]
        quotes = _unescaped_quotes(content)
        folded = content | _BRACE_BIT
        marks = np.flatnonzero((folded == _OPEN) | (folded == _CLOSE) | (content == _COMMA))
        marks = marks[(np.searchsorted(quotes, marks) + in_string) % 2 == 0]
        in_string = (len(quotes) + in_string) % 2 == 1
        kinds = folded[marks]
        depths = depth + np.cumsum((kinds == _OPEN).astype(np.int8) - (kinds == _CLOSE))
        ends = np.flatnonzero(depths == 0)
        if len(ends):
            marks, depths, kinds = (array[: ends[0] + 1] for array in (marks, depths, kinds))
        starts = marks[(depths == 0) | ((depths == 1) & (kinds == _COMMA | _BRACE_BIT))] + 1
        breaks = np.flatnonzero(content == _NEWLINE)
        row_starts = np.concatenate([[row_start], starts + base])
        row_lines = np.concatenate([[row_line], line + np.searchsorted(breaks, starts)])
        long = np.flatnonzero(np.diff(row_starts) - 1 > MAX_ROW_BYTES)
        if len(long):
            at = int(long[0])
            raise _too_long(path, _line_of(descriptor, row_starts[at], row_lines[at]))
        offsets.append(row_starts[1:])
        lines.append(row_lines[1:].astype(np.uint32))
        found += len(starts)
        row_start, row_line = int(row_starts[-1]), int(row_lines[-1])
        if len(ends):
            _check_nothing_after(path, descriptor, row_start, row_line)
            break
        if limit is not None and found > limit:
            break
        if base + len(joined) - row_start > MAX_ROW_BYTES:
            raise _too_long(path, _line_of(descriptor, row_start, row_line))
        line += len(breaks)
        depth = int(depths[-1]) if len(depths) else depth
    else:
        what = "the array is not closed: the file is cut short, or a quote or bracket is missing"
        where = _line_of(descriptor, row_start, row_line)
        raise _refusal(path, f"{what} in the row that begins here", where)
    all_offsets, numbers = np.concatenate(offsets), np.concatenate(lines)[:-1]
    if len(numbers) == 1:
        only = os.pread(descriptor, int(all_offsets[1] - all_offsets[0]) - 1, int(all_offsets[0]))
        if not only.strip(_BLANK):
            raise _refusal(path, "no rows: an empty array")
    return [all_offsets, numbers]


def _unescaped_quotes(content: np.ndarray) -> np.ndarray:
    """Positions of the quotes that have an even number of backslashes before them."""
    quotes = np.flatnonzero(content == _QUOTE)
    escaped = (quotes > 0) & (content[quotes - 1] == _BACKSLASH)
    unsure = np.flatnonzero(
        escaped & (quotes > 1) & (content[np.maximum(quotes, 2) - 2] == _BACKSLASH)
    )
    if len(unsure):
        backslashes = np.flatnonzero(content == _BACKSLASH)
        begins_run = np.diff(backslashes, prepend=-2) > 1
        run_starts = np.maximum.accumulate(np.where(begins_run, backslashes, 0))
        before = quotes[unsure] - 1
        run_lengths = before + 1 - run_starts[np.searchsorted(backslashes, before)]
        escaped[unsure] = run_lengths % 2 == 1
    return quotes[~escaped]


def _line_of(descriptor: int, row_start: int, line: int) -> int:
    """The line that an element begins on, of an array whose space before it begins on `line`."""
    raw = os.pread(descriptor, 4096, row_start)
    return int(line) + raw[: len(raw) - len(raw.lstrip(_BLANK))].count(b"\n")


def _check_nothing_after(path: Path, descriptor: int, end: int, line: int) -> None:
    for _, block in _blocks(descriptor, end):
        rest = block.lstrip(_BLANK)
        line += block[: len(block) - len(rest)].count(b"\n")
        if rest:
            what = "more text after the array's end; a file is one array, or one object a line"
            raise _refusal(path, what, line)
