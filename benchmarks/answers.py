"""Answers side by side against one at a time, turn by turn, and programs that pass their tests.

    python benchmarks/answers.py --model FOLDER --tasks HumanEval.jsonl.gz     # 16 prompts
    python benchmarks/answers.py --tasks HumanEval.jsonl.gz --runs adapters/*   # pass@1 of runs

The second runs what the models write (`mlx-tune eval --allow-code-execution`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import child, interleave, options, preload_openblas, report, save, table

PROMPTS = 16


def main() -> None:
    preload_openblas()
    parser = options(__doc__)
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--tasks", type=Path, required=True, help="a file in HumanEval's format")
    parser.add_argument("--runs", nargs="*", type=Path, help="run folders, all of one base")
    parser.add_argument("--data", type=Path, help="rows that all runs held out")
    parser.add_argument("--limit", type=int, help="the first tasks only")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--one", type=int, help="answer so many at once, here")
    args = parser.parse_args()
    if args.one:
        report(**answering(args))
        return
    settings = {"max_tokens": args.max_tokens}
    if args.runs:
        runs = programs(args)
        settings |= {"tasks": args.tasks.name, "limit": args.limit}
        print(table(runs))
        print(save(args.name or "tasks", runs, settings=settings))
        return

    def variant(many: int) -> Any:
        words = ("--model", args.model, "--tasks", str(args.tasks.resolve()))
        return child("--one", str(many), *words, "--max-tokens", str(args.max_tokens))

    variants = {f"{PROMPTS} at once": variant(PROMPTS), "one at a time": variant(1)}
    runs = interleave(variants, repeats=args.repeats, on_result=lambda *turn: print(*turn))
    print(table(runs, baseline="one at a time"))
    settings |= {"model": Path(args.model).name, "prompts": PROMPTS}
    print(save(args.name or "answers", runs, baseline="one at a time", settings=settings))


def answering(args: Any) -> dict[str, float]:
    """The same answers, so many at once."""
    from mlx_tuner.commands.tasks import BEGINNING, read_tasks
    from mlx_tuner.models.answers import answer_all, prompt_tokens
    from mlx_tuner.models.model import load

    loaded = load(Path(args.model))
    begun = loaded.tokenizer.encode(BEGINNING, add_special_tokens=False)
    prompts = [
        prompt_tokens(loaded.tokenizer, [{"role": "user", "content": t.question}], loaded.path)
        + begun
        for t in read_tasks(args.tasks, PROMPTS)
    ]
    answer_all(loaded.model, loaded.tokenizer, prompts[:1], 2)
    start, tokens = time.perf_counter(), 0
    for first in range(0, PROMPTS, args.one):
        some = prompts[first : first + args.one]
        said = answer_all(loaded.model, loaded.tokenizer, some, args.max_tokens)
        tokens += sum(answer.tokens for answer in said)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}


def programs(args: Any) -> dict[str, list[dict[str, float]]]:
    """What `mlx-tune eval --tasks` says of each run, and of their base."""
    sides: dict[str, list[dict[str, float]]] = {}
    for run in args.runs:
        words = ["eval", str(run), "--tasks", str(args.tasks), "--allow-code-execution", "--json"]
        words += ["--samples", "0", "--max-tokens", str(args.max_tokens)]
        words += ["--data", str(args.data)] if args.data else []
        words += ["--limit", str(args.limit)] if args.limit else []
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mlx_tuner", *words], stdout=subprocess.PIPE, check=True
        )
        seconds = time.perf_counter() - start
        found = json.loads(done.stdout)
        for name, side in (("base", found["base"]), (run.name, found["tuned"])):
            passes = side["passes"]
            figures = {
                "tasks": passes["of"],
                "passed": passes["count"],
                "pass_at_1": passes["count"] / passes["of"],
                "held_out_loss": side["loss"]["value"],
            }
            sides.setdefault(name, [figures | ({} if name == "base" else {"seconds": seconds})])
    return sides


if __name__ == "__main__":
    main()
