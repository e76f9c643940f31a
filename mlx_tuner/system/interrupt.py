"""Signals that ask a run to stop: the first is kept for the next step boundary, a second kills."""

from __future__ import annotations

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
