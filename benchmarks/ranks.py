"""Several ranks on this machine: what adding up costs, whether it is exact, and what kills cost.

    python benchmarks/ranks.py                 # cost and gradient: 2 ranks, the 0.5B shape
    python benchmarks/ranks.py --kills 10      # a run of 2 ranks, killed and resumed

`together` and `apart` are the same rows of the same shares: with the sum over the ranks, and
without, as processes that know nothing of each other. Either ends when both processes are done.
`gradient_error` is relative, of the ranks' sum against one process that computes all rows.

A kill hits the training process or the supervisor of any rank, at its start or any step; then all
processes must end by themselves, and rank 0 (or, where it was killed, another) name the one that
was hit. The run goes on with `--resume` and 2 or 3 ranks, in the end with one. `adapter_error` is
that of the last adapter against a run of one process that nobody disturbed, relative.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from harness import ROOT, Measures, options, save, table

from mlx_tuner.runs import checkpoints
from mlx_tuner.system import blas

sys.path.insert(0, str(ROOT / "tests"))
from launched import environments, training_of

PATIENCE_SECONDS = 60.0
"""In which all ranks must have ended after one was killed."""
RECIPE = (
    str(ROOT / "recipes" / "quickstart.toml"),
    *("--set", "train.epochs=12", "--set", "train.save_every=2", "--set", "train.eval_every=10"),
)
START_SECONDS = 8.0
"""About what three ranks take to their first step here."""
AT_THE_START = 0.3
"""Share of the kills that are drawn from this time; the others are at some step."""
MOST_STEPS = 14
"""Between a start and a kill: ten of them are less than the run."""


def costs(args: Any) -> None:
    """Measure `together` against `apart`, and the gradient, once in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        places = environments(Path(folder), 2)
        script = [sys.executable, __file__, "--rank", "--repeats", str(args.repeats)]
        script += ["--model", args.model, "--rows", str(args.rows), "--seq", str(args.seq)]
        first, other = (
            subprocess.Popen(script, env=one_core(place), stdout=subprocess.PIPE, text=True)
            for place in places
        )
        told = first.communicate()[0]
        if other.wait() or first.returncode:
            raise SystemExit("a rank failed")
    found = json.loads(told.splitlines()[-1])
    settings = {"ranks": 2, "model": args.model, "rows a step": args.rows, "tokens a row": args.seq}
    runs = found["runs"]
    for turn in runs["together"]:
        turn["gradient_error"] = found["gradient_error"]
    print(table(runs, baseline="apart"))
    print(save(args.name or "ranks-cost", runs, baseline="apart", settings=settings))


def one_core(environ: dict[str, str]) -> dict[str, str]:
    """So that two ranks have a core each on a machine of two."""
    return {**blas.environment(environ), "OPENBLAS_NUM_THREADS": "1"}


def one_rank(args: Any) -> None:
    """One of the two processes."""
    import mlx.core as mx

    from mlx_tuner.bench.measure import interleave
    from mlx_tuner.bench.workload import LEARNING_RATE, Settings, adapted, workload_of
    from mlx_tuner.engine.optimizer import State
    from mlx_tuner.engine.ranks import Ranks, join
    from mlx_tuner.engine.trainer import Trainer, train

    ranks, alone = join("ring"), Ranks()
    work = workload_of(args.model, Settings(batch_size=args.rows, seq=args.seq), steps=2)
    trainer = Trainer(adapted(work.build()), micro_batch_tokens=1024, ranks=ranks)
    apart = Ranks()
    apart.rank, apart.size, apart.speeds = ranks.rank, ranks.size, ranks.speeds

    def steps(these: Ranks) -> Measures:
        trainer.ranks = these
        ranks.gather(b"")
        start = time.perf_counter()
        for _ in train(trainer, work.batches, repeat(LEARNING_RATE)):
            pass
        ranks.gather(b"")
        return {"step_seconds": (time.perf_counter() - start) / len(work.batches)}

    runs = interleave(
        {"apart": lambda: steps(apart), "together": lambda: steps(ranks)},
        repeats=args.repeats,
        warmups=1,
    )
    trainer.ranks = ranks
    trainer.state = State(*ranks.take_over(trainer.state))  # apart, they have become two
    _, own = trainer.sum_of_micro_batches(trainer.make_micro_batches(work.batches[0]), 0)
    gradient, _ = ranks.sum(own, mx.zeros(1))
    mx.eval(gradient)  # on both, before either goes
    trainer.ranks = alone
    _, truth = trainer.sum_of_micro_batches(trainer.make_micro_batches(work.batches[0]), 0)
    error = mx.linalg.norm(gradient - truth) / mx.linalg.norm(truth)
    if ranks.leads:
        print(json.dumps({"runs": runs, "gradient_error": error.item()}))


