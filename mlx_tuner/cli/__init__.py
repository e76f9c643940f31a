"""The command line: parse, call one function, print, exit code. Only this room prints.

Each command loads what it needs when it runs, so that `--help` is quick.
"""

import click

from mlx_tuner import __version__
from mlx_tuner.cli.faults import Commands
from mlx_tuner.cli.folders import convert, export, fuse, import_
from mlx_tuner.cli.machine import bench, completion, doctor
from mlx_tuner.cli.results import compare, eval_, generate
from mlx_tuner.cli.training import data, init, plan, recipes, run


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-tune")
def main() -> None:
    """LoRA fine-tuning of Qwen models on Apple silicon, in MLX."""


for command in (
    *(recipes, init),
    *(run, plan, data),
    *(generate, eval_, compare),
    *(convert, fuse, export, import_),
    *(bench, doctor, completion),
):
    main.add_command(command)
