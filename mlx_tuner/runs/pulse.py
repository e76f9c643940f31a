"""What a training process tells the process that watches over it, in lines on a pipe."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass

from mlx_tuner.errors import first_line

VARIABLE = "MLX_TUNE_SUPERVISED"
"""Environment variable that makes `mlx-tune run` train in this process (`Handover`)."""

_PR_SET_PDEATHSIG = 1
CRASHED = 70
"""Exit code of a training process that met an error of none of recipe, data and model."""


@dataclass(frozen=True)
class Handover:
    """Descriptors that a supervisor lets its child inherit, and how often it has restarted."""

    lock: int | None
    """Of the run's folder; None where another machine holds it."""
    pulse: int
    """Takes the lines."""
    alive: int
    """Ends when the supervisor does."""
    terminal: int
    """Standard error as the person sees it; descriptor 2 is the supervisor's to read."""
    restarts: int | None
    """All restarts of the run so far; None in the first start, which asks its checkpoint."""


class Pulse:
    """Tells a supervisor how far a run is, or nobody."""

    def __init__(self, handover: Handover | None = None) -> None:
        self._pipe = handover.pulse if handover else None
        self.lock = handover.lock if handover else None
        self.restarts = handover.restarts if handover else None

    def begun(self) -> None:
        """Say that this process runs, and will tell what goes wrong."""
        self._tell("begun")

    def started(self, micro_batch_tokens: int) -> None:
        """Say what a forward pass takes at most: half of it is tried where memory ends."""
        self._tell(f"started {micro_batch_tokens}")

    def restarted(self, count: int) -> None:
        """Say how many restarts the run has had."""
        self._tell(f"restarts {count}")

    def step(self) -> None:
        """Say that a step is made."""
        self._tell("step")

    def met(self) -> None:
        """Say that this rank's part of a step is computed, and others are waited for."""
        self._tell("met")

    def quiet(self) -> None:
        """Say that nothing is to be heard until the next beat or step, however long that takes."""
        self._tell("quiet")

    def beat(self) -> None:
        """Say that something else than a step goes on."""
        self._tell("beat")

    def saved(self, step: int) -> None:
        """Say that a checkpoint is on the disk."""
        self._tell(f"saved {step}")

    def crashed(self, error: Exception) -> int:
        """Say what ended this process, its traceback where the supervisor reads; the exit code."""
        with suppress(OSError):
            os.write(2, "".join(traceback.format_exception(error)).encode("utf-8", "replace"))
        self._tell(f"crashed {first_line(error)[:2000]}")
        return CRASHED

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # a supervisor that has just gone
                os.write(self._pipe, line.encode() + b"\n")


def take_over() -> Pulse | None:
    """The pulse of a process that a supervisor has started; None for any other.

    From here on this process ends when its supervisor does.
    """
    if (text := os.environ.pop(VARIABLE, None)) is None:
        return None
    handover = Handover(**json.loads(text))
    for descriptor in (handover.lock, handover.pulse, handover.alive, handover.terminal):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    sys.stderr = os.fdopen(handover.terminal, "w", buffering=1, errors="backslashreplace")
    threading.Thread(target=_end_with, args=(handover.alive,), daemon=True).start()
    if sys.platform == "linux":
        import ctypes

        # The thread needs the interpreter, which a kernel that hangs may hold.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.enable(2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is to be saved before the first step
    pulse = Pulse(handover)
    pulse.begun()
    return pulse


def _end_with(alive: int) -> None:
    """Wait for the end of the supervisor, and end too: checkpoints are whole at any time."""
    with suppress(OSError):
        os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGKILL)
