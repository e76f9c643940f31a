"""A model as llama.cpp knows it: its architecture's numbers, its tensors' names and their order.

What is stored is what llama.cpp's own converter stores for Qwen2, Qwen3 and Qwen3.5
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.model_files import ModelFiles

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_5": "qwen35"}
"""llama.cpp's name of each model type that can be written."""

_LINEAR = ".linear_attn."


class Names:
    """What llama.cpp calls the parts of one model.

    In Qwen3.5's linear attention several value heads share a key head. Hugging Face and MLX keep
    those of a key head side by side, llama.cpp keeps the first of each key head, then the second.

    Raises:
        ModelError: llama.cpp's form of this model type is not known here.
    """

    def __init__(self, base: ModelFiles, args: Any) -> None:
        """`args` are those of the text model, as mlx-lm has them."""
        kind = base.config["model_type"]
        if kind not in ARCHITECTURES:
            what = f"{kind!r} cannot be written as GGUF; only {', '.join(ARCHITECTURES)} can"
            raise ModelError(Fault(str(base.folder), "model_type", what))
        self.architecture = ARCHITECTURES[kind]
        self._folder, self._args = base.folder, args
        number = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        self._map = gguf.get_tensor_name_map(number, args.num_hidden_layers)

    def stored(self, path: str) -> str:
        """The name of an MLX parameter in the file."""
        name = path.removeprefix("language_model.").replace(".dt_bias", ".dt_proj.bias")
        return str(self._map.get_name(name, try_suffixes=(".weight", ".bias")))

    def value(self, path: str, value: mx.array) -> mx.array:
        """An MLX parameter, of the shape and order that the file has."""
        if _LINEAR not in path:
            return value
        value = self.outputs(path, self.inputs(path, value))
        if path.endswith(".A_log"):
            return -mx.exp(value)
        return value.squeeze(-1) if path.endswith(".conv1d.weight") else value

    def outputs(self, path: str, value: mx.array) -> mx.array:
        """The rows (axis 0) of a parameter in the file's order of value heads."""
        if _LINEAR not in path or ".norm." in path or ".out_proj." in path:
            return value
        per_head = path.endswith((".A_log", ".dt_bias")) or ".in_proj_a." in path
        size = 1 if per_head or ".in_proj_b." in path else self._args.linear_value_head_dim
        keys = self._args.linear_num_key_heads * self._args.linear_key_head_dim
        first = 2 * keys if ".in_proj_qkv." in path or ".conv1d." in path else 0
        queries_keys, values = mx.split(value, [first])
        return mx.concatenate([queries_keys, self._by_turns(values, size)])

    def inputs(self, path: str, value: mx.array) -> mx.array:
        """The columns (axis 1) of a parameter in the file's order of value heads."""
        if _LINEAR not in path or ".out_proj." not in path:
            return value
        return self._by_turns(value.T, self._args.linear_value_head_dim).T

    def _by_turns(self, value: mx.array, size: int) -> mx.array:
        """Reorder value heads of `size` rows: grouped by key head, to one of each in turn."""
        heads = self._args.linear_num_key_heads
        parts = value.reshape(heads, -1, size, *value.shape[1:])
        return parts.swapaxes(0, 1).reshape(value.shape)

    def add_numbers(self, writer: gguf.GGUFWriter) -> None:
        """Write what llama.cpp computes the model by.

        Raises:
            ModelError: positions are scaled in a way that has no form there.
        """
        args = self._args
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
        if self.architecture == "qwen35":
            self._add_linear_attention(writer)
        self._add_scaling(writer, args.rope_scaling or {})

    def _add_linear_attention(self, writer: gguf.GGUFWriter) -> None:
        args = self._args
        writer.add_ssm_conv_kernel(args.linear_conv_kernel_dim)
        writer.add_ssm_state_size(args.linear_key_head_dim)
        writer.add_ssm_group_count(args.linear_num_key_heads)
        writer.add_ssm_time_step_rank(args.linear_num_value_heads)
        writer.add_ssm_inner_size(args.linear_value_head_dim * args.linear_num_value_heads)
        writer.add_full_attention_interval(args.full_attention_interval)
        rotated = int(args.head_dim * args.partial_rotary_factor)
        writer.add_rope_dimension_count(rotated)
        # How images would share the rotated pairs; text has one position for all three.
        sections = (args.rope_scaling or {}).get("mrope_section") or []
        if 2 * sum(sections) != rotated:
            sections = [rotated // 2, 0, 0]
        writer.add_rope_dimension_sections([*sections, 0])

    def _add_scaling(self, writer: gguf.GGUFWriter, scaling: dict[str, Any]) -> None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in ("default", "mrope"):
            return
        if kind not in ("linear", "yarn"):
            what = f"{kind!r} cannot be written as GGUF"
            raise ModelError(Fault(str(self._folder), "rope_scaling", what))
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def add_base(writer: gguf.GGUFWriter, base: str) -> None:
    """Write which Hub model it was made from, where it was one."""
    if base.count("/") == 1 and not Path(base).exists():
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.partition("/")[2])
        writer.add_base_model_organization(0, base.partition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
