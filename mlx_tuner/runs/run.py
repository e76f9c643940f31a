"""What a run keeps in its directory: recipe, metrics, checkpoints, results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlx_tuner.errors import Fault, RunError
from mlx_tuner.runs import checkpoints, own
from mlx_tuner.runs.checkpoints import CHECKPOINTS
from mlx_tuner.runs.metrics import Record, Sample, Summary, record_from_json
from mlx_tuner.runs.place import (
    ADAPTER,
    ADAPTER_CONFIG,
    CRASH_LOG,
    DISCARDED,
    METRICS,
    OURS,
    PREVIOUS,
    RECIPE,
    RETURNING,
    SAMPLES,
    SUMMARY,
    Claim,
    keep_out,
)
from mlx_tuner.system import files


class Run:
    """A run directory that this process holds. Use it in a `with` block.

    Nothing of an earlier run is changed before `begin` or `go_on`.

    Args:
        resume: take up the run there; `checkpoint` is then the newest that verifies.
        overwrite: a run there may be replaced.
        held: a descriptor of the folder's lock that this process has inherited.

    Raises:
        UsageError, RunError: as `Claim` does; or no checkpoint verifies, and why.
    """

    def __init__(
        self, path: Path, *, resume: bool = False, overwrite: bool = False, held: int | None = None
    ) -> None:
        self.path = path
        self._claim = Claim(path, resume=resume, overwrite=overwrite, held=held)
        self._saved_step: int | None = None
        self.checkpoint: checkpoints.Checkpoint | None = None
        self.rejected: list[str] = []
        """Checkpoints newer than the one that is used, and why they are not."""
        try:
            files.sweep(path)
            if (path / CHECKPOINTS).is_dir():
                files.sweep(path / CHECKPOINTS)
            if resume:
                self.checkpoint, self.rejected = checkpoints.newest(path)
                if self.checkpoint is None:
                    what = "no checkpoint to resume from; start again with --overwrite"
                    faults = [Fault(str(path / CHECKPOINTS), "", each) for each in self.rejected]
                    raise RunError(Fault(str(path), "", what), *faults)
        except BaseException:
            self._claim.release()
            raise

    def begin(
        self, recipe_toml: str, *, keep_out_of: Iterable[Path] = (), restarted: bool = False
    ) -> None:
        """Start a new run, once everything else is known to be right.

        An earlier one is kept until the first checkpoint of this one; it comes back if there is
        none.

        Args:
            keep_out_of: folders of models and data, which a run must not be written into.
            restarted: `crash.log` is about an earlier try of this run.

        Raises:
            UsageError: the run is in one of `keep_out_of`.
        """
        keep_out(self.path, keep_out_of)
        aside = self.path / RETURNING
        there = [name for name in OURS if (self.path / name).exists()]
        if there:
            files.make_folder(aside)
            for name in there:
                files.move(self.path / name, aside / name)
            files.move(aside, self.path / PREVIOUS)
        if not restarted:
            files.discard(self.path / CRASH_LOG)
        files.write_text(self.path / RECIPE, recipe_toml)
        own.remember(recipe_toml)

    def go_on(self, recipe_toml: str) -> None:
        """Take the run up at `checkpoint`.

        Newer checkpoints are removed. Metric lines after it move to `metrics.discarded.jsonl`.
        """
        assert self.checkpoint is not None
        for name in checkpoints.names(self.path)[: len(self.rejected)]:
            files.remove(self.path / CHECKPOINTS / name)
        self._cut_metrics(self.checkpoint.state["metrics_bytes"])
        self._drop_torn_sample()
        files.discard(self.path / SUMMARY)
        recipe = self.path / RECIPE
        if not recipe.exists() or recipe.read_text("utf-8") != recipe_toml:
            files.write_text(recipe, recipe_toml)
            own.remember(recipe_toml)

    def require_space(self, most: int) -> None:
        """Refuse a run that the disk has no room for.

        Args:
            most: bytes that it will take, less those of checkpoints that are there: they are this
                run's, or go when its first one is written.

        Raises:
            RunError: bytes needed and bytes free.
        """
        there = sum(path.stat().st_size for path in (self.path / CHECKPOINTS).glob("*/*"))
        needed, free = most - there, shutil.disk_usage(self.path).free
        if free < needed:
            what = (
                f"checkpoints need {needed:,} bytes, {free:,} are free; "
                "free some disk space, or choose another folder with --run-dir"
            )
            raise RunError(Fault(str(self.path), "", what))

    def append(self, record: Record) -> None:
        """Add a line to `metrics.jsonl`."""
        files.append_line(self.path / METRICS, record.model_dump_json())

    def append_sample(self, sample: Sample) -> None:
        """Add a line to `samples.jsonl`."""
        files.append_line(self.path / SAMPLES, sample.model_dump_json())

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        *,
        best_step: int | None = None,
        size: int | None = None,
    ) -> None:
        """Keep a checkpoint after `step` steps, with the place in the metrics (`checkpoints.save`).

        The first one ends what `begin` has kept of an earlier run.
        """
        if step == self._saved_step:
            return
        metrics = self.path / METRICS
        if metrics.exists():
            files.sync(metrics)
        place = {"metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}
        checkpoints.save(self.path, step, write, {**place, **state}, best_step=best_step, size=size)
        if self._saved_step is None and (self.path / PREVIOUS).exists():
            files.remove(self.path / PREVIOUS)
        self._saved_step = step

    def publish(self, write: Callable[[Path], None], *, size: int | None = None) -> None:
        """Replace files of the run by those that `write` puts into the folder that it is given."""
        with files.filling(self.path, size) as folder:
            write(folder)

    def publish_kept(self, step: int) -> None:
        """Publish the adapter of the checkpoint after `step` steps, if it is still there."""
        kept = self.path / CHECKPOINTS / checkpoints.name_of(step)

        def copy(folder: Path) -> None:
            for name in (ADAPTER, ADAPTER_CONFIG):
                files.write_bytes(folder / name, (kept / name).read_bytes())

        if kept.exists() and not files.verify(kept):
            self.publish(copy)

    def write_summary(self, summary: Summary) -> None:
        """Keep `summary.json`."""
        files.write_json(self.path / SUMMARY, summary.to_json())

    def close(self) -> None:
        """Give the folder back, with an earlier run in it that was not replaced after all."""
        self._claim.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_torn_sample(self) -> None:
        """Drop what follows the last newline, so that no answer is added to half a line."""
        path = self.path / SAMPLES
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            files.write_bytes(path, whole)

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


class Elsewhere(Run):
    """What a rank other than the first has for a `Run`, which another machine holds.

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


def read_records(run: Path) -> list[Record]:
    """The lines of a run's `metrics.jsonl`, a torn last one left out. None there: no records.

    Raises RunError with the lines that are no records.
    """
    return _lines(run / METRICS, record_from_json, "a record of a run")


def read_samples(run: Path) -> list[Sample]:
    """The answers in a run's `samples.jsonl`, as `read_records` does.

    A resumed run answers again, to the same effect, what its checkpoint did not know of.
    """
    samples = _lines(run / SAMPLES, Sample.from_json, "an answer of a run")
    return list({(sample.step, sample.prompt): sample for sample in samples}.values())


_Line = TypeVar("_Line")


def _lines(path: Path, read: Callable[[dict[str, Any]], _Line | None], kind: str) -> list[_Line]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    found: list[_Line] = []
    faults = []
    for number, line in enumerate(lines, 1):
        try:
            one = read(_object(line))
        except ValueError as error:
            faults.append(Fault(f"{path}:{number}", "", f"is not {kind}: {error}"))
        else:
            found += [one] if one else []
    if faults:
        raise RunError(*faults)
    return found


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


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object. ValueError for anything else."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
