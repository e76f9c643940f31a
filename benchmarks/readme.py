"""Writes README.md beside this file from the results: every figure with where it comes from.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import harness

from mlx_tuner.bench.bench import Result
from mlx_tuner.bench.report import MARKDOWN_COLUMNS, markdown_row
from mlx_tuner.bench.sweep import tables
from mlx_tuner.system import files
from mlx_tuner.words import plural, ram, rate

INTRODUCTION = """\
# Benchmarks

Written by `python benchmarks/readme.py` from the files in `benchmarks/results/`: run it after a
benchmark.

| command | measures |
| --- | --- |
| `mlx-tune bench` | training here, against the chip's peak and PEFT on an M4 Pro; generation |
| `mlx-tune bench --against mlx-lm` | the same, and mlx-lm's own trainer turn by turn |
| `mlx-tune bench --sweep` | rows a step × tokens a row × quantisation |
| `python benchmarks/training.py` | our training step against mlx-lm's, on real rows |
| `… --model FOLDER --against mlx-lm peft` | the same on a model's weights, and PEFT on torch |
| `python benchmarks/truth.py --model FOLDER` | our steps and logits against PEFT's, and float64 |
| `python benchmarks/answers.py …` | answers side by side against one by one; HumanEval of runs |
| `python benchmarks/data.py` | reading, checking and tokenising rows |
| `python benchmarks/convert.py` | converting a model, against mlx-lm |
| `python benchmarks/chaos.py` | what kills, signals, disks, damage and clocks do to a run |
| `python benchmarks/fuzz.py` | what mutants of strangers' files do to the commands |
| `python benchmarks/ranks.py` | what several ranks cost, and whether their sum is exact |
| `… --kills 10` | the same run by several ranks, killed again and again |
| `mlx.launch … mlx-tune bench --ranks` | how fast machines add up their gradients |

Variants run in turns (A B A B …), so that whatever else the machine does hits all of them. A
figure is the median with the lowest and highest in parentheses; a ratio is taken turn by turn.
`chaos` and `fuzz` are recorded part by part (`--part`, `--kind`): date and command are the last
one's. `survived` and `same_result` are shares: 1 is all.
Figures of one machine at one time say little about another: the ratios carry over.
On Linux, MLX's CPU backend needs OpenBLAS for matrix products worth measuring: the scripts
preload it where it is installed, and `mlx-tune doctor` says how to.
"""


def write() -> None:
    """Write README.md."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(harness.RESULTS.glob("*.json"))]
    files.write_text(harness.RESULTS.parent / "README.md", readme(found))


def readme(results: list[dict[str, Any]]) -> str:
    """The README of these results' contents."""
    parts = [INTRODUCTION]
    benches = [result for result in results if result["benchmark"] == "bench"]
    if benches:
        parts.append("## `mlx-tune bench`\n")
        parts.append(_table(MARKDOWN_COLUMNS, map(markdown_row, benches)) + "\n")
        parts.append("\n".join(f"- {_origin(result)}" for result in benches) + "\n")
    for result in results:
        if result["benchmark"] != "bench":
            table = table_of_sweep if result["benchmark"] == "sweep" else harness.table_of
            parts += [f"## {result['benchmark']}\n", f"{_origin(result)}\n", f"{table(result)}\n"]
    return "\n".join(parts)


def table_of_sweep(found: Result) -> str:
    """A sweep's tokens a second, a table for each quantisation."""
    return "\n\n".join(
        _table(
            [form, *(f"{seq} tokens" for seq in found["seqs"])],
            [_row([plural(row[0]["batch_size"], "row"), *map(_cell, row)]) for row in cells],
        )
        for form, cells in tables(found)
    )


def _table(header: Sequence[str], rows: Iterable[str]) -> str:
    return "\n".join((_row(header), _row(["---"] * len(header)), *rows))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: dict[str, Any]) -> str:
    return cell["skipped"] or rate(cell["tokens_per_second"])


def _origin(result: Result) -> str:
    """Command, date, machine, versions and settings of a result."""
    machine = result["machine"]
    cores = machine["gpu_cores"] or machine["cpu_cores"]
    backend = machine["backend"] + (" with OpenBLAS" if machine["openblas"] else "")
    memory = ram(machine["memory_bytes"])
    told = (
        f"`{result['command']}`, {result['date'][:10]}: {machine['chip']}, {cores} cores, "
        f"{memory}, {machine['os']}, mlx {machine['mlx']} on {backend}, "
        f"mlx-lm {machine['mlx_lm']}, Python {machine['python']}"
    )
    settings = result.get("settings") or {}
    if settings:
        told += f" ({', '.join(f'{k} {v}' for k, v in settings.items() if v not in (None, False))})"
    notes = [*result.get("notes", ()), *machine["notes"]]
    return ". ".join([told, *dict.fromkeys(notes)]) + "."


if __name__ == "__main__":
    write()
