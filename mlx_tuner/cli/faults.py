"""Errors as lines and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from mlx_tuner.errors import Fault, RunStopped, TunerError
from mlx_tuner.show.terminal import safe

MAX_FAULTS_SHOWN = 20


class Commands(click.Group):
    """Turns a `TunerError`, and a command's wrong arguments, into lines and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            help_of = (error.ctx or ctx).command_path
            what = f"{error.format_message().rstrip('.')}; see `{help_of} --help`"
            print_faults([Fault(what=what)], 1)
            sys.exit(error.exit_code)
        except TunerError as error:
            kind = "" if isinstance(error, RunStopped) else "error: "
            print_faults(error.faults, len(error.faults), kind)
            sys.exit(error.exit_code)


def print_faults(faults: Sequence[Fault], count: int, kind: str = "error: ") -> None:
    """The first of `count` faults, a line each."""
    for fault in faults[:MAX_FAULTS_SHOWN]:
        click.echo(f"mlx-tune: {kind}{fault}", file=safe(sys.stderr))
    if (more := count - MAX_FAULTS_SHOWN) > 0:
        click.echo(f"mlx-tune: error: … and {more:,} more", file=safe(sys.stderr))
