"""An adapter alone as a GGUF file, which llama.cpp puts onto its base's file with `--lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import mlx.core as mx
import numpy as np

from mlx_tuner.conversion.fuse import open_base
from mlx_tuner.conversion.gguf import require_absent
from mlx_tuner.conversion.gguf_names import Names, add_base
from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.adapter import named_as_in
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.architecture import skeleton
from mlx_tuner.system import files

LoraDType = Literal["f32", "f16", "bf16"]


def export_gguf_lora(
    source: Path, output: Path, *, dtype: LoraDType = "f32", model: str | None = None
) -> int:
    """Write an adapter's factors as the new file `output`; returns their bytes.

    They are PEFT's A (r, I) and B (O, r), and the alpha that llama.cpp divides by the rank.

    Args:
        model: the base, for its names; by default the one that the adapter names.

    Raises:
        UsageError: `output` is there already.
        ModelError: adapter or base cannot be used, or llama.cpp has no such model.
        RunError: writing failed.
    """
    output = output.absolute()
    require_absent(output)
    adapter = read_adapter(source)
    if adapter.is_dora:
        what = "llama.cpp's adapters have no magnitudes, as DoRA does; export it with --to gguf"
        raise ModelError(Fault(str(source), "", what))
    base = open_base(adapter, model)
    bare = skeleton(base.config)
    adapter = named_as_in(bare, adapter)
    names = Names(base, bare.language_model.args if "language_model" in bare else bare.args)
    with files.replacing(output) as temporary:
        writer = gguf.GGUFWriter(temporary, names.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
        writer.add_name(source.resolve().name)
        add_base(writer, adapter.base)
        total = 0
        for module in adapter.modules:
            path = f"{module}.weight"
            a = names.inputs(path, adapter.tensors[f"{module}.lora_a"].T)
            b = names.outputs(path, adapter.tensors[f"{module}.lora_b"].T)
            for leaf, value in (("lora_a", a), ("lora_b", b)):
                data, kind = _stored(value, dtype)
                writer.add_tensor(f"{names.stored(path)}.{leaf}", data, raw_dtype=kind)
                total += data.nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return total


def _stored(value: mx.array, dtype: LoraDType) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    kinds = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
    bits = mx.contiguous(value.astype(kinds[dtype])).view(mx.uint8)
    return np.array(bits), gguf.GGMLQuantizationType[dtype.upper()]
