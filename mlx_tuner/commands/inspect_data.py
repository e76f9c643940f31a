"""What is in a file of training rows, as a recipe would see it: one pass over each file.

It remembers 12 bytes a row: how long the row is, and a hash of its content.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mlx_tuner import assembly
from mlx_tuner.data import check
from mlx_tuner.data.encode import Encoded, Encoder, unwrap
from mlx_tuner.data.index import RowFile, open_rows
from mlx_tuner.data.order import in_validation
from mlx_tuner.data.rows import Form, Row, parse_row
from mlx_tuner.errors import DataError, Fault
from mlx_tuner.models import model as models
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe, load_recipe, parse_recipe
from mlx_tuner.show.progress import Display
from mlx_tuner.words import plural

DEFAULT_MODEL = "builtin:tiny-qwen"
"""Whose tokenizer counts where no model is named."""

BATCH_ROWS = 256
"""Rows that are tokenised at once."""

FAULTS_KEPT = 20
"""Faults of a file that are kept; those after them are only counted."""

_EXAMPLES = 3
_BINS = 12
_FIELD_NAMES_KEPT = 100


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it."""

    line: int
    tokens: int
    target_tokens: int
    parts: list[tuple[str, bool]]
    """Its text, cut where targets begin and end, and whether a part is a target."""


