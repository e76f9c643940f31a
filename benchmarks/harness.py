"""What the benchmark scripts share: child processes, tables and result files.

A script measures variants with `interleave`, prints `table(...)` and writes `save(...)`:

    from harness import child, interleave, save, table

    runs = interleave({"ours": child("--one", "ours"), "theirs": child("--one", "theirs")},
                      repeats=3)
    print(table(runs, baseline="theirs"))
    save("training", runs, baseline="theirs", settings={"rows": 8})

where the script, called with `--one ours`, measures once and ends with
`report(samples_per_second=…)`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_tuner.bench.measure import Measures, Spread, interleave, ratio, spreads
from mlx_tuner.system import blas, device

__all__ = [
    "Measures",
    "Spread",
    "child",
    "interleave",
    "options",
    "preload_openblas",
    "ratio",
    "report",
    "result",
    "save",
    "spreads",
    "table",
    "table_of",
]

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARK = "measures:"


def report(**measures: float) -> None:
    """Hand one run's figures from a child process to its parent; call it once, at the end.

    `peak_rss_gb`, the process's peak of resident memory in 10^9 bytes, goes with them. (What the
    parent could read of its child would start at the parent's own peak.)
    """
    print(_MARK + json.dumps({**measures, "peak_rss_gb": _peak_rss_gb()}), flush=True)


def _peak_rss_gb() -> float:
    with suppress(OSError):  # no such file: not Linux
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def child(
    *arguments: str,
    script: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Callable[[], Measures]:
    """A variant that runs `python script arguments` (default: the running script) once a turn.

    Its figures are what the child gave to `report`, and `wall_seconds` (start of the process to
    its end). On a GPU, let the child also report MLX's own peak memory. On the CPU backend
    OpenBLAS is preloaded where it is installed. A child that fails stops the benchmark.
    """
    argv = [sys.executable, str(script or Path(sys.argv[0]).resolve()), *arguments]
    environ = blas.environment({**os.environ, **(environ or {})})

    def run() -> Measures:
        start = time.perf_counter()
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT)
        wall_seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{shlex.join(argv)} ended with {done.returncode}\n{done.stdout}")
        lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if not lines:
            raise SystemExit(f"{shlex.join(argv)} reported nothing")
        return {**json.loads(lines[-1][len(_MARK) :]), "wall_seconds": wall_seconds}

    return run


def result(
    name: str,
    runs: Mapping[str, Sequence[Measures]],
    *,
    baseline: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything needed to read the figures later: machine, versions, date, command, spreads.

    `ratios` are each variant's figures over the baseline's, turn by turn.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", _script_name(), *sys.argv[1:]]),
        "machine": device.facts().to_json(),
        "settings": dict(settings or {}),
        "measures": {
            variant: {key: spread.to_json() for key, spread in spreads(turns).items()}
            for variant, turns in runs.items()
        },
        "ratios": {
            variant: {key: spread.to_json() for key, spread in ratios.items()}
            for variant, ratios in _ratios(runs, baseline).items()
        },
    }


def save(
    name: str,
    runs: Mapping[str, Sequence[Measures]],
    *,
    baseline: str | None = None,
    settings: Mapping[str, Any] | None = None,
    added: bool = False,
) -> Path:
    """Write `benchmarks/results/NAME.json`; arguments as in `result`.

    `python benchmarks/readme.py` then writes README.md anew.

    Args:
        added: variants that were measured before stay beside these.
    """
    from mlx_tuner.system import files

    path = RESULTS / f"{name}.json"
    found = result(name, runs, baseline=baseline, settings=settings)
    if added and path.exists():
        found["measures"] = json.loads(path.read_text())["measures"] | found["measures"]
    files.write_json(path, found)
    return path


def table(runs: Mapping[str, Sequence[Measures]], *, baseline: str | None = None) -> str:
    """A Markdown table: a row a figure, a column a variant, then each one's ratio to `baseline`."""
    return table_of(result("", runs, baseline=baseline))


def table_of(found: Mapping[str, Any]) -> str:
    """The same table of a result file's content."""
    measures, ratios = found["measures"], found["ratios"]
    baseline = next((name for name in measures if name not in ratios), None)
    header = ["", *measures, *(f"{variant} / {baseline}" for variant in ratios)]
    columns = [*measures.values(), *ratios.values()]
    rows = [
        [key, *(str(Spread(**column[key])) if key in column else "" for column in columns)]
        for key in dict.fromkeys(key for figures in measures.values() for key in figures)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        f"| {' | '.join(map(str.ljust, cells, widths))} |"
        for cells in (header, ["-" * width for width in widths], *rows)
    )


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has: `--repeats` and `--name`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of each variant")
    parser.add_argument("--name", help="name of the result file, without .json")
    return parser


def preload_openblas() -> None:
    """Start this script over with OpenBLAS preloaded, where that helps and is possible.

    Call it first: then the figures measured here, too, and the recorded machine have it.
    """
    environ = blas.environment(os.environ)
    if environ != dict(os.environ):
        os.execve(sys.executable, sys.orig_argv, environ)


def _ratios(
    runs: Mapping[str, Sequence[Measures]], baseline: str | None
) -> dict[str, dict[str, Spread]]:
    if baseline is None:
        return {}
    return {
        variant: {
            key: ratio(turns, runs[baseline], key)
            for key in turns[0]
            if all(key in run and run[key] for run in runs[baseline])
        }
        for variant, turns in runs.items()
        if variant != baseline
    }


def _script_name() -> str:
    script = Path(sys.argv[0]).resolve()
    return str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
