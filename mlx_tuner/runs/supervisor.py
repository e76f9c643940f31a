"""The parent of a run: it starts the process that trains, watches it, and starts it again.

It loads neither MLX nor anything else that is large. The child holds the folder's lock too, so that
a run is never free before both are gone; and it ends when this process does (`pulse`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_tuner.runs import causes, pulse
from mlx_tuner.runs.causes import Cause
from mlx_tuner.runs.peers import Peers
from mlx_tuner.runs.place import CRASH_LOG
from mlx_tuner.system import blas, files
from mlx_tuner.system.awake import awake
from mlx_tuner.system.interrupt import Relay

DELAYS = (5.0, 30.0, 120.0)
"""Seconds before each restart in a row without a new checkpoint; then it is given up."""
TICK = 5.0
"""Seconds between two looks at a silent child."""
PATIENCE = 90.0
"""A child that has made a step counts as hung after so many seconds of silence, …"""
SLOWEST = 6.0
"""… or so many times its longest recent silence, if that is more."""
PATIENCE_OF_RANKS, SLOWEST_OF_RANKS = 45.0, 4.0
"""The same where several machines wait for one another, and would for ever."""
_KEPT_BYTES = 64_000
_CHILD = "import sys; sys.path[:] = {path!r}; from mlx_tuner.__main__ import start; start()"


def supervise(
    path: Path,
    lock: int | None,
    arguments: Sequence[str],
    *,
    resume: bool,
    restart: bool,
    say: Callable[[str], None],
    peers: Peers,
) -> int:
    """Run `mlx-tune run ARGUMENTS` in a child process until it ends for good.

    Args:
        path: the run's folder.
        lock: a descriptor of its lock; None where it is another machine's.
        arguments: without `--resume` and `--overwrite`.
        resume: go on with the run that is there.
        restart: start a child that died again, if it is the only one.
        say: tells the person a line.
        peers: those that supervise the run's other ranks.

    Returns:
        The exit code.
    """
    state = _State(path, lock, list(arguments), resume, say, peers)
    with awake(), state.relay:
        while True:
            child = _Child(state)
            cause = child.watch()
            if not peers.alone:
                return state.end_together(cause, child)
            if state.relay.signal is not None and (cause or child.code < 0):
                return state.stopped(child)
            if cause is None:
                return child.code
            state.log(f"process {child.pid}: {cause.sentence}", child.text)
            if not restart or not state.may_restart(cause, child):
                say(f"error: {path}: training died: {cause.sentence}; {state.advice()}")
                return 1
            if not state.wait():
                return state.stopped(child)


@dataclass
class _State:
    """What outlives a child."""

    path: Path
    lock: int | None
    arguments: list[str]
    resume: bool
    say: Callable[[str], None]
    peers: Peers
    relay: Relay = field(default_factory=Relay)
    restarts: int | None = None
    failures: int = 0
    """In a row without a new checkpoint."""
    saved: int = -1
    micro_batch_tokens: int | None = None
    """What the next child is told; None: what the recipe says."""

    def log(self, sentence: str, text: str) -> None:
        """Add to the run's `crash.log`: a line of our own, then what the child wrote."""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = f"{when} {sentence}" + (f"\n{text}" if text else "")
        with suppress(Exception):  # a full disk is no reason to lose the sentence too
            files.append_line(self.path / CRASH_LOG, lines)

    def stopped(self, child: _Child) -> int:
        """Say what is left of a run that a signal stopped between its steps; the exit code."""
        left = "continue with --resume" if child.saved >= 0 or self.resume else "nothing was saved"
        self.say(f"{self.path}: stopped at once; {left}")
        return 128 + int(self.relay.signal or 0)

    def end_together(self, cause: Cause | None, child: _Child) -> int:
        """End this rank of a run when all of them end; the exit code.

        Nothing is started again by itself: somebody should look at the machine that failed.
        """
        peers, text = self.peers, child.text
        by_signal = self.relay.signal is not None and child.code < 0 and peers.ending is None
        why = cause.sentence if cause else None
        if by_signal:
            why = "a signal stopped it before its first step, or a second one at once"
        ending = peers.ended(child.code, why, text, secondary=causes.is_of_others(text))
        if by_signal:
            return self.stopped(child)
        if ending is None or (cause is None and child.code > 0):
            return child.code
        if peers.lead:
            self.log(ending, "\n".join([text, *peers.texts]).strip())
        if peers.tells:
            how = "continue with --resume" if child.saved >= 0 or self.resume else "start again"
            self.say(f"error: {self.path}: the run is over on all machines: {ending}; {how}")
        return 1

    def may_restart(self, cause: Cause, child: _Child) -> bool:
        """Count a failure, and prepare another try if there is to be one."""
        if not cause.chance:
            return False
        progress = child.saved > self.saved
        self.saved = max(self.saved, child.saved)
        self.failures = 1 if progress else self.failures + 1
        if self.failures > len(DELAYS):
            return False
        if self.saved >= 0:
            self.resume = True
        self.restarts = (child.restarts or self.restarts or 0) + 1
        tokens, how = child.micro_batch_tokens or 0, ""
        if (cause.memory or child.ran_out_of_memory(self.failures)) and tokens > 1:
            self.micro_batch_tokens = tokens // 2
            how = f" with half the micro_batch_tokens, {self.micro_batch_tokens:,}"
        where = "goes on from its newest checkpoint" if self.resume else "starts over"
        delay = DELAYS[self.failures - 1]
        self.say(f"training died: {cause.sentence}; {where} in {delay:.0f} s{how}")
        return True

    def advice(self) -> str:
        """What a person can do after the last try."""
        more = f"see {self.path / CRASH_LOG}"
        return f"continue with --resume; {more}" if self.resume else more

    def wait(self) -> bool:
        """Wait until the next start. Returns False if a signal came."""
        end = time.monotonic() + DELAYS[self.failures - 1]
        while self.relay.signal is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.relay.signal is None

    def command(self) -> list[str]:
        """What the next child is to be."""
        code = _CHILD.format(path=sys.path)
        mode = "--resume" if self.resume else "--overwrite"  # the claim allows it
        command = [sys.executable, "-c", code, "run", *self.arguments, mode]
        if self.micro_batch_tokens is not None:
            command.append(f"--set=train.micro_batch_tokens={self.micro_batch_tokens}")
        return command


