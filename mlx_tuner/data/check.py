"""Every row of a file is read and checked before the first step, on all cores, once a file.

What is kept of a row is whether it is good and a digest of its content, 4 bytes. The work is split
among child processes that import nothing but the standard library and numpy.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_tuner.data import rows, skim
from mlx_tuner.data.index import CACHED_FROM_BYTES, RowFile, scan
from mlx_tuner.data.rows import Form, Row, parse_row
from mlx_tuner.errors import DataError, Fault, RunError
from mlx_tuner.system import cache

SPLIT_FROM_BYTES = 32 << 20
"""Smaller files are checked in this process."""

MAX_PROCESSES = 16

_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from mlx_tuner.data.check import child; child(int(sys.argv[2]), sys.argv[3])"
)


@dataclass(frozen=True)
class Checked:
    """What is known of a file's rows after all of them were read."""

    form: Form | None
    """The form of the rows; None if none is good."""
    bad: np.ndarray
    """The rows that cannot be read or are of another form, in order: int64."""
    digests: np.ndarray
    """A digest of each row's content: uint32, shape (rows,); 0 for bad rows."""

    @property
    def fingerprint(self) -> str:
        """Tells files apart by the content of their rows and their order."""
        digest = hashlib.blake2b(self.digests.data, digest_size=16)
        return digest.hexdigest()


def check(file: RowFile, cache_dir: Path) -> Checked:
    """Read every row of a file.

    The result is kept in `cache_dir` for a large file, until the file or the rules change.
    """
    kept = cache.path_for(cache_dir, file.path, ".checked")
    key = {"source": file.identity, "rows": len(file), "rules": _rules()}
    is_large = int(file.offsets[-1] - file.offsets[0]) >= CACHED_FROM_BYTES
    form = _form(file)
    if is_large and (known := cache.load(kept, key)) is not None:
        return Checked(form, *known)
    if form is None:
        nothing = np.zeros(len(file), np.uint32)
        checked = Checked(None, np.arange(len(file)), nothing)
    else:
        checked = Checked(form, *_check_all(file, form))
    file.check_unchanged()
    if is_large:
        cache.store(kept, key, [checked.bad, checked.digests])
    return checked


def faults(file: RowFile, row: int, form: Form | None) -> tuple[Fault, ...]:
    """What is wrong with a row in a file of `form`."""
    where = file.where(row)
    try:
        found = parse_row(file[row], where=where)
    except DataError as error:
        return error.faults
    if found.form == form:
        return ()
    what = f"a `{found.form}` row, but the rows before it are `{form}` rows; keep one form a file"
    return (Fault(where, "", what),)


def digest(content: bytes) -> int:
    """32 bits of a row's `content()`."""
    return zlib.crc32(content)


def child(descriptor: int, form: Form) -> None:
    """Check the rows whose offsets come on standard input; digests and bad rows go out."""
    offsets = np.frombuffer(sys.stdin.buffer.read(), np.int64)
    bad, digests = _check(scan(descriptor, offsets), len(offsets) - 1, form)
    sys.stdout.buffer.write(digests.tobytes() + bad.tobytes())


def _form(file: RowFile) -> Form | None:
    """The form of the first good row."""
    for row in file.scan(0, len(file)):
        if (found := _parsed(row)) is not None:
            return found.form
    return None


def _parsed(raw: bytes) -> Row | None:
    try:
        return parse_row(raw, where=":0")
    except DataError:
        return None


def _check_all(file: RowFile, form: Form) -> tuple[np.ndarray, np.ndarray]:
    size = int(file.offsets[-1] - file.offsets[0])
    processes = min(_cores(), MAX_PROCESSES) if size >= SPLIT_FROM_BYTES else 1
    if processes == 1:
        return _check(file.scan(0, len(file)), len(file), form)
    shares = np.linspace(file.offsets[0], file.offsets[-1], processes + 1)
    borders = [0, *np.searchsorted(file.offsets, shares[1:-1]).tolist(), len(file)]
    with ThreadPoolExecutor(processes) as pool:
        parts = list(pool.map(lambda a, b: _check_in_child(file, a, b, form), borders, borders[1:]))
    bad = np.concatenate([part + first for (part, _), first in zip(parts, borders, strict=False)])
    return bad, np.concatenate([digests for _, digests in parts])


def _check_in_child(
    file: RowFile, first: int, last: int, form: Form
) -> tuple[np.ndarray, np.ndarray]:
    # Isolated: the user's folder and environment do not decide what the child imports.
    command = [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), str(file.descriptor), form]
    done = subprocess.run(
        command,
        input=file.offsets[first : last + 1].tobytes(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[file.descriptor],
        check=False,
    )
    count = last - first
    if done.returncode < 0:
        what = f"the process that checked its rows was stopped by signal {-done.returncode}"
        raise RunError(Fault(str(file.path), "", what))
    if done.returncode or len(done.stdout) < 4 * count:
        # What keeps a child from its work, such as a frozen program, does not hinder this process.
        return _check(file.scan(first, last), count, form)
    digests = np.frombuffer(done.stdout, np.uint32, count)
    return np.frombuffer(done.stdout, np.int64, offset=4 * count), digests


def _check(raws: Iterable[bytes], count: int, form: Form) -> tuple[np.ndarray, np.ndarray]:
    digests = np.zeros(count, np.uint32)
    bad: list[int] = []
    for i, raw in enumerate(raws):
        content = skim.simple_content(raw, form)
        if content is None:
            row = _parsed(raw)
            if row is None or row.form != form:
                bad.append(i)
                continue
            content = row.content()
        digests[i] = digest(content)
    return np.array(bad, np.int64), digests


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _rules() -> str:
    """Changes whenever the code that tells good rows from bad ones does."""
    digest = hashlib.blake2b(digest_size=8)
    for module in (rows, skim, sys.modules[__name__]):
        digest.update(Path(module.__file__ or "").read_bytes())
    return digest.hexdigest()
