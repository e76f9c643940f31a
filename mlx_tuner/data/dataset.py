"""The rows of a file as examples to train on: checked, surveyed, encoded when they are asked for.

Every row is read and checked when a file is opened, and the first ones are encoded once to learn
what they are (`survey`). What cannot be used is refused or left out then, as the policies say, so
that `len(dataset)` is fixed, and the order of an epoch is a function of it. A row beyond the survey
that turns out unusable when its step comes is left out of that step, and named.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from mlx_tuner.data.encode import Encoded, Encoder, Problem
from mlx_tuner.data.order import in_validation
from mlx_tuner.data.rows import ParsedRow
from mlx_tuner.data.scan import RowFile
from mlx_tuner.data.sources import Source
from mlx_tuner.data.survey import SURVEYED_ROWS, Survey, survey
from mlx_tuner.engine.batching import Example
from mlx_tuner.errors import FAULTS_SHOWN, DataError, Fault
from mlx_tuner.words import plural

BadRowPolicy = Literal["error", "skip"]

ShowTask = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows that something goes on, up to a total; yields what to call with each part of it done."""

QUARANTINE_KEPT = 1000
"""Rows left out whose reasons are kept; those after them are only counted."""

TOLD_FROM_BYTES = 4 << 20
"""Nothing is shown of a smaller file, which is open at once."""

UNREADABLE = "cannot be read"


def untold(description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A `ShowTask` that shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Quarantined:
    """A row that is left out, and why."""

    line: int
    reason: str

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"line": self.line, "reason": self.reason}, ensure_ascii=False)


@dataclass
class LeftOut:
    """The rows of a file that are not trained on."""

    first: list[Quarantined] = field(default_factory=list)
    """The first `QUARANTINE_KEPT` of them."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many there are for each kind of reason."""
    late: int = 0
    """How many of them turned out unusable only when their step came."""

    @property
    def notes(self) -> list[str]:
        """What the user should know of them: a sentence, or none."""
        if not self.counts:
            return []
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items())
        return [f"{plural(self.counts.total(), 'row')} left out: {reasons}"]

    def add(self, line: int, kind: str, reason: str) -> None:
        """Count a row in."""
        self.counts[kind] += 1
        if len(self.first) < QUARANTINE_KEPT:
            self.first.append(Quarantined(line, reason))


@dataclass
class Faults:
    """What must be mended before a run: the first faults, and how many rows have any."""

    first: list[Fault] = field(default_factory=list)
    """One more than are shown, where there are more."""
    rows: int = 0

    def add(self, *faults: Fault) -> None:
        """Count a row in."""
        self.rows += 1
        self.first += faults[: max(FAULTS_SHOWN + 1 - len(self.first), 0)]

    def shown(self, path: Path) -> list[Fault]:
        """The first faults, in place of the last one how many rows there are, if not all fit."""
        if len(self.first) <= FAULTS_SHOWN:
            return self.first
        what = f"{plural(self.rows, 'row')} like these; correct them, or let the recipe skip them"
        return [*self.first[: FAULTS_SHOWN - 1], Fault(str(path), "", what)]

    def refuse(self, path: Path) -> None:
        """Raise them, if there are any."""
        if self.first:
            raise DataError(*self.shown(path))


