"""Errors as lines and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

import click

from mlx_tuner.errors import FAULTS_SHOWN, Fault, RunStopped, TunerError
from mlx_tuner.runs import causes
from mlx_tuner.runs.place import CRASH_LOG
from mlx_tuner.show.terminal import safe
from mlx_tuner.system import cache, files
from mlx_tuner.words import shortened


class Commands(click.Group):
    """Turns wrong arguments, and whatever else goes wrong, into lines and an exit code."""

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
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # click ends these as it should
        except Exception as error:
            print_faults([_unforeseen(error)], 1)
            sys.exit(1)


def _unforeseen(error: Exception) -> Fault:
    """An exception of MLX, of the system, or of ours; its traceback is kept in a file."""
    said = shortened(traceback.format_exception_only(error)[0].splitlines()[0], 500)
    cause = None if isinstance(error, OSError) else causes.of_message(said)
    todo = "if it stays, report it"
    if cause and cause.memory:
        todo = "close other programs, or take a smaller or 4-bit model"
    what = f"{cause.sentence if cause else said}; {todo}"
    with suppress(Exception):  # where nothing can be written, the line has to do
        log = cache.user_folder() / CRASH_LOG
        text = "".join(traceback.format_exception(error))
        files.write_bytes(log, text.encode("utf-8", "replace"))
        what += f"; see {log}"
    return Fault(what=what)


def print_faults(faults: Sequence[Fault], count: int, kind: str = "error: ") -> None:
    """The first of `count` faults, a line each."""
    for fault in faults[:FAULTS_SHOWN]:
        click.echo(f"mlx-tune: {kind}{fault}", file=safe(sys.stderr))
    if (more := count - FAULTS_SHOWN) > 0:
        click.echo(f"mlx-tune: error: … and {more:,} more", file=safe(sys.stderr))
