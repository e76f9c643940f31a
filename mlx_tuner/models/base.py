"""The model that an adapter was trained on: found by name, and known again by its weights."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.adapter import Adapter, named_as_in
from mlx_tuner.models.architecture import skeleton
from mlx_tuner.models.folder import check_folder
from mlx_tuner.models.model import resolve
from mlx_tuner.models.tensors import TensorInfo, read_header

_SAMPLES = 8
_SAMPLE_BYTES = 64


def fingerprint(folder: Path) -> str:
    """Which weights a model folder holds: a SHA-256 over each tensor's name, dtype and shape, and
    over 8 samples of 64 bytes of it, evenly spread.

    It takes milliseconds and does not depend on how the tensors are parted into files. Two models
    of one shape differ in it unless all of their sampled values are the same.

    Raises:
        ModelError: there are no weights, or a file is damaged.
    """
    digest = hashlib.sha256()
    tensors: dict[str, tuple[Path, int, TensorInfo]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        header = read_header(path)
        data = path.stat().st_size - max((info.end for info in header.values()), default=0)
        tensors.update((name, (path, data, info)) for name, info in header.items())
    if not tensors:
        raise ModelError(Fault(str(folder), "", "no model*.safetensors there"))
    paths = {path for path, _, _ in tensors.values()}
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths}
    try:
        for name, (path, data, info) in sorted(tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            last = max(info.end - info.start - _SAMPLE_BYTES, 0)
            for offset in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                size = min(_SAMPLE_BYTES, info.end - info.start - offset)
                digest.update(os.pread(descriptors[path], size, data + info.start + offset))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()


def resolve_base(adapter: Adapter, model: str | None = None, *, fetch: bool = True) -> Path:
    """The folder of an adapter's base, or of `model` in its place.

    Raises:
        ModelError: the adapter names no base, or it cannot be had.
    """
    if not (model or adapter.base):
        what = "does not say which model it was trained on; name it with --model"
        raise ModelError(Fault(str(adapter.folder), "", what))
    return resolve(model or adapter.base, None if model else adapter.revision, fetch=fetch)


def named_as_in_base(adapter: Adapter) -> Adapter:
    """The adapter by the names of its base's modules in MLX, where the base is on this machine.

    Where it is not, only the prefix that Qwen3.5 alone has is translated.
    """
    try:
        model = skeleton(check_folder(resolve_base(adapter, fetch=False)))
    except ModelError:
        theirs, ours = r"^model\.language_model\.", "language_model.model."
        tensors = {re.sub(theirs, ours, name): t for name, t in adapter.tensors.items()}
        return replace(adapter, tensors=tensors)
    return named_as_in(model, adapter)


def check_base(adapter: Adapter, folder: Path) -> None:
    """Refuse a base other than the one that the adapter was trained on, where that is known.

    Raises:
        ModelError: the fingerprints differ.
    """
    if adapter.fingerprint is None or (found := fingerprint(folder)) == adapter.fingerprint:
        return
    what = (
        f"trained on {adapter.base or 'another model'} (weights {adapter.fingerprint[:12]}), "
        f"but {folder} holds other weights ({found[:12]}); give the model it was trained on"
    )
    raise ModelError(Fault(str(adapter.folder or "adapter"), "fingerprint", what))
