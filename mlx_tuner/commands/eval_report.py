"""What `mlx-tune eval` found, for the terminal: base and tuned side by side, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.commands.evaluate import Evaluation, Side
from mlx_tuner.commands.intervals import Interval, Share
from mlx_tuner.words import plural

_SHARES = {
    "answers that end properly": "stops",
    "answers that repeat themselves": "repeats",
    "answers with a block of code": "fenced",
    "answers whose Python parses": "parses",
    "answers that are the row's own": "exact",
    "tasks that pass (pass@1)": "passes",
}


def report(found: Evaluation) -> RenderableType:
    """The table and the verdict, to print with rich."""
    title = Text.assemble((found.run, "bold"), f" against {found.model or 'its base'}")
    rows, tokens = plural(found.rows, "row"), plural(found.target_tokens, "target token")
    about = f"{rows}, {tokens}; " if found.rows else ""
    facts = Text(f"{about}answers of at most {found.max_tokens:,} tokens", "dim")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name in ("", "base", "tuned"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for line in _lines(found):
        table.add_row(*line)
    style = "green" if found.difference.high < 0 else "bold yellow"
    verdict = Table.grid(padding=(0, 2, 0, 0))
    verdict.add_row(Text("verdict", "bold"), Text(found.verdict, style))
    note = Text("± and (…): with a confidence of 95 %, for rows such as these", "dim")
    parts = (Group(title, facts), Group(table, note), verdict)
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in parts))


def _lines(found: Evaluation) -> Iterator[tuple[str, ...]]:
    sides = (found.base, found.tuned)
    if found.rows:
        yield ("loss", *(_loss(side.loss, ".4f") for side in sides))
        yield ("of them, tuned less base", "", _loss(found.difference, "+.4f"))
        yield ("perplexity", *(_ends(side.perplexity) for side in sides))
    for title, name in _SHARES.items():
        shares: list[Share] = [getattr(side, name) for side in sides]
        if any(share.of for share in shares):
            yield (title, *map(_share, shares))
    if found.own_answer_tokens is not None:
        own = f"{found.own_answer_tokens:.0f}"
        yield (f"tokens an answer (rows: {own})", *map(_length, sides))


def _loss(figure: Interval, form: str) -> str:
    reach = figure.high - figure.value  # not-a-number of one row
    return f"{figure.value:{form}} ± {reach:.4f}" if reach >= 0 else f"{figure.value:{form}}"


def _ends(figure: Interval) -> str:
    ends = f" ({figure.low:.3g}–{figure.high:.3g})" if figure.high >= figure.low else ""
    return f"{figure.value:.4g}{ends}"


def _share(share: Share) -> str:
    if (found := share.share) is None:
        return "–"
    return f"{share} ({100 * found.low:.0f}–{100 * found.high:.0f} %)"


def _length(side: Side) -> str:
    return "–" if side.answer_tokens is None else f"{side.answer_tokens:.0f}"
