"""A terminal that cannot stop a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from mlx_tuner.words import printable

if TYPE_CHECKING:
    from rich.console import Console

_ASCII = str.maketrans(
    "╭╮╰╯─│┤└·●★→–−×✓✗━╸╺…“”’▁▂▃▄▅▆▇█▉▊▋▌▍▎▏⟦⟧", "..''-||+.o*>--x+x---.\"\"'_.,-~=+########[]"
)
"""What a terminal that knows only ASCII gets, character for character, so that columns stay."""


class SafeStream:
    """A text stream whose reader may leave, and whose encoding may lack what is written to it."""

    def __init__(self, stream: TextIO, *, plain: bool = False) -> None:
        self._stream = stream
        self._plain = plain
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
        self._translate = not encoding.startswith("utf")

    def write(self, text: str) -> int:
        """Write `text`, as well as the encoding can."""
        shown = printable(text, keep="\n\t") if self._plain else text
        if self._translate:
            shown = shown.translate(_ASCII)
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
    """`stream` as one that nothing can stop (see `SafeStream`), for text without escapes."""
    return cast("TextIO", SafeStream(stream, plain=True))


def console(stream: TextIO) -> Console:
    """A rich console on `stream` that survives its reader, its encoding and what it prints.

    Escape sequences in what is printed, such as in rows of a stranger's, are shown as text, and so
    is what rich would read as markup, such as brackets in a path.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Escaping(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                text, style, control = segment
                if not (control or text.isprintable()):
                    segment = Segment(printable(text, keep="\n\t"), style)
                yield segment

    return Escaping(
        file=cast("TextIO", SafeStream(stream)),
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
    )
