"""A recipe's file, or a text, as a checked recipe."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, RecipeError
from mlx_tuner.recipe import shipped
from mlx_tuner.recipe.checks import (
    LENGTHS,
    Report,
    check_lengths,
    check_tables,
    check_together,
    shown,
    unknown_table,
)
from mlx_tuner.recipe.tables import TABLES, Recipe
from mlx_tuner.recipe.toml_lines import NestingError, key_lines

MAX_RECIPE_BYTES = 1024 * 1024
_EXAMPLE = 'lora.target_modules=["q_proj", "v_proj"]'

DEFAULT_MODEL = "builtin:tiny-qwen"
"""Whose tokenizer counts where no model is named."""

logger = logging.getLogger(__name__)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True
) -> Recipe:
    """Read the recipe at `path`, or the shipped one of that name, with `table.key=value` overrides.

    Relative paths start from the recipe's folder, those of overrides from the current directory.
    `check_paths = False` is for reading the record of a run whose data may have moved.
    Raises RecipeError with all faults.
    """
    path = shipped.locate(Path(path))
    return parse_recipe(
        _read(path),
        source=str(path),
        folder=path.parent,
        overrides=overrides,
        check_paths=check_paths,
    )


def parse_recipe(
    text: str,
    *,
    source: str,
    folder: Path,
    overrides: Sequence[str] = (),
    check_paths: bool = False,
) -> Recipe:
    """`load_recipe` for a text; `source` is what faults call it."""
    tables, lines = _parse_toml(text, source)
    report = Report(source, lines)
    _apply_overrides(tables, overrides, report)
    checked = check_tables(tables, report)
    check_lengths(tables.get("train"), report)
    check_together(tables, checked, report)
    folder = Path(_absolute(folder))
    for key, path in _absolute_paths(tables, folder, report, check_paths):
        if key[0] in checked:
            checked[key[0]] = checked[key[0]].model_copy(update={key[1]: path})
    report.raise_faults()
    name = Path(source).stem
    return Recipe(folder.name if name == "recipe" else name, **checked)


def recipe_for(
    file: str,
    *,
    recipe: Path | None,
    model: str | None,
    valid: str | None,
    overrides: Sequence[str],
) -> Recipe:
    """The recipe by which a file of rows is read: the one at `recipe` with this file, or defaults.

    Raises:
        RecipeError: the recipe or an override is wrong.
    """
    settings = [f"data.train={_toml(file)}"]
    if model is not None:
        settings.append(f"model.path={_toml(model)}")
    if valid is not None:
        settings.append(f"data.valid={valid if _is_number(valid) else _toml(valid)}")
    if recipe is not None:
        return load_recipe(recipe, [*overrides, *settings], check_paths=False)
    text = f'[model]\npath = "{DEFAULT_MODEL}"\n[train]\nepochs = 1\n'
    return parse_recipe(text, source="", folder=Path.cwd(), overrides=[*overrides, *settings])


def _toml(text: str) -> str:
    """A TOML string: a path may look like any other TOML value."""
    return json.dumps(text, ensure_ascii=False)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# From a file to tables


def _read(path: Path) -> str:
    """The text of a recipe's file, which may be none at all."""

    def refuse(what: str, line: int | None = None) -> RecipeError:
        return RecipeError(Fault(f"{path}:{line}" if line else str(path), "", what))

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise refuse("is a directory; give a recipe's file")
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would hang
            raise refuse("is not a regular file; give a recipe's file")
        if status.st_size > MAX_RECIPE_BYTES:
            raise refuse(
                f"has {status.st_size} bytes, more than the {MAX_RECIPE_BYTES} of a recipe; "
                "is it the right file?"
            )
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        names = ", ".join(shipped.recipes())
        what = f"cannot be read ({reason}); give a recipe's file, or a shipped one: {names}"
        raise refuse(what) from None

    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse("is UTF-16; save it as UTF-8", 1)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refuse(
            f"byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8", line
        ) from None


