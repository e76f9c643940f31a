"""What may be done to a run: kills, signals, a disk that fails, damage, many starts at once.

    python benchmarks/chaos.py                            # 100 stops of each kind
    python benchmarks/chaos.py --stops 10 --seed 1
    python benchmarks/chaos.py --part "power" "50 starts" # others stay as they are in the results

A turn is one training (`recipes/quickstart.toml`, fewer steps), stopped five times, or five
conversions or mergers, or a fifth … of the other counts. The moments are drawn: after any step,
while a checkpoint is being written or the validation loss taken, and while a run starts. A killed
child is started again by its parent; a killed parent must take its child along, and the run is
continued with `--resume`; after SIGINT, SIGTERM and SIGHUP the exit code must be 130, 143 or 129.
A run whose clock jumps by days, and one that is stopped for a minute as by a machine that sleeps,
must neither start again nor end otherwise.

`survived` is the share of stops after which a run went on at the step after its newest checkpoint,
which verified; of conversions after which the folder was absent or complete; of boundaries of a
save, disk errors and power losses after which the newest checkpoint that was promised was gone on
from; of damages to a checkpoint that were found while none was found in an undamaged one.
`same_result`: whether the adapter is bit for bit that of a run that nobody stopped. A stop while
ours writes costs the checkpoint that it was at, five steps; mlx-lm, which does not wait for the
disk, has mostly written by then.

mlx-lm is killed at moments drawn alike and goes on with `--resume-adapter-file` from its newest
file, for the iterations that are left, counted by hand. It runs uncompiled (compiling takes longer
than the run on a CPU) and does not validate.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import mean, median

from harness import ROOT, Measures, options, preload_openblas, save, table
from safetensors.numpy import load_file

from mlx_tuner import cli
from mlx_tuner.errors import RunError
from mlx_tuner.models.model import resolve
from mlx_tuner.runs import checkpoints, supervisor
from mlx_tuner.runs.metrics import TrainRecord
from mlx_tuner.runs.run import Run, read_records, read_summary
from mlx_tuner.system import blas, files
from mlx_tuner.training import finetune as training

sys.path.insert(0, str(ROOT / "tests"))
import disk

BUILTIN = "builtin:tiny-qwen"
SAVE_EVERY, STOPS_A_TURN = 5, 5
AIMED = 0.3
"""Share of the stops for which the next file to be written is waited for."""
AT_THE_START = 0.25
"""Share of the resumed runs that are stopped once more while they start."""
CHILD, PARENT, SIGNALS = "child", "parent", "signals"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)
AT_ONCE = 50
ASLEEP_SECONDS = 60.0
DAY_SECONDS = 86_400
PATIENCE_SECONDS = 300.0
"""For a run to come to its next step: longer is an error of this script or of the run."""


class Forked:
    """`mlx-tune` as a fork of this process, which has imported all of it: a start takes no 3 s.

    Nothing is computed here before, so MLX starts in the fork. (On a Mac no fork can use Metal.)
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.returncode: int | None = None
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        if (pid := os.fork()) == 0:
            become(arguments, output)
        os.close(output)
        self.pid = pid

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """Wait for its end; as `poll`."""
        while self.poll() is None:
            time.sleep(0.005)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


