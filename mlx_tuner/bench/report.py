"""A bench's result for the terminal, and as a row of the README's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner.bench.bench import PROJECTED_EPOCHS, Result
from mlx_tuner.bench.sweep import recipe_lines, tables
from mlx_tuner.bench.workload import BASELINE_MODEL, RANK, TARGET_MODULES
from mlx_tuner.words import duration, plural, ram, rate

MARKDOWN_COLUMNS = (
    *("machine", "memory", "system", "MLX", "model", "rows a step", "samples/s", "tokens/s"),
    *("peak memory", "TFLOP/s", "of peak", "× baseline", "date"),
)
_LIMITS = {
    "products": "matrix products: only fewer of them, or a faster chip, would make it shorter",
    "weights": "reading the weights: more rows a step would share each reading",
    "python": "building the graph in Python: more rows a step would hide it",
    "other": "small products, element-wise work, softmax and launches",
}
_PHASES = {
    "rows": "laying out rows, meanwhile",
    "python": "Python, meanwhile",
    "forward": "forward",
    "backward": "backward, and the update",
    "step": "a step",
}


def report(found: Result) -> RenderableType:
    """All of a result, to print with rich."""
    parts = _sweep(found) if found["benchmark"] == "sweep" else [_grid(_facts(found))]
    notes = [Text(f"note: {note}", "yellow") for note in found["notes"]]
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in (*parts, *notes)), "")


def markdown_row(found: Result) -> str:
    """A result as a row of a table with the `MARKDOWN_COLUMNS`."""
    machine, work, training = found["machine"], found["workload"], found["training"]
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    backend = "CPU with OpenBLAS" if machine["openblas"] else machine["backend"].upper()
    factor = found["baseline"]["factor"] if work["model"] == BASELINE_MODEL else None
    cells = (
        f"{machine['chip']}{cores}, {backend}",
        ram(machine["memory_bytes"]),
        machine["os"],
        machine["mlx"],
        _form(work),
        str(work["batch_size"]),
        _spread(training["samples_per_second"]),
        rate(training["tokens_per_second"]["median"]),
        f"{training['peak_memory_gb']:.2f} GB",
        "" if training["tflops"] is None else f"{training['tflops']:.3g}",
        "" if training["percent_of_peak"] is None else f"{training['percent_of_peak']:.0f} %",
        "" if factor is None else f"{factor:.2f}",
        found["date"][:10],
    )
    return f"| {' | '.join(cells)} |"


def _cell(cell: Mapping[str, Any]) -> str:
    return cell["skipped"] or rate(cell["tokens_per_second"])


def _form(work: Mapping[str, Any]) -> str:
    bits = f", {work['quantize']} bit" if work["quantize"] else ""
    return f"{work['model']}, {work['dtype']}{bits}"


def _spread(spread: Mapping[str, float]) -> str:
    if spread["repeats"] == 1:
        return rate(spread["median"])
    return f"{rate(spread['median'])} ({rate(spread['low'])} … {rate(spread['high'])})"


def _flop(count: float) -> str:
    """Such as "4.01 TFLOP", "3.44 GFLOP"."""
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e11 else f"{count / 1e9:.3g} GFLOP"


def _grid(facts: Iterable[tuple[str, str | Text]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for name, text in facts:
        grid.add_row(name, text)
    return grid


def _facts(found: Result) -> Iterator[tuple[str, str | Text]]:
    yield from _machine(found["machine"])
    yield from _work(found["workload"], found["training"])
    yield from _training(found["training"], found["workload"])
    yield from _breakdown(found["phases"], found["limit"])
    yield from _baseline(found["baseline"])
    for i, (rows, seconds) in enumerate(found["projection"].items()):
        what = f"{int(rows):,} rows × {PROJECTED_EPOCHS} epochs: about {duration(seconds)}"
        yield "" if i else "projection", what
    yield from _generation(found["generation"])
    for name, other in found["against"].items():
        yield from _against(name, other)


def _machine(machine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cores = f", {machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else ""
    bandwidth = machine["bandwidth_gb_per_second"]
    speed = f", {bandwidth} GB/s" if bandwidth else ""
    yield "machine", f"{machine['chip']}{cores}, {ram(machine['memory_bytes'])}{speed}"
    backend = f"{machine['backend']}{' with OpenBLAS' if machine['openblas'] else ''}"
    yield "", f"{machine['os']}, mlx {machine['mlx']} on {backend}, mlx-lm {machine['mlx_lm']}"
    if machine["thermal_state"] or machine["low_power_mode"] is not None:
        power = {True: "on", False: "off", None: "unknown"}[machine["low_power_mode"]]
        thermal = machine["thermal_state"] or "unknown"
        yield "", f"low power mode {power}, thermal pressure {thermal}"


def _work(work: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    targets = " ".join(name[0] for name in TARGET_MODULES)
    yield "work", f"{_form(work)}, LoRA of rank {RANK} on {targets}"
    length = f"of {work['seq']} tokens" if work["seq"] else "as long as CodeAlpaca's"
    mean, learned = (work[key] / work["rows"] for key in ("tokens", "target_tokens"))
    rows = plural(work["batch_size"], "row")
    yield "", f"{rows} a step, {length}: {mean:.0f} tokens each, of which {learned:.0f} are learned"
    passes = training["samples_per_second"]["repeats"]
    steps = plural(work["steps"], "step")
    yield "", f"{steps} a pass: the median of {passes} passes (low … high)"


def _training(
    training: Mapping[str, Any], work: Mapping[str, Any]
) -> Iterator[tuple[str, str | Text]]:
    yield "training", Text(f"{_spread(training['samples_per_second'])} samples/s", "bold green")
    yield "", f"{_spread(training['tokens_per_second'])} tokens/s, padding not counted"
    yield "", f"{_spread(training['steps_per_second'])} steps/s"
    yield "", f"peak memory {training['peak_memory_gb']:.2f} GB"
    if (tflops := training["tflops"]) is None:
        return
    yield "FLOPs", f"{_flop(training['flops_per_step'])} a step, {_flop(tflops * 1e12)}/s"
    peak, gemm = (f"{_flop(training[k] * 1e12)}/s" for k in ("peak_tflops", "gemm_tflops"))
    percent = f"{training['percent_of_peak']:.0f} % of"
    if training["peak_source"] == "table":
        yield "", f"{percent} the chip's FP32 peak, {peak}"
        form = f"{work['quantize']}-bit" if work["quantize"] else work["dtype"]
        share = 100 * tflops / training["gemm_tflops"]
        yield "", f"{share:.0f} % of large {form} products, measured: {gemm}"
    else:
        yield "", f"{percent} large {work['dtype']} products, measured: {peak}"
        yield "", "(the table of peaks does not have this chip)"


def _breakdown(
    phases: Mapping[str, float], limit: Mapping[str, Any]
) -> Iterator[tuple[str, str | Text]]:
    for i, name in enumerate(("step", "forward", "backward", "rows", "python")):
        share = f"{100 * phases[name] / phases['step']:5.1f} %"
        yield "" if i else "a step", f"{share}  {phases[name]:.4f} s  {_PHASES[name]}"
    weights = (
        "" if limit["weights"] is None else f", reading weights {100 * limit['weights']:.0f} %"
    )
    yield "limit", Text(_LIMITS[limit["verdict"]], "bold")
    yield (
        "",
        f"at full speed, products would take {100 * limit['products']:.0f} %{weights} of a step",
    )


def _baseline(baseline: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if baseline["here"] is not None:
        yield "baseline", f"{baseline['samples_per_second']} samples/s: {baseline['of']}"
        here = rate(baseline["here"])
        factor = f"{baseline['factor']:.2g}"
        yield "", f"here about {here} samples/s on that work, by its FLOPs: {factor} ×"


def _generation(generation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    decode = {n: measured["decode_tokens_per_second"] for n, measured in generation.items()}
    for name, measured in generation.items():
        prompt = rate(measured["prompt_tokens_per_second"]["median"])
        speed = f"{rate(decode[name]['median']):>8} tokens/s, reads prompts at {prompt} tokens/s"
        yield "generation" if name == "base" else "", f"{name:<8}{speed}"
    if decode["fused"]["low"] <= decode["adapter"]["high"]:
        yield "", "fusing makes no clear difference to the speed of answers"
    else:
        faster = 100 * (decode["fused"]["median"] / decode["adapter"]["median"] - 1)
        yield "", f"fusing makes answers {faster:.0f} % faster"


def _against(name: str, other: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ratios = other["ratios"]
    yield "against", f"{name}: {_spread(ratios['samples_per_second'])} × its samples/s"
    yield "", f"{_spread(ratios['peak_memory_gb'])} × its peak memory"
    if figures := other.get("figures"):
        computed = figures["computed_per_token"]["median"]
        yield "", f"its own: {_spread(figures['samples_per_second'])} samples/s"
        yield "", f"it computes {computed:.2f} tokens for each that is in the rows"
    for difference in other.get("differs", ()):
        yield "", f"not the same: {difference}"


def _sweep(found: Result) -> list[RenderableType]:
    """Tables of tokens/s by rows a step and tokens a row, and the fastest setting as a recipe."""
    work = ("work", f"{found['workload']['model']}, training")
    parts = [_grid([*_machine(found["machine"]), work])]
    for form, cells in tables(found):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(f"tokens/s, {form}")
        for seq in found["seqs"]:
            table.add_column(f"{seq} tokens", justify="right")
        for row in cells:
            table.add_row(plural(row[0]["batch_size"], "row"), *map(_cell, row))
        parts.append(table)
    if lines := recipe_lines(found):
        parts += [Text("the fastest that fits, as recipe lines:", "bold"), Text(lines)]
    return parts
