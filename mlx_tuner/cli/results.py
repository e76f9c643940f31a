"""After training: answers, evaluation, runs side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from mlx_tuner.cli.options import base_option, example, json_option
from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.show.terminal import console, safe
from mlx_tuner.words import printable


@click.command(
    epilog=example('generate adapters/codealpaca "Write a function that sorts." --max-tokens 200')
)
@click.argument("run_or_model")
@click.argument("prompt", required=False)
@click.option("--max-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="0 = greedy.",
)
@click.option("--system", help="The system message.")
@click.option("--base", is_flag=True, help="The base model of a run, without its adapter.")
@base_option
def generate(
    run_or_model: str,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    system: str | None,
    base: bool,
    model: str | None,
) -> None:
    """Answer PROMPT with a run or a model; without PROMPT, chat."""
    from mlx_tuner.commands.generate import answer, load
    from mlx_tuner.show.progress import Display

    with Display() as display, display.task("loading the model"):
        loaded = load(run_or_model, base=base, model=model)
    messages = [{"role": "system", "content": system}] if system else []
    chatting = prompt is None
    while True:
        if prompt is None:
            try:
                prompt = click.prompt("you", prompt_suffix="> ", err=True)
            except click.Abort:  # end of input
                click.echo(err=True)
                return
        messages.append({"role": "user", "content": prompt})
        pieces = []
        for piece in answer(loaded, messages, max_tokens=max_tokens, temperature=temperature):
            # A terminal would obey escape sequences; a file gets what the model wrote.
            shown = printable(piece, keep="\n\t") if sys.stdout.isatty() else piece
            click.echo(shown, nl=False)
            pieces.append(piece)
        click.echo()
        if not chatting:
            return
        messages.append({"role": "assistant", "content": "".join(pieces)})
        prompt = None


@click.command("eval", epilog=example("eval adapters/codealpaca --samples 20"))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Rows that were held out. Default: the run's validation rows.")
@base_option
@click.option(
    "--samples",
    default=10,
    show_default=True,
    type=click.IntRange(min=0),
    help="Rows that are answered.",
)
@click.option(
    "--max-tokens",
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Of an answer.",
)
@click.option(
    "--tasks",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Programming tasks in HumanEval's format, JSONL, gzipped or not: pass@1.",
)
@click.option("--limit", type=click.IntRange(min=1), help="The first tasks only.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Where to keep a line a task. Default: tasks.jsonl in RUN.",
)
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Run what the models write, each program in a process of its own, with a limit on time, "
    "on Linux also on memory, and without files and network. Needed for --tasks.",
)
@json_option
def eval_(
    run: Path,
    data: str | None,
    model: str | None,
    samples: int,
    max_tokens: int,
    tasks: Path | None,
    limit: int | None,
    results: Path | None,
    allow_code_execution: bool,
    as_json: bool,
) -> None:
    """RUN, or any adapter, against its base on held-out rows."""
    if tasks and not allow_code_execution:
        what = "runs programs that a model wrote; allow it with --allow-code-execution"
        raise UsageError(Fault("", "--tasks", what))
    from mlx_tuner.commands.eval_report import report
    from mlx_tuner.commands.evaluate import Tasks, evaluate
    from mlx_tuner.show.progress import Display

    with Display() as display:
        found = evaluate(
            run,
            display,
            model=model,
            data=data,
            samples=samples,
            max_tokens=max_tokens,
            programs=Tasks(tasks, limit, results) if tasks else None,
        )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        console(sys.stdout).print(report(found))


@click.command(epilog=example("compare adapters/first adapters/improved -o compared"))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    help="Folder for compare.html and compare.png, which are made only if it is given.",
)
def compare(runs: tuple[Path, ...], as_json: bool, output: Path | None) -> None:
    """RUNS side by side, as a table, and as a page and a plot."""
    from mlx_tuner.commands.compare import compare, draw

    comparison = compare(runs)
    made = draw(comparison, output) if output else []
    if as_json:
        found = {**comparison.to_json(), "files": [str(path) for path in made]}
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(comparison.to_markdown(), file=safe(sys.stdout))
    for path in made:
        click.echo(path, err=True)
