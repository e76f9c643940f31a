"""Plots as PNG files. The only module that imports matplotlib, and it keeps no global state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mlx_tuner.runs.metrics import Record, by_step, curve, mean, train_records
from mlx_tuner.show import story
from mlx_tuner.system import files
from mlx_tuner.words import scientific

_SIZE = (9.0, 5.0)
"""Inches; with the dots below, 1350 × 750 pixels."""
_DPI = 150

# Okabe and Ito's palette, told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)
_RUN_COLOURS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _RED)
_RUN_MARKERS = "os^Dvp"

_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 20,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.parse_math": False,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}

_MOST_BARS = 48
_NOISY_FROM = 20
"""Log lines from which on a smoothed line is drawn over them."""

Curve = tuple[list[float], list[float]]
"""Steps and values."""


def loss_curve(path: Path, records: Sequence[Record], best_step: int | None) -> None:
    """Training and validation loss by step, the best evaluation marked."""
    with _figure(path) as figure:
        axes = _axes(figure, "Loss", "mean loss per target token")
        valid = _curve(curve(records, "val_loss"))
        _line_over_steps(axes, records, "losses", _BLUE, "training")
        if valid[0]:
            axes.plot(*valid, color=_ORANGE, marker="o", markersize=6, label="validation")
        if best_step in valid[0]:
            best = (best_step, valid[1][valid[0].index(best_step)])
            axes.plot(
                *best,
                color=_GREEN,
                marker="*",
                markersize=18,
                markeredgecolor="white",
                linestyle="none",
                zorder=5,
                label=f"best: {best[1]:.4g} at step {best[0]:,}",
            )
        _mark_epochs(axes, records)
        _legend(axes)


def grad_norm_curve(path: Path, records: Sequence[Record]) -> None:
    """Gradient norm by step, with the learning rate on an axis of its own."""
    with _figure(path) as figure:
        axes = _axes(figure, "Gradient norm and learning rate", "gradient norm before clipping")
        _line_over_steps(axes, records, "grad_norms", _PURPLE, "gradient norm (left)")
        axes.yaxis.label.set_color(_PURPLE)
        axes.set_ylim(bottom=0)
        rates = axes.twinx()
        rates.spines["right"].set_visible(True)
        rates.grid(visible=False)
        steps, values = _curve(curve(records, "learning_rate"))
        rates.plot(
            steps,
            values,
            color=_GREEN,
            linestyle="--",
            linewidth=1.6,
            label="learning rate (right)",
        )
        rates.set_ylim(0, 1.08 * max(values, default=0.0) or 1.0)
        rates.set_ylabel("learning rate", color=_GREEN)
        rates.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
        _mark_epochs(axes, records)
        _legend(axes, rates)


def comparison(path: Path, runs: Mapping[str, Sequence[Record]]) -> None:
    """Training loss and, where a run has it, validation loss of runs by name, side by side."""
    validated = any(curve(records, "val_loss") for records in runs.values())
    with _figure(path, wide=validated) as figure:
        kinds = {"loss": "Training loss"} | ({"val_loss": "Validation loss"} if validated else {})
        all_axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
        for axes, (kind, title) in zip(all_axes, kinds.items(), strict=True):
            _dress(axes, title, "mean loss per target token" if axes is all_axes[0] else "")
            for index, (name, records) in enumerate(runs.items()):
                steps, losses = _curve(curve(records, kind))
                colour = _RUN_COLOURS[index % len(_RUN_COLOURS)]
                marker = _RUN_MARKERS[index % len(_RUN_MARKERS)]
                # Beyond the palette the line's style tells runs apart.
                dashes = ("-", "--", ":")[index // len(_RUN_COLOURS) % 3]
                if not steps:
                    continue
                axes.plot(
                    steps,
                    losses,
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markersize=5,
                    markevery=max(1, len(steps) // 12),
                    label=name,
                )
        handles = {
            label: handle
            for axes in all_axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4)
        )


def length_histogram(path: Path, lengths: Sequence[int], max_seq_length: int) -> None:
    """Rows by their length in tokens, and where `max_seq_length` cuts."""
    with _figure(path) as figure:
        axes = _axes(figure, "Length of rows", "rows")
        axes.set_xlabel("tokens")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        longest = max(lengths, default=1)
        bins = min(longest, _MOST_BARS)
        axes.hist(lengths, bins=bins, range=(0.5, longest + 0.5), color=_BLUE, edgecolor="white")
        # A cut far beyond the longest row would squeeze the bars.
        if max_seq_length < 1.5 * longest:
            label = f"data.max_seq_length = {max_seq_length:,}"
            axes.axvline(max_seq_length + 0.5, color=_RED, linestyle="--", label=label)
            _legend(axes)


def heat_maps(
    path: Path,
    panels: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    ylabel: str,
    xlabel: str,
) -> None:
    """Tables of numbers side by side, by title, darker where larger; None is left white."""
    numbers = [value for panel in panels.values() for row in panel for value in row if value]
    top = max(numbers, default=1.0)
    with _figure(path, wide=len(panels) > 1) as figure:
        all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (title, panel) in zip(all_axes, panels.items(), strict=True):
            grid = [[value or math.nan for value in row] for row in panel]
            axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=top, aspect="auto")
            axes.set_title(title)
            axes.grid(visible=False)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_xlabel(xlabel)
            for y, row in enumerate(panel):
                for x, value in enumerate(row):
                    colour = "white" if value and value > 0.5 * top else "#333333"
                    shown = f"{value:,.0f}" if value else "–"
                    axes.text(x, y, shown, ha="center", va="center", color=colour)
        all_axes[0].set_ylabel(ylabel)


@contextmanager
def _figure(path: Path, *, wide: bool = False) -> Iterator[Figure]:
    """An empty figure; what is drawn into it becomes the file."""
    width, height = _SIZE
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.4 * width if wide else width, height), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        with files.replacing(path) as temporary, warnings.catch_warnings():
            # A run may be named in a script that the font lacks; boxes in its place will do.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            canvas.print_figure(temporary, dpi=_DPI, facecolor="white")


def _axes(figure: Figure, title: str, ylabel: str) -> Axes:
    axes = figure.add_subplot()
    _dress(axes, title, ylabel)
    return axes


def _dress(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))


def _line_over_steps(
    axes: Axes,
    records: Sequence[Record],
    name: Literal["losses", "grad_norms"],
    colour: str,
    label: str,
) -> None:
    """Every step as a faint line, under the means of the log lines; of many, smoothed ones."""
    axes.plot(*_curve(list(enumerate(by_step(records, name), 1))), color=colour, alpha=0.3, lw=1.0)
    steps, means = _curve([(r.step, mean(getattr(r, name))) for r in train_records(records)])
    if len(steps) < _NOISY_FROM:
        axes.plot(steps, means, color=colour, marker="o", markersize=5, label=label)
    else:
        axes.plot(steps, _smoothed(means), color=colour, label=f"{label}, smoothed")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over a centred window of about a twelfth of the values."""
    reach = max(1, len(values) // 24)
    means = []
    for index in range(len(values)):
        near = min(reach, index)  # symmetric at the start, where losses fall steeply
        window = values[index - near : index + near + 1]
        means.append(sum(window) / len(window))
    return means


def _mark_epochs(axes: Axes, records: Sequence[Record]) -> None:
    """Faint lines where epochs end."""
    for end, label in story.epoch_marks(records):
        axes.axvline(end, color="#CCCCCC", linestyle=":", linewidth=1.2, zorder=0)
        axes.annotate(
            label,
            (end, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="#777777",
        )


def _legend(*all_axes: Axes) -> None:
    """One legend for axes that share a plot, where it covers least."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in all_axes]
    entries = [entry for pair in pairs for entry in pair]
    if entries:
        handles, labels = zip(*entries, strict=True)
        all_axes[-1].legend(handles, labels, loc="best")


def _curve(pairs: Sequence[tuple[float, float]]) -> Curve:
    """Points in the order of steps, those without a finite value left out."""
    finite = sorted(pair for pair in pairs if math.isfinite(pair[1]))
    return [step for step, _ in finite], [value for _, value in finite]
