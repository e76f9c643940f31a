"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click


def example(arguments: str) -> str:
    """The end of a command's help: how it is called, on a line of its own that is not wrapped."""
    return f"\b\nExample:\n  mlx-tune {arguments}"


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the recipe; paths start from the current folder. Repeatable.",
)


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """RECIPE and --set, which every command on a recipe takes."""
    return click.argument("recipe", type=click.Path(path_type=Path))(set_option(command))


base_option = click.option(
    "--model", help="The base of an adapter. Default: the one that it names."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
output_option = click.option(
    "-o", "output", required=True, type=click.Path(path_type=Path), help="New folder."
)
push_option = click.option(
    "--push", metavar="OWNER/NAME", help="Upload what was made as a private Hub model."
)


def quantize_options(command: Callable[..., None]) -> Callable[..., None]:
    """--quantize and --group-size, of every command that writes a model."""
    bits = click.option("--quantize", "bits", type=click.Choice(["4", "8"]), help="Bits a weight.")
    group_size = click.option(
        "--group-size",
        type=click.Choice(["32", "64", "128"]),
        default="64",
        show_default=True,
        help="Weights that share a scale when quantised.",
    )
    return bits(group_size(command))


link_option = click.option(
    "--link",
    default="thunderbolt",
    show_default=True,
    type=click.Choice(["thunderbolt", "ethernet"]),
    help="Between the machines of --machines or --ranks.",
)
