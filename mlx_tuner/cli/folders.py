"""Models and adapters as folders and files: made, merged, handed on."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from mlx_tuner.cli.options import base_option, example, output_option, push_option, quantize_options
from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.system import install
from mlx_tuner.words import size


@click.command(
    epilog=example("convert Qwen/Qwen2.5-Coder-1.5B-Instruct -o models/1.5b-4bit --quantize 4")
)
@click.argument("model")
@output_option
@quantize_options
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
@push_option
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
    click.echo(f"{output}: {model} in {made.form}, {size(made.bytes)}")
    for name, value in made.check.lines() if made.check else ():
        click.echo(f"{name:>30}  {value}")
    if push:
        click.echo(hub.push(output, push))


@click.command(epilog=example("fuse adapters/codealpaca -o models/codealpaca"))
@click.argument("run_or_adapter", type=click.Path(path_type=Path))
@output_option
@base_option
@quantize_options
@push_option
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
    click.echo(f"{output}: {made.base} with {run_or_adapter} in {made.form}, {size(made.bytes)}")
    for name, value in made.check.lines():
        click.echo(f"{name:>30}  {value}")
    if push:
        click.echo(hub.push(output, push))


@click.command(
    epilog=example("export adapters/codealpaca --to gguf -o codealpaca.gguf --dtype q8_0")
)
@click.argument("run_or_adapter", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    required=True,
    type=click.Choice(["peft", "gguf", "gguf-lora"]),
    help="PEFT's adapter; a GGUF file of the merged model, or of the adapter alone.",
)
@click.option(
    "-o",
    "output",
    required=True,
    type=click.Path(path_type=Path),
    help="New folder for peft, new file for gguf and gguf-lora.",
)
@click.option(
    "--dtype",
    type=click.Choice(["f16", "bf16", "f32", "q8_0", "q4_k_m"]),
    help="Of a GGUF file's matrices. Default: f16, of an adapter alone f32.",
)
@click.option("--model", help="The base, for GGUF. Default: the one that the adapter names.")
@push_option
def export(
    run_or_adapter: Path,
    form: str,
    output: Path,
    dtype: str | None,
    model: str | None,
    push: str | None,
) -> None:
    """RUN_OR_ADAPTER as a PEFT adapter, or as a GGUF file for llama.cpp and Ollama."""
    from mlx_tuner.system import hub

    if form == "peft" and (dtype or model):
        raise UsageError("--dtype and --model are for --to gguf; leave them out")
    if dtype == "q4_k_m":
        what = (
            "--dtype q4_k_m: only llama.cpp writes it; export f16, then run its "
            "`llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M`"
        )
        raise UsageError(what)
    if form == "gguf-lora" and dtype == "q8_0":
        raise UsageError("--dtype q8_0 is for --to gguf; give f32, f16 or bf16")
    if push:
        hub.check_token(push)
    if form == "peft":
        from mlx_tuner.models.adapter_folder import export_peft

        adapter = export_peft(run_or_adapter, output)
        click.echo(f"{output}: PEFT adapter of rank {adapter.rank} for {adapter.base}")
        folder = output
    else:
        folder = output.absolute().parent
        if push and folder.is_dir() and any(folder.iterdir()):
            what = "has other files in it, which --push would upload; choose a new folder"
            raise UsageError(Fault(str(folder), "", what))
        try:
            from mlx_tuner.conversion import gguf, gguf_lora
        except ModuleNotFoundError as error:
            if error.name != "gguf":
                raise
            what = f"writing GGUF needs the gguf package; {install.extra('gguf')}"
            raise UsageError(what) from None
        from mlx_tuner.show.progress import Display

        if form == "gguf-lora":
            kind = cast("gguf_lora.LoraDType", dtype or "f32")
            written = gguf_lora.export_gguf_lora(run_or_adapter, output, dtype=kind, model=model)
            click.echo(f"{output}: adapter, {size(written)}, for llama.cpp's --lora")
        else:
            whole = cast("gguf.DType", dtype or "f16")
            with Display() as display:
                made = gguf.export_gguf(run_or_adapter, output, display, dtype=whole, model=model)
            click.echo(f"{output}: {whole}, {size(made.bytes)}, and {made.modelfile.name}")
            for name, value in made.check.lines():
                click.echo(f"{name:>30}  {value}")
    if push:
        click.echo(hub.push(folder, push))


@click.command("import", epilog=example("import downloads/peft-adapter -o adapters/theirs"))
@click.argument("adapter", type=click.Path(path_type=Path))
@output_option
def import_(adapter: Path, output: Path) -> None:
    """ADAPTER, a PEFT folder, as one that mlx-lm and mlx-tune read."""
    from mlx_tuner.models.adapter_folder import import_adapter

    made = import_adapter(adapter, output)
    click.echo(
        f"{output}: rank {made.rank}, scale {made.scale:g}, {len(made.modules)} modules, "
        f"for {made.base or 'a base that it does not name'}"
    )