class Launched:
    """`mlx-tune run` as some ranks of this machine."""

    def __init__(self, folder: Path, ranks: int, *more: str) -> None:
        command = [sys.executable, "-m", "mlx_tuner", "run", *RECIPE, "--run-dir", str(folder)]
        self.ranks = ranks
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [*command, *more],
                env=one_core(place),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for place in (environments(folder.parent, ranks) if ranks > 1 else [dict(os.environ)])
        ]

    def children(self) -> list[list[int]]:
        """Process ids of the ranks that train, where they run by now."""
        return [training_of(process.pid) for process in self.processes]

    def end(self) -> tuple[float, list[int], str]:
        """Wait for all of them: seconds, exit codes, all that they said."""
        start, said = time.monotonic(), []
        for process in self.processes:
            left = PATIENCE_SECONDS * 10 - (time.monotonic() - start)
            said.append(process.communicate(timeout=left)[1])
        return time.monotonic() - start, [p.returncode for p in self.processes], "\n".join(said)


def kills(args: Any) -> None:
    """Kill a run again and again, and compare where it ends."""
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed, folder = Path(temporary) / "alone", Path(temporary) / "run"
        assert Launched(undisturbed, 1).end()[1] == [0]
        turns, launched = [], Launched(folder, 2)
        for number in range(args.kills):
            turns.append(kill(launched, draw, number))
            print(turns[-1], file=sys.stderr, flush=True)
            again = checkpoints.newest(folder)[0] is not None
            more = "--resume" if again else "--overwrite"
            launched = Launched(
                folder, draw.choice([2, 3] if number + 1 < args.kills else [1]), more
            )
        went_on = launched.end()[1] == [0] * launched.ranks
        error = difference(folder, undisturbed)
    for turn in turns:
        turn.update(went_on=float(went_on), adapter_error=error)
    print(table({"killed": turns}))
    settings = {"kills": args.kills, "seed": args.seed, "ranks": "2 or 3, then 1"}
    print(save(args.name or "ranks-kills", {"killed": turns}, settings=settings))


def kill(launched: Launched, draw: random.Random, number: int) -> dict[str, float]:
    """Kill a process of a rank at some moment, and see all of them end."""
    rank, supervisor = draw.randrange(launched.ranks), bool(draw.getrandbits(1))
    if draw.random() < AT_THE_START:
        until, target = time.monotonic() + draw.uniform(0.5, START_SECONDS), math.inf
    else:
        until, target = math.inf, newest_step(launched.folder) + draw.randint(1, MOST_STEPS)
    while time.monotonic() < until and newest_step(launched.folder) < target:
        if launched.processes[0].poll() is not None:
            break
        time.sleep(0.005)
    steps = newest_step(launched.folder)
    children = launched.children()
    victims = [launched.processes[rank].pid] if supervisor else children[rank]
    if launched.processes[rank].poll() is None:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
    seconds, codes, said = launched.end()
    time.sleep(1)  # a child notices its parent's end
    orphans = sum(is_alive(child) for child in chain(*children))
    what = "supervisor" if supervisor else "training"
    print(f"{number}: rank {rank} {what} after step {steps}: {codes}", file=sys.stderr)
    return {
        "end_seconds": seconds,
        "all_ended": float(seconds < PATIENCE_SECONDS and 0 not in codes and not orphans),
        "named": float(f"(rank {rank})" in said),
    }


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without."""
    names = checkpoints.names(folder)
    return int(names[0].removeprefix("step-")) if names else 0


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return state[:1] not in ("", "Z")


def difference(run: Path, truth: Path) -> float:
    """Relative, of the last checkpoints' adapters: the largest of any array."""
    import numpy as np
    from safetensors.numpy import load_file

    ours, theirs = (
        load_file(folder / "checkpoints" / checkpoints.names(folder)[0] / "adapters.safetensors")
        for folder in (run, truth)
    )
    return max(
        float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name]))
        for name in theirs
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--model", default="qwen2.5-0.5b", help="a shape of `mlx-tune bench`")
    parser.add_argument("--rows", type=int, default=8, help="rows a step, of one length")
    parser.add_argument("--seq", type=int, default=64, help="tokens of a row")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rank", action="store_true", help="be one of the processes")
    args = parser.parse_args(arguments)
    if args.rank:
        one_rank(args)
    elif args.kills:
        kills(args)
    else:
        costs(args)


if __name__ == "__main__":
    main()
