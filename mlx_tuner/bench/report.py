"""A bench's result for the terminal, and as a row of the README's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.bench.bench import PROJECTED_EPOCHS, Result
from mlx_tuner.bench.measure import Spread
from mlx_tuner.bench.speed import Phases, Training
from mlx_tuner.bench.sweep import Sweep
from mlx_tuner.bench.workload import RANK, TARGET_MODULES, Workload
from mlx_tuner.system.device import Machine
from mlx_tuner.words import duration, plural, ram, rate

MARKDOWN_COLUMNS = (
    "machine",
    "memory",
    "system",
    "MLX",
    "model",
    "rows a step",
    "samples/s",
    "tokens/s",
    "peak memory",
    "TFLOP/s",
    "of peak",
    "× baseline",
    "date",
)

_VERDICTS = {
    "FLOPs": "matrix products: only fewer of them, or a faster chip, would make it shorter",
    "bandwidth": "reading the weights: more rows a step would share each reading",
    "data": "waiting for rows",
    "Python": "building the graph in Python: more rows a step would hide it",
    "other kernels": "small products, element-wise work, softmax and launches",
}
_PHASES = {
    "data": "rows",
    "graph": "graph (Python)",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "logging": "logging",
}


def report(result: Result | Sweep) -> RenderableType:
    """All of a result, to print with rich."""
    parts = _sweep(result) if isinstance(result, Sweep) else _bench(result)
    notes = [Text(f"note: {note}", "yellow") for note in result.notes]
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in (*parts, *notes)), "")


def _bench(result: Result) -> list[RenderableType]:
    return [_grid(_facts(result)), _phases(result.phases)]


def markdown_row(found: Mapping[str, Any]) -> str:
    """A result file's content as a row of a table with the `MARKDOWN_COLUMNS`."""
    machine, work, training = found["machine"], found["workload"], found["training"]
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    backend = "CPU with OpenBLAS" if machine["openblas"] else machine["backend"].upper()
    cells = (
        f"{machine['chip']}{cores}, {backend}",
        ram(machine["memory_bytes"]),
        machine["os"],
        machine["mlx"],
        _form(work["model"], work["dtype"], work["quantize"]),
        str(work["batch_size"]),
        _spread(Spread(**training["samples_per_second"])),
        rate(training["tokens_per_second"]["median"]),
        f"{training['peak_memory_gb']:.2f} GB",
        "" if training["tflops"] is None else f"{training['tflops']:.3g}",
        "" if training["percent_of_peak"] is None else f"{training['percent_of_peak']:.0f} %",
        f"{found['baseline']['factor']:.2f}" if found["baseline"]["basis"] == "measured" else "",
        found["date"][:10],
    )
    return _row(cells)


def markdown_table(rows: Sequence[str]) -> str:
    """The rows under their header."""
    return "\n".join((_row(MARKDOWN_COLUMNS), _row(["---"] * len(MARKDOWN_COLUMNS)), *rows))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _form(model: str, dtype: str, quantize: int | None) -> str:
    return f"{model}, {dtype}{f', {quantize} bit' if quantize else ''}"


