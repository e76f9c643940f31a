"""Pages of HTML that need nothing but a browser: a run's report, and runs side by side.

Text and tables are written here; `page.html` holds the style and the script that draws charts from
the JSON which it is given. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from mlx_tuner.runs.metrics import (
    Record,
    Sample,
    Summary,
    by_step,
    curve,
    mean,
    train_records,
)
from mlx_tuner.runs.verdict import judge
from mlx_tuner.show import story
from mlx_tuner.words import duration, plural, rate

_MOST_POINTS = 2_000
"""Of a line: longer ones keep the lowest and highest of each piece, so that a bad step stays."""
_DASHES = (None, "6 4", "2 3")

Point = tuple[float, float]


def report(
    records: Sequence[Record],
    summary: Summary,
    run: Path,
    *,
    recipe: str,
    samples: Sequence[Sample] = (),
) -> str:
    """The page of a run, under way or ended.

    Args:
        run: its directory, as the user should see it.
        recipe: its TOML.
        samples: answers of the base and of the run, in the order of steps.
    """
    verdict = judge(records)
    told = story.trajectory(records, summary.best_step)
    body = [
        f"<h1>{escape(summary.recipe)}</h1>",
        f"<p>{escape(story.headline(summary))}</p>",
        f'<p class="quiet">{escape(story.description(summary))}</p>',
        _verdict(verdict.tone, verdict.text),
        _tiles(summary),
        _section("Curves", _figures(5)),
        _section("Numbers", _pairs(story.numbers(summary))),
        _section("Step by step", _table(told.names, told.rows, told.best, "number")),
        _section("Where the time went", _time_bar(summary)),
        _section("Answers", _samples(samples, summary.best_step)),
        _section("Data", _pairs(_data(summary))),
        _section("Recipe", f"<pre>{escape(recipe)}</pre>"),
        _section("Machine", _pairs(summary.machine.items())),
        _section("Next", _commands(story.what_next(summary, run))),
    ]
    return _page(summary.recipe, body, _curves(records, summary), summary.to_json())


def comparison(
    records: Mapping[str, Sequence[Record]],
    names: Sequence[str],
    progression: Sequence[Sequence[str]],
    facts: Sequence[Sequence[str]],
) -> str:
    """The page of runs side by side.

    Args:
        records: by the runs' names.
        names, progression: the columns' names, and a row a run.
        facts: the runs' names after an empty cell, then a row a fact.
    """
    charts = _overlaid(records)
    body = [
        f"<h1>{escape(', '.join(records))}</h1>",
        _section("Progression", _table(names, progression)),
        _section("Curves", _figures(len(charts))),
        _section("Numbers", _table(facts[0], facts[1:])),
    ]
    return _page("runs side by side", body, charts, None)


# ---- pieces --------------------------------------------------------------------------------------


def _page(title: str, body: Iterable[str], charts: Sequence[Any], summary: Any) -> str:
    values = {
        "title": escape(title),
        "body": "\n".join(part for part in body if part),
        "charts": _script(charts),
        "summary": _script(summary),
    }
    page = (resources.files("mlx_tuner.show") / "page.html").read_text("utf-8")
    head, *parts = page.split("{{")
    for part in parts:  # once through the template: values may have braces of their own
        name, rest = part.split("}}", 1)
        head += values[name] + rest
    return head


def _script(value: Any) -> str:
    """JSON for a script element, escaped so that no text in it can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _verdict(tone: str, text: str) -> str:
    return f'<p class="verdict {tone}">{escape(text)}</p>'


def _figures(count: int) -> str:
    """Charts in two columns; the first and a last one without a neighbour are twice as wide."""
    wide = {0} | ({count - 1} if count % 2 == 0 else set())
    figures = [
        f'<figure data-chart="{i}"{" class=wide" if i in wide else ""}></figure>'
        for i in range(count)
    ]
    return f'<div class="charts">{"".join(figures)}</div>'


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows]
    return f'<table class="pairs">{"".join(lines)}</table>' if lines else ""


