"""The checkpoints of a run: which there are, which verify, which are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_tuner.system import files

CHECKPOINTS = "checkpoints"
STATE = "state.json"

_KEPT = 2
"""The newest ones, beside the best: the second is there if the first is damaged."""
MOST_AT_ONCE = _KEPT + 2
"""On the disk: those, the best, and one that is being written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint all of whose files are as they were written."""

    path: Path
    step: int
    state: dict[str, Any]


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, and why newer ones are not used."""
    rejected: list[str] = []
    for name in names(run):
        path = run / CHECKPOINTS / name
        if wrong := files.verify(path):
            rejected.append(f"{name} is not used: {wrong[0]}")
            continue
        state = json.loads((path / STATE).read_bytes())
        return Checkpoint(path, state["step"], state), rejected
    return None, rejected


def save(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    state: Mapping[str, Any],
    *,
    best_step: int | None = None,
    size: int | None = None,
) -> Path:
    """Keep a checkpoint, and drop those no longer needed.

    The two newest stay, and that of `best_step` if there is one.

    Args:
        write: puts adapter and optimizer into the folder that it is given.
        state: plain values, kept in `state.json` with the step.
        size: bytes that it takes, for the message of a full disk.
    """
    path = run / CHECKPOINTS / name_of(step)
    if path.exists():  # did not verify, or this run would have gone on from it
        files.remove(path)
    with files.staging(path, size) as folder:
        write(folder)
        files.write_json(folder / STATE, {"step": step, **state})
    kept = {*names(run)[:_KEPT], name_of(best_step or 0)}
    for name in names(run):
        if name not in kept:
            files.remove(run / CHECKPOINTS / name)
    return path


def names(run: Path) -> list[str]:
    """Names of the checkpoints of a run, newest first."""
    paths = (run / CHECKPOINTS).glob("step-*")
    return sorted((p.name for p in paths if p.name[5:].isdecimal() and p.is_dir()), reverse=True)


def name_of(step: int) -> str:
    """The folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"
