"""Writes a model's weights as safetensors shards, one tensor in memory at a time.

The bytes depend on nothing but the tensors, so that two conversions of a model are equal.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_tuner.models.folder import INDEX
from mlx_tuner.models.model_files import DTYPES
from mlx_tuner.models.tensors import ITEM_BYTES
from mlx_tuner.system import files

MAX_SHARD_BYTES = 2 << 30
_IN_FLIGHT_BYTES = 256 << 20
"""Computed and not yet written, so that computing and writing overlap."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    folder: Path,
    weights: Mapping[str, mx.array],
    compute: Callable[[str], mx.array],
    advance: Callable[[int], None],
) -> None:
    """Write `model*.safetensors` and their index.

    Args:
        weights: every tensor by name, of which only shape and dtype are looked at.
        compute: gives the tensor of a name, once each; it should take it out of `weights`, since
            memory is freed only when nobody refers to a tensor any more.
        advance: told the bytes written since the last call.
    """
    shards = list(_shards(weights))
    total = sum(value.nbytes for value in weights.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        specs = {n: (_NAMES[weights[n].dtype], tuple(weights[n].shape)) for n in names}
        _write_shard(folder / name, specs, compute, advance)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files.write_json(folder / INDEX, index)


def _shards(weights: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """The names of each shard, in the model's order; within a shard, widest dtype first.

    So every tensor begins at a multiple of its element's size, which some readers need.
    """
    names: list[str] = []
    size = 0
    for name, value in weights.items():
        if names and size + value.nbytes > MAX_SHARD_BYTES:
            yield sorted(names, key=lambda n: -weights[n].itemsize)
            names, size = [], 0
        names.append(name)
        size += value.nbytes
    yield sorted(names, key=lambda n: -weights[n].itemsize)


def _write_shard(
    path: Path,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    compute: Callable[[str], mx.array],
    advance: Callable[[int], None],
) -> None:
    written: deque[tuple[Future[int], int]] = deque()
    in_flight = 0
    with path.open("xb") as file, ThreadPoolExecutor(1) as writer:
        file.write(_header(specs))
        for name in specs:
            data = _bytes(compute(name))
            written.append((writer.submit(file.write, data), data.nbytes))
            in_flight += data.nbytes
            del data
            while in_flight > _IN_FLIGHT_BYTES:
                in_flight -= _wait(written, advance)
        while written:
            _wait(written, advance)


def _wait(written: deque[tuple[Future[int], int]], advance: Callable[[int], None]) -> int:
    future, size = written.popleft()
    future.result()
    advance(size)
    return size


def _header(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for name, (dtype, shape) in specs.items():
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def is_finite(value: mx.array) -> bool:
    """Whether a float tensor holds neither NaN nor infinity.

    Those have all bits of the exponent set, so they are the largest of the bit patterns of their
    sign. Comparing integers is 50 times faster on a CPU than asking MLX about each number.
    """
    wide = value.itemsize == 4
    unsigned = np.frombuffer(_bytes(value), np.uint32 if wide else np.uint16)
    signed = unsigned.view(np.int32 if wide else np.int16)
    infinity = 0x7F800000 if wide else 0x7C00 if value.dtype == mx.float16 else 0x7F80
    sign = 0x80000000 if wide else 0x8000
    return value.size == 0 or bool(signed.max() < infinity and unsigned.max() < sign + infinity)


def _bytes(value: mx.array) -> memoryview:
    """The bytes of a tensor in row-major order; no copy of one that is contiguous."""
    flat = mx.contiguous(value).reshape(-1).view(mx.uint8)
    mx.eval(flat)
    return memoryview(flat)
