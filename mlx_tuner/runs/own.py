"""Which runs were made on this machine, as a record in the user's cache folder.

A folder from elsewhere may hold a recipe that names any file or data set. Only a recipe on record
here was given to `run` by the user, so only its rows are read for whoever did not ask for them.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from mlx_tuner.errors import TunerError
from mlx_tuner.runs.place import RECIPE
from mlx_tuner.system import cache, files


def remember(recipe_toml: str) -> None:
    """Put a run's recipe on record; where that fails, its rows are only not read later."""
    with suppress(TunerError, OSError):
        files.write_text(_record(recipe_toml.encode()), "")


def is_own(run: Path) -> bool:
    """Whether the recipe of a folder is on record."""
    try:
        return _record((run / RECIPE).read_bytes()).exists()
    except OSError:
        return False


def _record(recipe: bytes) -> Path:
    return cache.user_folder() / "runs" / hashlib.sha256(recipe).hexdigest()
