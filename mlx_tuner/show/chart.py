"""A line chart made of characters, for a terminal of any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from mlx_tuner.words import scientific

_WIDEST = 88
_NARROWEST_PLOT = 16
_LABELLED_GAPS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points (x, y) in the order of x. A dotted series shows its points, a plain one a line."""

    points: Sequence[Point]
    style: str
    dotted: bool = False


@dataclass(frozen=True)
class Chart:
    """Series over a common axis, and at most one point that is marked with a star."""

    series: Sequence[Series]
    mark: Point | None = None
    height: int = 13
    """Rows of the plot."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        finite = [
            Series([p for p in s.points if all(map(math.isfinite, p))], s.style, s.dotted)
            for s in self.series
        ]
        points = [point for series in finite for point in series.points]
        if len({x for x, _ in points}) < 2:
            return
        xs, ys = zip(*points, strict=True)
        bottom, top = min(ys), max(ys)
        if bottom == top:
            bottom, top = bottom - 0.5, top + 0.5
        labels = self._labels(bottom, top)
        margin = max(map(len, labels.values())) + 2
        width = max(_NARROWEST_PLOT, min(options.max_width, _WIDEST) - margin - 1)
        canvas = _Canvas(width, self.height, (min(xs), max(xs)), (bottom, top))
        for series in finite:
            if series.points and series.dotted:
                canvas.dots(series.points, series.style)
            elif series.points:
                canvas.line(series.points, series.style)
        if self.mark:
            canvas.put(*canvas.cell(*self.mark), "★", "bold green")
        for row in reversed(range(self.height)):
            label = labels.get(row, "")
            yield Text(f"{label:>{margin - 2}} {'┤' if label else '│'}", "dim") + canvas.text(row)
        yield Text(" " * (margin - 1) + "└" + "─" * width, "dim")
        yield Text(" " * margin + _axis(min(xs), max(xs), width), "dim")

    def _labels(self, bottom: float, top: float) -> dict[int, str]:
        """The rows that have a number, with enough digits to tell them apart."""
        steps = min(_LABELLED_GAPS, self.height - 1)
        rows = [round(i * (self.height - 1) / steps) for i in range(steps + 1)]
        values = {row: bottom + (top - bottom) * row / (self.height - 1) for row in rows}
        if top < 0.01:
            return {row: scientific(value) for row, value in values.items()}
        digits = max(0, min(8, 2 - math.floor(math.log10((top - bottom) / steps))))
        digits = min(digits, 2) if top >= 10 else digits
        return {row: f"{value:.{digits}f}" for row, value in values.items()}


class _Canvas:
    """Cells of characters with styles; row 0 is the lowest."""

    def __init__(self, width: int, height: int, x: Point, y: Point) -> None:
        self.width, self.height = width, height
        self._x, self._y = x, y
        self._cells: dict[tuple[int, int], tuple[str, str]] = {}

    def cell(self, x: float, y: float) -> tuple[int, int]:
        """Column and row of a point."""
        (x0, x1), (y0, y1) = self._x, self._y
        column = round((x - x0) / (x1 - x0) * (self.width - 1))
        row = round((y - y0) / (y1 - y0) * (self.height - 1))
        return column, row

    def put(self, column: int, row: int, character: str, style: str) -> None:
        self._cells[column, row] = (character, style)

    def line(self, points: Sequence[Point], style: str) -> None:
        """One row a column, joined by corners where it changes."""
        rows = self._rows(points)
        columns = sorted(rows)
        for column in columns[:-1]:
            here, there = rows[column], rows[column + 1]
            if here == there:
                self.put(column, here, "─", style)
                continue
            down = there < here
            self.put(column, here, "╮" if down else "╯", style)
            self.put(column, there, "╰" if down else "╭", style)
            for between in range(min(here, there) + 1, max(here, there)):
                self.put(column, between, "│", style)
        self.put(columns[-1], rows[columns[-1]], "─", style)

    def dots(self, points: Sequence[Point], style: str) -> None:
        """The points, and a trail between them where nothing else is."""
        for column, row in self._rows(points).items():
            if (column, row) not in self._cells:
                self.put(column, row, "·", style)
        for point in points:
            self.put(*self.cell(*point), "●", style)

    def text(self, row: int) -> Text:
        text = Text()
        for column in range(self.width):
            text.append(*self._cells.get((column, row), (" ", "")))
        return text

    def _rows(self, points: Sequence[Point]) -> dict[int, int]:
        """The row of each column from the first point to the last: means, then between them."""
        sums: dict[int, list[float]] = {}
        for x, y in points:
            sums.setdefault(self.cell(x, y)[0], []).append(y)
        known = [(column, sum(ys) / len(ys)) for column, ys in sorted(sums.items())]
        heights = dict(known)
        for (left, low), (right, high) in pairwise(known):
            for column in range(left + 1, right):
                heights[column] = low + (high - low) * (column - left) / (right - left)
        return {c: self.cell(self._x[0], y)[1] for c, y in heights.items()}


def _axis(first: float, last: float, width: int) -> str:
    """Numbers below both ends and the middle."""
    left, middle, right = (f"{value:,.0f}" for value in (first, (first + last) / 2, last))
    line = f"{middle:^{width}}"
    return left + line[len(left) : width - len(right)] + right
