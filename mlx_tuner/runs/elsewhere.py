"""A run whose folder another machine holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_tuner.runs.run import Run


class Elsewhere(Run):
    """What a rank other than the first has for a `Run`: nothing is kept of it here.

    Args:
        path: the folder as the other machine calls it, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = None
        self.rejected = []

    def begin(self, *_: Any, **__: Any) -> None: ...

    def go_on(self, *_: Any) -> None: ...

    def require_space(self, *_: Any) -> None: ...

    def append(self, *_: Any) -> None: ...

    def append_sample(self, *_: Any) -> None: ...

    def save_checkpoint(self, *_: Any, **__: Any) -> None: ...

    def publish(self, *_: Any, **__: Any) -> None: ...

    def publish_kept(self, *_: Any) -> None: ...

    def close(self) -> None: ...
