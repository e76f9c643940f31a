"""The command line: parse, call one function, print, exit code. Only this module prints."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_tuner import __version__
from mlx_tuner.errors import Fault, RunStopped, TunerError, UsageError
from mlx_tuner.show.terminal import console, safe

if TYPE_CHECKING:
    from mlx_tuner.conversion.gguf import DType
    from mlx_tuner.recipe.tables import Recipe

MAX_FAULTS_SHOWN = 20
PEER = "mlx-lm"


class _Commands(click.Group):
    """Turns a `TunerError`, and a command's wrong arguments, into lines and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            help_of = (error.ctx or ctx).command_path
            what = f"{error.format_message().rstrip('.')}; see `{help_of} --help`"
            _print_faults([Fault(what=what)], 1)
            sys.exit(error.exit_code)
        except TunerError as error:
            kind = "" if isinstance(error, RunStopped) else "error: "
            _print_faults(error.faults, len(error.faults), kind)
            sys.exit(error.exit_code)


def _print_faults(faults: Sequence[Fault], count: int, kind: str = "error: ") -> None:
    """The first of `count` faults, a line each."""
    for fault in faults[:MAX_FAULTS_SHOWN]:
        click.echo(f"mlx-tune: {kind}{fault}", file=safe(sys.stderr))
    if (more := count - MAX_FAULTS_SHOWN) > 0:
        click.echo(f"mlx-tune: error: … and {more:,} more", file=safe(sys.stderr))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-tune")
def main() -> None:
    """LoRA fine-tuning of Qwen models on Apple silicon, in MLX."""


_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the recipe; paths start from the current folder. Repeatable.",
)


def _recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """RECIPE and --set, which every command on a recipe takes."""
    return click.argument("recipe", type=click.Path(path_type=Path))(_set_option(command))


