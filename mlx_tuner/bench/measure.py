"""Timing things fairly: variants interleaved, medians with their spread, paired ratios."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_tuner.system.device import Machine

SCHEMA_VERSION = 2
"""Of the files that `mlx-tune bench` writes."""

Measures = Mapping[str, float]
"""Figures of one run by name, each with its unit in the name, such as `seconds`."""


def result(benchmark: str, command: str, machine: Machine) -> dict[str, Any]:
    """What every result file begins with."""
    return {
        "benchmark": benchmark,
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine.to_json(),
    }


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the lowest and highest of them."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def to_json(self) -> dict[str, float]:
        """`{"median", "low", "high", "repeats"}`."""
        return asdict(self)

    def __truediv__(self, other: Spread) -> Spread:
        """The ratio of two that were not measured in turns: as wide as it can be."""
        repeats = min(self.repeats, other.repeats)
        bounds = self.low / other.high, self.high / other.low
        return Spread(self.median / other.median, *bounds, repeats)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.4g}"
        return f"{self.median:.4g} ({self.low:.4g} … {self.high:.4g})"


def interleave(
    variants: Mapping[str, Callable[[], Measures]],
    *,
    repeats: int,
    warmups: int = 0,
    seconds: float = math.inf,
    on_result: Callable[[str, Measures], None] = lambda name, measures: None,
) -> dict[str, list[Measures]]:
    """Measures of each variant, run in turns A B A B …, so that drift hits all of them alike.

    Args:
        warmups: turns before them that are run and thrown away.
        seconds: after these no turn begins but the first one that is kept.
        on_result: hears of every kept run as it ends, by its variant's name.
    """
    kept: dict[str, list[Measures]] = {name: [] for name in variants}
    start = time.perf_counter()
    for turn in range(warmups + repeats):
        if turn > warmups and time.perf_counter() - start > seconds:
            break
        for name, run in variants.items():
            measures = run()
            if turn >= warmups:
                kept[name].append(measures)
                on_result(name, measures)
    return kept


def spreads(runs: Sequence[Measures]) -> dict[str, Spread]:
    """The spread of each figure over the runs of one variant."""
    return {key: Spread.of([run[key] for run in runs]) for key in runs[0]}


def ratio(runs: Sequence[Measures], baseline: Sequence[Measures], key: str) -> Spread:
    """Figure `key` over the baseline's, turn by turn: those of a turn share what else went on."""
    return Spread.of([ours[key] / theirs[key] for ours, theirs in zip(runs, baseline, strict=True)])
