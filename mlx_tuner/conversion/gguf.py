"""A run as one GGUF file for llama.cpp, with a Modelfile for Ollama; the gguf package writes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_tuner.conversion.fidelity import Fidelity, compare, require_kept
from mlx_tuner.conversion.fuse import merge, open_base, rows_to_compare
from mlx_tuner.conversion.gguf_names import Names, add_base
from mlx_tuner.conversion.gguf_vocabulary import add_tokenizer
from mlx_tuner.conversion.logits import in_float32
from mlx_tuner.conversion.modelfile import modelfile
from mlx_tuner.conversion.work import require_space
from mlx_tuner.data.encode import unwrap
from mlx_tuner.errors import Fault, ModelError, RunError, UsageError
from mlx_tuner.models.adapter import Adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.folder import TOKENIZER_CONFIG
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.models.model_files import ModelFiles
from mlx_tuner.models.weights import is_finite
from mlx_tuner.system import files

if TYPE_CHECKING:
    from mlx_tuner.show.progress import Display

DType = Literal["f16", "bf16", "f32", "q8_0"]
MODELFILE = "Modelfile"

_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""
_ROUNDING = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}
"""Largest error of a weight that is read back, as a part of its row's largest weight."""


@dataclass(frozen=True)
class Exported:
    """What was made."""

    path: Path
    modelfile: Path
    bytes: int
    """Of the weights."""
    check: Fidelity


def export_gguf(
    source: Path,
    output: Path,
    display: Display,
    *,
    dtype: DType = "f16",
    model: str | None = None,
) -> Exported:
    """Merge an adapter into its base and write that as the new file `output`.

    Matrices are stored as `dtype`, norms and biases in float32.

    Args:
        model: the base; by default the one that the adapter names.

    Raises:
        UsageError: `output` or the Modelfile beside it is there already.
        ModelError: adapter or base cannot be used, llama.cpp has no such model or tokenizer, or
            the fine-tune would be lost.
        RunError: the disk is too small, writing failed, or the file holds something else.
    """
    output = output.absolute()
    beside = output.parent / MODELFILE
    require_absent(output, beside)
    adapter = read_adapter(source)
    base = open_base(adapter, model)
    tokenizer = _with_end(load_tokenizer(base.folder), base.folder)
    ollama = modelfile(output.name, tokenizer, source)
    file = _File(base, adapter, tokenizer, dtype, name=source.resolve().name)
    require_space(output, file.bytes)

    def rounded(model: nn.Module) -> nn.Module:
        return _rounded(in_float32(model), dtype)

    quantised = dtype == "q8_0"
    with display.task("comparing the rounded model with the adapter"):
        check = compare(
            rows_to_compare(source, base.folder),
            base.folder,
            adapter,
            lambda: rounded(merge(base.folder, adapter, mx.float32)),
            rounded if quantised else None,
        )
    require_kept(check, output, quantised=quantised)
    with files.replacing(output) as temporary:
        with display.task(f"writing {output.name}", file.bytes) as advance:
            file.write(temporary, advance)
        with display.task(f"reading {output.name} back"):
            file.check(temporary, output)
    files.write_text(beside, ollama)
    return Exported(output, beside, file.bytes, check)


def require_absent(*paths: Path) -> None:
    """Raise UsageError for the first path that is there."""
    for path in paths:
        if path.exists():
            what = "is there already; choose another folder or remove it"
            raise UsageError(Fault(str(path), "", what))


def _with_end(tokenizer: TokenizerWrapper, folder: Path) -> Any:
    """The transformers tokenizer, with the end token of the model's config if it has none."""
    inner = unwrap(tokenizer)
    if not inner.eos_token:
        ends = inner.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))
        inner.eos_token = next(filter(None, ends), None)
    if not inner.eos_token:
        what = "no token ends a text; name one"
        raise ModelError(Fault(str(folder / TOKENIZER_CONFIG), "eos_token", what))
    return inner


# ---- the file ----------------------------------------------------------------------------------


