"""A model's chat template, tried in a child process before it is trusted: it is a program.

Jinja's sandbox keeps it from files and from Python, but not from looping or filling memory.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.system.time_limit import TookTooLong, time_limit

SECONDS = 2
"""Of CPU time, in which it must have written a few conversations; real ones take milliseconds."""

MEGABYTES = 256
MOST_CHARACTERS = 1_000_000

ROW_SECONDS = 4.0
"""For rendering real conversations, and a little more for each."""

_WALL_SECONDS = 20  # where the machine is busy, or limits are not to be had
_LOOK_SECONDS = 0.01
_CHILD = Path(__file__).with_name("render_child.py")


def require_bounded(template: str, folder: Path) -> None:
    """Refuse a template that takes too much time or memory, or writes too much.

    A template that raises an error passes: whoever renders rows with it says which row it refused.

    Raises:
        ModelError: what it takes too much of.
    """
    if excess := _excess(template):
        what = f"{excess} for a few short turns; the model may be harmful"
        raise ModelError(Fault(str(folder), "chat_template", what))


@cache
def _excess(template: str) -> str | None:
    """What a template takes too much of, rendering the child's conversations."""
    order = {
        "template": template,
        "path": [place for place in sys.path if place],  # not the folder that we are in
        "seconds": SECONDS,
        "bytes": MEGABYTES << 20,
    }
    command, pipe = [sys.executable, "-I", str(_CHILD)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as child:
        threading.Thread(target=_watch, args=(child,), daemon=True).start()
        said, _ = child.communicate(json.dumps(order).encode())
    if child.returncode or not said.strip().isdigit():
        return f"takes over {SECONDS} s or {MEGABYTES} MB"
    if (characters := int(said)) > MOST_CHARACTERS:
        return f"makes {characters:,} characters"
    return None


def _watch(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that takes what its kernel does not limit."""
    until = time.monotonic() + _WALL_SECONDS
    while child.poll() is None:
        if time.monotonic() > until or _footprint(child.pid) > MEGABYTES << 20:
            child.kill()
        time.sleep(_LOOK_SECONDS)


def _footprint(pid: int) -> int:
    """Bytes that a process has taken, on macOS, whose kernel holds none to a limit; elsewhere 0."""
    if sys.platform != "darwin":
        return 0
    usage = (ctypes.c_uint64 * 12)()  # struct rusage_info_v0, whose tenth is ri_phys_footprint
    ctypes.CDLL(None).proc_pid_rusage(pid, 0, usage)
    return usage[9]


class Bounded:
    """`apply_chat_template` of a tokenizer, with a time limit.

    After that it refuses at once, so that a thousand such rows take no longer than one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._refusal: str | None = None

    def __call__(self, conversation: Any, *arguments: Any, **options: Any) -> Any:
        """Render as transformers does.

        Raises:
            ModelError: it took too long, now or before.
        """
        if self._refusal is None:
            render = type(self._tokenizer).apply_chat_template
            try:
                with time_limit(ROW_SECONDS + 0.02 * len(conversation)):
                    return render(self._tokenizer, conversation, *arguments, **options)
            except TookTooLong:
                self._refusal = f"takes over {ROW_SECONDS:g} s; the model may be harmful"
        raise ModelError(Fault("", "chat_template", self._refusal))