def open_dataset(
    path: Path,
    encoder: Encoder,
    *,
    limit: int | None = None,
    on_bad_row: BadRowPolicy = "error",
    surveyed_rows: int | None = SURVEYED_ROWS,
    refuse: bool = True,
    task: ShowTask = untold,
) -> Dataset:
    """Open a file of rows, check all of them and survey the first.

    Args:
        limit: use the first rows only.
        on_bad_row: what a row that cannot be read or has no target does: "error" or "skip".
        surveyed_rows: how many; None for all, as it is where long rows are errors.
        refuse: whether to raise the faults of rows; else they are kept in the dataset's `faults`.
        task: shows what is under way where it takes a while.

    Raises:
        DataError: the file is none of rows, or rows are refused, or none is left.
        ModelError: the tokenizer cannot encode the rows.
    """
    source = Source(path)
    if source.size < TOLD_FROM_BYTES:
        task = untold
    with task(f"checking {path.name}", source.size) as advance:
        file = RowFile(source, limit, advance)
    reader, faults = _Reader(file, encoder), Faults()
    _judge_bad_rows(reader, on_bad_row, faults)
    if refuse:
        faults.refuse(path)
    if encoder.on_long_row == "error":
        surveyed_rows = None
    good = len(file) - len(file.bad)
    chosen = _good_rows(file, surveyed_rows)
    with task(f"surveying {path.name}", len(chosen)) as advance:
        found = survey(reader.read, chosen, good, advance)
    file.source.check_unchanged()
    _judge_problems(reader, found.problems, on_bad_row, faults)
    unusable = [*file.bad.tolist(), *(row for row, _ in found.problems)]
    rows = None
    if unusable:
        mask = np.ones(len(file), np.bool_)
        mask[unusable] = False
        rows = np.flatnonzero(mask).astype(np.uint32)
    dataset = Dataset(reader, rows, found, faults)
    if refuse:
        faults.refuse(path)
        if not len(dataset) or (found.problems and not found.usable.any()):
            of = f"its {plural(len(file), 'row')}"
            of = of if found.is_complete else f"its first {plural(len(found.rows), 'row')}"
            what = f"none of {of} can be trained on; see `mlx-tune data`"
            raise DataError(Fault(str(path), "", what))
    return dataset


def _good_rows(file: RowFile, at_most: int | None) -> np.ndarray:
    if not len(file.bad):
        return np.arange(len(file) if at_most is None else min(len(file), at_most))
    mask = np.ones(len(file), np.bool_)
    mask[file.bad] = False
    return np.flatnonzero(mask)[:at_most]


def _judge_bad_rows(reader: _Reader, policy: BadRowPolicy, faults: Faults) -> None:
    file = reader.file
    shown = FAULTS_SHOWN + 1 if policy == "error" else QUARANTINE_KEPT
    for row in file.bad[:shown].tolist():
        found = file.faults(row)
        if policy == "error":
            faults.add(*found)
        else:
            reason = ", ".join(f"{f.field}: {f.what}" if f.field else f.what for f in found)
            reader.left_out.add(file.line(row), UNREADABLE, reason)
    more = max(len(file.bad) - shown, 0)
    if policy == "error":
        faults.rows += more
    elif more:
        reader.left_out.counts[UNREADABLE] += more


def _judge_problems(
    reader: _Reader, problems: list[tuple[int, Problem]], policy: BadRowPolicy, faults: Faults
) -> None:
    for row, problem in problems:
        is_long = problem.kind == "too long"
        if (reader.encoder.on_long_row if is_long else policy) == "error":
            key = "on_long_row" if is_long else "on_bad_row"
            what = f'{problem.what}; change the row, or set data.{key} = "skip"'
            faults.add(Fault(reader.file.where(row), "", what))
        else:
            reader.left_out.add(reader.file.line(row), problem.kind, problem.what)


