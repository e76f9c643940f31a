"""What is worked out once about a user's file and kept for the next time, in a cache folder.

A cache is never needed: one that is missing, damaged, out of date or cannot be written only costs
the time to work its content out again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from mlx_tuner.errors import TunerError
from mlx_tuner.system import files

Key = Mapping[str, object]
"""What a cached result depends on, in values that JSON can hold."""


def user_folder() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/mlx-tune`, or `~/.cache/mlx-tune`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-tune"


def path_for(folder: Path, source: Path, suffix: str) -> Path:
    """Where `folder` keeps what is known about `source`: one name a source, readable and unique."""
    name = hashlib.blake2b(os.fsencode(source.absolute()), digest_size=8).hexdigest()
    return folder / f"{source.name[:64]}-{name}{suffix}"


def store(path: Path, key: Key, arrays: Sequence[np.ndarray]) -> None:
    """Keep one-dimensional `arrays` in `path` under `key`."""
    shapes = [(array.dtype.str, len(array)) for array in arrays]
    header = {"key": key, "arrays": shapes, "digest": _digest(arrays)}
    with (
        suppress(TunerError, OSError),
        files.replacing(path) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(json.dumps(header).encode() + b"\n")
        for array in arrays:
            array.tofile(file)


def load(path: Path, key: Key) -> list[np.ndarray] | None:
    """The arrays that `path` keeps under this very `key`, intact; None otherwise."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(1 << 20))
            if header["key"] != json.loads(json.dumps(key)):
                return None
            arrays = [np.fromfile(file, dtype, count) for dtype, count in header["arrays"]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return arrays if _digest(arrays) == header["digest"] else None


def _digest(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