def become(arguments: Sequence[str], output: int) -> None:
    """Be `mlx-tune ARGUMENTS`, whose children are forks too and start without delay."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output), "w", buffering=1) for _ in range(2))
    supervisor.DELAYS = (0.1, 0.1, 0.1)

    def spawn(path, command, environ, *, file_actions=(), setpgroup=None):
        if (pid := os.fork()) == 0:
            os.setpgid(0, 0)
            for _, source, target in file_actions:
                os.dup2(source, target)
            for path in list(Path("/proc/self/fd").iterdir()):  # what an exec would close
                with suppress(OSError):
                    if int(path.name) > 2 and not os.get_inheritable(int(path.name)):
                        os.close(int(path.name))
            sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
            os.environ.clear()
            os.environ.update(environ)
            for number in CODES:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            end(command[command.index("run") :])
        return pid

    os.posix_spawn = spawn
    end(arguments)


def end(arguments: Sequence[str]) -> None:
    """Run the command line, and leave this fork."""
    code = 1
    try:
        cli.main(list(arguments), prog_name="mlx-tune", standalone_mode=True)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(code)


class Ours:
    """One training with mlx-tune, from its first start to its end."""

    line = re.compile(r"^step (\d+)/\d+  epoch \S+  loss ", re.MULTILINE)
    offset = 0
    """What to add to the number of a line for its step."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.log, self.run = folder / "log", folder / "run"
        self.adapter = self.run / "adapters.safetensors"
        settings = {"max_steps": steps, "save_every": SAVE_EVERY, "log_every": 1, "eval_every": 4}
        sets = [f"--set=train.{key}={value}" for key, value in settings.items()]
        recipe = str(ROOT / "recipes" / "quickstart.toml")
        self._command = ["run", recipe, "--run-dir", str(self.run), *sets]

    def start(self) -> Process:
        """Begin, or go on."""
        again = ["--resume" if self.saved() else "--overwrite"] if self.run.exists() else []
        return Forked([*self._command, *again], self.log)

    def start_new(self) -> subprocess.Popen[bytes]:
        """Begin, whatever is there."""
        return start(["-m", "mlx_tuner", *self._command], self.log)

    def saved(self) -> int:
        """The step from which a resumed run will go on."""
        checkpoint, rejected = checkpoints.newest(self.run)
        if rejected:
            raise SystemExit(f"a checkpoint does not verify: {rejected}")
        return checkpoint.step if checkpoint else 0

    def is_writing(self) -> bool:
        """Whether it is at a checkpoint at this moment."""
        return any(self.run.glob("checkpoints/.tmp-*"))


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
        return start(["-m", "mlx_lm", "lora", "--train", "--mask-prompt", *flags], self.log)

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
Process = subprocess.Popen[bytes] | Forked


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`python …`, its output in `log`."""
    environ = blas.environment(os.environ) | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    if "mlx_lm" in arguments:
        environ["MLX_DISABLE_COMPILE"] = "1"
    with log.open("wb") as output:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)


def children(process: Process) -> list[int]:
    """Process ids of the children of a process."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not only as its exit code."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(found.stdout.strip()) and not found.stdout.startswith("Z")


def told(trainer: Trainer) -> list[int]:
    """The steps that its last start has told of so far."""
    text = re.sub(r"\x1b\[[\d;]*m", "", trainer.log.read_text(errors="replace"))  # colours
    found = trainer.line.findall(text)
    return [trainer.offset + int(number) for number in found]


