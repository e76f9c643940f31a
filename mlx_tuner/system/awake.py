"""A Mac that stays awake while there is work."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from shutil import which


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from sleeping during the block, but not its display."""
    program = which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        yield
        return
    # -w: it ends with this process too, however that ends.
    pid = os.posix_spawn(program, [program, "-is", "-w", str(os.getpid())], os.environ)
    try:
        yield
    finally:
        with suppress(OSError):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
