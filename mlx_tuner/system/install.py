"""Commands for the user that install what is missing, by the way this program was installed."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from mlx_tuner.words import from_here

DISTRIBUTION = "mlx-lora-tuner"
_MODULES = {
    "gguf": "gguf",
    "mlflow": "mlflow",
    "parquet": "pyarrow",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Extras, and a module that each of them brings."""


def extra(name: str) -> str:
    """The command that adds an extra; uv, which forgets the others, is told those too."""
    if _has("uv-receipt.toml"):
        others = {each for each, module in _MODULES.items() if find_spec(module)}
        extras = ",".join(sorted({name, *others}))
        executables = "--with-executables-from mlx-lm,mlx,huggingface-hub"
        return f"uv tool install '{DISTRIBUTION}[{extras}]' {executables}"
    if _has("pipx_metadata.json"):
        return f"pipx install --force '{DISTRIBUTION}[{name}]'"
    return f"{_pip()} '{DISTRIBUTION}[{name}]'"


def packages(arguments: str) -> str:
    """The command that mends packages: pip's, with these arguments, or the tool's own."""
    if _has("uv-receipt.toml"):
        return f"uv tool upgrade --reinstall {DISTRIBUTION}"
    if _has("pipx_metadata.json"):
        return f"pipx reinstall {DISTRIBUTION}"
    return f"{_pip()} {arguments}"


def _has(receipt: str) -> bool:
    """Whether the tool that leaves this file made the environment."""
    return (Path(sys.prefix) / receipt).exists()


def _pip() -> str:
    python = shlex.quote(from_here(sys.executable))
    return f"{python} -m pip install" if find_spec("pip") else f"uv pip install --python {python}"
