"""A bench's result for the terminal, and as a row of the README's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.bench.bench import PROJECTED_EPOCHS, Result
from mlx_tuner.bench.measure import Spread
from mlx_tuner.bench.speed import Phases
from mlx_tuner.bench.sweep import Sweep
from mlx_tuner.terminal import duration, plural, rate

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
    "other kernels": "element-wise ones, softmax and launches rather than matrix products",
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
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in _facts(result):
        grid.add_row(name, text)
    return [grid, _phases(result.phases)]


def markdown_row(found: Mapping[str, Any]) -> str:
    """A result file's content as a row of a table with the `MARKDOWN_COLUMNS`."""
    machine, work, training = found["machine"], found["workload"], found["training"]
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    backend = "CPU with OpenBLAS" if machine["openblas"] else machine["backend"].upper()
    cells = (
        f"{machine['chip']}{cores}, {backend}",
        f"{machine['memory_bytes'] / 1e9:.0f} GB",
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


def _facts(result: Result) -> Iterator[tuple[str, str | Text]]:
    machine, work, training = result.machine, result.workload, result.training
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    bandwidth = machine.bandwidth_gb_per_second
    speed = f", {bandwidth} GB/s" if bandwidth else ""
    yield "machine", f"{machine.chip}{cores}, {machine.memory_bytes / 1e9:.0f} GB{speed}"
    backend = f"{machine.backend} with OpenBLAS" if machine.openblas else machine.backend
    yield "", f"{machine.os}, mlx {machine.mlx} on {backend}, mlx-lm {machine.mlx_lm}"
    if machine.thermal_state or machine.low_power_mode is not None:
        power = "on" if machine.low_power_mode else "off"
        yield "", f"low power mode {power}, thermal pressure {machine.thermal_state or 'unknown'}"
    length = f"of {work.seq} tokens" if work.seq else "as long as CodeAlpaca's"
    form = _form(work.model, work.dtype, work.quantize)
    yield "work", f"{form}: {plural(work.batch_size, 'row')} a step, {length}"
    yield (
        "",
        f"{plural(work.steps, 'step')} a pass, {training.samples_per_second.repeats} passes: "
        f"{work.tokens / work.rows:.0f} tokens a row, {work.target_tokens / work.rows:.0f} targets",
    )
    yield "training", Text(f"{_spread(training.samples_per_second)} samples/s", "bold green")
    yield "", f"{_spread(training.tokens_per_second)} tokens/s, padding not counted"
    yield "", f"{_spread(training.steps_per_second)} steps/s"
    yield "", f"{training.peak_memory_gb:.2f} GB at most"
    if training.tflops is not None and training.flops_per_step is not None:
        source = "the chip's peak" if training.peak_source == "table" else "its measured products"
        yield (
            "FLOPs",
            f"{training.flops_per_step / 1e12:.3g} TFLOP a step, {training.tflops:.3g} TFLOP/s: "
            f"{training.percent_of_peak:.0f} % of {source}, {training.peak_tflops:.3g}",
        )
    if training.peak_source == "measured":
        yield "", "this chip is not in the table of peaks: its speed in large products was measured"
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
        f"of a step: products at their own speed {100 * limit.products:.0f} %{weights}, "
        f"Python {100 * limit.python:.1f} %, data {100 * limit.data:.1f} %, "
        f"the rest {100 * limit.other:.0f} %",
    )
    for name, measured in result.generation.items():
        yield (
            "generation" if name == "base" else "",
            f"{name:<8}{rate(measured.decode_tokens_per_second.median):>8} tokens/s, "
            f"prompt {rate(measured.prompt_tokens_per_second.median)} tokens/s",
        )
    yield "", _worth_fusing(result)
    for name, other in result.against.items():
        yield from _against(name, other)


def _spread(spread: Spread) -> str:
    if spread.repeats == 1:
        return rate(spread.median)
    return f"{rate(spread.median)} ({rate(spread.low)} … {rate(spread.high)})"


def _baseline(baseline: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if (factor := baseline["factor"]) is None:
        return
    told = f"{factor:.2g} × {baseline['samples_per_second']} samples/s ({baseline['of']})"
    if baseline["basis"] != "measured":
        told += f"; by its FLOPs the same work would run at {rate(baseline['here'])} samples/s"
    yield "baseline", told


def _worth_fusing(result: Result) -> str:
    fused, adapter = (
        result.generation[name].decode_tokens_per_second.median for name in ("fused", "adapter")
    )
    percent = 100 * (fused / adapter - 1)
    if percent >= 3:
        return f"fusing makes answers {percent:.0f} % faster"
    return "fusing makes no difference to the speed of answers"


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
    undisturbed = "without waiting between phases"
    table.add_row(undisturbed, f"{phases.step_undisturbed:.4f}", "", style="dim")
    return table


def _sweep(sweep: Sweep) -> list[RenderableType]:
    """Tables of tokens/s by rows a step and tokens a row, and the fastest setting as a recipe."""
    parts: list[RenderableType] = []
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