def _table(
    names: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None, kind: str = ""
) -> str:
    """The best row stands out; `kind` "number" puts cells to the right."""
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name in names)
    lines = [
        f"<tr{' class=best' if number == best else ''}>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    ]
    body = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return f'<div class="scroll">{body}</div>' if rows else ""


def _tiles(summary: Summary) -> str:
    tiles = [(f"{summary.last_epoch_loss:.4f}", f"loss, last {story.span(summary)}")]
    if summary.best_val_loss is not None:
        tiles.append((f"{summary.best_val_loss:.4f}", f"best validation, step {summary.best_step}"))
    tiles += [
        (duration(summary.runtime_seconds), "run time"),
        (rate(summary.samples_per_second), "samples/s"),
        (rate(summary.tokens_per_second), "tokens/s"),
        (f"{summary.peak_memory_gb:.2f} GB", "peak memory"),
    ]
    made = [f'<div class="tile"><b>{b}</b><span class="quiet">{s}</span></div>' for b, s in tiles]
    return f'<div class="tiles">{"".join(made)}</div>'


def _time_bar(summary: Summary) -> str:
    spent = story.time_spent(summary)
    parts, legend = [], []
    for number, (what, seconds) in enumerate(spent.items()):
        share, colour = 100 * seconds / sum(spent.values()), f"var(--c{number % 6})"
        parts.append(f'<span style="width:{share:.3f}%;background:{colour}"></span>')
        text = f"{what} {duration(seconds)} ({share:.0f} %)"
        legend.append(f'<span><i style="background:{colour}"></i>{escape(text)}</span>')
    bar = f'<div class="bar">{"".join(parts)}</div>'
    return f'{bar}<p class="legend">{"".join(legend)}</p>' if parts else ""


def _samples(samples: Sequence[Sample], kept: int | None) -> str:
    """Before and after, a prompt at a time: the base's and the kept step's; others are folded."""
    parts = []
    for prompt in dict.fromkeys(sample.prompt for sample in samples):
        own = [sample for sample in samples if sample.prompt == prompt]
        ends = [own[0], next((s for s in own if s.step == kept), own[-1])][: len(own)]
        parts.append(f"<p><b>{escape(prompt)}</b></p>")
        parts.append(f'<div class="sides">{"".join(map(_answer, ends))}</div>')
        if others := [sample for sample in own if sample not in ends]:
            answers, count = "".join(map(_answer, others)), plural(len(others), "more answer")
            parts.append(f"<details><summary>{count}</summary>{answers}</details>")
    return "".join(parts)


def _answer(sample: Sample) -> str:
    title = "before training" if sample.step == 0 else f"step {sample.step:,}"
    if not sample.stopped:
        title += ", cut at the longest length"
    answer = escape(sample.answer)
    return f'<div><span class="quiet">{title}</span><pre class="answer">{answer}</pre></div>'


def _data(summary: Summary) -> Iterable[tuple[str, str]]:
    yield "training rows", f"{summary.rows:,}"
    yield "validation rows", f"{summary.valid_rows:,}" if summary.valid_rows else "none"
    yield "trained on", f"{summary.tokens:,} tokens, {summary.trained_tokens:,} of them targets"
    for note in summary.data_notes:
        yield "", note


def _commands(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<p>{escape(what)}</p><pre>{escape(command)}</pre>" for command, what in rows)


# ---- curves --------------------------------------------------------------------------------------


def _curves(records: Sequence[Record], summary: Summary) -> list[dict[str, Any]]:
    marks = story.epoch_marks(records)

    def logged(name: str, label: str, colour: int) -> dict[str, Any]:
        return _series(label, "line", colour, curve(records, name))

    best = None
    if summary.best_step is not None and summary.best_val_loss is not None:
        best = (summary.best_step, summary.best_val_loss)
    loss = [*_over_steps(records, "losses", "training", 0), logged("val_loss", "validation", 1)]
    memory = [logged("memory_gb", "active + cache", 4), logged("peak_memory_gb", "peak", 5)]
    return [
        _chart("Loss: mean over the target tokens", loss, marks, star=best),
        _chart("Gradient norm", _over_steps(records, "grad_norms", "", 3), marks, zero=True),
        _chart("Learning rate", [logged("learning_rate", "LR", 2)], marks, zero=True),
        _chart("Tokens a second", [logged("tokens_per_second", "tokens/s", 0)], marks, zero=True),
        _chart("Memory, GB", memory, marks, zero=True),
    ]


def _overlaid(records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """A line a run, told apart by colour, and beyond the colours by dashes."""

    def lines(points: Callable[[Sequence[Record]], list[Point]]) -> list[dict[str, Any]]:
        return [
            _series(name, "line", number % 6, points(own), _DASHES[number // 6 % len(_DASHES)])
            for number, (name, own) in enumerate(records.items())
        ]

    def logged(name: str) -> Callable[[Sequence[Record]], list[Point]]:
        return lambda own: curve(own, name)

    def norms(own: Sequence[Record]) -> list[Point]:
        return [(r.step, mean(r.grad_norms)) for r in train_records(own)]

    charts = [
        _chart("Training loss", lines(logged("loss"))),
        _chart("Validation loss", lines(logged("val_loss"))),
        _chart("Gradient norm", lines(norms), zero=True),
        _chart("Learning rate", lines(logged("learning_rate")), zero=True),
        _chart("Tokens a second", lines(logged("tokens_per_second")), zero=True),
    ]
    return [chart for chart in charts if chart["series"]]


def _over_steps(
    records: Sequence[Record], name: Literal["losses", "grad_norms"], label: str, colour: int
) -> list[dict[str, Any]]:
    """Every step, faint, and the means of the log lines."""
    every = [(float(step), value) for step, value in enumerate(by_step(records, name), 1)]
    means = [(float(r.step), mean(getattr(r, name))) for r in train_records(records)]
    return [
        _series(f"{label} each step".strip(), "faint", colour, every),
        _series(f"{label} mean".strip(), "line", colour, means),
    ]


def _chart(
    title: str,
    series: Sequence[dict[str, Any]],
    marks: Sequence[tuple[float, str]] = (),
    *,
    star: Point | None = None,
    zero: bool = False,
) -> dict[str, Any]:
    """What `page.html` draws; `zero` has the axis begin there."""
    shown = [one for one in series if one["points"]]
    return {
        "title": title,
        "x": "step",
        "series": shown,
        "marks": marks,
        "star": star,
        "zero": zero,
    }


def _series(
    name: str,
    kind: Literal["line", "faint"],
    colour: int,
    points: Sequence[Point],
    dash: str | None = None,
) -> dict[str, Any]:
    finite = [(x, float(f"{y:.6g}")) for x, y in points if math.isfinite(y)]
    return {"name": name, "kind": kind, "colour": colour, "dash": dash, "points": _thinned(finite)}


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for first in range(0, len(points), size):
        piece = points[first : first + size]
        kept += sorted({min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])})
    return kept
