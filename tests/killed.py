"""Kills a command of ours at random moments and looks at what it leaves."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlx_tuner.cli import main
from mlx_tuner.models.model import load_tokenizer, resolve
from mlx_tuner.system import files

MOMENTS = 25


def kill(*arguments: str, output: Path) -> int:
    """Run `mlx-tune ARGUMENTS -o OUTPUT` to its end, then again with a SIGKILL, 25 times.

    Returns how often OUTPUT was absent; else it must be as it was the first time.
    """
    output.parent.mkdir()
    command = [sys.executable, __file__, str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def child(output: Path, arguments: list[str]) -> int:
    """The command's process. On Linux forked: nothing was computed before, so MLX starts here.

    macOS lets no forked child use Metal.
    """
    if sys.platform == "darwin":
        command = [sys.executable, "-m", "mlx_tuner", *arguments, "-o", str(output)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL).pid
    process = os.fork()
    if process == 0:
        status = 1
        try:
            main([*arguments, "-o", str(output)], standalone_mode=False)
            status = 0
        finally:
            os._exit(status)
    return process


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    output, arguments = Path(sys.argv[1]), sys.argv[2:]
    load_tokenizer(resolve("builtin:tiny-qwen"))  # imports what every child would import again
    start = time.monotonic()
    assert os.waitpid(child(output, arguments), 0)[1] == 0
    whole = time.monotonic() - start
    reference, absent = content(output), 0
    draw = random.Random(7)
    files.remove(output)
    for _ in range(MOMENTS):
        process = child(output, arguments)
        time.sleep(draw.uniform(0, 1.2 * whole))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if output.exists():
            assert files.verify(output) == []
            assert content(output) == reference
            files.remove(output)
        else:
            absent += 1
    print(absent)
