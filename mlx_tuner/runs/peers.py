"""The supervisors of a run on several machines, who tell one another how their children are.

Rank 0 listens; each other rank has a connection to it, on which both send lines of JSON: signs of
life, and how a child has ended. Rank 0 decides that the run is over, and tells all. MLX's own
connections are no help there: a rank that waits in a sum for one that is gone may wait for ever.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from mlx_tuner.errors import Fault, RunError
from mlx_tuner.system.launch import MEETING, Launch

BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a machine counts as lost."""
ARRIVAL = 60.0
"""Seconds in which all ranks must have started, and ended when the first has."""
GRACE = 3.0
"""Seconds for the cause to be told where only its consequences are known so far, and for ranks that
start to learn that the run is over."""
_LONGEST = 1 << 20
STOPPED = (0, 129, 130, 143)
"""Exit codes of a child that all ranks expect."""


class Peers:
    """No other ranks: what a run on one machine has."""

    ending: str | None = None
    """Why the run is over on all machines, once it is."""
    texts: Sequence[str] = ()
    """What children that died elsewhere left on standard error."""
    alone = True
    lead = True
    """Whether this is rank 0, which waits for the others' signs of life."""
    stopped = False
    """Whether somebody has stopped this rank's child (SIGSTOP)."""
    tells = True
    """Whether it is this rank that tells the person why the run is over."""

    @property
    def sockets(self) -> list[socket.socket]:
        """To be read by `take`."""
        return []

    def take(self, ready: Sequence[object] = (), elapsed: float = 0.0) -> None:
        """Read what others tell, and give a sign of life.

        Args:
            ready: those of `sockets` among others.
            elapsed: seconds since the last call in which this process was awake.
        """

    def met(self) -> None:
        """This rank has computed its part of another step."""

    def late(self, sentence: str) -> str:
        """What no sign of life from this rank's child means."""
        return sentence

    def ended(self, code: int, sentence: str | None, text: str, *, secondary: bool) -> str | None:
        """Tell how this rank's child has ended, and wait until all have.

        Args:
            code: its exit code.
            sentence: why it died; None where it ended by itself.
            text: what it left on standard error.
            secondary: whether that looks like the consequence of another rank's end.

        Returns:
            Why the run is over on all machines; None where all have ended as they should.
        """
        return sentence

    def close(self) -> None:
        """End the connections; rank 0 lets the others go."""

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Link:
    """A connection to another rank's supervisor."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.rank = -1
        self.name = str(connection.getpeername()[0])
        self.silence = 0.0
        self.met = 0
        """Parts of steps that the rank has computed."""
        self.stopped = False
        self.ended = False
        self.gone = False
        self._line = b""

    def tell(self, **what: Any) -> None:
        with suppress(OSError):  # it has gone; reading says so
            self.socket.sendall(json.dumps(what).encode() + b"\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """What has come; `gone` where nothing more will."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.gone, self.silence = not data, 0.0
        *lines, self._line = (self._line + data)[-_LONGEST:].split(b"\n")
        for line in lines:
            with suppress(ValueError, RecursionError):
                if isinstance(found := json.loads(line), dict):
                    yield found


