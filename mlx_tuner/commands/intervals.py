"""95 % intervals: of a mean loss over rows, of the difference of two, of a share of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import computed_field

from mlx_tuner.runs.metrics import Figures, Number

_Z = 1.959964
"""The normal distribution's 97.5th percentile."""


class Interval(Figures):
    """A figure with its 95 % confidence interval."""

    value: Number
    low: Number
    high: Number


class Share(Figures):
    """How many of some answers have a property. The interval is Wilson's."""

    count: int
    of: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def share(self) -> Interval | None:
        """The share and its interval; None where there are no answers."""
        if not self.of:
            return None
        part, z = self.count / self.of, _Z**2 / self.of
        middle = (part + z / 2) / (1 + z)
        reach = math.sqrt(z * part * (1 - part) + z * z / 4) / (1 + z)
        return Interval(value=part, low=max(0.0, middle - reach), high=min(1.0, middle + reach))

    def __str__(self) -> str:
        return f"{self.count:,} of {self.of:,}" if self.of else "–"


def mean_over_targets(sums: Sequence[float], targets: Sequence[int]) -> Interval:
    """A mean over all rows' target tokens, where rows, and not tokens, were drawn.

    The ratio of two sums over rows, its variance linearised (Cochran 1977, Sampling Techniques,
    §2.11), with Student's t for the few rows that there often are.

    Args:
        sums: of each row, over its targets.
        targets: of each row, how many.
    """
    rows, total = len(sums), sum(targets)
    value = math.fsum(sums) / total if total else math.nan
    if rows < 2 or not math.isfinite(value):
        return Interval(value=value, low=math.nan, high=math.nan)
    squares = math.fsum((s - value * n) ** 2 for s, n in zip(sums, targets, strict=True))
    reach = _student(rows - 1) * math.sqrt(squares * rows / (rows - 1)) / total
    return Interval(value=value, low=value - reach, high=value + reach)


def _student(freedom: int) -> float:
    """The t distribution's 97.5th percentile, within 2 % from two degrees of freedom on.

    Its expansion in 1 / degrees (Abramowitz and Stegun 1964, 26.7.5).
    """
    if freedom == 1:
        return 12.706
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