def await_step(trainer: Trainer, process: Process, step: int) -> list[int]:
    """Wait until `step` or a later one is told of, or the process has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while max(steps := told(trainer), default=0) < step and process.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"no step {step}:\n{trainer.log.read_text(errors='replace')}")
        time.sleep(0.003)
    return steps


def finish(trainer: Trainer, process: Process) -> None:
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


def reach(
    trainer: Trainer,
    process: Process,
    draw: random.Random,
    moment: int,
    pace: float,
) -> None:
    """Wait for a step, and then for something to be written or for part of a step."""
    await_step(trainer, process, moment)
    if draw.random() < AIMED:
        while not trainer.is_writing() and max(told(trainer), default=0) < moment + SAVE_EVERY:
            if process.poll() is not None:
                return
    else:
        time.sleep(draw.uniform(0, pace))


def kill_children(
    draw: random.Random, steps: int, unbroken: Path, pace: float, folder: Path
) -> Measures:
    """One training whose child is killed at random moments; its parent goes on by itself."""
    trainer = Ours(folder, steps)
    process = trainer.start()
    kills, steps_lost, resume_seconds = 0, [], []
    for moment in sorted(draw.sample(range(1, steps - SAVE_EVERY), STOPS_A_TURN)):
        reach(trainer, process, draw, moment, pace)
        for pid in children(process):
            before = told(trainer)
            os.kill(pid, signal.SIGKILL)
            kills += 1
            begin = time.perf_counter()
            while len(after := told(trainer)) == len(before) and process.poll() is None:
                time.sleep(0.01)
            resume_seconds.append(time.perf_counter() - begin)
            if len(after) > len(before):
                steps_lost.append(before[-1] + 1 - after[len(before)])
    ended = process.wait() == 0
    summary = read_summary(trainer.run)
    counted = summary is not None and summary.restarts == kills
    return {
        "stops": kills,
        "survived": float(ended and counted and len(steps_lost) == kills),
        "same_result": float(ended and same(trainer.adapter, unbroken)),
        "steps_lost": mean(steps_lost),
        "resume_seconds": mean(resume_seconds),
    }


def stop_training(
    kind: type[Trainer],
    how: str,
    draw: random.Random,
    steps: int,
    unbroken: Path,
    pace: float,
    folder: Path,
) -> Measures:
    """One training that is stopped at random moments and continued after each.

    Args:
        how: `PARENT` (the process that was started is killed) or `SIGNALS`.
        unbroken: the adapter of a training that nobody stopped.
        pace: its seconds a step.
    """
    trainer = kind(folder, steps)
    survived, steps_lost, resume_seconds = [], [], []
    process = trainer.start()

    def stop(sign: signal.Signals, *also: int) -> bool:
        below = children(process)
        process.send_signal(sign)
        good = process.wait() in {CODES.get(sign, -sign), *also}
        deadline = time.monotonic() + 5
        while any(map(is_alive, below)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return good and not any(map(is_alive, below))

    for moment in sorted(draw.sample(range(1, steps - SAVE_EVERY), STOPS_A_TURN)):
        reach(trainer, process, draw, moment, pace)
        if max(told(trainer), default=0) >= steps - 1:  # its last step ends it, as it should
            break
        sign = draw.choice(list(CODES)) if how == SIGNALS else signal.SIGKILL
        stops = [stop(sign)]
        saved = trainer.saved()
        steps_lost.append(told(trainer)[-1] - saved)
        if draw.random() < AT_THE_START:
            process = trainer.start()
            time.sleep(draw.uniform(0, 5))
            # Before it handles signals it dies of them, or of an interrupt.
            ended = stop(sign, -sign, 1)
            if trainer.saved() == steps:  # it had come to its end by then
                survived += stops
                process = trainer.start()
                break
            stops.append(ended and trainer.saved() >= saved)
            saved = trainer.saved()
        begin = time.perf_counter()
        process = trainer.start()
        went_on = await_step(trainer, process, 1)[:1] == [saved + 1]
        resume_seconds.append(time.perf_counter() - begin)
        survived += [stopped and went_on for stopped in stops]
    finish(trainer, process)
    return {
        "stops": len(survived),
        "survived": mean(survived),
        "same_result": float(same(trainer.adapter, unbroken)),
        "steps_lost": mean(steps_lost),
        "resume_seconds": mean(resume_seconds),
    }


# ---- time ----------------------------------------------------------------------------------------


def jump_clock(steps: int, unbroken: Path, folder: Path) -> Measures:
    """A training whose clock goes a day back or forth at each look."""
    real, draw = time.time, random.Random(0)
    time.time = lambda: real() + draw.choice((-DAY_SECONDS, 0, DAY_SECONDS))
    try:
        trainer = Ours(folder, steps)
        begin = time.perf_counter()
        finish(trainer, trainer.start())  # a fork of this process, and so of its clock
        seconds = time.perf_counter() - begin
    finally:
        time.time = real
    return {
        "stops": 1,
        "survived": float(has_sane_rates(trainer.run, seconds)),
        "same_result": float(same(trainer.adapter, unbroken)),
    }


def sleep_a_minute(whole: bool, steps: int, unbroken: Path, folder: Path) -> Measures:
    """A training that stands still for longer than its parent's patience.

    Args:
        whole: with its parent, as when a machine sleeps; else the child alone is stopped.
    """
    tick, patience = supervisor.TICK, supervisor.PATIENCE
    supervisor.TICK, supervisor.PATIENCE = 1.0, ASLEEP_SECONDS / 4
    try:
        trainer = Ours(folder, steps)
        begin = time.perf_counter()
        process = trainer.start()
        await_step(trainer, process, 3)
        asleep = [*children(process), *([process.pid] if whole else [])]
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(ASLEEP_SECONDS)
        for pid in reversed(asleep):
            os.kill(pid, signal.SIGCONT)
        finish(trainer, process)
    finally:
        supervisor.TICK, supervisor.PATIENCE = tick, patience
    summary = read_summary(trainer.run)
    sane = has_sane_rates(trainer.run, time.perf_counter() - begin)
    return {
        "stops": 1,
        "survived": float(summary is not None and summary.restarts == 0 and sane),
        "same_result": float(same(trainer.adapter, unbroken)),
    }


def has_sane_rates(run: Path, seconds: float) -> bool:
    """Whether a run of so many seconds tells of no more, and of a speed that can be."""
    lines = [record for record in read_records(run) if isinstance(record, TrainRecord)]
    speed = sum(line.rows for line in lines) / sum(line.seconds for line in lines)
    return all(0 < line.elapsed_seconds <= seconds for line in lines) and 0 < speed < 10_000


# ---- the disk ----------------------------------------------------------------------------------


def kill_at_boundaries(scratch: Path) -> Measures:
    """A process killed before, in and after each call to the disk of two runs' saves."""
    survived = []
    for moment in ("before", "torn", "after"):
        for at in range(1, 10_000):
            folder = scratch / f"{moment}-{at}"
            if not disk.history_killed_at(folder, at, moment):
                break
            if promised := disk.promised(folder):
                survived.append(disk.newest_step(folder / "run") >= promised)
            shutil.rmtree(folder)
    return {"stops": len(survived), "survived": mean(survived)}