class _File:
    """A GGUF file to be: its metadata, and the tensors that are computed while it is written."""

    def __init__(
        self, base: ModelFiles, adapter: Adapter, tokenizer: Any, dtype: DType, name: str
    ) -> None:
        self._adapter = adapter
        model = merge(base.folder, adapter, mx.float32)
        args = model.language_model.args if "language_model" in model else model.args
        self._names = Names(base, args)
        self._folder = base.folder
        self._types = gguf.GGMLQuantizationType
        self._dtype = dtype
        self._writer = gguf.GGUFWriter(None, self._names.architecture)
        self._writer.add_type(gguf.GGUFType.MODEL)
        self._writer.add_name(name)
        add_base(self._writer, adapter.base)
        kinds = gguf.LlamaFileType
        kind = kinds.ALL_F32 if dtype == "f32" else kinds[f"MOSTLY_{dtype.upper()}"]
        self._writer.add_file_type(kind)
        self._writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._names.add_numbers(self._writer)
        add_tokenizer(self._writer, tokenizer, args.vocab_size, base.folder)
        self._tensors = dict(tree_flatten(model.parameters()))
        self.bytes = 0
        for path, value in self._tensors.items():
            kind = self._kind(value)
            shape = value.shape if value.ndim < 3 else value.shape[:2]
            stored = gguf.quant_shape_to_byte_shape(shape, kind)
            size = int(np.prod(stored))
            name = self._names.stored(path)
            self._writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, kind)
            self.bytes += size

    def write(self, path: Path, advance: Callable[[int], None]) -> None:
        """Write the file, one tensor in memory at a time.

        Raises:
            ModelError: a tensor is not finite.
        """
        with closing(self._writer) as writer:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in list(self._tensors):
                data = self._bytes(name, self._tensors.pop(name))
                writer.write_tensor_data(data)
                advance(data.nbytes)

    def check(self, path: Path, output: Path) -> None:
        """Compare the written file, as the gguf package reads it, with the merged model.

        Args:
            output: what faults call the file.

        Raises:
            RunError: a tensor is missing, or is off by more than rounding explains.
        """
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        model = merge(self._folder, self._adapter, mx.float32)
        weights = dict(tree_flatten(model.parameters()))
        del model  # so that each tensor is freed once it is compared
        for name in list(weights):
            value = self._names.value(name, weights.pop(name).astype(mx.float32))
            expected, found = np.array(value), stored.get(self._names.stored(name))
            if found is None or not _is_close(found, expected):
                what = "is not in the file as it was written; try again, or on another disk"
                raise RunError(Fault(str(output), name, what))

    def _kind(self, value: mx.array) -> Any:
        if value.ndim != 2 or self._dtype == "f32":
            return self._types.F32
        if self._dtype == "q8_0" and value.shape[-1] % _BLOCK:
            return self._types.F16
        return self._types[self._dtype.upper()]

    def _bytes(self, name: str, value: mx.array) -> np.ndarray:
        kind = self._kind(value)
        value = self._names.value(name, value.astype(mx.float32))
        if kind in (self._types.F16, self._types.BF16):
            value = value.astype(mx.float16 if kind == self._types.F16 else mx.bfloat16)
        mx.eval(value)
        if not is_finite(value):
            what = f"is not finite in {self._dtype}; choose bf16 or f32"
            raise ModelError(Fault(str(self._folder), name, what))
        if kind == self._types.Q8_0:
            return gguf.quants.quantize(np.array(value, copy=False), kind)
        return np.array(mx.contiguous(value).view(mx.uint8), copy=False)


def _is_close(stored: Any, expected: np.ndarray) -> bool:
    """Whether a tensor of a file is this one but for rounding."""
    if stored.n_elements != expected.size:
        return False
    values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(expected.shape)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    smallest = 2.0**-24  # of float16: what is less is nothing there
    bound = _ROUNDING[stored.tensor_type.name] * largest + smallest
    return bool((np.abs(values - expected) <= bound).all())


# ---- what the dtype does to the weights ----------------------------------------------------------


def _rounded(model: nn.Module, dtype: DType) -> nn.Module:
    """A float32 model with its matrices as the file holds them; nothing is computed yet."""

    def change(value: mx.array) -> mx.array:
        if value.ndim != 2 or dtype == "f32":
            return value
        if dtype == "q8_0" and value.shape[-1] % _BLOCK == 0:
            return _round_q8_0(value)
        return value.astype(mx.bfloat16 if dtype == "bf16" else mx.float16).astype(mx.float32)

    model.update(tree_map(change, model.parameters()))
    return model


def _round_q8_0(value: mx.array) -> mx.array:
    """Every 32 weights of a row in 127 steps each way, of a step stored in float16."""
    blocks = value.astype(mx.float32).reshape(*value.shape[:-1], -1, _BLOCK)
    step = mx.abs(blocks).max(axis=-1, keepdims=True) / 127
    steps = mx.round(blocks / mx.where(step == 0, 1, step))
    return (steps * step.astype(mx.float16)).reshape(value.shape)
