"""Streams on which independent pieces of a graph run side by side.

MLX's CPU backend runs each element-wise kernel on one thread, so a two-core machine would do
its softmaxes on one core. On a GPU one stream already fills the machine.
"""

import os
from functools import cache

import mlx.core as mx

MAX_LANES = 4


def lanes() -> tuple[mx.Stream, ...]:
    """One stream on a GPU; on the CPU backend one a core, at most `MAX_LANES`."""
    return _lanes(mx.default_device().type)


@cache
def _lanes(kind: mx.DeviceType) -> tuple[mx.Stream, ...]:
    first = mx.default_stream(mx.Device(kind))
    if kind == mx.gpu:
        return (first,)
    extra = min(os.cpu_count() or 1, MAX_LANES) - 1
    return (first, *(mx.new_stream(mx.cpu) for _ in range(extra)))