def _grid(facts: Iterable[tuple[str, str | Text]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in facts:
        grid.add_row(name, text)
    return grid


def _machine(machine: Machine) -> Iterator[tuple[str, str]]:
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    bandwidth = machine.bandwidth_gb_per_second
    speed = f", {bandwidth} GB/s" if bandwidth else ""
    yield "machine", f"{machine.chip}{cores}, {ram(machine.memory_bytes)}{speed}"
    backend = f"{machine.backend} with OpenBLAS" if machine.openblas else machine.backend
    yield "", f"{machine.os}, mlx {machine.mlx} on {backend}, mlx-lm {machine.mlx_lm}"
    if machine.thermal_state or machine.low_power_mode is not None:
        power = {True: "on", False: "off", None: "unknown"}[machine.low_power_mode]
        yield "", f"low power mode {power}, thermal pressure {machine.thermal_state or 'unknown'}"


def _facts(result: Result) -> Iterator[tuple[str, str | Text]]:
    work, training = result.workload, result.training
    yield from _machine(result.machine)
    length = f"of {work.seq} tokens" if work.seq else "as long as CodeAlpaca's"
    form = _form(work.model, work.dtype, work.quantize)
    yield "work", f"{form}, LoRA of rank {RANK} on {' '.join(n[0] for n in TARGET_MODULES)}"
    yield (
        "",
        f"{plural(work.batch_size, 'row')} a step, {length}: {work.tokens / work.rows:.0f} tokens "
        f"each, of which {work.target_tokens / work.rows:.0f} are learned",
    )
    passes = training.samples_per_second.repeats
    yield "", f"{plural(work.steps, 'step')} a pass: the median of {passes} passes (low … high)"
    yield "training", Text(f"{_spread(training.samples_per_second)} samples/s", "bold green")
    yield "", f"{_spread(training.tokens_per_second)} tokens/s, padding not counted"
    yield "", f"{_spread(training.steps_per_second)} steps/s"
    yield "", f"peak memory {training.peak_memory_gb:.2f} GB"
    yield from _flops(training, work)
    yield from _baseline(result.baseline)
    for rows, seconds in result.projection.items():
        epochs = f"{int(rows):,} rows × {PROJECTED_EPOCHS} epochs"
        yield (
            ("projection" if rows == next(iter(result.projection)) else ""),
            (f"{epochs}: about {duration(seconds)}"),
        )
    limit = result.limit
    weights = "" if limit.weights is None else f", reading weights {100 * limit.weights:.0f} %"
    yield "limit", Text(f"{limit.verdict}: {_VERDICTS[limit.verdict]}", "bold")
    yield (
        "",
        f"at full speed products take {100 * limit.products:.0f} % of a step{weights}; "
        f"Python {100 * limit.python:.1f} %, rows {100 * limit.data:.1f} %, "
        f"the rest {100 * limit.other:.0f} %",
    )
    for name, measured in result.generation.items():
        yield (
            "generation" if name == "base" else "",
            f"{name:<8}{rate(measured.decode_tokens_per_second.median):>8} tokens/s, "
            f"reads prompts at {rate(measured.prompt_tokens_per_second.median)} tokens/s",
        )
    yield "", _worth_fusing(result)
    for name, other in result.against.items():
        yield from _against(name, other)


def _spread(spread: Spread) -> str:
    if spread.repeats == 1:
        return rate(spread.median)
    return f"{rate(spread.median)} ({rate(spread.low)} … {rate(spread.high)})"


def _flops(training: Training, work: Workload) -> Iterator[tuple[str, str]]:
    if training.tflops is None or training.flops_per_step is None:
        return
    yield "FLOPs", f"{_flop(training.flops_per_step)} a step, {_flop(training.tflops * 1e12)}/s"
    if training.peak_source == "table":
        peak = f"the chip's FP32 peak, {_flop(training.peak_tflops * 1e12)}/s"
        yield "", f"{training.percent_of_peak:.0f} % of {peak}"
        percent = 100 * training.tflops / training.gemm_tflops
        form = f"{work.quantize}-bit" if work.quantize else work.dtype
        speed = _flop(training.gemm_tflops * 1e12)
        yield "", f"{percent:.0f} % of large {form} products, measured: {speed}/s"
    else:
        speed = _flop(training.peak_tflops * 1e12)
        share = f"{training.percent_of_peak:.0f} %"
        yield "", f"{share} of large {work.dtype} products, measured: {speed}/s"
        yield "", "(the table of peaks does not have this chip)"


def _flop(count: float) -> str:
    """Such as "4.01 TFLOP", "3.44 GFLOP"."""
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e11 else f"{count / 1e9:.3g} GFLOP"


def _baseline(baseline: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if (factor := baseline["factor"]) is None:
        return
    yield "baseline", f"{baseline['samples_per_second']} samples/s: {baseline['of']}"
    here = f"{rate(baseline['here'])} samples/s"
    if baseline["basis"] == "measured":
        yield "", f"here {here}: {factor:.2g} × as fast"
    else:
        yield "", f"here about {here} on that work, by its FLOPs: {factor:.2g} ×"


def _worth_fusing(result: Result) -> str:
    fused, adapter = (
        result.generation[name].decode_tokens_per_second for name in ("fused", "adapter")
    )
    if fused.low <= adapter.high:
        return "fusing makes no clear difference to the speed of answers"
    return f"fusing makes answers {100 * (fused.median / adapter.median - 1):.0f} % faster"


def _against(name: str, other: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ratios = other["ratios"]
    yield "against", f"{name}: {ratios['samples_per_second']} × its samples/s"
    yield "", f"{ratios['peak_memory_gb']} × its peak memory"
    if figures := other.get("figures"):
        computed = figures["computed_per_token"].median
        yield "", f"its own: {_spread(figures['samples_per_second'])} samples/s"
        yield "", f"it computes {computed:.2f} tokens for each that is in the rows"
    for difference in other.get("differs", ()):
        yield "", f"not the same: {difference}"


def _phases(phases: Phases) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("a step goes to")
    table.add_column("seconds", justify="right")
    table.add_column("", justify="right")
    for name, seconds in phases.by_name.items():
        table.add_row(_PHASES[name], f"{seconds:.4f}", f"{100 * seconds / phases.step:.1f} %")
    total = sum(phases.by_name.values())
    table.add_row("together", f"{total:.4f}", f"{100 * total / phases.step:.1f} %", style="dim")
    undisturbed = "a step that is not stopped in between"
    table.add_row(undisturbed, f"{phases.step_undisturbed:.4f}", "", style="dim")
    return table


def _sweep(sweep: Sweep) -> list[RenderableType]:
    """Tables of tokens/s by rows a step and tokens a row, and the fastest setting as a recipe."""
    parts = [_grid([*_machine(sweep.machine), ("work", f"{sweep.model}, training")])]
    for quantize in sweep.quantizations:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(f"tokens/s, {f'{quantize} bit' if quantize else sweep.dtype}")
        for seq in sweep.seqs:
            table.add_column(f"{seq} tokens", justify="right")
        for batch_size in sweep.batch_sizes:
            cells = [sweep.cell(quantize, batch_size, seq) for seq in sweep.seqs]
            shown = [
                rate(cell.tokens_per_second) if cell.tokens_per_second else cell.skipped
                for cell in cells
            ]
            table.add_row(plural(batch_size, "row"), *shown)
        parts.append(table)
    if lines := sweep.recipe_lines():
        parts.append(Text("the fastest that fits, as recipe lines:", "bold"))
        parts.append(Text(lines))
    return parts
