"""Limits the process of a program that a model wrote, before the program begins.

`tasks` puts this text before the program's and runs both with `python -I -`. The kernel limits
time, the size of files and, on Linux, memory; an audit hook, which cannot be taken off again,
refuses files, the network and other processes. That keeps accidents in; it is no prison for a
program that is written to break out.
"""

import os
import resource
import sys

FAILED, RAISED = 94, 95
"""Exit codes: an assertion was wrong; the program raised something else."""

_REFUSED = (
    *("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "tempfile.", "pty.", "syslog."),
    *("ftplib.", "smtplib.", "urllib.", "http.", "webbrowser.", "signal.pthread_kill"),
)
_HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}


def guard(seconds: int, size: int) -> None:
    """Limit this process to so many seconds of CPU and bytes of memory, and to itself.

    The kernel of macOS does not count memory here; a run-away program is ended by its time there.
    """
    readable = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)})
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, size),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):
            continue

    def refuse(event, arguments, readable=readable):  # type: ignore[no-untyped-def]
        if event == "open":
            path, _, flags = arguments
            inside = isinstance(path, str) and os.path.realpath(path).startswith(readable)
            if not inside or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise PermissionError(f"no files here: {path}")
        elif event.startswith(_REFUSED) and event not in _HARMLESS:
            raise PermissionError(f"not here: {event}")

    def said(kind, error, traceback, leave=os._exit):  # type: ignore[no-untyped-def]
        leave(FAILED if issubclass(kind, AssertionError) else RAISED)

    sys.excepthook = said
    sys.addaudithook(refuse)