class _Child:
    """One training process, from its start to its end."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self.code = 0
        """Exit code, or minus the signal that ended it."""
        self.saved = -1
        self.restarts: int | None = state.restarts
        self.micro_batch_tokens: int | None = None
        self.stderr = b""
        self._message: str | None = None
        self._line = b""
        self._alive = False
        """Whether steps are made, so that silence means something."""
        self._silence = 0.0
        self._silences: deque[float] = deque(maxlen=20)
        """Before the latest steps."""
        self._slowest_beat = 0.0
        """Of evaluations, which come seldom: of all of them."""
        self._beats = False
        self._stopped = False
        self._status: int | None = None
        self._begun = False
        self._oom_kills = _oom_kills()
        self._start()

    def _start(self) -> None:
        pulse_in, pulse_out = os.pipe()
        error_in, error_out = os.pipe()
        alive_in, alive_out = os.pipe()
        terminal = os.dup(2)
        lock = self._state.lock
        inherited = (pulse_out, alive_in, terminal, *(() if lock is None else (lock,)))
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        handover = pulse.Handover(lock, pulse_out, alive_in, terminal, self._state.restarts)
        environ = blas.environment(os.environ)
        environ[pulse.VARIABLE] = json.dumps(asdict(handover))
        self.pid = os.posix_spawn(
            sys.executable,
            self._state.command(),
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, error_out, 2)],
            setpgroup=0,
        )
        self._state.relay.child = self.pid
        if lock is not None:
            os.set_inheritable(lock, False)
        for descriptor in (pulse_out, error_out, alive_in, terminal):
            os.close(descriptor)
        self._pulse, self._error, self._alive_out = pulse_in, error_in, alive_out
        if self._state.relay.signal is not None:  # it came while the child was being started
            os.kill(self.pid, self._state.relay.signal)

    def watch(self) -> Cause | None:
        """Wait for the child's end. Returns why it died; None where its exit code says it all."""
        pipes, peers = [self._pulse, self._error], self._state.peers
        tick = TICK if peers.alone else TICK / 10
        hung = None
        last = time.monotonic()
        while self._pulse in pipes:
            watched: list[Any] = [*pipes, *peers.sockets]
            ready, _, _ = select.select(watched, [], [], tick)
            for pipe in [each for each in ready if each in pipes]:
                if not (data := os.read(pipe, 1 << 16)):
                    pipes.remove(pipe)
                elif pipe == self._error:
                    self.stderr = (self.stderr + data)[-_KEPT_BYTES:]
                else:
                    self._take(data)
            now = time.monotonic()
            # A machine that slept, or a parent that was stopped, counts as one tick.
            elapsed, last = min(now - last, 2 * tick), now
            peers.stopped = self._is_stopped()
            self._silence += 0.0 if peers.stopped and peers.alone else elapsed
            peers.take(ready, elapsed)
            if peers.ending is not None and self._status is None:
                os.kill(self.pid, signal.SIGKILL)  # checkpoints are whole at any time
            elif hung is None and self._is_hanging():
                hung = Cause(peers.late(f"it hung: nothing happened for {self._silence:.0f} s"))
                os.kill(self.pid, signal.SIGABRT)  # faulthandler tells where it is
                time.sleep(1)
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
        self._end()
        return hung or self._cause()

    def _take(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        silence, self._silence = self._silence, 0.0
        for line in lines:
            what, _, value = line.decode().partition(" ")
            self._begun = True
            if what in ("step", "met"):
                if self._alive:
                    self._silences.append(silence)
                self._alive = self._alive or what == "step"
                if what == "met":
                    self._state.peers.met()
            elif what == "beat":
                self._slowest_beat = max(self._slowest_beat, silence if self._beats else 0.0)
                self._beats = True
            elif what == "quiet":
                self._alive = False
            elif what == "saved":
                self.saved = int(value)
            elif what == "started":
                self.micro_batch_tokens = int(value)
            elif what == "restarts":
                self.restarts = int(value)
            elif what == "crashed":
                self._message = value

    def _is_stopped(self) -> bool:
        """Whether somebody has stopped the child (SIGSTOP), so that its silence is no wonder."""
        with suppress(ChildProcessError):
            flags = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
            pid, status = os.waitpid(self.pid, flags)
            if pid and os.WIFSTOPPED(status):
                self._stopped = True
            elif pid and os.WIFCONTINUED(status):
                self._stopped = False
            elif pid:
                self._status = status
        return self._stopped

    def _is_hanging(self) -> bool:
        peers, slowest = self._state.peers, max([self._slowest_beat, *self._silences])
        if peers.alone:
            limit = max(PATIENCE, SLOWEST * slowest)
        else:
            limit = max(PATIENCE_OF_RANKS, SLOWEST_OF_RANKS * slowest)
        return self._alive and peers.lead and self._silence > limit

    @property
    def text(self) -> str:
        """What it has written to standard error, the end of it."""
        return self.stderr.decode("utf-8", "replace").strip()

    def _end(self) -> None:
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        self._state.relay.child = None
        self.code = os.waitstatus_to_exitcode(self._status)
        while select.select([self._error], [], [], 0)[0] and (data := os.read(self._error, 65536)):
            self.stderr = (self.stderr + data)[-_KEPT_BYTES:]
        for descriptor in (self._pulse, self._error, self._alive_out):
            os.close(descriptor)

    def ran_out_of_memory(self, failures: int) -> bool:
        """Whether the system killed it for memory: Linux counts that, elsewhere twice is enough."""
        if self.code != -signal.SIGKILL:
            return False
        kills = _oom_kills()
        return failures > 1 if kills is None else kills != self._oom_kills

    def _cause(self) -> Cause | None:
        if self.code < 0:
            return causes.of_signal(-self.code, self.text)
        if self.code == pulse.CRASHED:
            message = self._message or "no reason is known"
            return causes.of_message(message) or Cause(message, chance=False)
        if self.code and not self._begun:
            return Cause(self.text.rpartition("\n")[2] or f"exit code {self.code}", chance=False)
        return None


def _oom_kills() -> int | None:
    """How often this machine's kernel has killed a process for memory, where it tells (Linux)."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
