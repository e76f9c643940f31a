"""Before and during training: a recipe to begin with, the run, its plan, its rows."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_tuner.cli.faults import print_faults
from mlx_tuner.cli.options import example, json_option, link_option, recipe_options, set_option
from mlx_tuner.errors import EverywhereError, RunStopped, TunerError, UsageError
from mlx_tuner.runs import peers, place, pulse
from mlx_tuner.runs.supervisor import supervise
from mlx_tuner.show.terminal import console, safe
from mlx_tuner.system import launch

if TYPE_CHECKING:
    from mlx_tuner.recipe.tables import Recipe


@click.command(epilog=example("run codealpaca --set train.epochs=1 --run-dir adapters/one-epoch"))
@recipe_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: adapters/RECIPE.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is there.")
@click.option(
    "--allow-change",
    is_flag=True,
    help="Resume with another length, learning_rate, eval_every or early_stopping_patience.",
)
@click.option("--no-restart", is_flag=True, help="Do not start training again that has died.")
@click.option("--force", is_flag=True, help="Train also where memory seems not to suffice.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done, as plan does.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json at the end.")
def run(
    recipe: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    overwrite: bool,
    allow_change: bool,
    no_restart: bool,
    force: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train what RECIPE, a file or a shipped name, says: adapter, metrics, plots and summary."""
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; give one")
    if dry_run:
        from mlx_tuner.recipe.load import load_recipe

        _plan(load_recipe(recipe, overrides), as_json)
        return
    run_dir = run_dir or place.default_folder(recipe)
    if (own := pulse.take_over()) is None:
        flags = [
            *(("--allow-change", allow_change), ("--force", force)),
            *(("--json", as_json), ("--quiet", quiet)),
        ]
        arguments = [
            f"./{recipe}" if str(recipe).startswith("-") else str(recipe),
            f"--run-dir={run_dir}",
            *(f"--set={override}" for override in overrides),
            *(flag for flag, given in flags if given),
        ]
        with peers.meet(launch.launched(os.environ)) as others, ExitStack() as stack:
            lock = None
            if others.lead:
                claim = place.Claim(run_dir, resume=resume, overwrite=overwrite)
                stack.callback(claim.release)
                lock = claim.descriptor
            code = supervise(
                run_dir,
                lock,
                arguments,
                resume=resume,
                restart=not no_restart,
                say=_say,
                peers=others,
            )
        sys.exit(code)
    here = launch.launched(os.environ)
    try:
        _train(
            recipe,
            overrides,
            run_dir,
            own,
            here,
            resume=resume,
            allow_change=allow_change,
            force=force,
            quiet=quiet,
            as_json=as_json,
        )
    except TunerError as error:
        if here is None or here.rank == 0:
            raise
        if not isinstance(error, EverywhereError | RunStopped):  # which rank 0 tells of
            print_faults(
                [replace(fault, where=f"{here.name}: {fault.where}") for fault in error.faults],
                len(error.faults),
            )
        sys.exit(error.exit_code)
    except Exception as error:  # of MLX, the system, or a fault of ours: the parent tells of it
        sys.exit(own.crashed(error))


def _say(line: str) -> None:
    """A line of the parent's, below whatever its child has left on the terminal."""
    clean = "\r\033[K\033[?25h" if sys.stderr.isatty() else ""
    click.echo(f"{clean}mlx-tune: {line}", file=safe(sys.stderr))