class Dataset:
    """Examples by position, 0 ≤ position < len. Several threads may ask for them."""

    def __init__(
        self, reader: _Reader, rows: np.ndarray | None, found: Survey, faults: Faults
    ) -> None:
        self.file = reader.file
        self.survey = found
        self.faults = faults
        """Of the file's rows, where they were not raised."""
        self.left_out = reader.left_out
        """Of the whole file, also where this is a part of it."""
        self.origin = ""
        """Which file was taken, where the user named none."""
        self._reader = reader
        self._rows = rows

    def __len__(self) -> int:
        """Usable rows, as far as is known."""
        return len(self.file) if self._rows is None else len(self._rows)

    def batches(self, steps: Sequence[Sequence[int]]) -> list[list[Example]]:
        """The examples at the positions of each of `steps`, in their order.

        A row that cannot be trained on after all is left out.

        Raises:
            DataError: the file has changed.
        """
        self.file.source.check_unchanged()
        rows = [self._row(position) for step in steps for position in step]
        examples = iter(self._reader.examples(rows))
        return [[one for one in islice(examples, len(step)) if one] for step in steps]

    def examples(self, positions: Sequence[int]) -> list[Example]:
        """The examples at these positions, as `batches` gives them."""
        return self.batches([positions])[0]

    def encoded(self, rows: Sequence[int]) -> list[Encoded]:
        """Rows by their numbers in the file, whether they can be trained on or not."""
        return [one for _, one in self._reader.read(rows)]

    def line(self, row: int) -> int:
        """The line of the file, from 1, that row number `row` (`Example.row`) begins on."""
        return self.file.line(row)

    @property
    def digests(self) -> np.ndarray:
        """64 bits of a hash of each usable row's content: uint64, shape (len,)."""
        return self.file.digests if self._rows is None else self.file.digests[self._rows]

    @property
    def fingerprint(self) -> str:
        """Changes with the content of the usable rows and with their order."""
        return hashlib.blake2b(self.digests.data, digest_size=16).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of all rows, from the surveyed ones."""
        return self._in_all(self.survey.tokens)

    @property
    def target_tokens(self) -> int:
        """Target tokens of all rows, from the surveyed ones."""
        return self._in_all(self.survey.targets)

    def _in_all(self, counts: np.ndarray) -> int:
        usable = counts[self.survey.usable]
        total = int(usable.sum())
        return total if self.survey.is_complete else round(total / max(len(usable), 1) * len(self))

    @property
    def rows_per_second(self) -> float | None:
        """Rows of the file read and encoded in a second of doing so."""
        reader = self._reader
        return reader.encoded_rows / reader.seconds if reader.encoded_rows else None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the file, a sentence each."""
        return [*filter(None, [self.origin]), *self.left_out.notes, *self.survey.notes()]

    def part(self, chosen: np.ndarray) -> Dataset:
        """The rows at which `chosen` (bool, shape (len,)) is true, in their order."""
        rows = np.flatnonzero(chosen).astype(np.uint32)
        rows = rows if self._rows is None else self._rows[rows]
        part = Dataset(self._reader, rows, self.survey.of(rows), self.faults)
        part.origin = self.origin
        return part

    def _row(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        return position if self._rows is None else int(self._rows[position])


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
        raise DataError(Fault(str(dataset.file.path), "data.valid", what))
    return train, valid


def shared_rows(train: Dataset, valid: Dataset) -> int:
    """Rows of `valid` that are in `train` as well, by the 64-bit hash of their content."""
    return int(np.isin(valid.digests, train.digests).sum())


class _Reader:
    """Reads and encodes rows, and keeps account of those that turn out unusable."""

    def __init__(self, file: RowFile, encoder: Encoder) -> None:
        self.file = file
        self.encoder = encoder
        self.left_out = LeftOut()
        self.encoded_rows = 0
        self.seconds = 0.0
        """Time that encoding them has taken."""
        self._known_late: set[int] = set()

    def read(self, rows: Sequence[int]) -> list[tuple[ParsedRow, Encoded]]:
        """Each of `rows`, and as the model sees it."""
        start = time.perf_counter()
        parsed = [self.file.parsed(row) for row in rows]
        encoded = self.encoder.encode(parsed)
        self.encoded_rows += len(rows)
        self.seconds += time.perf_counter() - start
        return list(zip(parsed, encoded, strict=True))

    def examples(self, rows: Sequence[int]) -> list[Example | None]:
        """Each of `rows` to be trained on; None for one that cannot be."""
        found = self.read(rows)
        for row, (_, one) in zip(rows, found, strict=True):
            if one.problem and row not in self._known_late:
                self._known_late.add(row)
                self.left_out.late += 1
                self.left_out.add(self.file.line(row), one.problem.kind, one.problem.what)
        return [
            None if one.problem else Example(one.tokens, one.loss_mask, row)
            for row, (_, one) in zip(rows, found, strict=True)
        ]
