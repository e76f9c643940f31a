"""Stopped at random moments: what is lost, how long going on takes, whether the end is the same.

    python benchmarks/chaos.py                      # 50 kills of each kind
    python benchmarks/chaos.py --kills 10 --seed 1

A turn is one training (`recipes/quickstart.toml`, fewer steps), stopped five times and continued
each time, or five conversions or mergers. The moments are drawn: after any step, while a checkpoint
is being written, and while a resumed run starts. `survived` is the share of stops after which a run
went on at the step after its newest checkpoint, which verified (SIGTERM: and ended with 143); or
after which a conversion's folder was absent or complete. `same_result`: whether the adapter is bit
for bit that of a run that nobody stopped. A stop while ours writes always costs the checkpoint that
it was at, five steps; mlx-lm, which does not wait for the disk, has mostly written by then.

mlx-lm is stopped at moments drawn alike and goes on with `--resume-adapter-file` from its newest
file, for the iterations that are left, counted by hand. It runs uncompiled (compiling takes longer
than the run on a CPU) and does not validate.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from harness import ROOT, Measures, interleave, options, save, table
from safetensors.numpy import load_file

from mlx_tuner.models.model import resolve
from mlx_tuner.runs.run import newest_checkpoint
from mlx_tuner.system import device, files

BUILTIN = "builtin:tiny-qwen"
SAVE_EVERY, STOPS_A_TURN = 5, 5
AIMED = 0.3
"""Share of the stops for which the next file to be written is waited for."""
AT_THE_START = 0.25
"""Share of the resumed runs that are killed once more while they start."""


class Ours:
    """One training with mlx-tune, from its first start to its end."""

    line = re.compile(r"^step (\d+)/\d+  epoch \S+  loss ", re.MULTILINE)
    offset = 0
    """What to add to the number of a line for its step."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.log, self._run = folder / "log", folder / "run"
        self.adapter = self._run / "adapters.safetensors"
        settings = {"max_steps": steps, "save_every": SAVE_EVERY, "log_every": 1}
        sets = [f"--set=train.{key}={value}" for key, value in settings.items()]
        recipe = str(ROOT / "recipes" / "quickstart.toml")
        self._command = ["mlx_tuner", "run", recipe, "--run-dir", str(self._run), *sets]

    def start(self) -> subprocess.Popen[bytes]:
        """Begin, or go on."""
        again = ["--resume" if self.saved() else "--overwrite"] if self._run.exists() else []
        return start([*self._command, *again], self.log)

    def saved(self) -> int:
        """The step from which a resumed run will go on."""
        checkpoint, rejected = newest_checkpoint(self._run)
        if rejected:
            raise SystemExit(f"a checkpoint does not verify: {rejected}")
        return checkpoint.step if checkpoint else 0

    def is_writing(self) -> bool:
        """Whether it is at a checkpoint at this moment."""
        return any(self._run.glob("checkpoints/.tmp-*"))