@dataclass
class FileFacts:
    """One file's rows: tokens as they are trained on, lengths as they are written."""

    file: str
    rows: int = 0
    usable_rows: int = 0
    held_out_rows: int = 0
    """Usable rows that are for validation, where the recipe holds out a fraction."""
    forms: Counter[Form] = field(default_factory=Counter)
    tokens: int = 0
    target_tokens: int = 0
    row_lengths: array[int] = field(default_factory=lambda: array("i"))
    """Tokens of each row before truncation; 0 for one that could not be read."""
    digests: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of each row's content."""
    truncated_rows: int = 0
    truncated_tokens: int = 0
    bad_rows: int = 0
    """Rows that could not be read, or that the chat template refuses."""
    long_rows: int = 0
    """Rows left out or refused for their length."""
    no_target_rows: int = 0
    control_rows: int = 0
    control_tokens: int = 0
    empty_answers: int = 0
    unused_fields: Counter[str] = field(default_factory=Counter)
    prefix: np.ndarray | None = None
    """Token ids that all usable rows begin with."""
    prefix_text: str = ""
    shown: list[Shown] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    fault_count: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the rows that could be read, before truncation: int32."""
        lengths = np.frombuffer(self.row_lengths, np.int32)
        return lengths[lengths > 0]

    def content(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the rows that could be read, and their digests."""
        numbers = np.flatnonzero(np.frombuffer(self.row_lengths, np.int32))
        return numbers, np.frombuffer(self.digests, np.uint64)[numbers]

    def percentile(self, share: float) -> int:
        """The length that `share` % of the rows do not exceed."""
        return int(np.percentile(self.lengths, share, method="inverted_cdf"))

    @property
    def shared_prefix_tokens(self) -> int:
        """Tokens that all usable rows begin with, where there are several."""
        return len(self.prefix) if self.prefix is not None and self.usable_rows > 1 else 0

    def add_unread(self) -> None:
        """Count a row that could not be read."""
        self.bad_rows += 1
        self.row_lengths.append(0)
        self.digests.append(0)

    def add_faults(self, *faults: Fault) -> None:
        """Count faults, and keep the first ones."""
        self.fault_count += len(faults)
        self.faults += faults[: max(FAULTS_KEPT - len(self.faults), 0)]


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
        """What must be fixed before a run, as far as it is kept."""
        return self.train.faults + (self.valid.faults if self.valid else [])

    @property
    def fault_count(self) -> int:
        """How much must be fixed before a run."""
        return self.train.fault_count + (self.valid.fault_count if self.valid else 0)

    def notes(self) -> Iterator[str]:
        """What does not stop a run, but should be known."""
        yield from self._notes_on(self.train)
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
            yield from (f"{self.valid.file}: {note}" for note in self._notes_on(self.valid))

    def _notes_on(self, facts: FileFacts) -> Iterator[str]:
        if facts.truncated_rows:
            rows, tokens = plural(facts.truncated_rows, "row"), f"{facts.truncated_tokens:,} tokens"
            enough = f"data.max_seq_length = {facts.lengths.max()} keeps all"
            yield f"{rows} cut: {tokens} and the end of the turn are lost; {enough}"
        if facts.long_rows:
            rows = plural(facts.long_rows, "row")
            yield f"{rows} longer than data.max_seq_length = {self.max_seq_length}"
        if facts.bad_rows:
            yield f"{plural(facts.bad_rows, 'row')} that cannot be read"
        if facts.no_target_rows:
            yield f"{plural(facts.no_target_rows, 'row')} without a target token"
        if facts.control_rows:
            rows = plural(facts.control_rows, "row")
            tokens = plural(facts.control_tokens, "control token")
            yield f"{rows} with {tokens} in its content, which are taken as text"
        if facts.empty_answers:
            yield f"{plural(facts.empty_answers, 'row')} with an empty answer"
        if facts.unused_fields:
            names = ", ".join(
                f"{name} ({rows:,})" for name, rows in facts.unused_fields.most_common(8)
            )
            yield f"fields that are not trained on: {names}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as one JSON object."""
        return {
            "model": self.model,
            **self._json_of(self.train),
            "train_rows": self.train_rows,
            "held_out_rows": self.train.held_out_rows,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "max_seq_length": self.max_seq_length,
            "duplicates": vars(self.repeats),
            "validation": self._json_of(self.valid) if self.valid else None,
            "validation_duplicates": vars(self.leaks) if self.leaks else None,
            "notes": list(self.notes()),
            "faults": [str(fault) for fault in self.faults],
            "fault_count": self.fault_count,
        }

    def _json_of(self, facts: FileFacts) -> dict[str, Any]:
        lengths = facts.lengths
        return {
            "file": facts.file,
            "rows": facts.rows,
            "usable_rows": facts.usable_rows,
            "forms": dict(facts.forms),
            "tokens": facts.tokens,
            "target_tokens": facts.target_tokens,
            "lengths": {
                "mean": float(lengths.mean()),
                "p50": facts.percentile(50),
                "p95": facts.percentile(95),
                "max": int(lengths.max()),
                "histogram": [
                    {"from": first, "to": last, "rows": rows}
                    for first, last, rows in histogram(lengths)
                ],
            }
            if len(lengths)
            else None,
            "shared_prefix_tokens": facts.shared_prefix_tokens,
            "shared_prefix": facts.prefix_text,
            "truncated_rows": facts.truncated_rows,
            "truncated_tokens": facts.truncated_tokens,
            "long_rows": facts.long_rows,
            "bad_rows": facts.bad_rows,
            "no_target_rows": facts.no_target_rows,
            "control_rows": facts.control_rows,
            "control_tokens": facts.control_tokens,
            "empty_answers": facts.empty_answers,
            "unused_fields": dict(facts.unused_fields),
            "shown": [vars(row) for row in facts.shown],
        }


def recipe_for(
    file: str,
    *,
    recipe: Path | None,
    model: str | None,
    valid: str | None,
    overrides: Sequence[str],
) -> Recipe:
    """The recipe that `file` is seen through: `recipe`'s other keys, or the defaults.

    Raises:
        RecipeError: the recipe or an override is wrong.
    """
    settings = [f"data.train={_toml(file)}"]
    if model is not None:
        settings.append(f"model.path={_toml(model)}")
    if valid is not None:
        settings.append(f"data.valid={valid if _is_number(valid) else _toml(valid)}")
    if recipe is not None:
        return load_recipe(recipe, [*overrides, *settings], check_paths=False)
    text = f'[model]\npath = "{DEFAULT_MODEL}"\n[train]\nepochs = 1\n'
    return parse_recipe(text, source="", folder=Path.cwd(), overrides=[*overrides, *settings])