_base_option = click.option(
    "--model", help="The base of an adapter. Default: the one that it names."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_output_option = click.option(
    "-o", "output", required=True, type=click.Path(path_type=Path), help="New folder."
)
_push_option = click.option(
    "--push", metavar="OWNER/NAME", help="Upload what was made as a private Hub model."
)


def _quantize_options(command: Callable[..., None]) -> Callable[..., None]:
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


@main.command()
@_recipe_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: adapters/RECIPE.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is there.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done, as plan does.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json at the end.")
def run(
    recipe: Path,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train what RECIPE says: adapter, metrics, plots and summary."""
    from mlx_tuner.recipe.tables import load_recipe

    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other; give one")
    loaded = load_recipe(recipe, overrides)
    if dry_run:
        _plan(loaded, as_json)
        return
    run_dir = run_dir or Path("adapters") / loaded.name
    from mlx_tuner.finetune import finetune
    from mlx_tuner.runs.run import read_records
    from mlx_tuner.show.progress import Display
    from mlx_tuner.show.report import report

    with Display() as display:
        summary = finetune(loaded, run_dir, display, resume=resume, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(summary.to_json(), indent=2))
    else:
        console(sys.stdout).print(report(read_records(run_dir), summary, run_dir))


@main.command()
@_recipe_options
@_json_option
def plan(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """What a run of RECIPE would do and need; loads no weights."""
    from mlx_tuner.recipe.tables import load_recipe

    _plan(load_recipe(recipe, overrides), as_json)


def _plan(recipe: Recipe, as_json: bool) -> None:
    from mlx_tuner.commands.plan import plan

    planned = plan(recipe)
    if as_json:
        click.echo(json.dumps(asdict(planned), indent=2))
        return
    share = 100 * planned.trainable_parameters / planned.total_parameters
    first, last = planned.learning_rates[0], planned.learning_rates[-1]
    for name, value in (
        ("recipe", planned.recipe),
        ("model", planned.model),
        ("rows", f"{planned.rows:,}, and {planned.valid_rows:,} for validation"),
        ("tokens", f"{planned.tokens:,} an epoch, {planned.target_tokens:,} of them targets"),
        ("steps", f"{planned.steps:,}, {planned.steps_per_epoch:,} an epoch"),
        ("learning rate", f"{first:.3g} at the first step, {last:.3g} at the last"),
        (
            "trainable",
            f"{planned.trainable_parameters:,} of {planned.total_parameters:,} ({share:.4f} %)",
        ),
        ("micro-batch", f"{planned.micro_batch_tokens:,} tokens at most"),
        ("peak memory", f"about {planned.peak_memory_gb:.2f} GB"),
    ):
        click.echo(f"{name:>14}  {value}")


@main.command()
@click.argument("file")
@click.option("--recipe", type=click.Path(path_type=Path), help="See the rows as it does.")
@_set_option
@click.option("--model", help="Count in its tokens; default: the recipe's, or builtin:tiny-qwen.")
@click.option("--valid", help="Validation rows: a file, or a fraction of FILE.")
@click.option("--show", default=0, type=click.IntRange(min=0), help="Print the first rows.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the rows' lengths as PNG.")
@_json_option
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
    from mlx_tuner.commands.inspect_data import inspect, recipe_for
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
        _print_faults(found.faults, found.fault_count)
        sys.exit(1)


@main.command()
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
@_base_option
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
            click.echo(piece, nl=False)
            pieces.append(piece)
        click.echo()
        if not chatting:
            return
        messages.append({"role": "assistant", "content": "".join(pieces)})
        prompt = None


@main.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Rows that were held out. Default: the run's validation rows.")
@_base_option
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
@_json_option
def eval_(
    run: Path,
    data: str | None,
    model: str | None,
    samples: int,
    max_tokens: int,
    as_json: bool,
) -> None:
    """RUN, or any adapter, against its base on held-out rows."""
    from mlx_tuner.commands.evaluate import evaluate, report
    from mlx_tuner.show.progress import Display

    with Display() as display:
        found = evaluate(
            run, display, model=model, data=data, samples=samples, max_tokens=max_tokens
        )
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        console(sys.stdout).print(report(found))


@main.command()
@click.argument("model")
@_output_option
@_quantize_options
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of what is not quantised. Default: what the model's config says.",
)
@click.option("--revision", help="Commit, tag or branch of a Hub model.")
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the result's logits with the source's; refuse a broken one.",
)
@_push_option
def convert(
    model: str,
    output: Path,
    bits: str | None,
    group_size: str,
    dtype: str | None,
    revision: str | None,
    verify: bool,
    push: str | None,
) -> None:
    """MODEL, a Hub name or a folder, as a new MLX folder."""
    from mlx_tuner.conversion.convert import convert as make
    from mlx_tuner.show.progress import Display
    from mlx_tuner.system import hub

    if push:
        hub.check_token(push)
    with Display() as display:
        made = make(
            model,
            output,
            display,
            bits=int(bits) if bits else None,
            group_size=int(group_size),
            dtype=dtype,
            revision=revision,
            verify=verify,
        )
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{output}: {model} in {made.form}, {made.bytes / 1e9:.2f} GB")
    for name, value in made.check.rows() if made.check else ():
        click.echo(f"{name:>30}  {value}")
    if push:
        click.echo(hub.push(output, push))


@main.command()
@click.argument("run_or_adapter", type=click.Path(path_type=Path))
@_output_option
@_base_option
@_quantize_options
@_push_option
def fuse(
    run_or_adapter: Path,
    output: Path,
    model: str | None,
    bits: str | None,
    group_size: str,
    push: str | None,
) -> None:
    """RUN_OR_ADAPTER merged into its base: a model of its own, in a new folder."""
    from mlx_tuner.conversion.fuse import fuse as make
    from mlx_tuner.show.progress import Display
    from mlx_tuner.system import hub

    if push:
        hub.check_token(push)
    with Display() as display:
        made = make(
            run_or_adapter,
            output,
            display,
            model=model,
            bits=int(bits) if bits else None,
            group_size=int(group_size),
        )
    click.echo(
        f"{output}: {made.base} with {run_or_adapter} in {made.form}, {made.bytes / 1e9:.2f} GB"
    )
    for name, value in made.check.lines():
        click.echo(f"{name:>30}  {value}")
    if push:
        click.echo(hub.push(output, push))


@main.command()
@click.argument("run_or_adapter", type=click.Path(path_type=Path))
@click.option("--to", "form", required=True, type=click.Choice(["peft", "gguf"]))
@click.option(
    "-o",
    "output",
    required=True,
    type=click.Path(path_type=Path),
    help="New folder for peft, new file for gguf.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "bf16", "f32", "q8_0"]),
    help="Of a GGUF file's matrices. Default: f16.",
)
@click.option("--model", help="The base, for gguf. Default: the one that the adapter names.")
@_push_option
def export(
    run_or_adapter: Path,
    form: str,
    output: Path,
    dtype: DType | None,
    model: str | None,
    push: str | None,
) -> None:
    """RUN_OR_ADAPTER as a PEFT adapter, or fused as a GGUF file with a Modelfile beside it."""
    from mlx_tuner.system import hub

    if form == "peft" and (dtype or model):
        raise UsageError("--dtype and --model are for --to gguf; leave them out")
    if push:
        hub.check_token(push)
    if form == "peft":
        from mlx_tuner.models.peft_format import export_peft

        adapter = export_peft(run_or_adapter, output)
        click.echo(f"{output}: PEFT adapter of rank {adapter.rank} for {adapter.base}")
        folder = output
    else:
        from mlx_tuner.conversion.gguf import export_gguf
        from mlx_tuner.show.progress import Display

        folder = output.absolute().parent
        if push and folder.is_dir() and any(folder.iterdir()):
            what = "has other files in it, which --push would upload; choose a new folder"
            raise UsageError(Fault(str(folder), "", what))
        with Display() as display:
            made = export_gguf(run_or_adapter, output, display, dtype=dtype or "f16", model=model)
        click.echo(
            f"{output}: {dtype or 'f16'}, {made.bytes / 1e9:.2f} GB, and {made.modelfile.name}"
        )
        for name, value in made.check.lines():
            click.echo(f"{name:>30}  {value}")
    if push:
        click.echo(hub.push(folder, push))


@main.command("import")
@click.argument("adapter", type=click.Path(path_type=Path))
@_output_option
def import_(adapter: Path, output: Path) -> None:
    """ADAPTER, a PEFT folder, as one that mlx-lm and mlx-tune read."""
    from mlx_tuner.models.adapter import import_adapter

    made = import_adapter(adapter, output)
    click.echo(
        f"{output}: rank {made.rank}, scale {made.scale:g}, {len(made.modules)} modules, "
        f"for {made.base or 'a base that it does not name'}"
    )


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """What this machine has, what is missing, what to do."""
    from mlx_tuner.commands.doctor import examine

    report = examine()
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else report)
    sys.exit(0 if report.can_train else 1)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@_json_option
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder for compare.png; default: the current one.",
)
def compare(runs: tuple[Path, ...], as_json: bool, output: Path) -> None:
    """RUNS side by side, as a table and a plot."""
    from mlx_tuner.commands.compare import PLOT, compare
    from mlx_tuner.show.plots import comparison as draw

    comparison = compare(runs)
    plot = output / PLOT
    draw(plot, comparison.records)
    if as_json:
        click.echo(json.dumps({**comparison.to_json(), "plot": str(plot)}, indent=2))
    else:
        click.echo(comparison.to_markdown(), file=safe(sys.stdout))
        click.echo(f"plot: {plot}", err=True)


@main.command()
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
@click.option("--name", help="Of the result file; default: by chip and model.")
@click.option("--markdown", is_flag=True, help="Print a row for the README's table.")
@_json_option
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
    name: str | None,
    markdown: bool,
    as_json: bool,
) -> None:
    """Training and generation speed of this machine; nothing is downloaded for a SHAPE.

    The result is kept as JSON: in benchmarks/results where that is a folder, else in
    ~/.cache/mlx-tune/bench.
    """
    from mlx_tuner.bench import report as bench_report
    from mlx_tuner.bench.bench import Result, bench, save
    from mlx_tuner.bench.sweep import Sweep, measure
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
    command = shlex.join(["mlx-tune", *sys.argv[1:]])
    earlier = Path(against) if against and against != PEER else None
    with Display() as display:
        if sweep:
            found: Result | Sweep = measure(settings, display, command=command)
        else:
            found = bench(settings, display, command=command, earlier=earlier)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif markdown:
        click.echo(bench_report.markdown_row(found.to_json()))
    else:
        console(sys.stdout).print(bench_report.report(found))
    click.echo(f"written to {save(found, name)}", err=True)  # last: a full disk costs no figures
