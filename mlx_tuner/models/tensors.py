"""Reads a safetensors header with Python integers and refuses every lie in it, before MLX reads it.

Format: 8 bytes little-endian header size, a JSON object name -> {dtype, shape, data_offsets}, then
the tensors' bytes (https://github.com/huggingface/safetensors#format). MLX trusts all of that.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, ModelError

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

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
_MAX_BYTES = 2**63 - 1
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


class _Lie(Exception):
    """A field of a header (or "") and what is wrong with it."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in the header's order; its data is not read.

    Raises:
        ModelError: the file cannot be read as exactly what its header describes.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Lie("", "not a regular file")
        length = _header_length(os.pread(descriptor, 64, 0), status.st_size)
        header = os.pread(descriptor, length, _PREFIX_BYTES)
        return _checked(_parsed(header), status.st_size - _PREFIX_BYTES - length)
    except OSError as error:
        raise ModelError(Fault(str(path), "", f"cannot be read: {error.strerror}")) from None
    except _Lie as lie:
        name, what = lie.args
        raise ModelError(
            Fault(str(path), name if name.isprintable() else ascii(name), what)
        ) from None
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
            raise _Lie("", what)
    if length <= MAX_HEADER_BYTES and room < length:
        raise _Lie("", f"truncated: {file_size:,} bytes in all; download it again")
    what = f"not safetensors, or damaged: begins with a header of {length:,} bytes, no JSON object"
    raise _Lie("", what)


def _parsed(header: bytes) -> dict[str, Any]:
    """The header as JSON with nothing in it that another parser could read differently."""
    try:
        return json.loads(
            header.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else error
        raise _Lie("", f"damaged: its header is no valid JSON ({cause})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise _Lie("", f"damaged: its header has the key {name!r} twice")
        table[name] = value
    return table


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 20:
        raise _Lie("", f"the number {digits[:24]} is out of range")
    return int(digits)


def _no_number(text: str) -> float:
    raise _Lie("", f"the number {text[:24]} is not a whole one")


def _checked(header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """Every tensor within its bounds, and the tensors side by side over all of the data."""
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # MLX writes null where it has none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Lie("__metadata__", "must be a table of texts")
    for text in (*header, *metadata, *metadata.values()):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise _Lie("", f"{text!r} is not valid Unicode")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            what = "overlaps another tensor" if tensor.start < position else "follows a hole"
            raise _Lie(name, f"{what}: starts at {tensor.start:,} where {position:,} is due")
        position = tensor.end
    if position > data_bytes:
        raise _Lie("", f"truncated: {data_bytes:,} bytes of data where {position:,} are due")
    if position < data_bytes:
        raise _Lie("", f"{data_bytes - position:,} bytes too long")
    return tensors


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _Lie(name, "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _Lie(name, f"dtype {dtype!r} is not one that MLX reads")
    if not _naturals(shape) or len(shape) > _MAX_RANK or max(shape, default=0) > _MAX_DIMENSION:
        raise _Lie(name, f"shape {_short(shape)} is not a list of at most 16 sizes below 2^31")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Lie(name, f"data_offsets {_short(offsets)} are not a begin and an end")
    # Without its zeros, so that no order of multiplying overflows in another parser.
    if math.prod(size for size in shape if size) * ITEM_BYTES[dtype] > _MAX_BYTES:
        raise _Lie(name, f"shape {_short(shape)} overflows")
    due = math.prod(shape) * ITEM_BYTES[dtype]
    if (stored := offsets[1] - offsets[0]) != due:
        raise _Lie(name, f"{stored:,} bytes where {dtype} {_short(shape)} takes {due:,}")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _naturals(value: Any) -> bool:
    """Numbers are natural ones by now (see `_natural`), but JSON has more than numbers."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