class _Connected(Peers):
    """A rank of several."""

    alone = False

    def __init__(self, launch: Launch) -> None:
        self.texts: list[str] = []
        self.lead = self.tells = launch.rank == 0
        self._launch = launch
        self._met, self._since_beat, self._waited = 0, 0.0, 0.0
        self._ended = self._over = False

    @property
    def _links(self) -> list[_Link]:
        raise NotImplementedError

    def _heard(self, link: _Link, line: dict[str, Any]) -> None:
        raise NotImplementedError

    def _lost(self, name: str, how: str) -> None:
        raise NotImplementedError

    @property
    def sockets(self) -> list[socket.socket]:
        return [link.socket for link in self._links]

    def take(self, ready: Sequence[object] = (), elapsed: float = 0.0) -> None:
        self._since_beat += elapsed
        if beat := self._since_beat >= BEAT:
            self._since_beat = 0.0
        for link in self._links:
            link.silence += elapsed
            if link.socket in ready:
                for line in link.lines():
                    self._heard(link, line)
            if link.gone:
                self._drop(link)
                what = "is gone: its mlx-tune was killed, or the machine or its network failed"
                if not link.ended and link.rank >= 0:
                    self._lost(link.name, what)
            elif link.silence > SILENCE and not link.ended and link.rank >= 0:
                self._lost(link.name, f"has not been heard of for {link.silence:.0f} s")
            elif beat:
                link.tell(met=self._met, stopped=self.stopped)

    def _drop(self, link: _Link) -> None:
        link.socket.close()

    def _wait_until_over(self) -> None:
        last = time.monotonic()
        while not self._over:
            ready, _, _ = select.select(self.sockets, [], [], 0.2)
            now = time.monotonic()
            self.take(ready, min(now - last, 1.0))
            last = now

    def close(self) -> None:
        for each in self.sockets:
            each.close()


