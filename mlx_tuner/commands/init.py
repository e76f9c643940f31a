"""A shipped recipe as a file of one's own: the keys that it leaves out are there as comments."""

from __future__ import annotations

import re
from pathlib import Path

import tomli_w

from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.recipe import shipped
from mlx_tuner.recipe.tables import TABLES
from mlx_tuner.system import files

_ROWS = re.compile(r'"\.\./(data/[^"]+)"')
"""How a shipped recipe names its sample rows."""
_COLUMN = 40


def listed() -> dict[str, str]:
    """The shipped recipes by name, and the first sentence of each one's comment."""
    return {name: _about(path.read_text("utf-8")) for name, path in shipped.recipes().items()}


def init(name: str, folder: Path) -> list[Path]:
    """Write the shipped recipe `name`, and its sample rows, into `folder`; nothing is replaced.

    Returns:
        The files: the recipe, then its rows.

    Raises:
        UsageError: there is no such recipe, or a file is there already.
        RunError: writing failed.
    """
    known = shipped.recipes()
    if name not in known:
        what = f"no such recipe; the shipped ones are {', '.join(known)}"
        raise UsageError(Fault(name, "", what))
    text = known[name].read_text("utf-8")
    rows = dict.fromkeys(_ROWS.findall(text))
    made = [folder / f"{name}.toml", *(folder / row for row in rows)]
    if there := [path for path in made if path.exists()]:
        what = "is there already; choose another folder with -o, or remove it"
        raise UsageError(*(Fault(str(path), "", what) for path in there))
    own = _ROWS.sub(r'"\1"', text).replace(f"recipes/{name}.toml", f"{name}.toml")
    for row in rows:
        files.write_bytes(folder / row, (shipped.folder() / row).read_bytes())
    files.write_text(made[0], _with_every_key(own))
    return made


def _about(text: str) -> str:
    comment = " ".join(re.findall(r"^# (?!  )(.+)$", text.partition("\n#\n")[0], re.M))
    return re.split(r"(?<=\.) ", comment)[0]


def _with_every_key(text: str) -> str:
    """A recipe with all keys that it does not give, commented, with default and meaning."""
    head, *rest = re.split(r"^\[(\w+)\]\n", text, flags=re.M)
    parts = [head]
    tables = dict(zip(rest[::2], rest[1::2], strict=True))
    for name, table in TABLES.items():
        given = tables.get(name, "").rstrip()
        parts += [f"[{name}]\n", f"{given}\n" if given else ""]
        for key, field in table.model_fields.items():
            if not re.search(rf"^{key} =", given, re.M):
                line = f"# {key} = {_value(field.get_default(call_default_factory=True))}"
                parts += [f"{line:<{_COLUMN}}  # {field.description}\n"]
        parts += ["\n"]
    return "".join(parts).rstrip() + "\n"


def _value(default: object) -> str:
    """A default as TOML, on one line; … for none."""
    if default is None:
        return "…"
    if default == {}:
        return "{}"  # on one line, which is not how it is written as a table
    lines = tomli_w.dumps({"key": default}).removeprefix("key = ").split("\n")
    return " ".join(line.strip() for line in lines).strip().replace(", ]", "]").replace("[ ", "[")
