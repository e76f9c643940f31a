"""The rows of a file as examples to train on: checked, counted, encoded when they are asked for.

What is known before the first step, however large the file:

- Every row was read and is good (`check`), or was refused or left out as `on_bad_row` says.
- Only rows that the tokenizer has seen are known to fit `max_seq_length` and to have a target. A
  token is at least a byte, so most rows need no look: up to `SETTLED_BYTES` the whole file is
  encoded once, beyond that the rows whose bytes allow more tokens, the first `SETTLED_BYTES` of
  them (all of them where `on_long_row` is "error").
- So `len(dataset)` is fixed, and the order of an epoch is a function of it. Where a row of a large
  file turns out unusable only when it is used, the usable row after it stands in, and is counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_tuner.data import check
from mlx_tuner.data.check import Checked
from mlx_tuner.data.encode import Encoded, Encoder, LongRowPolicy
from mlx_tuner.data.index import RowFile, open_rows
from mlx_tuner.data.order import in_validation
from mlx_tuner.data.rows import parse_row
from mlx_tuner.engine.batching import Example
from mlx_tuner.errors import DataError, Fault
from mlx_tuner.system import cache
from mlx_tuner.words import plural

BadRowPolicy = Literal["error", "skip"]

SETTLED_BYTES = 4 << 20
"""Bytes of rows that are encoded before the first step, about a second's work, and then kept: their
tokens take little more."""

QUARANTINE_KEPT = 1000
"""Rows left out whose reasons are kept; those after them are only counted."""

FAULTS_SHOWN = 20

_TEMPLATE_TOKENS = 256
"""More than a ChatML template adds to a row beyond the bytes that its JSON takes."""

_BATCH_ROWS = 256


@dataclass(frozen=True)
class Quarantined:
    """A row that is left out, and why."""

    line: int
    reason: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"line": self.line, "reason": self.reason}, ensure_ascii=False)


@dataclass
class Facts:
    """What is known of a file before the first step."""

    file_rows: int
    fingerprint: str
    """Changes with the content of the rows and their order."""
    bad_rows: int
    """Rows left out that cannot be read."""
    long_rows: int = 0
    """Rows left out for their length."""
    no_target_rows: int = 0
    """Rows left out that have nothing to learn."""
    encoded_rows: int = 0
    """Rows that the counts below are of: all, or those of a large file that may be too long."""
    tokens: int = 0
    target_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    control_rows: int = 0
    """Rows that spell control tokens, which are taken as text."""


def open_dataset(
    path: Path,
    tokenizer: Any,
    *,
    max_seq_length: int,
    mask_prompt: bool = True,
    system_prompt: str | None = None,
    limit: int | None = None,
    on_bad_row: BadRowPolicy = "error",
    on_long_row: LongRowPolicy = "truncate",
    cache_dir: Path | None = None,
) -> Dataset:
    """Open a file of rows and check it.

    Args:
        max_seq_length: tokens of a row; what is beyond is cut off, or as `on_long_row` says.
        mask_prompt: whether only the assistants' turns are targets.
        system_prompt: the system message of conversations that have none.
        limit: use the first rows only.
        on_bad_row: what a row that cannot be read or has no target does: "error" or "skip".
        on_long_row: what a row of too many tokens does: "truncate", "skip" or "error".
        cache_dir: where what is found out about the file is kept; by default the user's cache.

    Raises:
        DataError: the file is none of rows, or rows are refused, or none is left.
        ModelError: the tokenizer cannot encode the rows.
    """
    cache_dir = cache_dir or cache.user_folder()
    file = open_rows(path, cache_dir=cache_dir, limit=limit)
    checked = check.check(file, cache_dir)
    encoder = Encoder(
        tokenizer,
        mask_prompt=mask_prompt,
        max_seq_length=max_seq_length,
        system_prompt=system_prompt,
        on_long_row=on_long_row,
    )
    reader = _Reader(file, encoder)
    sieve = _Sieve(file, checked, on_bad_row, on_long_row)
    sieve.leave_out_bad_rows()
    at_most = max_seq_length - _TEMPLATE_TOKENS - len((system_prompt or "").encode())
    sieve.settle(reader, at_most)
    return Dataset(reader, checked, sieve.usable_rows(), sieve.facts, tuple(sieve.quarantined))


class Dataset:
    """Examples by position, 0 ≤ position < len. Several threads may ask for them."""

    def __init__(
        self,
        reader: _Reader,
        checked: Checked,
        rows: np.ndarray | None,
        facts: Facts,
        quarantined: tuple[Quarantined, ...],
    ) -> None:
        self.facts = facts
        """Of the whole file, also where this is a part of it."""
        self.quarantined = quarantined
        """The first rows that were left out."""
        self.replaced_rows = 0
        """Rows that turned out unusable when they were used: the next one was used instead."""
        self._file = reader.file
        self._reader = reader
        self._checked = checked
        self._rows = rows

    def __len__(self) -> int:
        """Usable rows."""
        return len(self._file) if self._rows is None else len(self._rows)

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """An example for each position, in their order.

        Raises:
            DataError: the file has changed, or no usable row is left.
        """
        self._file.check_unchanged()
        encoded = self._reader.encode([self._row(position) for position in positions])
        return [self._example(*pair) for pair in zip(positions, encoded, strict=True)]

    def line(self, row: int) -> int:
        """The line of the file, from 1, that row number `row` (`Example.row`) begins on."""
        return self._file.line(row)

    @property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each usable row in the file: int64, shape (len,)."""
        lengths = self._file.byte_lengths
        return lengths if self._rows is None else lengths[self._rows]

    @property
    def digests(self) -> np.ndarray:
        """32 bits of a hash of each usable row's content: uint32, shape (len,)."""
        digests = self._checked.digests
        return digests if self._rows is None else digests[self._rows]

    @property
    def rows_per_second(self) -> float | None:
        """Rows of the file read and encoded in a second of doing so."""
        reader = self._reader
        return reader.encoded_rows / reader.seconds if reader.encoded_rows else None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the file, a sentence each."""
        facts, notes = self.facts, []
        left_out = facts.bad_rows + facts.long_rows + facts.no_target_rows
        if left_out:
            reasons = {
                "cannot be read": facts.bad_rows,
                "too long": facts.long_rows,
                "without a target": facts.no_target_rows,
            }
            counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            notes.append(f"{plural(left_out, 'row')} left out: {counts}")
        of = "" if facts.encoded_rows == facts.file_rows - facts.bad_rows else "at least "
        if facts.truncated_rows:
            lost = plural(facts.truncated_tokens, "token")
            rows = plural(facts.truncated_rows, "row")
            notes.append(f"{of}{rows} cut short by {lost} in all, the end of the turn among them")
        if facts.control_rows:
            rows = plural(facts.control_rows, "row")
            notes.append(f"{of}{rows} with control tokens in the content: taken as text")
        return notes

    def part(self, chosen: np.ndarray) -> Dataset:
        """The rows at which `chosen` (bool, shape (len,)) is true, in their order."""
        rows = np.flatnonzero(chosen).astype(np.uint32)
        rows = rows if self._rows is None else self._rows[rows]
        return Dataset(self._reader, self._checked, rows, self.facts, self.quarantined)

    def _row(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        return position if self._rows is None else int(self._rows[position])

    def _example(self, position: int, encoded: Encoded) -> Example:
        for _ in range(len(self)):
            if encoded.problem is None:
                return Example(encoded.tokens, encoded.loss_mask, self._row(position))
            self.replaced_rows += 1
            position = (position + 1) % len(self)
            (encoded,) = self._reader.encode([self._row(position)])
        raise _nothing_left(self._file)


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training rows, validation rows), by a hash of each row's content and the seed.

    Raises:
        DataError: one of them has no row.
    """
    held_out = in_validation(dataset.digests, fraction, seed)
    train, valid = dataset.part(~held_out), dataset.part(held_out)
    if not len(train) or not len(valid):
        rows, none = plural(len(dataset), "row"), "training" if len(valid) else "validation"
        what = f"{fraction:g} of {rows} leaves none for {none}; name a file, or use more rows"
        raise DataError(Fault(str(dataset._file.path), "data.valid", what))
    return train, valid