def _toml(text: str) -> str:
    """A TOML string: a path may look like any other TOML value."""
    return json.dumps(text, ensure_ascii=False)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def inspect(recipe: Recipe, display: Display, *, show: int = 0) -> Inspection:
    """Read, check and encode every row of the recipe's data. Loads the tokenizer, no weights.

    Args:
        show: the number of rows, from the first on, whose text is kept.

    Raises:
        DataError: a file cannot be read at all, or changes meanwhile.
        ModelError: the tokenizer cannot encode the rows.
    """
    table = recipe.data
    with ExitStack() as files:
        train_rows = files.enter_context(
            open_rows(assembly.local_file(table.train), limit=table.limit)
        )
        valid_rows = None
        if isinstance(table.valid, str):
            valid_rows = files.enter_context(open_rows(assembly.local_file(table.valid)))
        folder = models.resolve(recipe.model.path, recipe.model.revision)
        reader = _Reader(models.load_tokenizer(folder), recipe, display)
        train = reader.read(train_rows, show)
        valid = reader.read(valid_rows, 0) if valid_rows else None
        return Inspection(
            model=recipe.model.path,
            train=train,
            valid=valid,
            repeats=_repeats(train, train_rows),
            leaks=_leaks(valid, valid_rows, train, train_rows) if valid and valid_rows else None,
            batch_size=recipe.train.batch_size,
            max_seq_length=table.max_seq_length,
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


class _Reader:
    """Reads, checks, encodes and counts the rows of files."""

    def __init__(self, tokenizer: Any, recipe: Recipe, display: Display) -> None:
        table = recipe.data
        self._tokenizer = unwrap(tokenizer)
        self._recipe = recipe
        self._table = table
        self._display = display
        self._encoder = Encoder(
            tokenizer,
            mask_prompt=table.mask_prompt,
            max_seq_length=table.max_seq_length,
            system_prompt=table.system_prompt,
            on_long_row=table.on_long_row,
        )

    def read(self, rows: RowFile, show: int) -> FileFacts:
        """Facts of all `rows`, and the text of the first `show`."""
        facts = FileFacts(str(rows.path))
        with self._display.task(f"reading {rows.path.name}", len(rows)) as advance:
            for start in range(0, len(rows), BATCH_ROWS):
                numbers = range(start, min(start + BATCH_ROWS, len(rows)))
                parsed = [self._parse(rows, i, facts) for i in numbers]
                encoded = iter(self._encoder.encode([row for row in parsed if row]))
                for i, row in zip(numbers, parsed, strict=True):
                    if row is None:
                        facts.add_unread()
                        continue
                    self._count(facts, row, one := next(encoded), rows.where(i))
                    if i < show:
                        facts.shown.append(self._shown(one, rows.line(i)))
                advance(len(numbers))
        rows.check_unchanged()
        facts.rows = len(rows)
        if facts.prefix is not None:
            facts.prefix_text = self._text(facts.prefix)
        self._check_sides(facts)
        return facts

    def _check_sides(self, facts: FileFacts) -> None:
        """There must be rows to train on and, where a fraction is held out, to validate on."""
        fraction = self._recipe.data.valid
        if not facts.usable_rows:
            if not facts.fault_count:
                facts.add_faults(Fault(facts.file, "", "no row is left to train on"))
        elif isinstance(fraction, float) and facts.held_out_rows in (0, facts.usable_rows):
            side = "training" if facts.held_out_rows else "validation"
            what = f"{fraction:g} leaves no row for {side}; name a file, or use more rows"
            facts.add_faults(Fault(facts.file, "data.valid", what))

    def _parse(self, rows: RowFile, number: int, facts: FileFacts) -> Row | None:
        faults: tuple[Fault, ...]
        try:
            row = parse_row(rows[number], where=rows.where(number))
        except DataError as error:
            faults = error.faults
        else:
            facts.forms[row.form] += 1
            first = next(iter(facts.forms))
            if row.form == first:
                return row
            faults = check.faults(rows, number, first)
        if self._table.on_bad_row == "error":
            facts.add_faults(*faults)
        return None

    def _count(self, facts: FileFacts, row: Row, encoded: Encoded, where: str) -> None:
        facts.digests.append(int.from_bytes(row.digest(), "little"))
        facts.control_rows += encoded.control_tokens > 0
        facts.control_tokens += encoded.control_tokens
        facts.empty_answers += _has_empty_answer(row)
        if row.unused and len(facts.unused_fields) < _FIELD_NAMES_KEPT:
            facts.unused_fields.update(row.unused)
        cut = encoded.truncated_tokens if self._table.on_long_row == "truncate" else 0
        facts.row_lengths.append(len(encoded.tokens) + cut)
        if encoded.problem:
            self._count_problem(facts, encoded, where)
            return
        facts.usable_rows += 1
        facts.held_out_rows += self._is_held_out(row)
        facts.tokens += len(encoded.tokens)
        facts.target_tokens += int(encoded.loss_mask.sum())
        facts.truncated_rows += cut > 0
        facts.truncated_tokens += cut
        facts.prefix = _common_prefix(facts.prefix, encoded.tokens)

    def _is_held_out(self, row: Row) -> bool:
        """Whether a row of the training file is for validation."""
        fraction = self._recipe.data.valid
        if not isinstance(fraction, float):
            return False
        digest = np.array([check.digest(row.content())], np.uint32)
        return bool(in_validation(digest, fraction, self._recipe.train.seed)[0])

    def _count_problem(self, facts: FileFacts, encoded: Encoded, where: str) -> None:
        table = self._table
        if encoded.truncated_tokens and table.on_long_row != "truncate":
            facts.long_rows += 1
            policy, advice = table.on_long_row, 'raise it, or set data.on_long_row = "truncate"'
        elif len(encoded.tokens):
            facts.no_target_rows += 1
            policy, advice = table.on_bad_row, 'raise it, or set data.on_bad_row = "skip"'
        else:
            facts.bad_rows += 1
            policy, advice = table.on_bad_row, 'correct it, or set data.on_bad_row = "skip"'
        if policy == "error":
            facts.add_faults(Fault(where, "", f"{encoded.problem}; {advice}"))

    def _shown(self, encoded: Encoded, line: int) -> Shown:
        tokens, mask = encoded.tokens, encoded.loss_mask
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
        parts = [
            (self._text(tokens[start:stop]), bool(mask[start])) for start, stop in pairwise(edges)
        ]
        return Shown(line, len(tokens), int(mask.sum()), parts)

    def _text(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _common_prefix(prefix: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
    if prefix is None:
        return tokens
    length = min(len(prefix), len(tokens))
    same = prefix[:length] == tokens[:length]
    return prefix[:length] if same.all() else prefix[: int(same.argmin())]


def _has_empty_answer(row: Row) -> bool:
    return any(
        message["role"] == "assistant"
        and not message.get("content")
        and not message.get("tool_calls")
        for message in row.messages
    )


def _repeats(facts: FileFacts, rows: RowFile) -> Repeats:
    """Rows with the content of an earlier row of the file."""
    numbers, digests = facts.content()
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(digests)))
    pairs = [(numbers[i], numbers[first[which[i]]]) for i in again[:_EXAMPLES]]
    return Repeats(len(again), [(rows.line(int(i)), rows.line(int(j))) for i, j in pairs])


def _leaks(valid: FileFacts, valid_rows: RowFile, train: FileFacts, train_rows: RowFile) -> Repeats:
    """Validation rows with the content of a training row."""
    numbers, digests = valid.content()
    train_numbers, train_digests = train.content()
    leaked = np.flatnonzero(np.isin(digests, train_digests))
    pairs = [
        (numbers[i], train_numbers[int((train_digests == digests[i]).argmax())])
        for i in leaked[:_EXAMPLES]
    ]
    lines = [(valid_rows.line(int(i)), train_rows.line(int(j))) for i, j in pairs]
    return Repeats(len(leaked), lines)


def _in_words(repeats: Repeats, pattern: str) -> str:
    more = ", …" if repeats.rows > len(repeats.lines) else ""
    return ", ".join(pattern.format(*lines) for lines in repeats.lines) + more
