"""Files of a folder that somebody else made: regular, inside it, of a sane size and depth."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, ModelError

MAX_JSON_BYTES = 64 << 20
"""A tokenizer of 250,000 tokens takes 20 MB."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Suffixes of files that can run code when they are read."""

COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What a model needs besides config and weights. Nothing else is fetched or copied."""

_MAX_DEPTH = 64
_MAX_DIGITS = 40
"""Of a number; transformers writes 10^30 for "no maximal length"."""


def fault_of(path: Path, folder: Path, most_bytes: float = MAX_JSON_BYTES) -> Fault | None:
    """Why a file of `folder` must not be opened: a pipe, a link that leads out, too large.

    Links may lead into the Hub's cache, where the folder itself lies in it.
    """
    try:
        status = path.stat()
    except OSError as error:
        return Fault(str(path), "", f"cannot be read: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return Fault(str(path), "", "not a regular file")
    if not any(path.resolve().is_relative_to(place) for place in _places(folder.resolve())):
        return Fault(str(path), "", "a link that leads out of its folder; copy the file")
    if status.st_size > most_bytes:
        what = f"{status.st_size:,} bytes, where at most {most_bytes:,} are taken"
        return Fault(str(path), "", what)
    return None


def faults_of_files(folder: Path, most_bytes: Mapping[str, float]) -> Iterator[Fault]:
    """`fault_of` the files of a folder with one of these suffixes, each with its largest size."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (most := most_bytes.get(path.suffix)) and (fault := fault_of(path, folder, most)):
            yield fault


def _places(folder: Path) -> list[Path]:
    """Where the files of a folder may lie; in the Hub's cache they are links to its blobs."""
    repository = folder.parent.parent  # CACHE/models--OWNER--NAME/snapshots/COMMIT
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [folder, repository / "blobs", repository.parent / "blobs"]
    return [folder]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the folder that it lies in.

    Raises:
        ModelError: it may not be opened (see `fault_of`), is not an object, is nested deeply, has
            numbers that are not finite or of over 40 digits, or is broken (with the line).
    """
    if fault := fault_of(path, path.parent):
        raise ModelError(fault)
    try:
        value = json.loads(
            path.read_text("utf-8"), parse_int=_integer, parse_float=_number, parse_constant=_number
        )
    except OSError as error:
        raise ModelError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    except json.JSONDecodeError as error:
        where, what = f"{path}:{error.lineno}", f"not valid JSON: {error.msg}"
        raise ModelError(Fault(where, "", what)) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(Fault(str(path), "", f"not valid JSON: {error}")) from None
    if not isinstance(value, dict):
        raise ModelError(Fault(str(path), "", "must hold a JSON object"))
    if is_deep(value, _MAX_DEPTH):
        raise ModelError(Fault(str(path), "", f"nested more than {_MAX_DEPTH} deep"))
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {digits[:24]}… has {len(digits):,} digits")
    return int(digits)


def _number(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits[:24]} is not finite")
    return value


def is_deep(value: Any, most: int) -> bool:
    """Whether a JSON value is nested more than ``most`` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(most):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [child for items in inner for child in items if isinstance(child, (dict, list))]
    return bool(level)
