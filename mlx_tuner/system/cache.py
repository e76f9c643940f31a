"""Where what takes long to unpack from a user's file is kept for the next time."""

import hashlib
import os
from pathlib import Path

from mlx_tuner.system import files


def user_folder() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/mlx-tune`, or `~/.cache/mlx-tune`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-tune"


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
            files.remove(path)
