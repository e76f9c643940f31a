"""Tells of a run wherever somebody looks: its files, the terminal, its plots and page, trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_tuner.runs.meter import Meter
from mlx_tuner.runs.metrics import RUNNING, Facts, Record, Sample, Summary, summarise
from mlx_tuner.runs.place import GRAD_NORM_PLOT, LOSS_PLOT, REPORT
from mlx_tuner.runs.run import Run, read_records, read_samples
from mlx_tuner.show import page, plots
from mlx_tuner.show.progress import Display
from mlx_tuner.show.trackers import Trackers
from mlx_tuner.system import files

DRAWING_SHARE = 0.01
"""Of a run's time, that its plots and page may take while it goes on."""
SHORT_SECONDS = 5.0
"""A run of less is drawn at its end alone."""


class Reporter:
    """Passes what happens in a run on to its files, the terminal, plots and trackers.

    Args:
        recipe: its TOML, for the page.
        config: the recipe's tables, for trackers.
        trackers: names of those that are told as well.
        run_id: what they know the run by.
    """

    def __init__(
        self,
        run: Run,
        display: Display,
        *,
        recipe: str,
        config: Mapping[str, Mapping[str, Any]],
        trackers: Sequence[str],
        run_id: str,
    ) -> None:
        self._run, self._display, self._recipe = run, display, recipe
        keys = {f"{name}.{key}": v for name, table in config.items() for key, v in table.items()}
        self._trackers = Trackers(trackers, run.path, run_id, keys, display.note)

    def record(self, record: Record, *, best: bool = False) -> None:
        """A log line, or an evaluation, which may be the best so far."""
        self._run.append(record)
        self._display.record(record, best=best)
        self._trackers.record(record)

    def sample(self, sample: Sample) -> None:
        """An answer to one of the recipe's prompts."""
        self._run.append_sample(sample)
        self._display.sample(sample)

    def refresh(self, facts: Facts, meter: Meter, **more: Any) -> None:
        """Draw a run that goes on, if that has not taken too much of its time already."""
        seconds, drawing = meter.elapsed_seconds, meter.other_seconds.get("drawing", 0.0)
        if seconds > SHORT_SECONDS and drawing <= DRAWING_SHARE * seconds:
            self._draw(RUNNING, facts, meter, more)

    def end(self, status: str, facts: Facts, meter: Meter, **more: Any) -> Summary:
        """Draw a run that has ended, and keep its summary.

        Args:
            more: `summarise` is told this too.
        """
        summary = self._draw(status, facts, meter, more)
        self._run.write_summary(summary)
        self._trackers.end(summary)
        return summary

    def _draw(self, status: str, facts: Facts, meter: Meter, more: Mapping[str, Any]) -> Summary:
        path = self._run.path
        records = read_records(path)
        summary = summarise(
            facts,
            records,
            status=status,
            runtime_seconds=meter.elapsed_seconds,
            other_seconds=meter.other_seconds,
            **more,
        )
        with self._display.task("drawing the plots"), meter.timing("drawing"):
            plots.loss_curve(path / LOSS_PLOT, records, summary.best_step)
            plots.grad_norm_curve(path / GRAD_NORM_PLOT, records)
            shown = page.report(
                records, summary, path, recipe=self._recipe, samples=read_samples(path)
            )
            files.write_text(path / REPORT, shown)
        return summary
