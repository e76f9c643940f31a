"""Measures rows as a model sees them: lengths, targets, shared prefix, and which are unusable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from mlx_tuner.data.encode import Encoded, Problem
from mlx_tuner.data.rows import ParsedRow
from mlx_tuner.words import plural

SURVEYED_ROWS = 20_000
"""Rows, from the first on, that are looked at before the first step."""

BATCH_ROWS = 256
"""Rows that are encoded at once."""

_FIELD_NAMES_KEPT = 100
_BINS = 12

Read = Callable[[Sequence[int]], list[tuple[ParsedRow, Encoded]]]
"""Gives rows of a file by their numbers."""


@dataclass(frozen=True)
class Survey:
    """Facts of the surveyed rows of a file. Arrays are of shape (surveyed,), in the rows' order."""

    good_rows: int
    """Rows of the file that could be surveyed: those that can be read."""
    rows: np.ndarray
    """Their numbers, int64."""
    lengths: np.ndarray
    """Tokens of a row before it is cut, int32."""
    tokens: np.ndarray
    """Tokens that are left of it, int32."""
    targets: np.ndarray
    """… and how many of those are targets, int32."""
    usable: np.ndarray
    """Whether a row can be trained on, bool."""
    prefix: np.ndarray
    """Token ids that all usable rows begin with, int32, shape (n,)."""
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    """The rows that cannot be trained on, and why."""
    control_rows: int = 0
    """Rows that spell control tokens, which are taken as text."""
    control_tokens: int = 0
    empty_answers: int = 0
    unused_fields: Counter[str] = field(default_factory=Counter)
    """Fields that are not trained on, and in how many rows they are."""

    @property
    def is_complete(self) -> bool:
        """Whether every row was looked at, so that its figures are those of the file."""
        return len(self.rows) == self.good_rows

    @property
    def longest(self) -> int:
        """Tokens of the longest row that is trained on."""
        return int(self.tokens[self.usable].max(initial=0))

    @property
    def truncated_rows(self) -> int:
        """Rows that are trained on without their ends."""
        return int(np.count_nonzero(self._lost))

    @property
    def truncated_tokens(self) -> int:
        """Tokens of those ends."""
        return int(self._lost.sum())

    @property
    def _lost(self) -> np.ndarray:
        return (self.lengths - self.tokens)[self.usable]

    def of(self, rows: np.ndarray) -> Survey:
        """Lengths and targets of these usable rows alone; counts stay those of the file."""
        chosen = self.usable & np.isin(self.rows, rows)
        arrays = ("rows", "lengths", "tokens", "targets", "usable")
        good = self.good_rows - len(self.rows) + int(chosen.sum())
        parts = {name: getattr(self, name)[chosen] for name in arrays}
        return replace(self, good_rows=good, **parts)

    def notes(self) -> Iterator[str]:
        """What does not stop a run, but should be known; a sentence each."""
        of = "" if self.is_complete else f"of the first {plural(len(self.rows), 'row')}, "
        if self.truncated_rows:
            rows, lost = plural(self.truncated_rows, "row"), plural(self.truncated_tokens, "token")
            enough = f"data.max_seq_length = {self.lengths[self.usable].max()} keeps all"
            yield f"{of}{rows} cut: {lost} and the end of the turn are lost; {enough}"
        if self.control_rows:
            rows = plural(self.control_rows, "row")
            tokens = plural(self.control_tokens, "control token")
            yield f"{of}{rows} with {tokens} in its content, which are taken as text"
        if self.empty_answers:
            yield f"{of}{plural(self.empty_answers, 'row')} with an empty answer"


def survey(read: Read, rows: np.ndarray, good_rows: int, advance: Callable[[int], None]) -> Survey:
    """Encode `rows` and count.

    Args:
        rows: numbers of good rows of a file, int64.
        good_rows: how many of them the file has in all.
        advance: called with the number of rows done since the last call.
    """
    columns = np.zeros((3, len(rows)), np.int32)
    usable = np.zeros(len(rows), np.bool_)
    problems: list[tuple[int, Problem]] = []
    counts: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    prefix: np.ndarray | None = None
    for first in range(0, len(rows), BATCH_ROWS):
        batch = rows[first : first + BATCH_ROWS].tolist()
        for i, (row, one) in enumerate(read(batch), first):
            columns[:, i] = one.length, len(one.tokens), np.count_nonzero(one.loss_mask)
            counts["rows"] += one.control_tokens > 0
            counts["tokens"] += one.control_tokens
            counts["empty"] += _has_empty_answer(row)
            if row.unused and len(unused) < _FIELD_NAMES_KEPT:
                unused.update(row.unused)
            if one.problem:
                problems.append((batch[i - first], one.problem))
            else:
                usable[i] = True
                prefix = _common(prefix, one.tokens)
        advance(len(batch))
    return Survey(
        good_rows,
        rows,
        columns[0],
        columns[1],
        columns[2],
        usable,
        np.zeros(0, np.int32) if prefix is None else prefix.copy(),
        problems,
        counts["rows"],
        counts["tokens"],
        counts["empty"],
        unused,
    )


def _common(prefix: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
    if prefix is None:
        return tokens
    length = min(len(prefix), len(tokens))
    same = prefix[:length] == tokens[:length]
    return prefix[:length] if same.all() else prefix[: int(same.argmin())]


def _has_empty_answer(row: ParsedRow) -> bool:
    return any(
        message["role"] == "assistant"
        and not message.get("content")
        and not message.get("tool_calls")
        for message in row.messages
    )


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(first length, last length, rows) of up to a dozen equal ranges, from the shortest row on.

    A few rows that are far longer than the rest share the last range, which is then longer.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    shown = min(longest, 2 * int(np.percentile(lengths, 95)))
    width = next(w for w in _round_numbers() if w * _BINS >= shown)
    edges = list(range((shortest - 1) // width * width, shown + width, width))
    edges[-1] = max(edges[-1], longest)
    counts, _ = np.histogram(lengths, np.array(edges) + 0.5)
    return [
        (first + 1, last, int(rows))
        for (first, last), rows in zip(pairwise(edges), counts, strict=True)
    ]


def _round_numbers() -> Iterator[int]:
    """1 2 5 10 20 50 100 …"""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
