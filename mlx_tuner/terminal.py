"""A terminal that cannot stop a run, and numbers as people read them."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_ASCII = str.maketrans("╭╮╰╯─│┤└·●★→–−×✓✗━╸╺…“”’█▉▊▋▌▍▎▏⟦⟧", "..''-||+.o*>--x+x---.\"\"'########[]")
"""What a terminal that knows only ASCII gets, character for character, so that columns stay."""


class SafeStream:
    """A text stream whose reader may leave, and whose encoding may lack what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
        self._translate = not encoding.startswith("utf")

    def write(self, text: str) -> int:
        """Write `text`, as well as the encoding can."""
        shown = text
        if self._translate:
            shown = text.translate(_ASCII)
            encoding = self._stream.encoding or "ascii"
            shown = shown.encode(encoding, "replace").decode(encoding)
        try:
            self._stream.write(shown)
        except (OSError, ValueError):
            self._leave()
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _leave(self) -> None:
        """Nobody reads any more: let this process's later output, at exit too, go nowhere."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def safe(stream: TextIO) -> TextIO:
    """`stream` as one that nothing can stop: see `SafeStream`."""
    return cast("TextIO", SafeStream(stream))


def console(stream: TextIO) -> Console:
    """A rich console on `stream` that survives its reader and its encoding."""
    from rich.console import Console

    return Console(file=safe(stream), highlight=False)


def duration(seconds: float) -> str:
    """Such as "0.35 s", "12.5 s", "3 min 24 s", "1 h 02 min", "2 d 03 h"."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest:02d} {smaller}"
    return f"{whole} s"


def rate(value: float) -> str:
    """A number a second, in three digits or more: "0.191", "1.47", "23.4", "1,234"."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def ram(size: int) -> str:
    """Bytes of RAM as it is sold, in binary gigabytes: "48 GB" of 51,539,607,552."""
    return f"{size / 2**30:.0f} GB"


def plural(count: int, noun: str) -> str:
    """Such as "1 row", "1,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def scientific(value: float) -> str:
    """A small number such as a learning rate, in four digits: "1.379e-4"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
