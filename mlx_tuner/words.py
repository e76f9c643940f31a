"""Numbers, and names, as people read them."""

from __future__ import annotations

import math
import os


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


def size(count: float) -> str:
    """Bytes in decimal units: "4.8 MB", "3.09 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def ram(size: int) -> str:
    """Bytes of RAM as it is sold, in binary gigabytes: "48 GB" of 51,539,607,552."""
    return f"{size / 2**30:.0f} GB"


def printable(text: str, keep: str = "") -> str:
    r"""Text out of somebody else's file for a terminal: `\x1b` as four characters, not as escape.

    Characters that turn the writing direction are escaped as well; those in `keep` are not.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def shortened(text: str, length: int = 1_000) -> str:
    """At most so many characters, of a text that may have any number."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def from_here(path: str) -> str:
    """A path as one would type it: from the current folder, if it is in it."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))  # noqa: PTH109, PTH118 - a name


def plural(count: int, noun: str) -> str:
    """Such as "1 row", "1,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def scientific(value: float) -> str:
    """A small number such as a learning rate, in four digits: "1.379e-4"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