def _train(
    recipe: Path,
    overrides: tuple[str, ...],
    run_dir: Path,
    own: pulse.Pulse,
    here: launch.Launch | None,
    *,
    resume: bool,
    allow_change: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train, in the child process."""
    from mlx_tuner.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    from mlx_tuner.engine.ranks import Ranks, join
    from mlx_tuner.runs.run import read_records
    from mlx_tuner.show.progress import Display
    from mlx_tuner.show.report import report
    from mlx_tuner.training.finetune import finetune

    ranks = join(here.backend, own.met) if here else Ranks()
    with Display(quiet=quiet or not ranks.leads) as display:
        summary = finetune(
            loaded,
            run_dir,
            display,
            resume=resume,
            overwrite=not resume,  # the parent's claim has looked whether that is asked for
            allow_change=allow_change,
            force=force,
            pulse=own,
            ranks=ranks,
        )
    if not ranks.leads:
        return
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=2))
    else:
        console(sys.stdout).print(report(read_records(run_dir), summary, run_dir))


@click.command(epilog=example("recipes"))
def recipes() -> None:
    """The shipped recipes, which run and plan take by name."""
    from mlx_tuner.commands.init import listed

    for name, about in listed().items():
        click.echo(f"{name:<12}  {about}")


@click.command(epilog=example("init codealpaca -o recipes"))
@click.argument("name")
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder to write into; default: the current one.",
)
def init(name: str, output: Path) -> None:
    """Write the shipped recipe NAME, with its rows and every key explained, to be changed."""
    from mlx_tuner.commands.init import init as write

    recipe, *rows = write(name, output)
    for path in (recipe, *rows):
        click.echo(path)
    click.echo(f"change it, then: mlx-tune run {recipe}", err=True)


@click.command(epilog=example("plan recipes/codealpaca.toml --set train.batch_size=4"))
@recipe_options
@click.option("--fit", is_flag=True, help="Only say what fits into this machine's memory.")
@click.option(
    "--machines",
    default=1,
    type=click.IntRange(min=1),
    help="How many like this one share the steps (docs/several-macs.md).",
)
@link_option
@json_option
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    fit: bool,
    machines: int,
    link: str,
    as_json: bool,
) -> None:
    """What a run of RECIPE would do and need; loads no weights."""
    from mlx_tuner.recipe.load import load_recipe

    _plan(load_recipe(recipe, overrides), as_json, fit, machines=machines, link=link)


def _plan(recipe: Recipe, as_json: bool, fit: bool = False, **shared: Any) -> None:
    from mlx_tuner.commands.plan import plan
    from mlx_tuner.show.progress import Display

    with Display() as display:
        planned = plan(recipe, display.task, **shared)
    if as_json:
        click.echo(json.dumps(asdict(planned), indent=2))
        return
    if fit:
        click.echo(f"longest row  {planned.longest_row_that_fits:,} tokens")
        click.echo(f"micro-batch  {planned.largest_micro_batch_tokens:,} tokens")
        return
    from mlx_tuner.commands.plan_report import report

    console(sys.stdout).print(report(planned))


@click.command(epilog=example("data rows.jsonl --model Qwen/Qwen2.5-Coder-1.5B-Instruct --show 2"))
@click.argument("file")
@click.option("--recipe", type=click.Path(path_type=Path), help="See the rows as it does.")
@set_option
@click.option("--model", help="Count in its tokens; default: the recipe's, or builtin:tiny-qwen.")
@click.option("--valid", help="Validation rows: a file, or a fraction of FILE.")
@click.option("--show", default=0, type=click.IntRange(min=0), help="Print the first rows.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the rows' lengths as PNG.")
@json_option
def data(
    file: str,
    recipe: Path | None,
    overrides: tuple[str, ...],
    model: str | None,
    valid: str | None,
    show: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Check and describe the rows of FILE as a recipe would see them."""
    from mlx_tuner.commands.inspect_data import inspect
    from mlx_tuner.recipe.load import recipe_for
    from mlx_tuner.show.progress import Display

    seen = recipe_for(file, recipe=recipe, model=model, valid=valid, overrides=overrides)
    with Display() as display:
        found = inspect(seen, display, show=show)
    if plot:
        from mlx_tuner.show.plots import length_histogram

        length_histogram(plot, found.train.lengths.tolist(), found.max_seq_length)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        from mlx_tuner.commands.data_report import report

        terminal = console(sys.stdout)
        terminal.print(report(found, colour=terminal.is_terminal))
    if found.fault_count:
        print_faults(found.faults, len(found.faults))
        sys.exit(1)
