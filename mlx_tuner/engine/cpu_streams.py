"""Runs independent pieces of a graph side by side on the CPU, each on a stream of its own.

MLX's CPU backend runs each element-wise kernel on one thread, so a two-core machine would do
its softmaxes on one core. On a GPU one stream already fills the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import mlx.core as mx

MAX_STREAMS = 4


def cpu_streams() -> tuple[mx.Stream, ...]:
    """One stream on a GPU; on the CPU backend one a core, at most `MAX_STREAMS`."""
    return _streams(mx.default_device().type)


@cache
def _streams(kind: mx.DeviceType) -> tuple[mx.Stream, ...]:
    first = mx.default_stream(mx.Device(kind))
    if kind == mx.gpu:
        return (first,)
    extra = min(os.cpu_count() or 1, MAX_STREAMS) - 1
    return (first, *(mx.new_stream(mx.cpu) for _ in range(extra)))


def side_by_side(
    function: Callable[..., tuple[mx.array, ...]], *arrays: mx.array, axis: int = 0
) -> tuple[mx.array, ...]:
    """``function(*arrays)``, computed in parts along an axis, a part a stream.

    All arrays and results have the axis, in one length, and no piece of it depends on another.
    """
    streams = cpu_streams()[: arrays[0].shape[axis]]
    if len(streams) == 1:
        return function(*arrays)
    ends = [arrays[0].shape[axis] * i // len(streams) for i in range(1, len(streams))]
    results = []
    for stream, *parts in zip(streams, *(mx.split(x, ends, axis) for x in arrays), strict=True):
        with mx.stream(stream):
            results.append(function(*parts))
    return tuple(mx.concatenate(parts, axis) for parts in zip(*results, strict=True))
