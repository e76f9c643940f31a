"""A run as one GGUF file for llama.cpp, with a Modelfile for Ollama; the gguf package writes it.

What is stored, and under which names, is what llama.cpp's own converter stores for Qwen2 and Qwen3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_tuner.conversion.convert import in_float32, require_space
from mlx_tuner.conversion.fidelity import Check, compare, require_kept
from mlx_tuner.conversion.fuse import TURN_END, merge, open_base, recipe_of, rows_to_compare
from mlx_tuner.data.encode import unwrap
from mlx_tuner.errors import Fault, ModelError, UsageError
from mlx_tuner.models.adapter import Adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.models.model_files import ModelFiles
from mlx_tuner.models.weights import is_finite
from mlx_tuner.system import files

if TYPE_CHECKING:
    from mlx_tuner.show.progress import Display

DType = Literal["f16", "bf16", "f32", "q8_0"]
MODELFILE = "Modelfile"

_ARCHITECTURES = ("qwen2", "qwen3")
_BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a tokenizer cuts text that llama.cpp calls "qwen2"; any other would be cut wrongly there."""


@dataclass(frozen=True)
class Exported:
    """What was made."""

    path: Path
    modelfile: Path
    bytes: int
    """Of the weights."""
    check: Check


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
        UsageError: `output` or the Modelfile beside it is there already, or the gguf package is
            missing.
        ModelError: adapter or base cannot be used, llama.cpp has no such model or tokenizer, or
            the fine-tune would be lost.
        RunError: the disk is too small, or writing failed.
    """
    _require_package()
    output = output.absolute()
    modelfile = output.parent / MODELFILE
    for path in (output, modelfile):
        if path.exists():
            what = "is there already; choose another folder or remove it"
            raise UsageError(Fault(str(path), "", what))
    adapter = read_adapter(source)
    base = open_base(adapter, model)
    tokenizer = unwrap(load_tokenizer(base.folder))
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
    with display.task(f"writing {output.name}", file.bytes) as advance:
        file.write(output, advance)
    files.write_text(modelfile, _modelfile(output.name, tokenizer, source))
    return Exported(output, modelfile, file.bytes, check)


def _require_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        what = "writing GGUF needs the gguf package; pip install 'mlx-lora-tuner[gguf]'"
        raise UsageError(what) from None


# ---- the file ----------------------------------------------------------------------------------


class _File:
    """A GGUF file to be: its metadata, and the tensors that are computed while it is written."""

    def __init__(
        self, base: ModelFiles, adapter: Adapter, tokenizer: Any, dtype: DType, name: str
    ) -> None:
        import gguf

        config = base.config
        if config["model_type"] not in _ARCHITECTURES:
            what = f"{config['model_type']!r} cannot be written as GGUF; only qwen2 and qwen3 can"
            raise ModelError(Fault(str(base.folder), "model_type", what))
        self._folder = base.folder
        self._types = gguf.GGMLQuantizationType
        self._dtype = dtype
        model = merge(base.folder, adapter, mx.float32)
        self._writer = gguf.GGUFWriter(None, config["model_type"])
        self._add_model(model.args, name, dtype, adapter.base)
        self._add_tokenizer(_vocabulary(tokenizer, model.args.vocab_size, base.folder), tokenizer)
        architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]]
        names = gguf.get_tensor_name_map(architecture, model.args.num_hidden_layers)
        self._tensors = dict(tree_flatten(model.parameters()))
        self.bytes = 0
        for path, value in self._tensors.items():
            stored = str(names.get_name(path, try_suffixes=(".weight", ".bias")))
            kind = self._kind(value)
            shape = gguf.quant_shape_to_byte_shape(value.shape, kind)
            size = int(np.prod(shape))
            self._writer.add_tensor_info(stored, shape, np.dtype(np.uint8), size, kind)
            self.bytes += size

    def write(self, path: Path, advance: Callable[[int], None]) -> None:
        """Write the file, whole or not at all, one tensor in memory at a time.

        Raises:
            ModelError: a tensor is not finite.
        """
        with files.replacing(path) as temporary, closing(self._writer) as writer:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in list(self._tensors):
                data = self._bytes(name, self._tensors.pop(name))
                writer.write_tensor_data(data)
                advance(data.nbytes)

    def _kind(self, value: mx.array) -> Any:
        if value.ndim == 1 or self._dtype == "f32":
            return self._types.F32
        if self._dtype == "q8_0" and value.shape[-1] % _BLOCK:
            return self._types.F16
        return self._types[self._dtype.upper()]

    def _bytes(self, name: str, value: mx.array) -> np.ndarray:
        import gguf

        kind = self._kind(value)
        if kind in (self._types.F16, self._types.BF16):
            value = value.astype(mx.float16 if kind == self._types.F16 else mx.bfloat16)
        else:
            value = value.astype(mx.float32)
        mx.eval(value)
        if not is_finite(value):
            what = f"is not finite in {self._dtype}; choose bf16 or f32"
            raise ModelError(Fault(str(self._folder), name, what))
        if kind == self._types.Q8_0:
            return gguf.quants.quantize(np.array(value, copy=False), kind)
        return np.array(mx.contiguous(value).view(mx.uint8), copy=False)

    def _add_model(self, args: Any, name: str, dtype: DType, base: str) -> None:
        import gguf

        writer = self._writer
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        if base.count("/") == 1 and not Path(base).exists():
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base.partition("/")[2])
            writer.add_base_model_organization(0, base.partition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
        kinds = gguf.LlamaFileType
        writer.add_file_type(
            {
                "f32": kinds.ALL_F32,
                "f16": kinds.MOSTLY_F16,
                "bf16": kinds.MOSTLY_BF16,
                "q8_0": kinds.MOSTLY_Q8_0,
            }[dtype]
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(args.num_hidden_layers)
        writer.add_context_length(args.max_position_embeddings)
        writer.add_embedding_length(args.hidden_size)
        writer.add_feed_forward_length(args.intermediate_size)
        writer.add_head_count(args.num_attention_heads)
        writer.add_head_count_kv(args.num_key_value_heads)
        writer.add_layer_norm_rms_eps(args.rms_norm_eps)
        writer.add_rope_freq_base(args.rope_theta)
        writer.add_vocab_size(args.vocab_size)
        if (head_dim := getattr(args, "head_dim", None)) is not None:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        scaling = args.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return
        if kind not in ("linear", "yarn"):
            what = f"{kind!r} cannot be written as GGUF"
            raise ModelError(Fault(str(self._folder), "rope_scaling", what))
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])

    def _add_tokenizer(self, vocabulary: _Vocabulary, tokenizer: Any) -> None:
        writer = self._writer
        writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        writer.add_token_merges(vocabulary.merges)
        ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        end = ids.get(TURN_END) if tokenizer.chat_template else None
        if end is not None:
            writer.add_eot_token_id(end)
        writer.add_eos_token_id(tokenizer.eos_token_id if end is None else end)
        if tokenizer.pad_token_id is not None:
            writer.add_pad_token_id(tokenizer.pad_token_id)
        if tokenizer.bos_token_id is not None:
            writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_add_bos_token(False)
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer as GGUF has it: one token an embedding row."""

    tokens: list[str]
    types: list[int]
    merges: list[str]


