"""A lock that one process holds, and that the kernel frees when it dies.

The open descriptor is the lock: a process hands it to its child by letting the child inherit it,
and both hold it then. (filelock's locks can neither be handed on nor name their owner.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from mlx_tuner.errors import Fault, RunError
from mlx_tuner.system import files

_PATIENCE_SECONDS = 0.3
"""For a holder that was killed a moment ago."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def acquire(path: Path, owner: str) -> int:
    """Hold the lock file `path` until the descriptor that is returned is closed.

    Args:
        owner: written into the file for whoever comes second.

    Raises:
        RunError: another process holds it, with what that one wrote; or it cannot be made.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with files.faults_named(path):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if _try(descriptor):
                    if os.fstat(descriptor).st_nlink:  # else its holder removed it meanwhile
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, owner.encode("utf-8") + b"\n", 0)
                        return descriptor
                elif time.monotonic() > deadline:
                    what = f"is in use by {_owner(descriptor)}; wait for it, or stop it"
                    raise RunError(Fault(str(path.parent), "", what))
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            time.sleep(0.02)


def holder(path: Path) -> str | None:
    """What the live owner of a lock wrote into it; None if nobody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _owner(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks; unique temporary names keep data whole.
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _owner(descriptor: int) -> str:
    """What is written in an open lock file."""
    for _ in range(20):
        if text := os.pread(descriptor, 4096, 0).decode("utf-8", "replace").strip():
            return text
        time.sleep(0.01)  # the owner got the lock a moment ago, and is about to write
    return "another process"
