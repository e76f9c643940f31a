"""The command line: parse, call one function, print, exit code. Only this module prints."""

from __future__ import annotations

import json
import sys

import click

from mlx_tuner import __version__
from mlx_tuner.errors import TunerError

MAX_FAULTS_SHOWN = 20


class _Commands(click.Group):
    """Turns a `TunerError` into its lines and its exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TunerError as error:
            for fault in error.faults[:MAX_FAULTS_SHOWN]:
                click.echo(f"mlx-tune: error: {fault}", err=True)
            if (more := len(error.faults) - MAX_FAULTS_SHOWN) > 0:
                click.echo(f"mlx-tune: error: … and {more} more", err=True)
            sys.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-tune")
def main() -> None:
    """LoRA fine-tuning of Qwen models on Apple silicon, in MLX."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """What this machine has, what is missing, what to do."""
    from mlx_tuner.doctor import examine

    report = examine()
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report)
    sys.exit(0 if report.can_train else 1)
