"""This machine: what it has and how fast it trains."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import click

from mlx_tuner.cli.options import example, json_option, link_option
from mlx_tuner.errors import UsageError
from mlx_tuner.show.terminal import console
from mlx_tuner.system import launch

PEER = "mlx-lm"
COMPINIT = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }"
"""Makes compdef, which a Mac's zsh lacks until somebody asks for it."""


@click.command(
    epilog=example('completion zsh > ~/.mlx-tune.zsh; echo "source ~/.mlx-tune.zsh" >> ~/.zshrc')
)
@click.argument("shell", type=click.Choice(["zsh", "bash", "fish"]))
def completion(shell: str) -> None:
    """The script that completes commands and options in SHELL."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    whole = click.get_current_context().find_root().command
    script = kind(whole, {}, "mlx-tune", "_MLX_TUNE_COMPLETE").source()
    if shell == "zsh":  # below the line that must be the first
        script = script.replace("\n", f"\n{COMPINIT}\n", 1)
    click.echo(script)


@click.command(epilog=example("doctor --self-test --report self-test.md"))
@click.option("--self-test", is_flag=True, help="Prove the GPU against the CPU: about a minute.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Write what the self-test finds to a Markdown file, for an issue.",
)
@json_option
def doctor(self_test: bool, report: Path | None, as_json: bool) -> None:
    """What this machine has, what is missing, what to do."""
    if report and not self_test:
        raise UsageError("--report is for --self-test; give both")
    if self_test:
        _self_test(report, as_json)
        return
    from mlx_tuner.commands.doctor import examine

    found = examine()
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found)
    sys.exit(0 if found.can_train else 1)


def _self_test(report: Path | None, as_json: bool) -> None:
    from mlx_tuner.proof.self_test import run
    from mlx_tuner.system import files

    found = run(lambda finding: None if as_json else click.echo(finding))
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.verdict)
    if report:
        files.write_text(report, found.to_markdown())
    sys.exit(0 if found.ok else 1)


@click.command(epilog=example("bench --model qwen2.5-1.5b --against mlx-lm"))
@click.option(
    "--model",
    metavar="SHAPE|FOLDER|NAME",
    help="A shape such as qwen2.5-1.5b, of random weights; or a model. Default: what fits here.",
)
@click.option("--quantize", type=click.Choice(["4", "8"]), help="Bits of the frozen weights.")
@click.option("--rows", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--seq", type=click.IntRange(min=32), help="Tokens of every row.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--steps", type=click.IntRange(min=1), help="Steps of one pass; several are timed.")
@click.option("--quick", is_flag=True, help="Fewer and shorter measurements.")
@click.option("--against", metavar="mlx-lm|FILE.json", help="Compare with its trainer, or earlier.")
@click.option("--sweep", is_flag=True, help="Try rows a step, tokens a row and quantisation.")
@click.option("--ranks", is_flag=True, help="Under mlx.launch: time a sum over all machines.")
@link_option
@click.option("--name", help="Of the result file; default: by chip and model.")
@click.option("--markdown", is_flag=True, help="Print a row for the README's table.")
@json_option
def bench(
    model: str | None,
    quantize: str | None,
    rows: int,
    seq: int | None,
    batch_size: int,
    steps: int | None,
    quick: bool,
    against: str | None,
    sweep: bool,
    ranks: bool,
    link: str,
    name: str | None,
    markdown: bool,
    as_json: bool,
) -> None:
    """Training and generation speed of this machine; nothing is downloaded for a SHAPE.

    The result is kept as JSON: in benchmarks/results where that is a folder, else in
    ~/.cache/mlx-tune/bench.
    """
    command = shlex.join(["mlx-tune", *sys.argv[1:]])
    if ranks:
        _bench_ranks(link, command, 3 if quick else 20, as_json)
        return
    from mlx_tuner.bench import report as bench_report
    from mlx_tuner.bench.bench import bench, save
    from mlx_tuner.bench.sweep import measure
    from mlx_tuner.bench.workload import Settings
    from mlx_tuner.show.progress import Display

    if sweep and (against or markdown):
        raise UsageError("--sweep excludes --against and --markdown; give one")
    settings = Settings(
        model=model,
        quantize=int(quantize) if quantize else None,
        rows=rows,
        seq=seq,
        batch_size=batch_size,
        steps=steps,
        quick=quick,
        peer=against == PEER,
    )
    earlier = Path(against) if against and against != PEER else None
    with Display() as display:
        found = (
            measure(settings, display, command=command)
            if sweep
            else bench(settings, display, command=command, earlier=earlier)
        )
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif markdown:
        click.echo(bench_report.markdown_row(found))
    else:
        console(sys.stdout).print(bench_report.report(found))
    click.echo(f"written to {save(found, name)}", err=True)  # last: a full disk costs no figures


def _bench_ranks(link: str, command: str, repeats: int, as_json: bool) -> None:
    if (here := launch.launched(os.environ)) is None:
        raise UsageError("--ranks is for several: mlx.launch -n 2 -- mlx-tune bench --ranks")
    from mlx_tuner.bench import ranks as bench_ranks
    from mlx_tuner.engine.ranks import join

    ranks = join(here.backend)
    found = bench_ranks.measure(ranks, here.backend, link, command=command, repeats=repeats)
    if not ranks.leads:
        return
    click.echo(json.dumps(found, indent=2) if as_json else bench_ranks.report(found))
    click.echo(f"written to {bench_ranks.save(found)}", err=True)
