"""A small random model of every Qwen type that we take, as Hugging Face publishes it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

BUILTIN = Path(__file__).resolve().parent.parent / "mlx_tuner" / "builtin" / "tiny-qwen"

_DENSE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 2039,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "head_dim": 16,
}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "head_dim": 16,
}
CONFIGS = {
    "qwen2": _DENSE,
    "qwen2_moe": _DENSE | _EXPERTS | {"tie_word_embeddings": False},
    "qwen3": _DENSE | {"head_dim": 16},
    "qwen3_moe": _DENSE | _EXPERTS,
    "qwen3_next": _DENSE | _EXPERTS | _LINEAR_ATTENTION,
    "qwen3_5": {"text_config": _DENSE | _LINEAR_ATTENTION, "eos_token_id": 2039},
    "qwen3_5_moe": {"text_config": _DENSE | _EXPERTS | _LINEAR_ATTENTION, "eos_token_id": 2039},
}


def write_model(
    folder: Path,
    model_type: str = "qwen2",
    *,
    dtype: mx.Dtype = mx.float32,
    shards: int = 1,
    seed: int = 0,
    **config: object,
) -> Path:
    """Write a random model with the built-in model's tokenizer; returns its folder."""
    settings = {**CONFIGS[model_type], "model_type": model_type, **config}
    model_class, args_class = _get_classes(settings)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(json.loads(json.dumps(settings))))
    # Three times larger than at initialisation, so that logits differ visibly between tokens.
    weights = tree_map(lambda v: (3 * v if v.ndim > 1 else v).astype(dtype), model.parameters())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    _write_weights(folder, _published(dict(tree_flatten(weights))), shards)
    return folder


def _write_weights(folder: Path, weights: dict[str, mx.array], shards: int) -> None:
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
        return
    names, weight_map = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        mx.save_safetensors(str(folder / file), {n: weights[n] for n in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _published(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts one by one, as Hugging Face keeps Qwen2's and Qwen3's mixtures; MLX stacks them."""
    published = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(model\..*)\.switch_mlp\.(\w+)\.weight", name)
        if match is None:
            published[name] = value
        else:
            for expert in range(value.shape[0]):
                published[f"{match[1]}.experts.{expert}.{match[2]}.weight"] = value[expert]
    return published
