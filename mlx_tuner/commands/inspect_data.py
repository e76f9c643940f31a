"""What is in a file of training rows, as a recipe would see it: all of its rows are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_tuner.data.dataset import Dataset, open_dataset
from mlx_tuner.data.encode import Encoded, unwrap
from mlx_tuner.data.order import in_validation
from mlx_tuner.data.survey import histogram
from mlx_tuner.errors import Fault
from mlx_tuner.models import model as models
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.show.progress import Display
from mlx_tuner.training import assembly
from mlx_tuner.words import plural

_EXAMPLES = 3


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it."""

    line: int
    tokens: int
    target_tokens: int
    parts: list[tuple[str, bool]]
    """Its text, cut where targets begin and end, and whether a part is a target."""


@dataclass(frozen=True)
class FileFacts:
    """One file's rows: tokens after truncation, lengths before it."""

    dataset: Dataset
    """All of the file, surveyed to its end."""
    held_out_rows: int
    """Usable rows that are for validation, where the recipe holds out a fraction."""
    prefix_text: str
    """What all usable rows begin with."""
    shown: list[Shown]
    faults: list[Fault]
    """What must be fixed before a run, as far as it is shown."""
    fault_count: int
    """In how many rows it is."""

    @property
    def file(self) -> str:
        """Its path."""
        return str(self.dataset.file.path)

    @property
    def rows(self) -> int:
        """All of them."""
        return len(self.dataset.file)

    @property
    def usable_rows(self) -> int:
        """Those that can be trained on."""
        return len(self.dataset)

    @property
    def forms(self) -> dict[str, int]:
        """The form of the rows, and how many of it can be read."""
        form = self.dataset.file.form
        return {form: self.dataset.survey.good_rows} if form else {}

    @property
    def problems(self) -> Counter[str]:
        """Rows that can be read and not trained on, by reason."""
        return Counter(problem.kind for _, problem in self.dataset.survey.problems)

    @property
    def bad_rows(self) -> int:
        """Rows that cannot be read, or that the chat template refuses."""
        return len(self.dataset.file.bad) + self.problems["refused by the template"]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the rows that could be read, before truncation: int32."""
        lengths = self.dataset.survey.lengths
        return lengths[lengths > 0]

    def percentile(self, share: float) -> int:
        """The length that `share` % of the rows do not exceed."""
        return int(np.percentile(self.lengths, share, method="inverted_cdf"))

    @property
    def shared_prefix_tokens(self) -> int:
        """Tokens that all usable rows begin with, where there are several."""
        return len(self.dataset.survey.prefix) if self.usable_rows > 1 else 0

    def notes(self, max_seq_length: int) -> Iterator[str]:
        """What does not stop a run, but should be known."""
        problems, survey = self.problems, self.dataset.survey
        if problems["too long"]:
            rows = plural(problems["too long"], "row")
            yield f"{rows} longer than data.max_seq_length = {max_seq_length}"
        if self.bad_rows:
            yield f"{plural(self.bad_rows, 'row')} that cannot be read"
        if problems["without a target"]:
            yield f"{plural(problems['without a target'], 'row')} without a target token"
        yield from survey.notes()
        if survey.unused_fields:
            fields = survey.unused_fields.most_common(8)
            names = ", ".join(f"{name} ({rows:,})" for name, rows in fields)
            yield f"fields that are not trained on: {names}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        lengths, survey = self.lengths, self.dataset.survey
        return {
            "file": self.file,
            "rows": self.rows,
            "usable_rows": self.usable_rows,
            "forms": self.forms,
            "tokens": self.dataset.tokens,
            "target_tokens": self.dataset.target_tokens,
            "lengths": {
                "mean": float(lengths.mean()),
                "p50": self.percentile(50),
                "p95": self.percentile(95),
                "max": int(lengths.max()),
                "histogram": [
                    {"from": first, "to": last, "rows": rows}
                    for first, last, rows in histogram(lengths)
                ],
            }
            if len(lengths)
            else None,
            "shared_prefix_tokens": self.shared_prefix_tokens,
            "shared_prefix": self.prefix_text,
            "truncated_rows": survey.truncated_rows,
            "truncated_tokens": survey.truncated_tokens,
            "long_rows": self.problems["too long"],
            "bad_rows": self.bad_rows,
            "no_target_rows": self.problems["without a target"],
            "control_rows": survey.control_rows,
            "control_tokens": survey.control_tokens,
            "empty_answers": survey.empty_answers,
            "unused_fields": dict(survey.unused_fields),
            "shown": [vars(row) for row in self.shown],
        }


@dataclass(frozen=True)
class Repeats:
    """Rows whose content is that of a row before them, or of another file."""

    rows: int
    lines: list[tuple[int, int]]
    """The line of each of the first few, and the line that it repeats."""


@dataclass(frozen=True)
class Inspection:
    """A training file and its validation rows, in the recipe's batches."""

    model: str
    train: FileFacts
    valid: FileFacts | None
    repeats: Repeats
    """Within the training file."""
    leaks: Repeats | None
    """Validation rows that are training rows as well."""
    batch_size: int
    max_seq_length: int

    @property
    def train_rows(self) -> int:
        """Rows that an epoch trains on."""
        return self.train.usable_rows - self.train.held_out_rows

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that an epoch takes."""
        return schedule.steps_per_epoch(self.train_rows, self.batch_size)

    @property
    def faults(self) -> list[Fault]:
        """What must be fixed before a run, as far as it is shown."""
        return self.train.faults + (self.valid.faults if self.valid else [])

    @property
    def fault_count(self) -> int:
        """How many rows must be fixed before a run."""
        return self.train.fault_count + (self.valid.fault_count if self.valid else 0)

    def notes(self) -> Iterator[str]:
        """What does not stop a run, but should be known."""
        yield from self.train.notes(self.max_seq_length)
        if self.repeats.rows:
            lines = _in_words(self.repeats, "line {} is line {}")
            yield f"{plural(self.repeats.rows, 'row')} with the content of an earlier one: {lines}"
        if self.valid and self.leaks and self.leaks.rows:
            lines = _in_words(self.leaks, "its line {} is line {}")
            rows = f"{plural(self.leaks.rows, 'row')} of {self.valid.file}"
            yield f"{rows} also trained on, so that validation flatters: {lines}"
        if 0 < self.train_rows < self.batch_size:
            rows = plural(self.train_rows, "row")
            yield f"{rows}, fewer than train.batch_size = {self.batch_size}: one step an epoch"
        if self.valid:
            notes = self.valid.notes(self.max_seq_length)
            yield from (f"{self.valid.file}: {note}" for note in notes)

    def to_json(self) -> dict[str, Any]:
        """Everything, as one JSON object."""
        return {
            "model": self.model,
            **self.train.to_json(),
            "train_rows": self.train_rows,
            "held_out_rows": self.train.held_out_rows,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "max_seq_length": self.max_seq_length,
            "duplicates": vars(self.repeats),
            "validation": self.valid.to_json() if self.valid else None,
            "validation_duplicates": vars(self.leaks) if self.leaks else None,
            "notes": list(self.notes()),
            "faults": [str(fault) for fault in self.faults],
            "fault_count": self.fault_count,
        }


def inspect(recipe: Recipe, display: Display, *, show: int = 0) -> Inspection:
    """Read, check and encode every row of the recipe's data. Loads the tokenizer, no weights.

    Args:
        show: the number of rows, from the first on, whose text is kept.

    Raises:
        DataError: a file cannot be read at all, or changes meanwhile.
        ModelError: the tokenizer cannot encode the rows.
    """
    table = recipe.data
    train_file = assembly.local_file(table.train)
    valid_file = assembly.local_file(table.valid) if isinstance(table.valid, str) else None
    tokenizer = models.load_tokenizer(models.resolve(recipe.model.path, recipe.model.revision))
    encoder = assembly.encoder(table, tokenizer)

    def opened(path: Path, limit: int | None = None) -> Dataset:
        return open_dataset(
            path,
            encoder,
            limit=limit,
            on_bad_row=table.on_bad_row,
            surveyed_rows=None,
            refuse=False,
            task=display.task,
        )

    train = opened(train_file, table.limit)
    valid = opened(valid_file) if valid_file else None
    return Inspection(
        model=recipe.model.path,
        train=_facts(train, recipe, tokenizer, show, table.valid),
        valid=_facts(valid, recipe, tokenizer) if valid is not None else None,
        repeats=_repeats(train),
        leaks=_leaks(valid, train) if valid is not None else None,
        batch_size=recipe.train.batch_size,
        max_seq_length=table.max_seq_length,
    )


def _facts(
    dataset: Dataset,
    recipe: Recipe,
    tokenizer: Any,
    show: int = 0,
    held_out: str | float | None = None,
) -> FileFacts:
    """A file's facts; there must be rows to train on and, if a fraction is held out, for both."""
    faults, count = dataset.faults.shown(dataset.file.path), dataset.faults.rows
    fraction = held_out if isinstance(held_out, float) else 0.0
    seed = recipe.train.seed
    out = int(in_validation(dataset.digests, fraction, seed).sum()) if fraction else 0
    field, what = "", ""
    if not len(dataset):
        what = "" if count else "no row is left to train on"
    elif fraction and out in (0, len(dataset)):
        side = "training" if out else "validation"
        field = "data.valid"
        what = f"{fraction:g} leaves no row for {side}; name a file, or use more rows"
    if what:
        faults, count = [*faults, Fault(str(dataset.file.path), field, what)], count + 1

    def text(tokens: np.ndarray) -> str:
        return unwrap(tokenizer).decode(tokens, clean_up_tokenization_spaces=False)

    bad = set(dataset.file.bad[:show].tolist())
    rows = [row for row in range(min(show, len(dataset.file))) if row not in bad]
    encoded = dataset.encoded(rows)

    def shown(row: int, one: Encoded) -> Shown:
        tokens, mask = one.tokens, one.loss_mask
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
        parts = [(text(tokens[a:b]), bool(mask[a])) for a, b in pairwise(edges) if b > a]
        return Shown(dataset.line(row), len(tokens), int(mask.sum()), parts)

    return FileFacts(
        dataset,
        out,
        text(dataset.survey.prefix),
        list(map(shown, rows, encoded)),
        faults,
        count,
    )


def _repeats(dataset: Dataset) -> Repeats:
    """Rows with the content of an earlier row of the file."""
    numbers, digests = _content(dataset)
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(digests)))
    line = dataset.line
    lines = [
        (line(int(numbers[i])), line(int(numbers[first[which[i]]]))) for i in again[:_EXAMPLES]
    ]
    return Repeats(len(again), lines)


def _leaks(valid: Dataset, train: Dataset) -> Repeats:
    """Validation rows with the content of a training row."""
    numbers, digests = _content(valid)
    train_numbers, train_digests = _content(train)
    leaked = np.flatnonzero(np.isin(digests, train_digests))
    lines = [
        (
            valid.line(int(numbers[i])),
            train.line(int(train_numbers[int((train_digests == digests[i]).argmax())])),
        )
        for i in leaked[:_EXAMPLES]
    ]
    return Repeats(len(leaked), lines)


def _content(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows that can be read, and their digests."""
    numbers = dataset.survey.rows
    return numbers, dataset.file.digests[numbers]


def _in_words(repeats: Repeats, pattern: str) -> str:
    more = ", …" if repeats.rows > len(repeats.lines) else ""
    return ", ".join(pattern.format(*lines) for lines in repeats.lines) + more
