"""Interrupting: signals, kept for the next step boundary, and code that takes too long, stopped."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """The signal that came, if one did."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Keep SIGINT, SIGTERM and SIGHUP while the block runs; what they did before is put back.

    Outside the main thread, where Python allows no handlers, none is kept.
    """
    interrupt = Interrupt()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if main}

    def keep(number: int, _: FrameType | None) -> None:
        interrupt.received = signal.Signals(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, keep)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TookTooLong(Exception):
    """A block of `time_limit` did not end in time."""


class _Late(BaseException):
    """Raised in the block; not an Exception, which the code in it might catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` out of the block after so many seconds, whatever Python code runs in it.

    It works in every thread, which a signal does not.
    """
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
