"""What `mlx.launch` tells each of the processes that it starts. Nothing here loads MLX."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_tuner.errors import UsageError

MEETING = "MLX_TUNE_MEET"
"""Environment variable with a name of rank 0's machine, where its address in the ring is one that
only a neighbour can reach (three or more Macs by Thunderbolt)."""


@dataclass(frozen=True)
class Launch:
    """This process's place among those that were started with it."""

    rank: int
    size: int
    backend: str
    """Of MLX: "ring", "jaccl" or "nccl"."""
    address: str
    """Of rank 0: a name or an IP that all ranks can reach."""
    port: int
    """There, one that the backend leaves free."""
    listens: str
    """The address that rank 0 listens on; empty for all that it has."""

    @property
    def name(self) -> str:
        """This machine and rank, for messages."""
        return f"{host()} (rank {self.rank})"


def host() -> str:
    """This machine's name."""
    return socket.gethostname().removesuffix(".local")


def launched(environ: Mapping[str, str]) -> Launch | None:
    """The place that the environment gives this process; None for one that is alone.

    Raises:
        UsageError: it is started by a launcher that tells no address (MPI), or too little.
    """
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        raise UsageError("MPI is not supported; use mlx.launch with --backend ring or jaccl")
    try:
        found = _ring(environ) or _jaccl(environ) or _nccl(environ)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        what = f"MLX_RANK is set, but the rest that mlx.launch sets is not right: {error!r}"
        raise UsageError(what) from None
    if found and (name := environ.get(MEETING)):
        return replace(found, address=name, listens="")
    return found


def _ring(environ: Mapping[str, str]) -> Launch | None:
    if not (path := environ.get("MLX_HOSTFILE")):
        return None
    text = Path(path).read_text()
    hosts = json.loads(text) if text.strip() else []
    if len(hosts) < 2:
        return None
    ports = [int(_parted(place)[1]) for host in hosts for place in host]
    address = _parted(hosts[0][0])[0]
    return Launch(int(environ["MLX_RANK"]), len(hosts), "ring", address, max(ports) + 1, address)


def _jaccl(environ: Mapping[str, str]) -> Launch | None:
    if not (path := environ.get("MLX_IBV_DEVICES")):
        return None
    devices = json.loads(Path(path).read_text())
    address, port = _parted(environ["MLX_JACCL_COORDINATOR"])
    if len(devices) < 2:
        return None
    return Launch(int(environ["MLX_RANK"]), len(devices), "jaccl", address, int(port) + 1, address)


def _nccl(environ: Mapping[str, str]) -> Launch | None:
    if "NCCL_HOST_IP" not in environ or int(environ.get("MLX_WORLD_SIZE", 1)) < 2:
        return None
    size, port = int(environ["MLX_WORLD_SIZE"]), int(environ["NCCL_PORT"]) + 1
    address = environ["NCCL_HOST_IP"]
    return Launch(int(environ["MLX_RANK"]), size, "nccl", address, port, address)


def _parted(place: str) -> tuple[str, str]:
    """Host and port of "host:port"; an IPv6 address may be in brackets."""
    host, _, port = place.rpartition(":")
    return host.strip("[]"), port
