"""A disk that fails, and one that loses its power: what `files` asks of the system, and what may be
left of it."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_tuner.runs.checkpoints import newest
from mlx_tuner.runs.metrics import EvalRecord
from mlx_tuner.runs.run import Run, read_records
from mlx_tuner.system import files

CALLS = ("open", "write", "fsync", "replace", "mkdir")
"""Functions of `os` by which `files` changes the disk."""


@contextmanager
def instant() -> Iterator[None]:
    """Flushes that cost no time, and go through `os.fsync` on a Mac as well: what matters to a test
    is which there are."""
    fsync, full = os.fsync, getattr(fcntl, "F_FULLFSYNC", None)
    os.fsync = lambda descriptor: None
    if full is not None:
        del fcntl.F_FULLFSYNC
    try:
        yield
    finally:
        os.fsync = fsync
        if full is not None:
            fcntl.F_FULLFSYNC = full


@contextmanager
def _watched(step_in: Callable[[int, str, Callable[[], object], tuple], object]) -> Iterator[list]:
    """Let `step_in(number, name, call, arguments)` make every call that changes the disk."""
    calls: list[str] = []

    def wrapped(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            calls.append(name)
            return step_in(len(calls), name, lambda: real(*args, **kwargs), args)

        return call

    real = {name: getattr(os, name) for name in CALLS}
    try:
        for name, function in real.items():
            setattr(os, name, wrapped(name, function))
        yield calls
    finally:
        for name, function in real.items():
            setattr(os, name, function)


_write = os.write


def _half(name: str, args: tuple) -> None:
    """What a write that does not come to its end leaves."""
    if name == "write":
        _write(args[0], bytes(args[1])[: len(args[1]) // 2])


def failing(at: int, code: int, *, for_good: bool):
    """Let call number `at` of all `CALLS` fail, or that and every later one; lists the calls."""

    def step_in(number, name, call, args):
        if number == at or (for_good and number > at):
            _half(name, args)
            raise OSError(code, os.strerror(code), *args[:1] * (name in ("open", "mkdir")))
        return call()

    return _watched(step_in)


def dying(at: int, moment: str, die: Callable[[], object]):
    """Call `die` "before" call number `at` of all `CALLS`, "after" it, or in it ("torn")."""

    def step_in(number, name, call, args):
        if number == at and moment == "torn":
            _half(name, args)
        result = call() if number != at or moment == "after" else None
        if number == at:
            die()
        return result

    return _watched(step_in)


# ---- a run that is saved, and one that replaces it ----------------------------------------------

OLD, NEW = "old", "new"
SIZE = 3000


def content(recipe: str, step: int) -> bytes:
    """The adapter of a run after a step."""
    return f"{recipe} {step} ".encode() * (SIZE // 10)


def save(run: Run, recipe: str, step: int) -> None:
    """A log line, a checkpoint and the adapter of the run."""

    def write(folder: Path) -> None:
        files.write_bytes(folder / "adapters.safetensors", content(recipe, step))

    run.append(EvalRecord(step=step, epoch=1.0, val_loss=1.0))
    run.save_checkpoint(step, write, {"recipe": recipe}, size=SIZE)
    run.publish(write, size=SIZE)


def history(path: Path, promise: Callable[[int], object] = lambda step: None) -> None:
    """A run of three checkpoints, and one of four that replaces it, a `promise` after each."""
    for recipe, steps in ((OLD, (1, 2, 3)), (NEW, (4, 5, 6, 7))):
        with Run(path, overwrite=True) as run:
            run.begin(recipe)
            for step in steps:
                save(run, recipe, step)
                promise(step)


def history_killed_at(folder: Path, at: int, moment: str) -> bool:
    """Kill a process at a call of `history`, which it begins in the folder; whether there was one.

    The last step that it had saved by then is in the file "promised".
    """
    folder.mkdir()
    child = os.fork()
    if child == 0:
        with dying(at, moment, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            history(folder / "run", lambda step: (folder / "promised").write_text(str(step)))
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def promised(folder: Path) -> int:
    """What `history_killed_at` had saved."""
    path = folder / "promised"
    return int(path.read_text()) if path.exists() else 0


def newest_step(path: Path) -> int:
    """Resume the run, check all that is in it, save once more; the step that it went on from."""
    with Run(path, resume=True) as run:
        assert run.checkpoint
        recipe, step = run.checkpoint.state["recipe"], run.checkpoint.step
        assert (run.path / "recipe.toml").read_text() == recipe
        adapter = (run.checkpoint.path / "adapters.safetensors").read_bytes()
        assert adapter == content(recipe, step)
        run.go_on(recipe)
        assert [record.step for record in read_records(path)][-1] == step
        published = path / "adapters.safetensors"
        whole = {content(OLD, i) for i in range(1, 4)} | {content(NEW, i) for i in range(4, 8)}
        assert not published.exists() or published.read_bytes() in whole
        save(run, recipe, 100)
    assert newest(path)[0].step == 100
    return step


# ---- power loss --------------------------------------------------------------------------------


@dataclass
class Node:
    """A file or folder, apart from its name: what it holds, and since when for good."""

    is_folder: bool
    number: int


@dataclass
class Operation:
    """One change of the disk, which stays only once `kept_by` nodes have been flushed."""

    kind: str
    """"link" (a name for a node), "move" or "data" (bytes at the end of a file)."""
    folder: Node
    name: str = ""
    node: Node | None = None
    source: tuple[Node, str] | None = None
    data: bytes = b""
    flushed_at: int | None = None
    """Number of operations at which it was flushed."""


@dataclass
class Journal:
    """All that is asked of the disk below `root` while `recording`."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of operations at which something was promised to stay."""

    def __post_init__(self) -> None:
        self.top = Node(True, 0)
        self._count = 0
        self._names: dict[Node | int, dict[str, Node]] = {0: {}}
        self._open: dict[int, Node] = {}

    def promise(self, what: int) -> None:
        """From here on this must be found after a power loss."""
        self.marks.append((len(self.operations), what))

    def promised(self, length: int) -> int:
        """The last promise at a time when `length` operations had been made."""
        return next(what for at, what in reversed(self.marks) if at <= length)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Take down every call to `CALLS`."""
        real = {name: getattr(os, name) for name in CALLS}

        def open_(path, flags, *args, **kwargs):
            descriptor = real["open"](path, flags, *args, **kwargs)
            self._open.pop(descriptor, None)
            if kwargs.get("dir_fd") is None and self._is_ours(path):
                node = self._find(path)
                if node is None:
                    node = self._link(path, is_folder=False)
                self._open[descriptor] = node
            return descriptor

        def write(descriptor, data):
            written = real["write"](descriptor, data)
            if descriptor in self._open:
                node = self._open[descriptor]
                self.operations.append(Operation("data", node, data=bytes(data[:written])))
            return written

        def fsync(descriptor):
            real["fsync"](descriptor)
            if node := self._open.get(descriptor):
                for operation in self.operations:
                    if operation.folder is node and operation.flushed_at is None:
                        operation.flushed_at = len(self.operations)

        def replace(source, target):
            real["replace"](source, target)
            if self._is_ours(source):
                self._move(source, target)

        def mkdir(path, *args, **kwargs):
            real["mkdir"](path, *args, **kwargs)
            if self._is_ours(path):
                self._link(path, is_folder=True)

        try:
            for name, function in zip(CALLS, (open_, write, fsync, replace, mkdir), strict=True):
                setattr(os, name, function)
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def _is_ours(self, path: object) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(self.root)

    def _find(self, path: object) -> Node | None:
        node: Node | None = self.top
        for name in Path(str(path)).relative_to(self.root).parts:
            node = self._names.get(node.number, {}).get(name) if node else None
        return node

    def _link(self, path: object, *, is_folder: bool) -> Node:
        folder = self._find(Path(str(path)).parent)
        assert folder is not None, path
        self._count += 1
        node = Node(is_folder, self._count)
        self._names[node.number] = {}
        name = Path(str(path)).name
        self._names[folder.number][name] = node
        self.operations.append(Operation("link", folder, name, node))
        return node

    def _move(self, source: object, target: object) -> None:
        old, new = Path(str(source)), Path(str(target))
        from_, to = self._find(old.parent), self._find(new.parent)
        assert from_
        assert to
        node = self._names[from_.number].pop(old.name)
        self._names[to.number][new.name] = node
        self.operations.append(Operation("move", to, new.name, node, (from_, old.name)))

    def lose_power(self, length: int, draw: random.Random, into: Path) -> None:
        """Make `into` what may be left after `length` operations.

        What was flushed is there. Of the rest each part is or is not, in any combination: names
        and moves; of a file's data the beginning, or zeros in its place.
        """
        names: dict[int, dict[str, Node]] = {0: {}}
        data: dict[int, bytes] = {}
        for operation in self.operations[:length]:
            safe = operation.flushed_at is not None and operation.flushed_at <= length
            if not safe and draw.random() < 0.5 and operation.kind != "data":
                continue
            entries = names.setdefault(operation.folder.number, {})
            if operation.kind == "data":
                kept = operation.data
                if not safe:
                    kept = kept[: draw.randint(0, len(kept))]
                    kept = bytes(len(kept)) if draw.random() < 0.3 else kept
                number = operation.folder.number
                data[number] = data.get(number, b"") + kept
                continue
            if operation.source is not None:
                folder, name = operation.source
                if names.get(folder.number, {}).get(name) is operation.node:
                    del names[folder.number][name]
            assert operation.node is not None
            entries[operation.name] = operation.node

        def make(node: Node, path: Path) -> None:
            if not node.is_folder:
                path.write_bytes(data.get(node.number, b""))
                return
            path.mkdir()
            for name, child in names.get(node.number, {}).items():
                make(child, path / name)

        if into.exists():
            shutil.rmtree(into)
        make(self.top, into)


def states_after_power_loss(scratch: Path, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """At least `count` states that `history` may be left in: a folder, and the step promised.

    All are from after the first promise.
    """
    journal, discard = Journal(scratch / "disk"), files.discard
    journal.root.mkdir()
    files.discard = lambda path: None  # what is gone by name may stay on the disk
    try:
        with journal.recording():
            history(journal.root / "run", journal.promise)
    finally:
        files.discard = discard
    draw, lengths = random.Random(seed), range(journal.marks[0][0], len(journal.operations) + 1)
    for number in range(max(count, len(lengths))):
        length = lengths[number % len(lengths)]
        journal.lose_power(length, draw, scratch / "left")
        yield scratch / "left" / "run", journal.promised(length)
