"""peers.py: an end for all ranks where one fails, with children that only pretend to train."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import environments
from test_supervisor import parent, state, wait_for

from mlx_tuner.errors import UsageError
from mlx_tuner.system.launch import Launch, host, launched

PARENT = parent("""
supervisor.TICK, supervisor.PATIENCE_OF_RANKS = 0.5, 1.0
peers.BEAT, peers.SILENCE, peers.ARRIVAL, peers.GRACE = 0.1, 2.0, 3.0, 1.0
""")
CHILD = """
import os, signal, sys, time
from pathlib import Path
from mlx_tuner.runs import pulse
own = pulse.take_over()
rank = int(os.environ["MLX_RANK"])
Path(f"new-{rank}").write_text(str(os.getpid()))
os.rename(f"new-{rank}", f"child-{rank}")
while len(list(Path.cwd().glob("child-*"))) < 3:
    time.sleep(0.01)
def step():
    own.met()
    time.sleep(0.02)
    own.step()
"""


def start(folder: Path, script: str) -> list[subprocess.Popen[str]]:
    (folder / "child.py").write_text(CHILD + script)
    return [
        subprocess.Popen(
            [sys.executable, "-c", PARENT], cwd=folder, env=each, stderr=subprocess.PIPE, text=True
        )
        for each in environments(folder, 3)
    ]


def end(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[list[str]]]:
    """Exit codes, and lines on standard error."""
    lines = [process.communicate(timeout=30)[1].splitlines() for process in processes]
    return [process.returncode for process in processes], lines


def child(folder: Path, rank: int) -> int:
    wait_for(folder / f"child-{rank}")
    return int((folder / f"child-{rank}").read_text())


def assert_all_ended(folder: Path, processes: list[subprocess.Popen[str]], why: str) -> None:
    """With exit code 1, one sentence of rank 0 that names the host, and no child left."""
    codes, lines = end(processes)
    assert codes == [1] * len(processes)
    assert lines[1:] == [[]] * (len(processes) - 1)
    [line] = lines[0]
    start = "mlx-tune: error: adapters/mine: the run is over on all machines: "
    assert line.startswith(start + why.format(host=host()))
    for rank in range(len(processes)):
        assert state(child(folder, rank)) in ("", "Z")


TRAIN = "\nfor _ in range(10 ** 6): step()"


@pytest.mark.slow
def test_ranks_that_end_by_themselves_decide_their_exit_codes(tmp_path: Path) -> None:
    for code in (0, 143):
        for path in tmp_path.glob("child-*"):
            path.unlink()
        codes, lines = end(start(tmp_path, f"time.sleep(0.3 * rank)\nsys.exit({code})"))
        assert (codes, lines) == ([code] * 3, [[]] * 3)


@pytest.mark.slow
def test_one_rank_holds_the_folder_and_is_given_back_to_nobody_else(tmp_path: Path) -> None:
    script = "assert (own.lock is None) == (rank > 0)\nassert '--overwrite' in sys.argv"
    assert end(start(tmp_path, script)) == ([0] * 3, [[]] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_ends_all_of_them(tmp_path: Path, rank: int) -> None:
    script = f"own.saved(1)\nif rank == {rank}: step(); os.kill(os.getpid(), signal.SIGKILL)"
    why = f"training on {{host}} (rank {rank}) died: the system killed it, most likely for memory"
    assert_all_ended(tmp_path, start(tmp_path, script + TRAIN), why)


@pytest.mark.slow
def test_the_first_cause_is_told_and_not_what_followed_from_it(tmp_path: Path) -> None:
    script = """
