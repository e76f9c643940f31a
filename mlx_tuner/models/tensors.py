"""A safetensors file's header, checked against the file before MLX, which trusts it, reads that.

Format: 8 bytes little-endian header size, a JSON object name -> {dtype, shape, data_offsets}, then
the tensors' bytes (https://github.com/huggingface/safetensors#format). The format's own parser
checks it; what that takes and MLX cannot read is refused here.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mlx_tuner.errors import Fault, ModelError, first_line

MAX_HEADER_BYTES = 10_000_000
"""Some 80,000 tensors; the largest Qwen, of 36,000 in 118 files, takes 5 MB in all."""

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "C64": 8,
}
"""Bytes an element of the dtypes that MLX reads."""

_MAX_RANK = 16
_MAX_DIMENSION = 2**31 - 1  # MLX keeps dimensions in 32 bits
_PREFIX_BYTES = 8
_KEYS = {"dtype", "shape", "data_offsets"}

_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, not weights; download the file again"),
    (b"<html", "an HTML page, not weights; download the file again"),
    (b"pk\x03\x04", "a zip archive (PyTorch pickle?), not safetensors; use safetensors weights"),
    (b"\x80\x02", "a Python pickle, not safetensors; use safetensors weights"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"gguf", "a GGUF file, not safetensors; use the model's safetensors weights"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor, checked."""

    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte, from the beginning of the data."""
    end: int


class HeaderError(Exception):
    """A tensor of a header (or "") and what is wrong with it."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in the header's order; its data is not read.

    Raises:
        ModelError: the file cannot be read as exactly what its header describes.
    """
    try:
        header = _header(path)
        with safe_open(path, "np"):  # which checks the header, and that it covers the file
            pass
        table = json.loads(header, object_pairs_hook=_unique)
        table.pop("__metadata__", None)
        return {name: _tensor(name, entry) for name, entry in table.items()}
    except OSError as error:
        raise ModelError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    except SafetensorError as error:
        cause = first_line(error).rpartition("header: ")[2]
        what = f"truncated or damaged: {cause}; download it again"
        raise ModelError(Fault(str(path), "", what)) from None
    except HeaderError as error:
        raise ModelError(Fault(str(path), *error.args)) from None


def _header(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise HeaderError("", "not a regular file")
        length = _header_length(os.pread(descriptor, 64, 0), status.st_size)
        return os.pread(descriptor, length, _PREFIX_BYTES)
    finally:
        os.close(descriptor)


def _header_length(head: bytes, file_size: int) -> int:
    length = int.from_bytes(head[:_PREFIX_BYTES], "little")
    room = file_size - _PREFIX_BYTES
    if head[_PREFIX_BYTES : _PREFIX_BYTES + 1] == b"{" and length <= min(room, MAX_HEADER_BYTES):
        return length
    text = head.lstrip().lower()
    for magic, what in _IMPOSTORS:
        if text.startswith(magic):
            raise HeaderError("", what)
    if length <= MAX_HEADER_BYTES and room < length:
        raise HeaderError("", f"truncated: {file_size:,} bytes in all; download it again")
    what = f"not safetensors, or damaged: begins with a header of {length:,} bytes"
    raise HeaderError("", f"{what}, where a JSON object of at most {MAX_HEADER_BYTES:,} is due")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise HeaderError(name, "damaged: its header has this key twice")
    return table


def _tensor(name: str, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = entry["dtype"], entry["shape"]
    if entry.keys() != _KEYS:
        raise HeaderError(name, "must have exactly dtype, shape and data_offsets")
    if dtype not in ITEM_BYTES:
        raise HeaderError(name, f"dtype {dtype!r} is not one that MLX reads")
    if len(shape) > _MAX_RANK or max(shape, default=0) > _MAX_DIMENSION:
        what = f"shape {str(shape)[:57]} is not a list of at most 16 sizes below 2^31"
        raise HeaderError(name, what)
    return TensorInfo(dtype, tuple(shape), *entry["data_offsets"])
