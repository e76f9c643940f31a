"""A plan for the terminal: what will be trained, and what that takes of this machine."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.commands.plan import Plan
from mlx_tuner.show.chart import Chart, Series
from mlx_tuner.words import duration, plural, scientific, size

_BAR = 30
"""Characters of the whole budget."""


def report(planned: Plan) -> RenderableType:
    """All of the plan, to print with rich."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    for name, text in _facts(planned):
        facts.add_row(name, text)
    rates = planned.learning_rates
    curve = Chart([Series(list(enumerate(rates, 1)), "cyan")], height=5)
    title = Text.assemble((planned.recipe, "bold"), f" on {planned.model}")
    parts = [title, facts, *([curve] if len(set(rates)) > 1 else []), _memory(planned)]
    if planned.notes:
        parts.append(Group(*(Text.assemble(("! ", "bold yellow"), n) for n in planned.notes)))
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in parts), "")


def _facts(planned: Plan) -> Iterator[tuple[str, str]]:
    about = "" if planned.is_counted else "about "
    share = 100 * planned.trainable_parameters / planned.total_parameters
    yield (
        "trainable",
        f"{planned.trainable_parameters:,} of {planned.total_parameters:,} parameters "
        f"({share:.4f} %)",
    )
    valid = f"{planned.valid_rows:,} for validation" if planned.valid_rows else "no validation"
    yield "rows", f"{planned.rows:,}, {valid}"
    yield (
        "tokens",
        f"{about}{planned.tokens:,} an epoch, {planned.target_tokens:,} of them targets",
    )
    yield "shared prefix", f"{plural(planned.shared_prefix, 'token')}, computed once a step"
    yield "no padding", f"which would add {100 * planned.padding_avoided:.0f} % of the tokens"
    evaluated = f", evaluated every {planned.eval_every:,}" if planned.eval_every else ""
    yield "steps", f"{planned.steps:,}, {planned.steps_per_epoch:,} an epoch{evaluated}"
    yield "micro-batch", f"{planned.micro_batch_tokens:,} tokens at most"
    time = "" if planned.seconds is None else f"about {duration(planned.seconds)}, "
    yield "time", f"{time}{planned.seconds_by}"
    if planned.machines > 1:
        summed = f"a sum takes {1000 * planned.sum_seconds:.1f} ms a step, {planned.sum_by}"
        yield "machines", f"{planned.machines} like this one; {summed}"
    yield "disk", f"{size(1e9 * planned.disk_gb)} of checkpoints"
    first, last = planned.learning_rates[0], planned.learning_rates[-1]
    highest = scientific(max(planned.learning_rates))
    yield "learning rate", f"{scientific(first)} → {scientific(last)}, at most {highest}"


def _memory(planned: Plan) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    fits = planned.advice is None
    whole = max(planned.budget_gb, planned.peak_memory_gb)
    for part, gb in planned.memory_gb.items():
        grid.add_row(part, size(1e9 * gb), Text("█" * round(_BAR * gb / whole), "cyan"))
    style = "bold green" if fits else "bold red"
    peak, budget = size(1e9 * planned.peak_memory_gb), size(1e9 * planned.budget_gb)
    grid.add_row("", peak, f"of {budget}", style=style)
    title = Text("peak memory, about", "bold")
    if fits:
        return Group(title, grid)
    return Group(title, grid, Text(f"does not fit: {planned.advice}", "bold red"))