def fail_calls(scratch: Path) -> Measures:
    """Each call of a save fails with each error, once and for good."""
    survived = []
    for code in ERRORS:
        for for_good in (False, True):
            for at in range(1, 10_000):
                path = scratch / f"{code}-{for_good}-{at}"
                with Run(path) as run:
                    run.begin(disk.OLD)
                    disk.save(run, disk.OLD, 1)
                    told_of = False
                    with disk.failing(at, code, for_good=for_good) as calls:
                        try:
                            disk.save(run, disk.OLD, 2)
                        except RunError as error:
                            told_of = str(path) in str(error) and os.strerror(code) in str(error)
                if len(calls) < at:
                    break
                survived.append(told_of and disk.newest_step(path) >= 1)
                shutil.rmtree(path)
    return {"stops": len(survived), "survived": mean(survived)}


def lose_power(scratch: Path, states: int, seed: int) -> Measures:
    """What may be left after each call: unflushed writes gone, in any combination."""
    survived = []
    for path, promised in disk.states_after_power_loss(scratch, states, seed):
        survived.append(disk.newest_step(path) >= promised)
    return {"stops": len(survived), "survived": mean(survived)}


def damage(run: Path, count: int, draw: random.Random, scratch: Path) -> Measures:
    """Flips, truncations and missing files in a run's newest checkpoint; as many looks at it whole.

    Args:
        run: with two checkpoints at least.
    """
    copy = scratch / "run"
    shutil.copytree(run, copy)
    newest, _ = checkpoints.newest(copy)
    found, false_alarms = [], []
    for _ in range(count):
        path = draw.choice(sorted(newest.path.iterdir()))
        whole = path.read_bytes()
        kind, at = draw.choice(["flip", "cut", "gone"]), draw.randrange(len(whole))
        if kind == "flip":
            flipped = whole[at] ^ 1 << draw.randrange(8)
            path.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        elif kind == "cut":
            path.write_bytes(whole[:at])
        else:
            path.unlink()
        used, why = checkpoints.newest(copy)
        found.append(used is not None and used.step < newest.step and bool(why))
        path.write_bytes(whole)
        false_alarms.append(checkpoints.newest(copy) != (newest, []))
    return {"stops": count, "survived": mean(found), "false_alarms": mean(false_alarms)}


def start_at_once(folder: Path) -> Measures:
    """Fifty runs in one folder: how many train, and how long the others take to say no.

    Seconds are from the start of each process to its end, and of its CPU time.
    """
    trainer = Ours(folder, 1000)
    runs, begun = [], []
    for number in range(AT_ONCE):
        trainer.log = folder / f"log-{number}"
        begun.append(time.perf_counter())
        runs.append((trainer.start_new(), trainer.log))
    seconds, cpu_seconds = {}, []
    while len(seconds) < AT_ONCE - 1 and time.perf_counter() - begun[0] < PATIENCE_SECONDS:
        for number, (process, _) in enumerate(runs):
            if number in seconds:
                continue
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                seconds[number] = time.perf_counter() - begun[number]
                cpu_seconds.append(usage.ru_utime + usage.ru_stime)
        time.sleep(0.005)
    (winner,) = [process for process, _ in runs if process.returncode is None]
    named = f"in use by process {winner.pid},"
    refused = [
        process.returncode == 1 and named in log.read_text()
        for process, log in runs
        if process is not winner
    ]
    winner.kill()
    winner.wait()
    start_over = time.perf_counter()
    while True:  # its child ends with it
        try:
            Run(trainer.run, overwrite=True).close()
            break
        except RunError:
            if time.perf_counter() - start_over > 5:
                raise
    return {
        "stops": AT_ONCE,
        "survived": mean(refused),
        "seconds_until_refused": median(seconds.values()),
        "slowest_refusal_seconds": max(seconds.values()),
        "cpu_seconds_until_refused": median(cpu_seconds),
    }


