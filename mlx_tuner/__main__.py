"""The program `mlx-tune`."""

import sys

from mlx_tuner.cli import main
from mlx_tuner.system import blas

COMPUTING = {"generate", "eval", "convert", "fuse", "export", "bench", "doctor"}
"""Commands that compute in this process; `run` does so in its child."""


def start() -> None:
    """Run the command line."""
    # transformers imports torch where it is installed, which takes seconds. No command uses it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    if set(sys.argv[1:2]) & COMPUTING:
        blas.preload()
    main()


if __name__ == "__main__":
    start()
