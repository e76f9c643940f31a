"""The directory of a run: locked by one process, metrics appended, checkpoints that verify."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_tuner.errors import Fault, RunError, UsageError
from mlx_tuner.runs.metrics import Record, Summary, record_from_json
from mlx_tuner.system import files

RECIPE = "recipe.toml"
METRICS = "metrics.jsonl"
DISCARDED = "metrics.discarded.jsonl"
SUMMARY = "summary.json"
LOSS_PLOT = "loss.png"
GRAD_NORM_PLOT = "grad_norm.png"
CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine.jsonl"
STATE = "state.json"
_LOCK = ".lock"
_OURS = (
    "adapters.safetensors",
    "adapter_config.json",
    RECIPE,
    METRICS,
    DISCARDED,
    QUARANTINE,
    SUMMARY,
    LOSS_PLOT,
    GRAD_NORM_PLOT,
    CHECKPOINTS,
)
"""What `overwrite` removes."""

_KEPT_CHECKPOINTS = 2
"""The newest ones, beside the best: the second is there if the first is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint all of whose files are as they were written."""

    path: Path
    step: int
    state: dict[str, Any]
    rejected: tuple[str, ...] = ()
    """Newer checkpoints that are not, and why."""


class Run:
    """A run directory that this process holds the lock of. Use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = files.lock(path / _LOCK, _owner())
        self._saved_step: int | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        recipe_toml: str,
        *,
        overwrite: bool = False,
        keep_out_of: Iterable[Path] = (),
    ) -> Run:
        """Start a run in `path`, which does not exist or is empty.

        Call it once everything else is known to be right: `overwrite` removes an earlier run.

        Args:
            recipe_toml: kept as `recipe.toml`.
            keep_out_of: folders of models and data, which a run must not be written into.

        Raises:
            UsageError: `path` has something in it, or is in one of `keep_out_of`.
            RunError: another process is running there, or it cannot be written.
        """
        _check_place(path, keep_out_of)
        if _content(path) and not (path / _LOCK).exists():
            what = "is not empty and not a run; choose another folder with --run-dir"
            raise UsageError(Fault(str(path), "", what))
        files.make_folder(path)
        run = cls(path)
        try:
            if _content(path) and not overwrite:
                what = (
                    "has a run in it; continue it with --resume, replace it with --overwrite, "
                    "or choose another folder with --run-dir"
                )
                raise UsageError(Fault(str(path), "", what))
            files.sweep(path)
            for name in _OURS:
                if (path / name).exists():
                    files.remove(path / name)
            files.write_text(path / RECIPE, recipe_toml)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def resume(cls, path: Path) -> tuple[Run, Checkpoint]:
        """Take up the run in `path` at its newest checkpoint that verifies.

        Newer checkpoints, which do not, are removed. Metric lines after the checkpoint are moved to
        `metrics.discarded.jsonl`.

        Raises:
            RunError: no checkpoint verifies, and why; or another process is running there.
        """
        if not is_run(path):
            raise RunError(
                Fault(str(path), "", "there is no run to resume; start without --resume")
            )
        run = cls(path)
        try:
            files.sweep(path)
            if (path / CHECKPOINTS).is_dir():
                files.sweep(path / CHECKPOINTS)
            checkpoint, rejected = newest_checkpoint(path)
            if checkpoint is None:
                what = "no checkpoint to resume from; start again with --overwrite"
                faults = [Fault(str(path / CHECKPOINTS), "", reason) for reason in rejected]
                raise RunError(Fault(str(path), "", what), *faults)
            for name in _checkpoints(path)[: len(rejected)]:
                files.remove(path / CHECKPOINTS / name)
            run._cut_metrics(checkpoint.state["metrics_bytes"])
        except BaseException:
            run.close()
            raise
        return run, checkpoint

    def append(self, record: Record) -> None:
        """Add a line to `metrics.jsonl`."""
        files.append_line(self.path / METRICS, record.model_dump_json())

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        *,
        best_step: int | None = None,
    ) -> Path:
        """Keep a checkpoint after `step` steps, and drop those no longer needed.

        The two newest stay, and that of `best_step` if there is one.

        Args:
            write: puts adapter and optimizer into the folder that it is given.
            state: plain values, kept in `state.json` with the step and the place in the metrics.
        """
        path = self.path / CHECKPOINTS / _name(step)
        if step == self._saved_step:
            return path
        metrics = self.path / METRICS
        if metrics.exists():
            files.sync(metrics)
        size = metrics.stat().st_size if metrics.exists() else 0
        if path.exists():  # did not verify, or this run would have gone on from it
            files.remove(path)
        with files.staging(path) as folder:
            write(folder)
            files.write_json(folder / STATE, {"step": step, "metrics_bytes": size, **state})
        self._saved_step = step
        kept = {*_checkpoints(self.path)[:_KEPT_CHECKPOINTS], _name(best_step or 0)}
        for name in _checkpoints(self.path):
            if name not in kept:
                files.remove(self.path / CHECKPOINTS / name)
        return path

    def publish(self, write: Callable[[Path], None]) -> None:
        """Make the files that `write` puts into the folder it is given those of the run itself."""
        with files.filling(self.path) as folder:
            write(folder)

    def write_summary(self, summary: Summary) -> None:
        """Keep `summary.json`."""
        files.write_json(self.path / SUMMARY, summary.to_json())

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _cut_metrics(self, size: int) -> None:
        """Leave the first `size` bytes of the metrics; whole lines after them are set aside."""
        path = self.path / METRICS
        content = path.read_bytes() if path.exists() else b""
        later = content[size:]
        if not later:
            return
        for line in later.split(b"\n")[:-1]:  # what has no newline is torn
            files.append_line(self.path / DISCARDED, line.decode("utf-8", "replace"))
        if (self.path / DISCARDED).exists():
            files.sync(self.path / DISCARDED)
        files.write_bytes(path, content[:size])


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and why newer ones were rejected."""
    rejected: list[str] = []
    for name in _checkpoints(run):
        path = run / CHECKPOINTS / name
        wrong = files.verify(path)
        if not wrong:
            state = json.loads((path / STATE).read_bytes())
            return Checkpoint(path, state["step"], state, tuple(rejected)), rejected
        rejected.append(f"{name} is not used: {wrong[0]}")
    return None, rejected


def read_records(run: Path) -> list[Record]:
    """The lines of a run's `metrics.jsonl`, a torn last one left out. None there: no records.

    Raises RunError with the lines that are no records.
    """
    path = run / METRICS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    records: list[Record] = []
    faults = []
    for number, line in enumerate(lines, 1):
        try:
            record = record_from_json(_object(line))
        except ValueError as error:
            faults.append(Fault(f"{path}:{number}", "", f"is not a record of a run: {error}"))
        else:
            records += [record] if record else []
    if faults:
        raise RunError(*faults)
    return records


def read_summary(run: Path) -> Summary | None:
    """A run's `summary.json`; None if the run has not ended. RunError if it cannot be one."""
    path = run / SUMMARY
    try:
        return Summary.from_json(_object(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    except ValueError as error:
        raise RunError(Fault(str(path), "", f"is not the summary of a run: {error}")) from None


def is_run(path: Path) -> bool:
    """Whether `path` has what every run has from its start."""
    return (path / RECIPE).is_file() or (path / METRICS).is_file()


def is_running(path: Path) -> bool:
    """Whether a process holds the lock of the run in `path`."""
    return files.lock_holder(path / _LOCK) is not None


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object. ValueError for anything else."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _checkpoints(run: Path) -> list[str]:
    """Names of the checkpoints of a run, newest first."""
    paths = (run / CHECKPOINTS).glob("step-*")
    return sorted((p.name for p in paths if p.name[5:].isdecimal() and p.is_dir()), reverse=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _owner() -> str:
    return f"process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _content(path: Path) -> list[str]:
    """What is in a folder, leaving out hidden files such as the lock and what Finder writes."""
    if not path.is_dir():
        return []
    return [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]


def _check_place(path: Path, keep_out_of: Iterable[Path]) -> None:
    if path.exists() and not path.is_dir():
        what = "is not a folder; choose another one with --run-dir"
        raise UsageError(Fault(str(path), "", what))
    place = path.resolve()
    for folder in keep_out_of:
        own = folder.resolve()
        if place == own or own in place.parents:
            what = f"is where {folder} is; choose another folder with --run-dir"
            raise UsageError(Fault(str(path), "", what))