# ---- conversions -------------------------------------------------------------------------------


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
        return start(["-m", "mlx_tuner", *arguments, "-o", str(output)], log)

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
    parser.add_argument("--stops", type=int, default=100, help="of each kind, at least")
    parser.add_argument("--states", type=int, default=5000, help="after a power loss")
    parser.add_argument("--damages", type=int, default=1600, help="to a checkpoint")
    parser.add_argument("--steps", type=int, default=40, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--part", nargs="*", default=[], help="of the table, by part of its name")
    args = parser.parse_args()
    preload_openblas()
    training.models.load_tokenizer(resolve(BUILTIN))  # imports what every fork would import again
    for number in CODES:  # a job in the background has them ignored, and so would its children
        signal.signal(number, signal.default_int_handler)
    file = args.name or "chaos"

    def wanted(name: str) -> bool:
        return not args.part or any(part in name for part in args.part)

    with tempfile.TemporaryDirectory() as scratch:
        new = lambda: Path(tempfile.mkdtemp(dir=scratch))  # noqa: E731
        steps, states, damages = args.steps, args.states, args.damages

        @cache
        def unbroken(kind: type[Trainer]) -> tuple[Path, float]:
            (first, _), second = (train(kind(new(), steps), steps) for _ in "ab")
            if not same(first, second[0]):
                raise SystemExit(f"{kind.__name__}: two runs that nobody stopped differ")
            return second

        def stop(kind: type[Trainer], how: str, draw: random.Random) -> Measures:
            return stop_training(kind, how, draw, steps, *unbroken(kind), new())

        draws = {name: random.Random(args.seed) for name in "abcdefg"}
        ours = lambda: unbroken(Ours)[0]  # noqa: E731
        once: dict[str, Callable[[], Measures]] = {
            "save, each boundary": lambda: kill_at_boundaries(new()),
            "disk errors": lambda: fail_calls(new()),
            "power loss": lambda: lose_power(new(), states, args.seed),
            "damage": lambda: damage(ours().parent, damages, draws["g"], new()),
            "50 starts": lambda: start_at_once(new()),
            "clock, a day off": lambda: jump_clock(steps, ours(), new()),
            "child asleep": lambda: sleep_a_minute(False, steps, ours(), new()),
            "both asleep": lambda: sleep_a_minute(True, steps, ours(), new()),
        }
        converted = ("convert", BUILTIN, "--dtype", "float16")
        turns: dict[str, Callable[[], Measures]] = {
            "child, SIGKILL": lambda: kill_children(draws["a"], steps, *unbroken(Ours), new()),
            "parent, SIGKILL": lambda: stop(Ours, PARENT, draws["b"]),
            "run, signals": lambda: stop(Ours, SIGNALS, draws["c"]),
            "mlx_lm.lora, SIGKILL": lambda: stop(MlxLm, PARENT, draws["d"]),
            "convert, SIGKILL": lambda: stop_conversion(converted, new(), draws["e"]),
            "fuse, SIGKILL": lambda: stop_conversion(
                ("fuse", str(ours().parent)), new(), draws["f"]
            ),
        }
        runs: dict[str, list[Measures]] = {}

        def take(name: str, look: Callable[[], Measures]) -> None:
            runs.setdefault(name, []).append(look())
            print(name, runs[name][-1], flush=True)
            record(file, runs, steps=steps, added=bool(args.part))

        with disk.instant():
            for name in filter(wanted, once):
                take(name, once[name])

        def are_missing(name: str) -> bool:
            return wanted(name) and sum(turn["stops"] for turn in runs.get(name, [])) < args.stops

        while missing := [*filter(are_missing, turns)]:
            for name in missing:
                take(name, turns[name])
    print(table(runs))


def record(name: str, runs: Mapping[str, list[Measures]], *, steps: int, added: bool) -> None:
    """Write what there is so far, with all stops of a kind; parts that were not run stay."""
    counted = {
        name: [{**turn, "stops": sum(each["stops"] for each in turns)} for turn in turns]
        for name, turns in runs.items()
    }
    settings = {"steps": steps, "save_every": SAVE_EVERY}
    save(name, counted, settings=settings, added=added)


if __name__ == "__main__":
    main()
