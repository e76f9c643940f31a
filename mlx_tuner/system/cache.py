"""What is kept for the next time: unpacked rows, and results of `mlx-tune bench`."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_tuner.system import files

RESULTS = Path("benchmarks") / "results"
"""Of a clone of the repository, from where the README's tables are made."""


def user_folder() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/mlx-tune`, or `~/.cache/mlx-tune`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-tune"


def results_folder() -> Path:
    """Where a benchmark is kept: in a clone, else in the user's folder."""
    return RESULTS if RESULTS.is_dir() else user_folder() / "bench"


def results(pattern: str) -> Iterator[tuple[str, Any]]:
    """Name and content of each JSON file of a benchmark, the newest first."""
    paths = [path for f in (RESULTS, user_folder() / "bench") for path in f.glob(pattern)]
    for path in sorted(paths, key=lambda path: -path.stat().st_mtime):
        with suppress(OSError, ValueError):
            yield path.name, json.loads(path.read_text("utf-8"))


def path_for(source: Path, identity: tuple[int, ...]) -> Path:
    """Where the rows of `source` are kept while that is the file of this `identity`."""
    name = hashlib.blake2b(os.fsencode(source.absolute()), digest_size=8).hexdigest()
    version = hashlib.blake2b(repr(identity).encode(), digest_size=4).hexdigest()
    return user_folder() / f"{source.name[:64]}-{name}-{version}.rows"


def remove_others(kept: Path) -> None:
    """Remove what is kept of earlier content of the same source."""
    start = kept.name.rpartition("-")[0] + "-"
    for path in kept.parent.iterdir():
        if path.name.startswith(start) and path != kept:
            files.discard(path)
