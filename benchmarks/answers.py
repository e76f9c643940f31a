"""Answers side by side against one at a time, turn by turn, and programs that pass their tests.

    python benchmarks/answers.py --model FOLDER --tasks HumanEval.jsonl.gz     # 16 prompts
    python benchmarks/answers.py --tasks HumanEval.jsonl.gz --runs adapters/*   # pass@1 of runs

The second runs what the base and its fine-tunes write, one model after the other. With --answers a
model that has answered is not asked again.
"""

from __future__ import annotations

import json
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
    parser.add_argument("--answers", type=Path, help="folder that keeps what each run answers")
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
    from mlx_tuner.commands.evaluate import task_prompts
    from mlx_tuner.commands.tasks import read_tasks
    from mlx_tuner.models.answers import answer_all
    from mlx_tuner.models.model import load

    loaded = load(Path(args.model))
    prompts = task_prompts(loaded.tokenizer, read_tasks(args.tasks, PROMPTS), loaded.path)
    answer_all(loaded.model, loaded.tokenizer, prompts[:1], 2)
    start, tokens = time.perf_counter(), 0
    for first in range(0, PROMPTS, args.one):
        some = prompts[first : first + args.one]
        said = answer_all(loaded.model, loaded.tokenizer, some, args.max_tokens)
        tokens += sum(answer.tokens for answer in said)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}


def programs(args: Any) -> dict[str, list[dict[str, float]]]:
    """What the base, and each run's model, write, as `mlx-tune eval --tasks` has it tried."""
    from mlx_tuner.commands.tasks import read_tasks

    tasks = read_tasks(args.tasks, args.limit)
    sides: dict[str, list[dict[str, float]]] = {}
    before: list[bool] = []
    for run in (None, *args.runs):
        name = run.name if run else "base"
        kept = args.answers / f"{name}.json" if args.answers else None
        if kept and kept.exists():
            written = json.loads(kept.read_text())
        else:
            written = answers_to(tasks, run, args)
            if kept:
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps(written))
        passed = [outcome == "passed" for outcome in written["outcomes"]]
        before = before or passed
        both = list(zip(before, passed, strict=True))
        sides[name] = [
            {
                "tasks": len(tasks),
                "passed": sum(passed),
                "pass_at_1": sum(passed) / len(tasks),
                "passed_before_only": both.count((True, False)),
                "passed_now_only": both.count((False, True)),
                "stopped": sum(written["stopped"]),
                "tokens_an_answer": sum(written["tokens"]) / len(tasks),
            }
        ]
        print(name, sides[name][0], flush=True)
    return sides


def answers_to(tasks: Any, run: Path | None, args: Any) -> dict[str, list[Any]]:
    """The answers of a run's model, or of the base, and how their programs end."""
    from mlx_tuner.commands.evaluate import task_prompts
    from mlx_tuner.commands.tasks import ENDS, run_all
    from mlx_tuner.models.adapter import apply
    from mlx_tuner.models.adapter_folder import read_adapter
    from mlx_tuner.models.answers import answer_all
    from mlx_tuner.models.base import resolve_base
    from mlx_tuner.models.model import load

    loaded = load(resolve_base(read_adapter(args.runs[0]), args.model))
    if run:
        apply(loaded.model, read_adapter(run))
    prompts = task_prompts(loaded.tokenizer, tasks, loaded.path)
    said = answer_all(loaded.model, loaded.tokenizer, prompts, args.max_tokens, ends=ENDS)
    pairs = zip(tasks, said, strict=True)
    outcomes = run_all([task.program(answer.text) for task, answer in pairs], lambda _: None)
    return {
        "outcomes": outcomes,
        "stopped": [answer.stopped for answer in said],
        "tokens": [answer.tokens for answer in said],
        "text": [answer.text for answer in said],
    }


if __name__ == "__main__":
    main()
