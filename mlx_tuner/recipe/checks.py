"""The faults of a recipe's tables, found all together, each told by file, line and key."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pydantic import ValidationError

from mlx_tuner.errors import Fault, RecipeError
from mlx_tuner.recipe import peer_names
from mlx_tuner.recipe.tables import TABLES

_MAX_FAULTS = 100
LENGTHS = ("epochs", "max_steps")
"""Keys of [train], of which exactly one is given."""


@dataclass
class Report:
    """The faults found so far, and where each key was given."""

    source: str
    lines: dict[tuple[str, ...], int]
    overridden: set[tuple[str, str]] = field(default_factory=set)
    reported: set[tuple[str, ...]] = field(default_factory=set)
    faults: list[tuple[int, Fault]] = field(default_factory=list)

    def add(self, key: tuple[str, ...], what: str) -> None:
        self.reported.add(key)
        name = ".".join(map(_shown_key, key))
        if key in self.overridden:
            self.add_override(name, what)
        else:
            line = self.lines.get(key[:2]) or self.lines.get(key[:1])
            where = f"{self.source}:{line}" if line else self.source
            self.faults.append((line or sys.maxsize, Fault(where, name, what)))
        if len(self.faults) == _MAX_FAULTS:
            self.raise_faults()

    def add_override(self, name: str, what: str) -> None:
        self.faults.append((sys.maxsize, Fault("", f"--set {name}", what)))

    def raise_faults(self) -> None:
        if self.faults:
            raise RecipeError(*(fault for _, fault in sorted(self.faults, key=lambda f: f[0])))


def check_tables(tables: dict[str, Any], report: Report) -> dict[str, Any]:
    """The tables that are right, checked one by one; the faults of the others are reported."""
    for name, content in tables.items():
        if name not in TABLES:
            report.add((name,), unknown_table(name))
        elif not isinstance(content, dict):
            report.add((name,), f"is {shown(content)}; write its keys under [{name}]")

    checked = {}
    for name, table in TABLES.items():
        content = tables.get(name, {})
        if not isinstance(content, dict):
            continue
        known = {key: value for key, value in content.items() if key in table.model_fields}
        for key in content:
            if key not in known:
                report.add((name, key), _unknown_key(name, key))
        try:
            checked[name] = table.model_validate(known)
        except ValidationError as error:
            for detail in error.errors():
                key = str(detail["loc"][0])
                description = table.model_fields[key].description
                if detail["type"] == "missing":
                    report.add((name, key), f"is missing; give {description}")
                else:
                    wanted = _EXPECTED.get(detail["type"], detail["msg"])
                    wanted = wanted.format(**detail.get("ctx", {}))
                    what = f"is {shown(known[key])}; give {wanted} ({description})"
                    report.add((name, key), what)
    return checked


_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "string_type": "a string",
    "value_error": "{error}",
}
"""What pydantic's kinds of error ask for."""


def check_lengths(train: Any, report: Report) -> None:
    """Exactly one of the keys that say how long to train."""
    given = [key for key in LENGTHS if key in train] if isinstance(train, dict) else []
    if not given and isinstance(train, dict | None):
        report.add(("train", "epochs"), "is missing; give train.epochs or train.max_steps")
    elif len(given) == 2:
        report.add(("train", "max_steps"), "is given beside train.epochs; keep one of them")


def check_together(tables: dict[str, Any], checked: dict[str, Any], report: Report) -> None:
    """What must fit between keys that are right by themselves."""
    lora, train = checked.get("lora"), checked.get("train")
    if lora and lora.variant == "dora" and lora.dropout:
        what = 'is given beside lora.variant = "dora", where PEFT and mlx-lm differ; give 0'
        report.add(("lora", "dropout"), what)
    if not train:
        return
    if train.max_steps and train.warmup_steps > train.max_steps:
        what = f"is {train.warmup_steps}, more than the {train.max_steps} steps; lower it"
        report.add(("train", "warmup_steps"), what)
    data = tables.get("data", {})
    if train.early_stopping_patience and isinstance(data, dict) and "valid" not in data:
        what = "needs validation rows; give data.valid, or 0 to never stop early"
        report.add(("train", "early_stopping_patience"), what)


def unknown_table(name: str) -> str:
    for table, model in TABLES.items():
        if name in model.model_fields:
            return f"is outside its table; write it under [{table}]"
    if answer := _peer_answer(name):
        return answer
    tables = ", ".join(f"[{table}]" for table in TABLES)
    return f"unknown table; {_did_you_mean(name, TABLES) or f'a recipe has {tables}'}"


def _unknown_key(table: str, key: str) -> str:
    for other, model in TABLES.items():
        if key in model.model_fields:
            return f"is in the wrong table; write it under [{other}]"
    if answer := _peer_answer(key):
        return answer
    own = TABLES[table].model_fields
    every = chain.from_iterable(model.model_fields for model in TABLES.values())
    hint = _did_you_mean(key, own) or _did_you_mean(key, every)
    return f"unknown key; {hint or f'[{table}] has ' + ', '.join(own)}"


def _peer_answer(key: str) -> str | None:
    name = key.replace("-", "_").lower()
    if ours := peer_names.RENAMED.get(name):
        return f"unknown key; here it is `{ours}`"
    if answer := peer_names.ANSWERED.get(name):
        return f"unknown key; {answer}"
    return None


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    matches = difflib.get_close_matches(word[:64], known, 1)
    return f"did you mean `{matches[0]}`?" if matches else None


# For messages


def shown(value: Any) -> str:
    """A TOML value for a message, on one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    try:
        text = repr(value) if isinstance(value, str | list) else str(value)
    except ValueError:  # Python's limit on the digits of a number
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _shown_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else shown(key)
