"""Reading rows: ours against mlx-lm's tokenisation, and against loading all lines of a large file.

    python benchmarks/data.py                        # both, 1 M rows for the second
    python benchmarks/data.py --part start --rows 2000000

CodeAlpaca rows and the real tokenizer from ../shared. "tokenise": rows a second from JSON lines to
tokens and masks, with our cache of words, without it, and mlx-lm's, each with a tokenizer of its
own that is loaded before, in turns in one process, after a check that the tokens are the same.
"start": from opening a file of many rows to the first step's tokens, each way in a process of its
own; `grown_mb` is the peak of resident memory above what libraries and tokenizer take.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness import child, interleave, options, report, save, table
from mlx_lm import tokenizer_utils
from shared import shared

from mlx_tuner.bench.measure import Measures
from mlx_tuner.data import text_encoder
from mlx_tuner.data.dataset import open_dataset
from mlx_tuner.data.encode import Encoder
from mlx_tuner.data.order import shuffled
from mlx_tuner.data.stream import prefetch
from mlx_tuner.engine.batching import Example
from mlx_tuner.models.model import load_tokenizer

SHARED = shared()
BATCH_ROWS = 8
FEW_ROWS = 64
STEPS = 100
"""Steps whose rows are read after the first."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--part", choices=["tokenise", "start"], help="one of the two only")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the large file")
    parser.add_argument("--one", choices=["ours", "all lines"], help="measure one turn, here")
    parser.add_argument("--file", type=Path, help="the large file")
    args = parser.parse_args()
    if args.one:
        report(**(start_ours if args.one == "ours" else start_all_lines)(args))
        return
    if args.part != "start":
        tokenise(args)
    if args.part != "tokenise":
        start(args)


def tokenise(args: argparse.Namespace) -> None:
    """Rows a second over the training rows, ours and mlx-lm's."""
    rows = completions()
    with tempfile.TemporaryDirectory() as folder, qwen() as model:
        tokenizer, theirs = load_tokenizer(model), tokenizer_utils.load(model)
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(rows))

        def ours(encoder: Encoder) -> list[Example]:
            dataset = open_dataset(path, encoder, surveyed_rows=0)
            steps = (
                range(i, min(i + BATCH_ROWS, len(rows))) for i in range(0, len(rows), BATCH_ROWS)
            )
            return [example for examples in prefetch(dataset, steps) for example in examples]

        def mlx_lm(tokenizer: Any) -> list[tuple[list[int], int]]:
            dataset = peer_dataset(path, tokenizer)
            return [dataset[i] for i in range(len(dataset))]

        # A new one each time: it remembers words.
        encoder = partial(Encoder, tokenizer, max_seq_length=2048)

        def without_words() -> Encoder:
            with patch.object(text_encoder, "_word_pattern", lambda backend: None):
                return encoder()

        same = [(one.tokens.tolist(), int(one.loss_mask.argmax())) for one in ours(encoder())]
        assert same == mlx_lm(theirs), "the two do not give the same tokens and first targets"
        variants = {
            "ours": timed(encoder, ours, len(rows)),
            "ours, each text whole": timed(without_words, ours, len(rows)),
            "mlx-lm": timed(lambda: theirs, mlx_lm, len(rows)),
        }
        gc.collect()
        gc.freeze()  # else a turn of a third of a second may hold a search of all that is imported
        runs = interleave(variants, repeats=args.repeats)
    print(table(runs, baseline="mlx-lm"))
    settings = {"rows": len(rows), "batch_rows": BATCH_ROWS}
    print(save(args.name or "data-tokenise", runs, baseline="mlx-lm", settings=settings))