def shared_rows(train: Dataset, valid: Dataset) -> int:
    """Rows of `valid` that are in `train` as well, by the 32-bit hash of their content."""
    return int(np.isin(valid.digests, train.digests).sum())


class _Reader:
    """Reads and encodes rows, and keeps those that it is told to."""

    def __init__(self, file: RowFile, encoder: Encoder) -> None:
        self.file = file
        self.encoded_rows = 0
        self.seconds = 0.0
        """Time that encoding them has taken."""
        self._encoder = encoder
        self._kept: dict[int, Encoded] = {}

    def encode(self, rows: Sequence[int]) -> list[Encoded]:
        """Each of `rows` as the model sees it."""
        new = [row for row in rows if row not in self._kept]
        if not new:
            return [self._kept[row] for row in rows]
        start = time.perf_counter()
        parsed = [parse_row(self.file[row], where=self.file.where(row)) for row in new]
        encoded = dict(zip(new, self._encoder.encode(parsed), strict=True))
        self.encoded_rows += len(new)
        self.seconds += time.perf_counter() - start
        return [encoded[row] if row in encoded else self._kept[row] for row in rows]

    def keep(self, row: int, encoded: Encoded) -> None:
        """Remember what `encode` gave for a row."""
        self._kept[row] = encoded


@dataclass
class _Sieve:
    """Which rows of a file can be used, and the faults of the others."""

    file: RowFile
    checked: Checked
    on_bad_row: BadRowPolicy
    on_long_row: LongRowPolicy
    facts: Facts = field(init=False)
    quarantined: list[Quarantined] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts = Facts(
            file_rows=len(self.file),
            fingerprint=self.checked.fingerprint,
            bad_rows=len(self.checked.bad),
        )

    def leave_out_bad_rows(self) -> None:
        bad = self.checked.bad
        shown = bad[: FAULTS_SHOWN if self.on_bad_row == "error" else QUARANTINE_KEPT].tolist()
        found = [check.faults(self.file, row, self.checked.form) for row in shown]
        if shown and self.on_bad_row == "error":
            self._refuse([fault for faults in found for fault in faults], len(bad))
        for row, faults in zip(shown, found, strict=True):
            reasons = (f"{f.field}: {f.what}" if f.field else f.what for f in faults)
            self._quarantine(row, ", ".join(reasons))

    def settle(self, reader: _Reader, at_most: int) -> None:
        """Encode the rows that may be too long: those of more than `at_most` bytes, or all."""
        faults: list[Fault] = []
        refused = 0
        for rows in _batches(self._unsure_rows(at_most)):
            for row, one in zip(rows, reader.encode(rows), strict=True):
                self._count(one)
                if one.problem is None:
                    if self.facts.tokens <= SETTLED_BYTES:
                        reader.keep(row, one)
                    continue
                is_long = self.on_long_row != "truncate" and one.truncated_tokens > 0
                policy = self.on_long_row if is_long else self.on_bad_row
                if policy == "error":
                    refused += 1
                    key = "on_long_row" if is_long else "on_bad_row"
                    what = f'{one.problem}; change the row, or set data.{key} = "skip"'
                    if len(faults) < FAULTS_SHOWN:
                        faults.append(Fault(self.file.where(row), "", what))
                    continue
                self.facts.long_rows += is_long
                self.facts.no_target_rows += not is_long
                self.left_out.append(row)
                self._quarantine(row, one.problem)
        self.file.check_unchanged()
        if faults:
            self._refuse(faults, refused)

    def usable_rows(self) -> np.ndarray | None:
        """Their numbers, uint32, or None for all."""
        usable = len(self.file) - len(self.checked.bad) - len(self.left_out)
        if not usable:
            raise _nothing_left(self.file)
        if usable == len(self.file):
            return None
        mask = self._good()
        mask[self.left_out] = False
        return np.flatnonzero(mask).astype(np.uint32)

    def _good(self) -> np.ndarray:
        mask = np.ones(len(self.file), bool)
        mask[self.checked.bad] = False
        return mask

    def _unsure_rows(self, at_most: int) -> np.ndarray:
        offsets = self.file.offsets
        if offsets[-1] - offsets[0] <= SETTLED_BYTES:
            return np.flatnonzero(self._good())
        lengths = self.file.byte_lengths
        rows = np.flatnonzero(self._good() & (lengths > at_most))
        if self.on_long_row == "error":
            return rows
        return rows[: np.searchsorted(np.cumsum(lengths[rows]), SETTLED_BYTES)]

    def _count(self, one: Encoded) -> None:
        facts = self.facts
        facts.encoded_rows += 1
        facts.control_rows += one.control_tokens > 0
        if one.problem is None:
            facts.tokens += len(one.tokens)
            facts.target_tokens += int(one.loss_mask.sum())
            facts.truncated_rows += one.truncated_tokens > 0
            facts.truncated_tokens += one.truncated_tokens

    def _quarantine(self, row: int, reason: str) -> None:
        if len(self.quarantined) < QUARANTINE_KEPT:
            self.quarantined.append(Quarantined(self.file.line(row), reason))

    def _refuse(self, faults: list[Fault], rows: int) -> None:
        """Stop, with at most `FAULTS_SHOWN` faults of the `rows` refused."""
        if len(faults) > FAULTS_SHOWN or rows > FAULTS_SHOWN:
            what = f"{plural(rows, 'row')} like these; correct them, or let the recipe skip them"
            faults = [*faults[: FAULTS_SHOWN - 1], Fault(str(self.file.path), "", what)]
        raise DataError(*faults)


def _nothing_left(file: RowFile) -> DataError:
    what = f"none of its {plural(len(file), 'row')} can be trained on; see `mlx-tune data`"
    return DataError(Fault(str(file.path), "", what))


def _batches(rows: np.ndarray) -> Iterator[list[int]]:
    for first in range(0, len(rows), _BATCH_ROWS):
        yield rows[first : first + _BATCH_ROWS].tolist()
