"""Signals, kept for the next step boundary or handed on to a child."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """The signal that came, if one did."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None


def _handlers(numbers: Iterable[signal.Signals]) -> dict[signal.Signals, Any]:
    """What each signal does; those that are ignored, as by nohup, are left alone."""
    found = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Keep SIGINT, SIGTERM and SIGHUP while the block runs; what they did before is put back.

    Outside the main thread, where Python allows no handlers, none is kept.
    """
    interrupt = Interrupt()
    main = threading.current_thread() is threading.main_thread()
    before = _handlers(SIGNALS) if main else {}

    def keep(number: int, _: FrameType | None) -> None:
        interrupt.received = signal.Signals(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    for number in before:
        signal.signal(number, keep)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Relay:
    """Hands signals on to a child in a process group of its own while its `with` block runs.

    So a Ctrl-C reaches the child once, and not twice: a second signal ends it at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first that came."""
        self.child: int | None = None
        """The process id of a child that runs."""

    def __enter__(self) -> Relay:
        self._before = _handlers((*SIGNALS, signal.SIGTSTP))
        for number in self._before:
            signal.signal(number, self._stop if number == signal.SIGTSTP else self._hand_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, _: object) -> None:
        if self.signal is None:
            self.signal = number
        if self.child is not None:
            with suppress(ProcessLookupError):
                os.kill(self.child, number)

    def _stop(self, *_: object) -> None:
        """Ctrl-Z: stop the child, then this process; both go on when this call returns."""
        child = self.child
        if child is not None:
            os.kill(child, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if child is not None:
            os.kill(child, signal.SIGCONT)
