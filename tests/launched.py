"""Processes of runs on this machine: what `mlx.launch` gives several ranks, which one trains."""

import json
import os
import socket
import subprocess
from pathlib import Path


def environments(folder: Path, ranks: int) -> list[dict[str, str]]:
    """Each rank's environment, as `mlx.launch -n RANKS` makes it."""
    port = free_ports(ranks + 1)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(ranks)]))
    return [
        {**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(ranks)
    ]


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            first = int(one.getsockname()[1])
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


def training_of(parent: int) -> list[int]:
    """The process that trains for an `mlx-tune run`, whose other child on a Mac is caffeinate."""
    command = ["pgrep", "-P", str(parent), "-f", "mlx_tuner"]
    found = subprocess.run(command, capture_output=True, check=False).stdout
    return [int(pid) for pid in found.split()]
