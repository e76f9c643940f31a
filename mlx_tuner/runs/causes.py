"""Why a training process died, in one sentence, and whether another try may help."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

_MESSAGES = (
    (
        r"insufficient memory|MemoryError|OutOfMemory|out of memory|unable to allocate|"
        r"attempting to allocate|maximum allowed buffer",
        "the GPU or the machine ran out of memory",
        True,
    ),
    (
        r"Impacting ?Interactivity",
        "macOS stopped the GPU work because the display waited for it; "
        "let the display sleep while training",
        False,
    ),
    (
        r"resource limit",
        "Metal's limit of buffers was reached; close other programs that use the GPU",
        False,
    ),
    (r"GPU Timeout|CallbackErrorTimeout", "the GPU took too long over one piece of work", False),
    (r"innocent victim|InnocentVictim", "another program's GPU work failed", False),
    (r"\[METAL\]|command buffer|kIOGPU|\[metal::", "the GPU's work failed", False),
    (r"cuda|cublas|cudnn", "the GPU's work failed", False),
)
"""Patterns of messages; what they mean; whether less memory helps. The first match counts."""

_OF_OTHERS = re.compile(r"\[(ring|jaccl|nccl)\]|connection to a peer", re.IGNORECASE)
"""What MLX writes where another rank is gone."""

_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "the system killed it, most likely for memory",
    signal.SIGSEGV: "it read memory that is not its own (segmentation fault)",
    signal.SIGBUS: "it read memory that is not there (bus error)",
    signal.SIGABRT: "it stopped itself (abort)",
    signal.SIGILL: "it met an instruction that this processor does not have",
    signal.SIGFPE: "it divided by zero",
}


@dataclass(frozen=True)
class Cause:
    """Of the end of a training process."""

    sentence: str
    memory: bool = False
    """Whether less memory a forward pass may help."""
    chance: bool = True
    """Whether another try may end otherwise."""


def of_message(text: str) -> Cause | None:
    """What somebody's error message says; None for one that says nothing of the machine."""
    for pattern, sentence, memory in _MESSAGES:
        if re.search(pattern, text, re.IGNORECASE):
            return Cause(sentence, memory)
    return None


def is_of_others(text: str) -> bool:
    """Whether what a process wrote to standard error tells of another rank's end."""
    return bool(_OF_OTHERS.search(text))


def of_signal(number: int, text: str) -> Cause:
    """What a signal that ended a process means, with what it wrote to standard error."""
    if found := of_message(text):
        return found
    names = {each.value: each.name for each in signal.Signals}
    return Cause(_SIGNALS.get(number) or f"signal {names.get(number, number)} ended it")
