"""A run on a disk that fails, or loses its power: nothing that was saved is lost."""

import errno
import os
import shutil
from collections import namedtuple

import disk
import pytest

from mlx_tuner.errors import RunError
from mlx_tuner.runs.run import Run
from mlx_tuner.training.needs import disk_bytes

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT)


@pytest.fixture(autouse=True)
def instant():
    with disk.instant():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_whichever_call_fails_what_was_saved_stays_and_the_error_says_where(tmp_path, for_good):
    """Each call of a save in turn, each with another error."""
    for at in range(1, 1000):
        path, code = tmp_path / str(at), ERRORS[at % 5]
        with Run(path) as run:
            run.begin(disk.OLD)
            disk.save(run, disk.OLD, 1)
            error = None
            with disk.failing(at, code, for_good=for_good) as calls:
                try:
                    disk.save(run, disk.OLD, 2)
                except RunError as raised:
                    error = raised
        if len(calls) < at:
            break
        assert error is not None, (at, calls)
        assert error.exit_code == 1
        message = str(error)
        assert str(path) in message
        assert ".tmp-" not in message
        assert os.strerror(code) in message
        assert disk.newest_step(path) in (1, 2)
        shutil.rmtree(path)
    assert at > 20


def test_a_full_disk_is_told_with_the_bytes_of_the_whole_checkpoint(tmp_path):
    with Run(tmp_path / "run") as run:
        run.begin(disk.OLD)
        with (
            disk.failing(9, errno.ENOSPC, for_good=True),
            pytest.raises(RunError, match=r"step-00000001: cannot write 3,000 bytes: No space"),
        ):
            disk.save(run, disk.OLD, 1)


def test_a_run_that_the_disk_has_no_room_for_is_refused_before_it_begins(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 4_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Run(tmp_path / "run") as run:
        with pytest.raises(RunError, match="checkpoints need 5,000 bytes, 4,999 are free; free"):
            run.require_space(5_000)
        run.require_space(4_999)
    assert not (tmp_path / "run").exists()


def test_what_is_asked_of_the_disk_is_the_most_that_a_run_takes_of_it(tmp_path, monkeypatch):
    """An adapter of 1,000 numbers, beside its two moments; the best checkpoint is an old one."""
    taken = []

    def save(run, step, best):
        def write(folder):
            (folder / "adapters.safetensors").write_bytes(bytes(4_000))
            (folder / "optimizer.safetensors").write_bytes(bytes(8_000))
            taken.append(sum(path.stat().st_size for path in run.path.rglob("*.safetensors")))

        run.save_checkpoint(step, write, {}, best_step=best)
        run.publish(lambda folder: (folder / "adapters.safetensors").write_bytes(bytes(4_000)))

    with Run(tmp_path / "run") as run:
        run.begin(disk.OLD)
        for step in range(1, 8):
            save(run, step, best=1)
        assert max(taken) == disk_bytes(1_000)
        # What it has by then is no longer asked for, nor when it is resumed or replaced.
        usage = namedtuple("usage", "total used free")(10**9, 10**9, 52_000 - 36_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        run.require_space(disk_bytes(1_000))
        with pytest.raises(RunError, match="are free"):
            run.require_space(disk_bytes(1_000) + 10_000)


@pytest.mark.slow
def test_a_power_loss_leaves_the_newest_checkpoint_that_was_promised(tmp_path):
    """`benchmarks/chaos.py` looks at 5,000 states."""
    for path, promised in disk.states_after_power_loss(tmp_path, 100, seed=1):
        assert disk.newest_step(path) >= promised


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "torn", "after"])
def test_killed_at_any_boundary_of_a_save_a_run_goes_on(tmp_path, moment):
    """Every eleventh call; `benchmarks/chaos.py` takes every one."""
    promises = set()
    for at in range(1, 1000, 11):
        path = tmp_path / str(at)
        if not disk.history_killed_at(path, at, moment):
            break
        promises.add(promised := disk.promised(path))
        if promised:
            assert disk.newest_step(path / "run") >= promised
        shutil.rmtree(path)
    assert at > 100
    assert len(promises) > 2  # none, the first, later ones
