"""Small element-wise functions as one kernel each, also inside a gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import Any

import mlx.core as mx


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays, compiled once for all shapes.

    MLX hands a compiled function out uncompiled to a thread that is tracing a gradient
    (`mlx/compile.cpp`: "if the inputs are tracers, trace the original graph"), and its backward
    passes trace as well. So the graph is put together on a thread that traces nothing, on the
    caller's stream; whoever asked for the result computes it.
    """
    compiled = mx.compile(function, shapeless=True)

    def call(*arrays: mx.array) -> Any:
        stream, answer = mx.default_stream(mx.default_device()), SimpleQueue[Any]()
        _requests().put((compiled, arrays, stream, answer))
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        return result

    return call


@cache
def _requests() -> SimpleQueue[tuple[Callable[..., Any], tuple[mx.array, ...], mx.Stream, Any]]:
    """The queue of a thread that lives as long as the process."""
    requests: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        while True:
            compiled, arrays, stream, answer = requests.get()
            try:
                with mx.stream(stream):
                    answer.put(compiled(*arrays))
            except BaseException as error:
                answer.put(error)

    # A daemon: MLX's cache of the thread must not be torn down after Python.
    threading.Thread(target=work, name="mlx-tune kernels", daemon=True).start()
    return requests
