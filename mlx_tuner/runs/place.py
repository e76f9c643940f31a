"""Where a run is: its folder claimed for one process before anything heavy is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from mlx_tuner.errors import Fault, RunError, UsageError
from mlx_tuner.runs import checkpoints
from mlx_tuner.runs.checkpoints import CHECKPOINTS
from mlx_tuner.system import files, lock

RECIPE = "recipe.toml"
ADAPTER = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
METRICS = "metrics.jsonl"
DISCARDED = "metrics.discarded.jsonl"
SUMMARY = "summary.json"
LOSS_PLOT = "loss.png"
REPORT = "report.html"
SAMPLES = "samples.jsonl"
GRAD_NORM_PLOT = "grad_norm.png"
QUARANTINE = "quarantine.jsonl"
TASKS = "tasks.jsonl"
TENSORBOARD = "tensorboard"
CRASH_LOG = "crash.log"
PREVIOUS = ".previous"
"""A run that is being replaced, until the new one has its first checkpoint."""
RETURNING = ".returning"
"""A run that is half way into `PREVIOUS`, or out of it again."""
LOCK = ".lock"
OURS = (
    ADAPTER,
    ADAPTER_CONFIG,
    METRICS,
    DISCARDED,
    QUARANTINE,
    SUMMARY,
    REPORT,
    SAMPLES,
    LOSS_PLOT,
    GRAD_NORM_PLOT,
    TASKS,
    TENSORBOARD,
    CHECKPOINTS,
    RECIPE,
)
"""What `overwrite` replaces. The recipe is the last to go and to come back: it makes a run."""


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
        # A run that was copied without its hidden files is one still.
        if content(path) and not (path / LOCK).exists() and not checkpoints.names(path):
            what = "is not empty and not a run; choose another folder with --run-dir"
            raise UsageError(Fault(str(path), "", what))
        self._is_new = not (path / LOCK).exists()
        self._made = [each for each in (path, *path.parents) if not each.exists()]
        self._inherited = held is not None
        if held is None:
            files.make_folder(path)
            held = lock.acquire(path / LOCK, _owner())
        self.descriptor = held
        try:
            put_back(path)
            if not resume and not overwrite and is_run(path):
                what = (
                    "has a run in it; continue it with --resume, replace it with --overwrite, "
                    "or choose another folder with --run-dir"
                )
                raise UsageError(Fault(str(path), "", what))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder back: with an earlier run that was not replaced, or as it was."""
        if self.descriptor < 0:
            return
        try:
            put_back(self.path)
            alone = list(self.path.iterdir()) == [self.path / LOCK]
            if self._is_new and alone and not self._inherited:
                files.discard(self.path / LOCK)
                for folder in self._made:
                    files.discard_empty(folder)
        finally:
            os.close(self.descriptor)
            self.descriptor = -1


def put_back(path: Path) -> None:
    """Bring back an earlier run that `Run.begin` set aside, if no checkpoint followed.

    It may be called again after it was interrupted, or after `begin` was.
    """
    previous, returning = path / PREVIOUS, path / RETURNING
    if previous.is_dir():
        if checkpoints.newest(path)[0] is not None:
            files.remove(previous)
            return
        for name in OURS:
            if (path / name).exists():
                files.remove(path / name)
        files.move(previous, returning)
    if returning.is_dir():
        for name in OURS:
            if (returning / name).exists():
                files.move(returning / name, path / name)
        files.remove(returning)


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
