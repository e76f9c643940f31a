"""A file of rows as raw bytes: JSON Lines or one JSON array, plain, gzipped, or Parquet.

Lines are read with `pread`, not through a mapping: pages of a mapping count as this process's
memory for as long as it lives, and a file that is cut short under a mapping kills the process
instead of raising an error. An array is held in memory. What is packed is unpacked into a cache.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from mlx_tuner.data.json_array import elements
from mlx_tuner.errors import DataError, Fault
from mlx_tuner.system import cache, files, install

MAX_ROW_BYTES = 16 << 20
"""Longest row that is read; a longer one is refused as soon as that shows."""

MAX_ARRAY_BYTES = 4 << 30
"""Largest JSON array that is held in memory."""

MAX_UNPACKED_BYTES = 256 << 30
"""Most that a packed file may unpack to."""

_BLOCK_BYTES = 1 << 20
_FREE_BYTES_KEPT = 1 << 30
_BATCH_ROWS = 1024
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_PARQUET = b"PAR1"

_MAGIC = {
    b"\x1f\x8b": "gzip; name it .jsonl.gz or .json.gz",
    b"PK\x03\x04": "a zip archive; unpack it",
    _PARQUET: "Parquet; name it .parquet",
    b"ARROW1": "Arrow; convert it to JSONL",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run `git lfs pull`",
}

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size and time of the last change in ns: what shows that a file is another one."""


class Source:
    """The bytes of a file's rows, in order or from anywhere. Several threads may read.

    The file is closed once this is dropped.

    Raises:
        DataError: it is not a file of rows, or is damaged.
        RunError: what is packed in it cannot be written into the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The user's file."""
        self._identity = _identity(path)
        plain = _unpacked(path, self._identity)
        self._descriptor = _open(plain, path)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        """Bytes."""
        head = os.pread(self._descriptor, 64, 0)
        _check_content(path, head)
        self._start = len(_BOM) if head.startswith(_BOM) else 0
        self._array: bytes | None = None
        if self._first_character() == b"[":
            if self.size > MAX_ARRAY_BYTES:
                what = f"an array of more than {MAX_ARRAY_BYTES >> 30} GiB; write one row a line"
                raise refusal(path, what)
            self._array = b"".join(self._blocks(0))

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, line and bytes of each row, with the space around it."""
        if self._array is None:
            return self._lines()
        return self._elements(self._array)

    def read(self, start: int, stop: int) -> bytes:
        """The row that begins at `start`, where the next one does at `stop`, or it ends there."""
        if self._array is not None:
            return self._array[start:stop].strip(b" \t\r\n,")
        raw = os.pread(self._descriptor, stop - start, start)
        if len(raw) < stop - start:
            self.check_unchanged()
            raise refusal(self.path, "cannot be read to its end")
        return raw.strip(_BLANK)

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file is not what it was when it was opened."""
        try:
            unchanged = _identity(self.path) == self._identity
        except DataError:
            unchanged = False
        if not unchanged:
            what = "changed while it was in use; leave it as it is during a run, and start again"
            raise refusal(self.path, what)

    def _first_character(self) -> bytes:
        for block in self._blocks(self._start):
            if rest := block.lstrip(_BLANK):
                return rest[:1]
        raise refusal(self.path, "no rows: the file is empty or blank")

    def _blocks(self, start: int) -> Iterator[bytes]:
        while block := os.pread(self._descriptor, _BLOCK_BYTES, start):
            yield block
            start += len(block)

    def _elements(self, array: bytes) -> Iterator[tuple[int, int, bytes]]:
        for offset, line, raw in elements(self.path, array, self._start):
            if len(raw) > MAX_ROW_BYTES:
                raise self._too_long(line)
            yield offset, line, raw

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        offset, number, rest = self._start, 1, b""
        for block in self._blocks(self._start):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if len(line) > MAX_ROW_BYTES:
                    raise self._too_long(number)
                if line and (line[0] > 0x20 or line.strip(_BLANK)):
                    yield offset, number, line
                offset += len(line) + 1
                number += 1
            if len(rest) > MAX_ROW_BYTES:
                raise self._too_long(number)
        if rest.strip(_BLANK):
            yield offset, number, rest

    def _too_long(self, line: int) -> DataError:
        what = f"a row of more than {MAX_ROW_BYTES >> 20} MiB; split or remove it"
        return refusal(self.path, what, line)


def refusal(path: Path, what: str, line: int | None = None) -> DataError:
    """The error that a file, or a line of it, is."""
    return DataError(Fault(str(path) if line is None else f"{path}:{line}", "", what))


# --- The file -----------------------------------------------------------------------------------


def _identity(path: Path) -> FileIdentity:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    if stat.S_ISDIR(found.st_mode):
        raise refusal(path, "a folder, not a file; name a .jsonl or .json file")
    if not stat.S_ISREG(found.st_mode):
        raise refusal(path, "a pipe or device; rows need a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open(path: Path, named: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(named, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    cause = (error.strerror or str(error)).lower()
    todo = "check its permissions" if isinstance(error, PermissionError) else "check the path"
    return refusal(path, f"cannot be read: {cause}; {todo}")


def _check_content(path: Path, head: bytes) -> None:
    """Refuse what is not UTF-8 text by its first bytes."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise refusal(path, f"this is {what}")
    if b"\0" in head[:2]:
        raise refusal(path, "this is UTF-16 without a mark, or no text; save it as UTF-8")


# --- Packed files -------------------------------------------------------------------------------


def _unpacked(path: Path, identity: FileIdentity) -> Path:
    """The file itself, or what is packed in it, unpacked unless that was done before."""
    unpack = {".gz": _gunzip, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if unpack is None:
        return path
    os.close(_open(path, path))  # So that a file that cannot be read is no fault of unpacking it.
    plain = cache.path_for(path, identity)
    if plain.exists():
        return plain
    with files.replacing(plain) as temporary, temporary.open("wb") as file:
        allowed = shutil.disk_usage(plain.parent).free - _FREE_BYTES_KEPT
        allowed = min(allowed, MAX_UNPACKED_BYTES)
        for block in unpack(path):
            allowed -= len(block)
            if allowed < 0:
                what = f"unpacks to more than there is room for in {plain.parent}"
                raise refusal(path, f"{what}; free some disk space")
            file.write(block)
    cache.remove_others(plain)
    return plain


def _gunzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as packed:
            while block := packed.read(_BLOCK_BYTES):
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise refusal(path, f"damaged, or no gzip: {error}; pack it again") from None


def _parquet_rows(path: Path) -> Iterator[bytes]:
    """A JSON object a line, without nulls: a table cannot tell them from what is not there."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        what = f"Parquet needs pyarrow; {install.extra('parquet')}"
        raise refusal(path, what) from None
    encoder = msgspec.json.Encoder()
    try:
        with path.open("rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(_BATCH_ROWS):
                yield encoder.encode_lines([_without_nulls(row) for row in batch.to_pylist()])
    except (ArrowException, OSError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise refusal(path, f"damaged, or no Parquet: {first}; write it again") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
