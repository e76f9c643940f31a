"""A model's chat template, tried once before it is trusted: it is a program, and may never end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, ModelError

SECONDS = 5.0
"""In which it must have written a conversation of two turns; a real one takes milliseconds."""

MOST_CHARACTERS = 1_000_000

_CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def require_end(tokenizer: Any, folder: Path) -> None:
    """Refuse a template that does not come to an end, or writes without measure.

    One that fails is left to whoever renders rows with it, and can say which row it refused.

    Raises:
        ModelError: as above.
    """
    if not tokenizer.has_chat_template:
        return
    try:
        with _alarm(SECONDS):
            text = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    except _Late:
        what = f"takes over {SECONDS:g} s for two short turns; the model may be harmful"
        raise ModelError(Fault(str(folder), "chat_template", what)) from None
    except Exception:
        return
    if len(text) > MOST_CHARACTERS:
        what = f"makes {len(text):,} characters of two short turns; the model may be harmful"
        raise ModelError(Fault(str(folder), "chat_template", what))


class _Late(BaseException):
    pass


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `_Late` in the block after so many seconds; signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
