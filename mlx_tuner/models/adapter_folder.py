"""Adapter folders of any format: the gate to them, and from one format into another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models import adapter as mlx_format
from mlx_tuner.models import peft_format
from mlx_tuner.models.adapter import Adapter
from mlx_tuner.models.base import named_as_in_base
from mlx_tuner.system import files, foreign

_MOST_BYTES = {
    ".json": 10_000_000.0,
    ".jsonl": float("inf"),
    ".png": 50_000_000.0,
    ".safetensors": float("inf"),
    ".toml": 1_000_000.0,
}
"""What may be read of an adapter's or run's folder, by suffix."""


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter folder: a run's, one that mlx-lm made, or PEFT's.

    No file of the folder is opened before all that this package may read of it are known to be
    regular files inside it, a run's recipe, summary and plot as well.

    Raises:
        ModelError: there is none, it is of a kind that cannot be used (full fine-tunes,
            embeddings, pickles), or its files are damaged or contradict each other; all faults
            of the tensors at once.
    """
    if faults := list(foreign.faults_of_files(directory, _MOST_BYTES)):
        raise ModelError(*faults)
    if (directory / mlx_format.WEIGHTS).exists():
        return mlx_format.read_mlx(directory)
    if (directory / peft_format.WEIGHTS).exists():
        return peft_format.read_peft(directory)
    if pickles := sorted(path.name for path in directory.glob("adapter_model.*")):
        what = (
            f"{pickles[0]} may run code when it is read; save the adapter again with PEFT's "
            "safe_serialization=True"
        )
        raise ModelError(Fault(str(directory), "", what))
    what = f"no adapter: neither {mlx_format.WEIGHTS} nor {peft_format.WEIGHTS} is there"
    raise ModelError(Fault(str(directory), "", what))


def import_adapter(source: Path, output: Path) -> Adapter:
    """Write an adapter of any format that `read_adapter` knows as the new folder `output`.

    Its modules are named as mlx-lm names them (see `named_as_in_base`).

    Raises:
        UsageError: `output` cannot be a new folder.
        ModelError: as `read_adapter` does.
    """

    def write(folder: Path, adapter: Adapter) -> None:
        mlx_format.write_adapter(folder, named_as_in_base(adapter))

    return _rewrite(source, output, write)


def export_peft(source: Path, output: Path) -> Adapter:
    """Write the adapter of a run, or any adapter, as the new PEFT folder `output`.

    Raises:
        UsageError, ModelError: as `import_adapter` does.
    """
    return _rewrite(source, output, peft_format.write_peft)


def _rewrite(source: Path, output: Path, write: Callable[[Path, Adapter], None]) -> Adapter:
    output = output.absolute()
    files.require_new(output)
    adapter = read_adapter(source)
    with files.staging(output) as folder:
        write(folder, adapter)
    return adapter