class MlxLm:
    """The same with mlx-lm: every start has a folder and a count of its own."""

    line = re.compile(r"^ +(\d+) +\d+\.\d+ [▼▲]", re.MULTILINE)

    def __init__(self, folder: Path, steps: int) -> None:
        self.log, self._folder, self._steps = folder / "log", folder, steps
        self.offset = self._starts = 0
        self._newest: Path | None = None
        rows = map(json.loads, (ROOT / "data" / "python_100.jsonl").read_text().splitlines())
        pairs = ({"prompt": row["instruction"], "completion": row["output"]} for row in rows)
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        lora = {"rank": 16, "scale": 2.0, "dropout": 0.0}
        (folder / "config.yaml").write_text(json.dumps({"lora_parameters": lora}))

    @property
    def adapter(self) -> Path:
        """What its last start leaves."""
        return self._folder / f"start-{self._starts}" / "adapters.safetensors"

    def start(self) -> subprocess.Popen[bytes]:
        """Begin, or go on with the weights that are kept."""
        self.offset, self._starts = self.saved(), self._starts + 1
        options = {
            "model": resolve(BUILTIN),
            "data": self._folder,
            "config": self._folder / "config.yaml",
            "adapter-path": self.adapter.parent,
            "iters": self._steps - self.offset,
            "batch-size": 8,
            "num-layers": -1,
            "optimizer": "adamw",
            "learning-rate": 5e-3,
            "steps-per-report": 1,
            "save-every": SAVE_EVERY,
            **({"resume-adapter-file": self._newest} if self._newest else {}),
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        return start(["mlx_lm", "lora", "--train", "--mask-prompt", *flags], self.log)

    def saved(self) -> int:
        """Steps whose adapter is kept, of all its starts together."""
        kept = sorted(self.adapter.parent.glob("*_adapters.safetensors"))
        if not kept:
            return self.offset
        self._newest = kept[-1]
        return self.offset + int(kept[-1].name.partition("_")[0])

    def is_writing(self) -> bool:
        """Whether it is about to save: it does so as soon as it has told of the step."""
        return (told(self)[-1] - self.offset) % SAVE_EVERY == 0


Trainer = Ours | MlxLm


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m …`, its output in `log`."""
    environ = device.blas_environment(os.environ) | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    if arguments[0] == "mlx_lm":
        environ["MLX_DISABLE_COMPILE"] = "1"
    with log.open("wb") as output:
        command = [sys.executable, "-m", *arguments]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)


def told(trainer: Trainer) -> list[int]:
    """The steps that its last start has told of so far."""
    text = re.sub(r"\x1b\[[\d;]*m", "", trainer.log.read_text(errors="replace"))  # colours
    found = trainer.line.findall(text)
    return [trainer.offset + int(number) for number in found]


def await_step(trainer: Trainer, process: subprocess.Popen[bytes], step: int) -> list[int]:
    """Wait until `step` or a later one is told of, or the process has ended."""
    while max(steps := told(trainer), default=0) < step and process.poll() is None:
        time.sleep(0.003)
    return steps


def finish(trainer: Trainer, process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that must succeed."""
    if process.wait():
        raise SystemExit(trainer.log.read_text(errors="replace"))


def train(trainer: Trainer, steps: int) -> tuple[Path, float]:
    """A training that nobody stops: its adapter, and seconds a step."""
    process = trainer.start()
    await_step(trainer, process, 1)
    begin = time.perf_counter()
    await_step(trainer, process, steps)
    seconds = (time.perf_counter() - begin) / (steps - 1)
    finish(trainer, process)
    return trainer.adapter, seconds


def same(one: Path, other: Path) -> bool:
    """Whether two adapters have the same bits."""
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].tobytes() == theirs[name].tobytes() for name in ours
    )


def stop_training(
    trainer: Trainer,
    sign: signal.Signals,
    draw: random.Random,
    steps: int,
    unbroken: Path,
    pace: float,
) -> Measures:
    """One training that is stopped at random moments and continued after each.

    Args:
        unbroken: the adapter of a training that nobody stopped.
        pace: its seconds a step.
    """
    survived, steps_lost, seconds_lost, resume_seconds = [], [], [], []
    process = trainer.start()
    for moment in sorted(draw.sample(range(1, steps - SAVE_EVERY), STOPS_A_TURN)):
        await_step(trainer, process, moment)
        if draw.random() < AIMED:
            while not trainer.is_writing() and told(trainer)[-1] < moment + SAVE_EVERY:
                pass
        else:
            time.sleep(draw.uniform(0, pace))
        if told(trainer)[-1] >= steps - 1:  # one that makes its last step ends, as it should
            break
        since = time.time() - trainer.log.stat().st_mtime
        process.send_signal(sign)
        expected = 143 if sign == signal.SIGTERM else -sign
        stops = [process.wait() == expected]
        saved = trainer.saved()
        steps_lost.append(told(trainer)[-1] - saved)
        seconds_lost.append(steps_lost[-1] * pace + since * (sign == signal.SIGKILL))
        if draw.random() < AT_THE_START:
            process = trainer.start()
            time.sleep(draw.uniform(0, 5))
            process.kill()
            process.wait()
            stops.append(trainer.saved() >= saved)
            saved = trainer.saved()
        begin = time.perf_counter()
        process = trainer.start()
        went_on = await_step(trainer, process, 1)[:1] == [saved + 1]
        resume_seconds.append(time.perf_counter() - begin)
        survived += [stop and went_on for stop in stops]
    finish(trainer, process)
    return {
        "stops": len(survived),
        "survived": mean(survived),
        "same_result": float(same(trainer.adapter, unbroken)),
        "steps_lost": mean(steps_lost),
        "seconds_lost": mean(seconds_lost),
        "resume_seconds": mean(resume_seconds),
    }


def stop_conversion(arguments: Sequence[str], folder: Path, draw: random.Random) -> Measures:
    """Conversions that are killed, half of them when they write; before and after, one that is not.

    Args:
        folder: empty.
    """
    output, log = folder / "work" / "out", folder / "log"
    output.parent.mkdir()

    def begin() -> subprocess.Popen[bytes]:
        if output.exists():
            files.remove(output)
        return start(["mlx_tuner", *arguments, "-o", str(output)], log)

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in output.iterdir()}

    started = time.perf_counter()
    process = begin()
    while not any(output.parent.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    writing = time.perf_counter() - started
    if process.wait():
        raise SystemExit(log.read_text(errors="replace"))
    whole, reference = time.perf_counter() - started, content()
    complete, survived = [], []
    for _ in range(STOPS_A_TURN):
        process = begin()
        time.sleep(draw.uniform(writing if draw.random() < 0.5 else 0, whole))
        process.kill()
        process.wait()
        complete.append(output.exists())
        good = not complete[-1] or (not files.verify(output) and content() == reference)
        survived.append(good)
    done = begin().wait() == 0 and list(output.parent.iterdir()) == [output]
    return {
        "stops": len(survived),
        "survived": mean(survived),
        "same_result": float(done and content() == reference),
        "complete": mean(complete),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="stops of each kind, at least")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    turns = -(-args.kills // STOPS_A_TURN)
    with tempfile.TemporaryDirectory() as scratch:
        new = partial(tempfile.mkdtemp, dir=scratch)
        unbroken = {}
        for kind in (Ours, MlxLm):
            (first, _), second = (train(kind(Path(new()), args.steps), args.steps) for _ in "ab")
            if not same(first, second[0]):
                raise SystemExit(f"{kind.__name__}: two runs that nobody stopped differ")
            unbroken[kind] = second
        ours = unbroken[Ours][0].parent

        def training(kind: type[Trainer], sign: signal.Signals) -> Callable[[], Measures]:
            draw = random.Random(args.seed)  # the same moments for all
            return lambda: stop_training(
                kind(Path(new()), args.steps), sign, draw, args.steps, *unbroken[kind]
            )

        def conversion(*arguments: str) -> Callable[[], Measures]:
            draw = random.Random(args.seed)
            return lambda: stop_conversion(arguments, Path(new()), draw)

        variants = {
            "run, SIGKILL": training(Ours, signal.SIGKILL),
            "run, SIGTERM": training(Ours, signal.SIGTERM),
            "mlx_lm.lora, SIGKILL": training(MlxLm, signal.SIGKILL),
            "convert, SIGKILL": conversion("convert", BUILTIN, "--dtype", "float16"),
            "fuse, SIGKILL": conversion("fuse", str(ours)),
        }
        runs = interleave(variants, repeats=turns, on_result=lambda *turn: print(*turn, flush=True))
    print(table(runs))
    stops = {name: int(sum(turn["stops"] for turn in found)) for name, found in runs.items()}
    settings = {"steps": args.steps, "save_every": SAVE_EVERY, "turns": turns}
    told_stops = ", ".join(f"{count} × {name}" for name, count in stops.items())
    print(save(args.name or "chaos", runs, settings={**settings, "stops": told_stops}))


if __name__ == "__main__":
    main()