def start(args: argparse.Namespace) -> None:
    """First step and memory for a large file and for a few rows of it: ours, and all lines."""
    with tempfile.TemporaryDirectory() as folder:
        path, few = Path(folder) / "rows.jsonl", Path(folder) / "few.jsonl"
        some = completions()
        few.write_text("\n".join(some[:FEW_ROWS]))
        with path.open("w") as file:
            for i in range(args.rows):
                file.write(some[i % len(some)] + "\n")
        variants = {
            "ours": child("--one", "ours", "--file", str(path)),
            f"ours, {FEW_ROWS} rows": child("--one", "ours", "--file", str(few)),
            "all lines": child("--one", "all lines", "--file", str(path)),
        }
        runs = interleave(variants, repeats=args.repeats)
        size_mb = path.stat().st_size / 1e6
    print(table(runs, baseline="all lines"))
    settings = {"rows": args.rows, "file_mb": round(size_mb), "bound_mb": 200 + 16e-6 * args.rows}
    print(save(args.name or "data-start", runs, baseline="all lines", settings=settings))


def start_ours(args: argparse.Namespace) -> Measures:
    """One turn of ours: open, first step, some more steps."""
    with qwen() as model:
        tokenizer = load_tokenizer(model)
        watch = Watch()
        dataset = open_dataset(args.file, Encoder(tokenizer, max_seq_length=2048))
        return watch.measures(prefetch(dataset, steps_of(dataset)))


def start_all_lines(args: argparse.Namespace) -> Measures:
    """One turn of mlx-lm's way: all lines as Python objects, then rows as they are asked for."""
    with qwen() as model:
        tokenizer = tokenizer_utils.load(model)
        watch = Watch()
        dataset = peer_dataset(args.file, tokenizer)
        return watch.measures([dataset[row] for row in step] for step in steps_of(dataset))


def steps_of(rows: Sized) -> Iterator[list[int]]:
    """The first steps' rows, as a run shuffles them."""
    order = shuffled(0, 0, len(rows))
    for first in range(0, min((1 + STEPS) * BATCH_ROWS, len(rows)), BATCH_ROWS):
        yield order[first : first + BATCH_ROWS].tolist()


class Watch:
    """Time and memory since it was made."""

    def __init__(self) -> None:
        self._seconds, self._bytes = time.perf_counter(), peak_bytes()

    def measures(self, steps: Iterator[Any]) -> Measures:
        """Seconds to the first of `steps`, and the memory grown by until their end."""
        next(steps)
        first_step_seconds = time.perf_counter() - self._seconds
        for _ in steps:
            pass
        return {
            "first_step_seconds": first_step_seconds,
            "grown_mb": (peak_bytes() - self._bytes) / 1e6,
        }


def peak_bytes() -> int:
    """This process's peak of resident memory so far."""
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(
    prepare: Callable[[], Any], run: Callable[[Any], Any], rows: int
) -> Callable[[], Measures]:
    """A variant that measures `run`, which goes through `rows` with what `prepare` makes."""

    def measure() -> Measures:
        prepared = prepare()
        begin, cpu = time.perf_counter(), time.process_time()
        run(prepared)
        return {
            "rows_per_second": rows / (time.perf_counter() - begin),
            "rows_per_cpu_second": rows / (time.process_time() - cpu),
        }

    return measure


def completions() -> list[str]:
    """CodeAlpaca's training rows in the prompt/completion form that both sides read."""
    rows = []
    with (SHARED / "codealpaca" / "train.jsonl").open() as file:
        for row in map(json.loads, file):
            prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
            rows.append(json.dumps({"prompt": prompt, "completion": row["output"]}))
    return rows


@contextmanager
def qwen() -> Iterator[Path]:
    """A model folder with the real tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (SHARED / "qwen2.5-coder").iterdir():
            name = "config.json" if file.name == "config-0.5B.json" else file.name
            shutil.copy(file, Path(folder) / name)
        yield Path(folder)


def peer_dataset(path: Path, tokenizer: Any) -> Sequence[tuple[list[int], int]]:
    """mlx-lm's own dataset over all lines of a file, prompts masked."""
    from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset

    with path.open() as file:
        data = [json.loads(line) for line in file]
    return CacheDataset(CompletionsDataset(data, tokenizer, "prompt", "completion", True))


if __name__ == "__main__":
    main()
