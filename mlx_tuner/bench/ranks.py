"""How fast machines add up their gradients: `mlx-tune bench --ranks`, started by `mlx.launch`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_tuner.bench.bench import Result
from mlx_tuner.bench.measure import Spread, result
from mlx_tuner.engine.ranks import Ranks
from mlx_tuner.system import cache, device, files

SIZES = (4_000, 400_000, 4_000_000, 16_000_000, 64_000_000)
"""Bytes: 16 MB are the gradient of the baseline's adapter in fp32."""


def measure(ranks: Ranks, backend: str, link: str, *, command: str, repeats: int) -> Result:
    """Time sums over the ranks. All of them call this; the figures are this one's.

    Args:
        backend: of MLX, for the record.
        link: what a person calls the connection.
        repeats: timed sums of each size.
    """
    spreads = {size: Spread.of(_seconds(ranks, size, repeats)) for size in SIZES}
    small, large = SIZES[0], SIZES[-1]
    # As `links.Link.sum_seconds` takes them apart again.
    messages = 2 * (ranks.size - 1)
    moving = spreads[large].median - spreads[small].median
    return {
        **result("links", command, device.facts()),
        "settings": {"ranks": ranks.size, "backend": backend, "link": link},
        "link": {
            "name": link,
            "bytes_per_second": messages * (large - small) / ranks.size / moving,
            "seconds": 2 * spreads[small].median / messages,
        },
        "measures": {
            f"sum of {size / 1e6:g} MB": {"seconds": spread.to_json()}
            for size, spread in spreads.items()
        },
        "ratios": {},
    }


def _seconds(ranks: Ranks, size: int, repeats: int) -> list[float]:
    vector, taken = mx.ones(size // 4), []
    for _ in range(repeats + 1):
        ranks.gather(b"")  # so that none waits for another in what is timed
        start = time.perf_counter()
        mx.eval(ranks.sum(vector, mx.zeros(1)))
        taken.append(time.perf_counter() - start)
    return taken[1:]


def report(found: Mapping[str, Any]) -> str:
    """The figures as lines."""
    settings, link = found["settings"], found["link"]
    lines = [f"{settings['ranks']} ranks by {settings['link']} ({settings['backend']})"]
    for name, measures in found["measures"].items():
        lines.append(f"{name:<16} {1000 * measures['seconds']['median']:.2f} ms")
    speed, seconds = link["bytes_per_second"] / 1e9, link["seconds"]
    lines.append(f"{speed:.2f} GB/s, {1000 * seconds:.2f} ms there and back")
    return "\n".join(lines)


def save(found: Result) -> str:
    """Write the result where `mlx-tune plan --machines` finds it; its path."""
    settings = found["settings"]
    path = cache.results_folder() / f"links-{settings['link']}-{settings['ranks']}.json"
    files.write_json(path, found)
    return str(path)