if rank == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGSEGV)
print("[ring] connection to a peer was lost", file=open(2, "w", closefd=False), flush=True)
os.abort()
"""
    why = "training on {host} (rank 1) died: it read memory that is not its own"
    assert_all_ended(tmp_path, start(tmp_path, script), why)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_ends_all_of_them(tmp_path: Path, rank: int) -> None:
    script = f"step()\nif rank != {rank}: own.met()\ntime.sleep(60)"
    why = f"training on {{host}} (rank {rank}) died: it hung: nothing happened for"
    assert_all_ended(tmp_path, start(tmp_path, script), why)


@pytest.mark.slow
def test_a_rank_whose_training_is_stopped_is_named(tmp_path: Path) -> None:
    script = "own.met(); own.step()\nPath('ready').touch()\ntime.sleep(60)"
    processes = start(tmp_path, script)
    wait_for(tmp_path / "ready")
    os.kill(child(tmp_path, 1), signal.SIGSTOP)
    why = "training on {host} (rank 1) died: it hung: nothing happened for"
    assert_all_ended(tmp_path, processes, why)


@pytest.mark.slow
def test_where_all_ranks_wait_all_are_named(tmp_path: Path) -> None:
    names = " and ".join(f"{{host}} (rank {rank})" for rank in range(3))
    why = f"nothing comes of what {names} tell one another: it hung"
    assert_all_ended(tmp_path, start(tmp_path, "step()\ntime.sleep(60)"), why)


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_all_of_them(tmp_path: Path) -> None:
    processes = start(tmp_path, TRAIN)
    stopped = child(tmp_path, 2)
    os.kill(processes[2].pid, signal.SIGSTOP)
    os.kill(stopped, signal.SIGSTOP)
    codes, lines = end(processes[:2])
    assert codes == [1, 1]
    assert f"{host()} (rank 2) has not been heard of for " in lines[0][0]
    os.kill(processes[2].pid, signal.SIGCONT)
    assert end(processes[2:])[0] == [1]
    assert state(stopped) in ("", "Z")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_supervisor_that_is_killed_ends_all_of_them(tmp_path: Path, rank: int) -> None:
    processes = start(tmp_path, TRAIN)
    children = [child(tmp_path, each) for each in range(3)]
    time.sleep(0.5)
    processes[rank].kill()
    codes, lines = end(processes)
    assert codes == [-9 if each == rank else 1 for each in range(3)]
    assert f"{host()} (rank {rank}) is gone" in lines[1 if rank == 0 else 0][0]
    assert all(state(pid) in ("", "Z") for pid in children)


@pytest.mark.slow
def test_a_rank_that_never_starts_is_told_of(tmp_path: Path) -> None:
    processes = start(tmp_path, TRAIN)
    processes[2].kill()
    assert "rank 2" in end(processes)[1][0][0]


@pytest.mark.slow
def test_a_stranger_at_the_port_changes_nothing(tmp_path: Path) -> None:
    processes = start(tmp_path, "time.sleep(1)")
    hosts = json.loads((tmp_path / "hosts.json").read_text())
    address, port = hosts[-1][0].split(":")
    wait_for(tmp_path / "child-0")
    with socket.create_connection((address, int(port) + 1)) as stranger:
        for line in (b"GET / HTTP/1.1", b'{"rank": [7]}', b'{"ended": 1}', b"[" * 9999, b'"\xff'):
            stranger.sendall(line + b"\n")
        assert end(processes) == ([0] * 3, [[]] * 3)


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_others(tmp_path: Path) -> None:
    processes = start(tmp_path, "if rank == 1: sys.exit(2)" + TRAIN)
    codes, lines = end(processes)
    assert codes == [1, 2, 1]
    assert f"{host()} (rank 1) ended with an error, exit code 2" in lines[0][0]


def test_a_folder_that_is_refused_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    (tmp_path / "adapters" / "mine" / "mine.txt").touch()
    processes = start(tmp_path, TRAIN)
    codes, lines = end(processes)
    assert codes == [2, 1, 1]
    assert "is not empty and not a run" in lines[0][0]


def test_what_launchers_set_is_understood(tmp_path: Path) -> None:
    hosts, devices = tmp_path / "hosts", tmp_path / "devices"
    hosts.write_text('[["10.0.0.1:5000", "10.0.0.1:5001"], ["10.0.0.2:5002", "10.0.0.2:5003"]]')
    devices.write_text('[[null, "rdma_en5"], ["rdma_en5", null]]')
    ring = {"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}
    assert launched(ring) == Launch(1, 2, "ring", "10.0.0.1", 5004, "10.0.0.1")
    named = {**ring, "MLX_TUNE_MEET": "studio1.local"}
    assert launched(named) == Launch(1, 2, "ring", "studio1.local", 5004, "")
    jaccl = {"MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
    assert launched({"MLX_RANK": "0", **jaccl}) == Launch(
        0, 2, "jaccl", "10.0.0.1", 32324, "10.0.0.1"
    )
    nccl = {"MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345"}
    assert launched({"MLX_RANK": "3", **nccl}) == Launch(
        3, 4, "nccl", "10.0.0.1", 12346, "10.0.0.1"
    )
    assert launched({}) is None
    hosts.write_text("")  # as for one host
    assert launched(ring) is None
    hosts.write_text(json.dumps([["10.0.0.1:5000"], ["10.0.0.2:5000"]]))
    for wrong in ({"MLX_HOSTFILE": str(hosts)}, {"OMPI_COMM_WORLD_SIZE": "2"}):
        with pytest.raises(UsageError):
            launched(wrong)