class _First(_Connected):
    """Rank 0, which decides."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self._arrived: list[_Link] = []
        self._seen: set[int] = set()
        self._done: set[int] = set()
        self._deaths: list[tuple[bool, str]] = []
        self._first_death: float | None = None
        self._late = False
        place = (launch.listens, launch.port)
        family = socket.AF_INET6 if ":" in launch.listens else socket.AF_INET
        try:
            self._listener = socket.create_server(place, family=family, backlog=launch.size)
        except OSError as error:
            what = (
                f"cannot wait for the other machines there ({error.strerror}); give mlx.launch "
                "another --starting-port, and a hosts file with this machine's own address first"
            )
            raise RunError(Fault(f"{launch.address}:{launch.port}", "", what)) from None

    @property
    def _links(self) -> list[_Link]:
        return list(self._arrived)

    @property
    def sockets(self) -> list[socket.socket]:
        return [self._listener, *super().sockets]

    def take(self, ready: Sequence[object] = (), elapsed: float = 0.0) -> None:
        self._waited += elapsed
        if self._listener in ready:
            link = _Link(self._listener.accept()[0])
            link.tell(name=self._launch.name)
            self._arrived.append(link)
        super().take(ready, elapsed)
        others = set(range(1, self._launch.size))
        missing = others - self._seen
        late, what = (others - self._done, "ended") if self._ended else (missing, "started")
        if late and self._waited > ARRIVAL and not self._deaths:
            ranks = ", ".join(map(str, sorted(late)))
            self._died(f"rank {ranks} has not {what} in {ARRIVAL:.0f} s", secondary=False)
        if self.ending is None and self._deaths:
            primary = next((sentence for second, sentence in self._deaths if not second), None)
            assert self._first_death is not None
            if primary or time.monotonic() - self._first_death > GRACE:
                self.ending = primary or self._deaths[0][1]
        self._over = self.ending is not None or (self._ended and self._done == others)

    def _drop(self, link: _Link) -> None:
        super()._drop(link)
        self._arrived.remove(link)

    def _heard(self, link: _Link, line: dict[str, Any]) -> None:
        rank = line.get("rank")
        if isinstance(rank, int) and 0 < rank < self._launch.size and rank not in self._seen:
            link.rank, link.name = rank, str(line.get("name"))
            self._seen.add(link.rank)
        if link.rank < 0:  # a stranger
            return
        link.met, link.stopped = line.get("met", link.met), line.get("stopped", link.stopped)
        if (code := line.get("ended")) is not None:
            link.ended = True
            self._done.add(link.rank)
            if text := line.get("text"):
                self.texts.append(f"{link.name}:\n{text}")
            if sentence := line.get("sentence"):
                self._died(_death(link.name, sentence), secondary=bool(line.get("secondary")))
            elif code not in STOPPED:
                self._died(f"{link.name} ended with an error, exit code {code}", secondary=False)

    def _lost(self, name: str, how: str) -> None:
        self._died(f"{name} {how}", secondary=False)

    def _died(self, sentence: str, *, secondary: bool) -> None:
        self._deaths.append((secondary, sentence))
        if self._first_death is None:
            self._first_death = time.monotonic()

    def met(self) -> None:
        self._met += 1

    def late(self, sentence: str) -> str:
        self._late = True
        ranks = [(self._launch.name, self._met, self.stopped)]
        known = (link for link in self._arrived if link.rank > 0)  # no stranger
        others = sorted(known, key=lambda link: link.rank)
        ranks += [(link.name, link.met, link.stopped) for link in others]
        most = max(met for _, met, _ in ranks)
        late = [name for name, _, stopped in ranks if stopped]
        if late := late or [name for name, met, _ in ranks if met < most]:
            return _death(" and ".join(late), sentence)
        names = " and ".join(name for name, _, _ in ranks)
        return f"nothing comes of what {names} tell one another: {sentence}"

    def ended(self, code: int, sentence: str | None, text: str, *, secondary: bool) -> str | None:
        self._ended, self._waited = True, 0.0
        if sentence and self.ending is None:
            named = sentence if self._late else _death(self._launch.name, sentence)
            self._died(named, secondary=secondary)
        elif code not in STOPPED and self.ending is None:
            self.ending = f"{self._launch.name} ended with an error, exit code {code}"
        self._wait_until_over()
        return self.ending

    def close(self) -> None:
        end = time.monotonic() + GRACE
        while len(self._seen) < self._launch.size - 1 and time.monotonic() < end:
            ready, _, _ = select.select(self.sockets, [], [], 0.1)
            self.take(ready)  # others are only just starting
        for link in self._arrived:
            link.tell(over=self.ending or "")
        super().close()


class _Other(_Connected):
    """Any other rank, which obeys."""

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self._link: _Link | None = None

    @property
    def _links(self) -> list[_Link]:
        return [self._link] if self._link else []

    def take(self, ready: Sequence[object] = (), elapsed: float = 0.0) -> None:
        if self._link is None and not self._over:
            self._connect(elapsed)
        super().take(ready, elapsed)

    def _connect(self, elapsed: float) -> None:
        self._waited += elapsed
        try:
            place = (self._launch.address, self._launch.port)
            self._link = _Link(socket.create_connection(place, timeout=1.0))
        except OSError as error:
            if self._waited > ARRIVAL:
                what = f"cannot be reached at port {place[1]}: {error.strerror or error}"
                self._lost(f"{place[0]} (rank 0)", f"{what}; see {MEETING} in docs/several-macs.md")
            return
        self._link.rank = 0
        self._link.tell(rank=self._launch.rank, name=self._launch.name)

    def _drop(self, link: _Link) -> None:
        super()._drop(link)
        self._link = None

    def _heard(self, link: _Link, line: dict[str, Any]) -> None:
        link.name = line.get("name", link.name)
        if "over" in line:
            link.ended, self._over = True, True
            ended = None if self._ended else f"{link.name} has ended"
            self.ending = self.ending or line["over"] or ended

    def _lost(self, name: str, how: str) -> None:
        self.ending, self._over = self.ending or f"{name} {how}", True
        self.tells = True  # rank 0 does not

    def met(self) -> None:
        self._met += 1
        if self._link:
            self._link.tell(met=self._met)

    def ended(self, code: int, sentence: str | None, text: str, *, secondary: bool) -> str | None:
        self._ended = True
        while self._link is None and not self._over:
            self.take(elapsed=0.2)
            time.sleep(0.2)
        if self._link:
            what = {"sentence": sentence, "text": text[-8000:], "secondary": secondary}
            self._link.tell(ended=code, **what)
        self._wait_until_over()
        return self.ending


def _death(name: str, sentence: str) -> str:
    return f"training on {name} died: {sentence}"


def meet(launch: Launch | None) -> Peers:
    """The other supervisors of this run.

    Raises:
        RunError: rank 0 cannot listen.
    """
    if launch is None:
        return Peers()
    return _First(launch) if launch.rank == 0 else _Other(launch)
