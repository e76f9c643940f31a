"""How much of a test `make quick` runs: some of its parameters, fewer of its examples."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings


def some_slow(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """The values for `parametrize`, of which some take too long for `make quick`."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (value in slow)) for value in values]


def examples(count: int) -> int:
    """So many examples, and a quarter of them in `make quick`."""
    return max(1, count * settings().max_examples // 100)
