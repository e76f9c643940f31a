"""Where a run is: its folder claimed for one process before anything heavy is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from mlx_tuner.errors import Fault, RunError, UsageError
from mlx_tuner.system import files, lock

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
CRASH_LOG = "crash.log"
PREVIOUS = ".previous"
"""A run that is being replaced, until the new one has its first checkpoint."""
RETURNING = ".returning"
"""A run that is half way into `PREVIOUS`, or out of it again."""
LOCK = ".lock"


class Claim:
    """The folder of a run, whose lock is held until `release`.

    Args:
        resume: there must be a run; otherwise there must be none, unless `overwrite`.
        held: a descriptor of the lock, where the process that started this one holds it.

    Raises:
        UsageError: what is there is no run, or is one that nobody asked to go on with or replace.
        RunError: there is no run to resume; or another process is at it; or it cannot be written.
    """

    def __init__(
        self, path: Path, *, resume: bool = False, overwrite: bool = False, held: int | None = None
    ) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            what = "is not a folder; choose another one with --run-dir"
            raise UsageError(Fault(str(path), "", what))
        if resume and not is_run(path):
            what = "there is no run to resume; start without --resume"
            raise RunError(Fault(str(path), "", what))
        if content(path) and not (path / LOCK).exists():
            what = "is not empty and not a run; choose another folder with --run-dir"
            raise UsageError(Fault(str(path), "", what))
        self._is_new = not (path / LOCK).exists()
        self._made = [each for each in (path, *path.parents) if not each.exists()]
        self._inherited = held is not None
        if held is None:
            files.make_folder(path)
            held = lock.acquire(path / LOCK, _owner())
        self.descriptor = held
        if not resume and not overwrite and is_run(path):
            self.release()
            what = (
                "has a run in it; continue it with --resume, replace it with --overwrite, "
                "or choose another folder with --run-dir"
            )
            raise UsageError(Fault(str(path), "", what))

    def release(self) -> None:
        """Give the folder back as it was, if no run has begun in it."""
        if self.descriptor < 0:
            return
        alone = list(self.path.iterdir()) == [self.path / LOCK]
        if self._is_new and alone and not self._inherited:
            files.discard(self.path / LOCK)
            for folder in self._made:
                files.discard_empty(folder)
        os.close(self.descriptor)
        self.descriptor = -1


def default_folder(recipe: Path) -> Path:
    """Where a run of a recipe goes; the recipe itself need not be there."""
    name = recipe.absolute().parent.name if recipe.stem == "recipe" else recipe.stem
    return Path("adapters") / name


def is_run(path: Path) -> bool:
    """Whether `path` has what every run has from its start."""
    return any((path / name).exists() for name in (RECIPE, METRICS, PREVIOUS, RETURNING))


def is_running(path: Path) -> bool:
    """Whether a process holds the lock of the run in `path`."""
    return lock.holder(path / LOCK) is not None


def keep_out(path: Path, folders: Iterable[Path]) -> None:
    """Refuse a run in one of these folders, of models or data.

    Raises:
        UsageError: `path` is one of them, or in one.
    """
    place = path.resolve()
    for folder in folders:
        own = folder.resolve()
        if place == own or own in place.parents:
            what = f"is where {folder} is; choose another folder with --run-dir"
            raise UsageError(Fault(str(path), "", what))


def content(path: Path) -> list[str]:
    """What is in a folder, leaving out hidden files such as the lock and what Finder writes."""
    if not path.is_dir():
        return []
    names = (entry.name for entry in path.iterdir())
    return [name for name in names if not name.startswith(".") and name != CRASH_LOG]


def _owner() -> str:
    return f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
