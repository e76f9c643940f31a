"""One pass over a file at each start: every row checked, its place and a hash of it kept."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import islice

import numpy as np

from mlx_tuner.data.rows import Form, ParsedRow, parse_row, plain_digest
from mlx_tuner.data.sources import Source
from mlx_tuner.errors import DataError, Fault

ROWS_BETWEEN_REPORTS = 10_000


class RowFile:
    """The checked rows of a file, by their number from 0. Several threads may read.

    Args:
        limit: of the first rows only.
        advance: called now and then with the bytes that were read since the last call.

    Raises:
        DataError: it is not a file of rows, is damaged, has none, or has one that is too long.
    """

    def __init__(
        self,
        source: Source,
        limit: int | None = None,
        advance: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.source = source
        self.path = source.path
        """The user's file."""
        self.form: Form | None = None
        """The form of the rows; None if none is good."""
        offsets, lines, bad, digests = array("q"), array("I"), array("q"), bytearray()
        end = reported = 0
        for row, (offset, line, raw) in enumerate(islice(source.rows(), limit)):
            offsets.append(offset)
            if lines or line != row + 1:
                lines = lines or array("I", range(1, row + 1))
                lines.append(line)
            end = offset + len(raw)
            if (digest := self._digest(raw)) is None:
                bad.append(row)
            digests += digest or bytes(8)
            if not row % ROWS_BETWEEN_REPORTS:
                advance(end - reported)
                reported = end
        source.check_unchanged()
        offsets.append(end)
        self._offsets = offsets
        self._lines = lines
        self.bad = np.frombuffer(bad, np.int64)
        """The rows that cannot be read or are of another form, in order: int64."""
        self.digests = np.frombuffer(digests, np.uint64)
        """64 bits of a hash of each row's content, uint64, shape (rows,); 0 for bad rows."""

    def _digest(self, raw: bytes) -> bytes | None:
        if self.form and (digest := plain_digest(raw, self.form)):
            return digest
        try:
            row = parse_row(raw, where=":0")
        except DataError:
            return None
        self.form = self.form or row.form
        return row.digest() if row.form == self.form else None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        """A row's bytes, without the space around them."""
        return self.source.read(self._offsets[row], self._offsets[row + 1])

    def parsed(self, row: int) -> ParsedRow:
        """A good row."""
        try:
            return parse_row(self[row], where=":0")
        except DataError:
            self.source.check_unchanged()
            raise

    def line(self, row: int) -> int:
        """The line of the file, from 1, that a row begins on."""
        return self._lines[row] if self._lines else row + 1

    def where(self, row: int) -> str:
        """FILE:LINE of a row."""
        return f"{self.path}:{self.line(row)}"

    def faults(self, row: int) -> tuple[Fault, ...]:
        """What is wrong with a row."""
        where = self.where(row)
        try:
            found = parse_row(self[row], where=where)
        except DataError as error:
            return error.faults
        if found.form == self.form:
            return ()
        what = f"a `{found.form}` row, but the rows before it are `{self.form}` rows"
        return (Fault(where, "", f"{what}; keep one form a file"),)
