"""Ends a block of Python code that takes too long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(Exception):
    """A block of `time_limit` did not end in time."""


class _Late(BaseException):
    """Raised in the block; not an Exception, which the code in it might catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` out of the block after so many seconds, whatever Python code runs in it.

    It works in every thread, which a signal does not.
    """
    import ctypes  # which a start that is refused need not wait for

    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def late() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_Late)
                )

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                over = True
            timer.cancel()
    except _Late:
        raise TookTooLong from None
