"""The recipes that come with the package, by name, with the rows that they train on."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """What holds `recipes/` and `data/`: a folder of the installed package, or the clone."""
    installed = _PACKAGE / "shipped"
    return installed if installed.is_dir() else _PACKAGE.parent


def recipes() -> dict[str, Path]:
    """The shipped recipes' files by their names."""
    return {path.stem: path for path in sorted((folder() / "recipes").glob("*.toml"))}


def locate(recipe: Path) -> Path:
    """The recipe's own path if there is such a file, else that of the shipped one of this name."""
    named = recipes().get(str(recipe))
    return recipe if named is None or recipe.exists() else named
