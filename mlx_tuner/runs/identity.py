"""What makes a resumed run the same run: its recipe, its rows and its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from mlx_tuner.errors import DataError, Fault, ModelError, RecipeError

FREE = {"micro_batch_tokens", "gradient_checkpointing", "log_every", "save_every"}
"""Keys of [train] that change no result."""
ON_REQUEST = {"epochs", "max_steps", "eval_every", "early_stopping_patience", "learning_rate"}
"""Keys of [train] that change it in a defined way, from the checkpoint on."""
CHECKED = ("model", "data", "lora", "train")
"""Tables that decide a result."""
PLACES = {"data.train", "data.valid", "model.path", "lora.init_from"}
"""Keys that name files, which may have moved, or are elsewhere on another machine."""


@dataclass(frozen=True)
class Identity:
    """Kept in every checkpoint."""

    recipe: dict[str, Any]
    """The resolved tables as plain values."""
    rows: dict[str, Any]
    """Of "train" and "valid": a digest of the rows' content and order."""
    base: str
    """Fingerprint of the base model's weights."""

    def to_state(self) -> dict[str, Any]:
        """Plain values, for `check`."""
        return asdict(self)

    def check(self, kept: Mapping[str, Any], source: str, *, allow_change: bool) -> None:
        """Refuse to go on from a checkpoint of another run.

        Args:
            kept: its `to_state`.
            source: the recipe's name, for messages.

        Raises:
            RecipeError: the keys that differ, with both values.
            DataError, ModelError: the rows or the base model are others.
        """
        if faults := self._recipe_faults(kept["recipe"], source, allow_change):
            raise RecipeError(*faults)
        for name, digest in self.rows.items():
            if digest != (before := kept["rows"].get(name)):
                what = (
                    f"has other rows than the run began with ({_short(before)} then, "
                    f"{_short(digest)} now); bring them back, or start over with --overwrite"
                )
                raise DataError(Fault(source, f"data.{name}", what))
        if self.base != kept["base"]:
            what = (
                f"holds other weights than the run began with ({_short(kept['base'])} then, "
                f"{_short(self.base)} now); give that model, or start over with --overwrite"
            )
            raise ModelError(Fault(source, "model.path", what))

    def _recipe_faults(
        self, before: Mapping[str, Any], source: str, allow_change: bool
    ) -> list[Fault]:
        faults = []
        now = json.loads(json.dumps(self.recipe))  # lists and tuples are one there
        for table in CHECKED:
            old, new = before[table], now[table]
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) == new.get(key) or (table == "train" and key in FREE):
                    continue
                if f"{table}.{key}" in PLACES and _has_moved(old.get(key), new.get(key)):
                    continue
                on_request = table == "train" and key in ON_REQUEST
                if on_request and allow_change:
                    continue
                way = (
                    "allow it with --allow-change" if on_request else "start over with --overwrite"
                )
                what = (
                    f"is {new.get(key)!r}, but the run began with {old.get(key)!r}; "
                    f"resume with the same recipe, or {way}"
                )
                faults.append(Fault(source, f"{table}.{key}", what))
        return faults


def _has_moved(old: object, new: object) -> bool:
    """Whether two places may hold the same file: what is in them is compared as well."""
    both = isinstance(old, str) and isinstance(new, str)
    return both and PurePath(str(old)).name == PurePath(str(new)).name


def _short(digest: object) -> str:
    return "none" if digest is None else str(digest)[:12]