def _parse_toml(text: str, source: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The tables of a TOML text, and the lines of their keys."""

    def refuse(what: str, position: str) -> RecipeError:
        return RecipeError(Fault(f"{source}:{position}", "", what))

    def line_of(offset: int) -> str:
        return str(text.count("\n", 0, offset) + 1)

    if text.startswith("\ufeff"):
        logger.warning("%s: starts with a byte order mark, which is ignored", source)
        text = text[1:]
    if bad := re.search(r"\0|\r(?!\n)", text):
        what = (
            "a NUL character; save the file as UTF-8 text"
            if bad.group() == "\0"
            else "a carriage return without a line feed; save the file with LF line ends"
        )
        raise refuse(what, line_of(bad.start()))
    try:
        lines = key_lines(text)
        return tomllib.loads(text), lines
    except NestingError as error:
        raise refuse(f"{error}; a recipe has tables of plain keys", str(error.line)) from None
    except tomllib.TOMLDecodeError as error:
        what, _, at = str(error).partition(" (at ")
        if what.startswith("Cannot "):  # overwrite, declare, mutate
            what = "a key or table is given twice; keep one"
        else:
            what = f"{what}; correct the TOML here"
        numbers = re.findall(r"\d+", at)
        raise refuse(what, ":".join(numbers) or line_of(len(text.rstrip()))) from None
    except ValueError:  # Python's limit on the digits of a number
        runs = re.finditer(r"[0-9_]+", text)
        start = next((run.start() for run in runs if len(run.group()) > 4000), 0)
        raise refuse("a number of thousands of digits; shorten it", line_of(start)) from None


def _apply_overrides(tables: dict[str, Any], overrides: Iterable[str], report: Report) -> None:
    """Put `table.key=value` texts into `tables`; a value is TOML or a bare word."""
    for override in overrides:
        name, equals, text = override.partition("=")
        table, dot, key = (part.strip() for part in name.partition("."))
        if not (equals and dot and table and key):
            what = "is not of the form table.key=value; write it like --set lora.rank=8"
            report.add_override(shown(override), what)
            continue
        value = _override_value(text.strip())
        if table not in TABLES:
            report.add_override(name, unknown_table(table))
        elif value is None:
            what = f"{shown(text)} is not a TOML value; write it like --set '{_EXAMPLE}'"
            report.add_override(name, what)
        elif isinstance(content := tables.setdefault(table, {}), dict):
            content[key] = value
            report.overridden.add((table, key))

    # A length from the command line takes the place of the recipe's.
    given = {length for length in LENGTHS if ("train", length) in report.overridden}
    if given and isinstance(train := tables.get("train"), dict):
        for length in set(LENGTHS) - given:
            train.pop(length, None)


def _override_value(text: str) -> Any:
    """A TOML value, or the bare word itself; None if it is neither."""
    try:
        key_lines(f"value = {text}")  # bounds the nesting
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except ValueError:
        if text and text[0] not in "\"'[{" and text.isprintable():
            return text
    return None


# Paths


def _absolute_paths(
    tables: dict[str, Any], folder: Path, report: Report, check_paths: bool
) -> Iterator[tuple[tuple[str, str], str]]:
    """The keys that name files, with absolute paths; those that lead nowhere are reported."""
    for key in (("model", "path"), ("data", "train"), ("data", "valid"), ("lora", "init_from")):
        table = tables.get(key[0])
        value = table.get(key[1]) if isinstance(table, dict) else None
        if not isinstance(value, str) or value.startswith(("hub:", "builtin:")):
            continue
        if key in report.reported:
            continue
        start = Path.cwd() if key in report.overridden else folder
        path = _absolute(start / os.path.expanduser(value))  # noqa: PTH111 - never raises
        exists = os.access(path, os.F_OK)
        if key[0] == "model" and not (exists or _is_path(value)):
            continue  # a Hub name
        if check_paths and not exists:
            report.add(key, f"is {shown(value)}, but there is no {path}; correct the path")
        yield key, path


def _absolute(path: Path) -> str:
    """`path` from the root and without "..", but with its symbolic links: they carry file names."""
    return os.path.abspath(path)  # noqa: PTH100


def _is_path(value: str) -> bool:
    return value in (".", "..") or value.startswith(("./", "../", "/", "~"))