def _vocabulary(tokenizer: Any, size: int, folder: Path) -> _Vocabulary:
    """The tokenizer's tokens by id; rows without one are named [PADi], as llama.cpp does.

    Raises:
        ModelError: llama.cpp would cut text in another way.
    """
    import gguf

    table = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splits = table["model"], table["pre_tokenizer"]
    patterns = [
        part["pattern"].get("Regex")
        for part in (splits or {}).get("pretokenizers", [])
        if part["type"] == "Split"
    ]
    if model["type"] != "BPE" or patterns != [_QWEN2_SPLIT]:
        what = "cuts text in another way than Qwen2's, so llama.cpp would give it other tokens"
        raise ModelError(Fault(str(folder / "tokenizer.json"), "pre_tokenizer", what))
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
    for added in table["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return _Vocabulary(tokens, types, merges)


# ---- what the dtype does to the weights ----------------------------------------------------------


def _rounded(model: nn.Module, dtype: DType) -> nn.Module:
    """A float32 model with its matrices as the file holds them; nothing is computed yet."""

    def change(value: mx.array) -> mx.array:
        if value.ndim == 1 or dtype == "f32":
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


# ---- Ollama ------------------------------------------------------------------------------------

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_CHATML_TURNS = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?"
    r"<\|im_start\|>user\nHello<\|im_end\|>\n<\|im_start\|>assistant\n",
    re.DOTALL,
)


def _modelfile(name: str, tokenizer: Any, source: Path) -> str:
    """How Ollama runs the file: the turns as the model's own template writes them."""
    lines = [f"FROM ./{name}"]
    if tokenizer.chat_template:
        message = [{"role": "user", "content": "Hello"}]
        turns = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if chatml := _CHATML_TURNS.fullmatch(turns):
            lines += [f'TEMPLATE """{_CHATML}"""']
            recipe = recipe_of(source)
            if system := (recipe and recipe.data.system_prompt) or chatml["system"]:
                lines += [f'SYSTEM """{system}"""']
        lines += [f'PARAMETER stop "{TURN_END}"']
    lines += [f'PARAMETER stop "{tokenizer.eos_token}"']
    return "\n".join(dict.fromkeys(lines)) + "\n"
