"""lock.py: one holder, named, and freed by its death."""

import errno
import fcntl
import os

import pytest

from mlx_tuner.errors import RunError
from mlx_tuner.system import lock


def test_a_lock_has_one_holder_and_names_it(tmp_path):
    path = tmp_path / ".lock"
    assert lock.holder(path) is None
    descriptor = lock.acquire(path, "process 42")
    assert lock.holder(path) == "process 42"
    with pytest.raises(RunError, match="in use by process 42"):
        lock.acquire(path, "process 43")
    os.close(descriptor)
    assert path.exists()
    assert lock.holder(path) is None
    os.close(lock.acquire(path, "43"))
    assert path.read_text() == "43\n"


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def no_locks(fd, how):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    os.close(lock.acquire(tmp_path / ".lock", "process 42"))


def test_a_child_that_inherits_the_descriptor_holds_the_lock_on(tmp_path):
    path = tmp_path / ".lock"
    descriptor = lock.acquire(path, "process 42")
    inherited = os.dup(descriptor)
    os.close(descriptor)
    with pytest.raises(RunError, match="in use by process 42"):
        lock.acquire(path, "process 43")
    os.close(inherited)
    os.close(lock.acquire(path, "process 43"))


def test_a_lock_file_that_its_holder_removes_locks_nobody(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    flock, removed = fcntl.flock, []

    def flock_after_a_removal(descriptor, how):
        if not removed:
            path.unlink()
            removed.append(True)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock_after_a_removal)
    descriptor = lock.acquire(path, "process 42")
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)
