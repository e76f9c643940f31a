"""What `mlx-tune data` found, for the terminal: counts, lengths as bars, what to look at, rows."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.commands.inspect_data import FileFacts, Inspection, Shown
from mlx_tuner.data.survey import histogram
from mlx_tuner.recipe.load import DEFAULT_MODEL
from mlx_tuner.words import from_here, plural, printable

_BAR_WIDTH = 40
_PREFIX_SHOWN = 160
"""Characters."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_TARGET = "bold green"


def report(found: Inspection, *, colour: bool) -> RenderableType:
    """All that was found, to print with rich.

    Args:
        colour: whether the reader sees colours; without them targets stand in ⟦…⟧.
    """
    parts: list[RenderableType] = [_facts(found)]
    if len(found.train.lengths):
        parts.append(_lengths(found))
    parts += [_row(row, colour) for row in found.train.shown]
    if notes := list(found.notes()):
        parts.append(Group(*(Text.assemble(("! ", "bold yellow"), note) for note in notes)))
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in parts), "")


def _facts(found: Inspection) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _lines(found):
        grid.add_row(name, Text(text))
    return grid


def _lines(found: Inspection) -> Iterator[tuple[str, str]]:
    train, valid = found.train, found.valid
    yield "file", from_here(train.file)
    yield "rows", _rows(train)
    own = "" if found.model != DEFAULT_MODEL else " (name your model with --model for its counts)"
    yield "tokenizer", f"{from_here(found.model)}{own}"
    if len(train.lengths):
        yield "tokens", _tokens(train)
        yield (
            "a row",
            f"mean {train.lengths.mean():,.0f}, median {train.percentile(50):,}, "
            f"95 % up to {train.percentile(95):,}, longest {train.lengths.max():,} tokens",
        )
    if prefix := train.shared_prefix_tokens:
        share = 100 * prefix * train.usable_rows / train.dataset.tokens
        text = shorten(printable(train.prefix_text, keep="\n\t"), _PREFIX_SHOWN, placeholder=" …")
        yield "all begin", f"with the same {prefix:,} tokens, {share:.0f} % of all: {text}"
    if valid:
        yield "validation", f"{from_here(valid.file)}: {_rows(valid)}, {_tokens(valid)}"
    elif train.held_out_rows:
        yield "validation", f"{plural(train.held_out_rows, 'row')} held out by their content"
    yield (
        "an epoch",
        f"{plural(found.steps_per_epoch, 'step')} of {plural(found.batch_size, 'row')}",
    )


def _rows(facts: FileFacts) -> str:
    forms = ", ".join(f"{rows:,} {form}" for form, rows in facts.forms.items())
    skipped = facts.rows - facts.usable_rows
    left_out = f"; {skipped:,} cannot be trained on" if skipped else ""
    return f"{facts.rows:,} ({forms or 'none readable'}){left_out}"


def _tokens(facts: FileFacts) -> str:
    tokens, targets = facts.dataset.tokens, facts.dataset.target_tokens
    share = 100 * targets / tokens if tokens else 0
    return f"{tokens:,} tokens, {targets:,} of them targets ({share:.0f} %)"


def _lengths(found: Inspection) -> RenderableType:
    """Rows by length, the cut marked."""
    bins = histogram(found.train.lengths)
    most = max(rows for *_, rows in bins)
    limit = found.max_seq_length
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for first, last, rows in bins:
        over = first > limit
        bar = Text(_bar(rows / most), "yellow" if over else "cyan")
        if first <= limit < last:
            bar.append(f"  data.max_seq_length = {limit:,}", "yellow")
        table.add_row(f"{first:,}–{last:,}", f"{rows:,}", bar)
    return table


def _bar(share: float) -> str:
    """A bar of character cells; whatever is not 0 shows."""
    eighths = round(8 * _BAR_WIDTH * share) or (1 if share else 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _row(row: Shown, colour: bool) -> RenderableType:
    head = (
        f"line {row.line:,}: {plural(row.tokens, 'token')}, {plural(row.target_tokens, 'target')}"
    )
    body = Text()
    for text, is_target in row.parts:
        shown = printable(text, keep="\n\t")
        if is_target:
            body.append(shown if colour else f"⟦{shown}⟧", _TARGET)
        else:
            body.append(shown, "dim")
    return Group(Text(head, "bold"), body)
