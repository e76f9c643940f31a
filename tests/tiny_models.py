"""Tiny random Qwen models in Hugging Face layout, and adapters for them."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2, qwen3

from mlx_tuner.engine import lora
from mlx_tuner.models.adapter import Adapter, fingerprint

BUILTIN = Path(str(files("mlx_tuner") / "builtin" / "tiny-qwen"))
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "bos_token_id": 2037,
    "eos_token_id": 2039,
    "hidden_act": "silu",
}


def make_model(folder, model_type="qwen2", *, dtype=mx.float32, seed=0, **changes):
    """Write a random model; returns its folder."""
    config = {
        "model_type": model_type,
        "architectures": ["Qwen2ForCausalLM" if model_type == "qwen2" else "Qwen3ForCausalLM"],
        "torch_dtype": str(dtype).rpartition(".")[2],
        "tie_word_embeddings": True,
        **({"head_dim": 16} if model_type == "qwen3" else {}),
        **CONFIG,
        **changes,
    }
    module = qwen2 if model_type == "qwen2" else qwen3
    model = module.Model(module.ModelArgs.from_dict(config))
    keys = mx.random.split(mx.random.key(seed), 1000)
    weights = {}
    for i, (name, value) in enumerate(sorted(tree_flatten(model.parameters()))):
        noise = mx.random.normal(value.shape, key=keys[i])
        weights[name] = (1 + 0.1 * noise if "norm" in name else 0.2 * noise).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(BUILTIN / name, folder / name)
    return folder


def make_adapter(
    model, folder, *, rank=4, scale=2.0, targets="all-linear", num_layers=None, size=0.1
):
    """A random adapter, as after training, for a model that stays without it."""
    paths = lora.find_targets(model, targets, num_layers)
    modules = dict(model.named_modules())
    tensors = {}
    for i, path in enumerate(paths):
        outputs, inputs = lora.dimensions(modules[path])
        a, b = mx.random.split(mx.random.key(100 + i))
        tensors[f"{path}.lora_a"] = size * mx.random.normal((inputs, rank), key=a)
        tensors[f"{path}.lora_b"] = size * mx.random.normal((rank, outputs), key=b)
    return Adapter(
        tensors,
        rank=rank,
        scale=scale,
        dropout=0.0,
        num_layers=num_layers or len(model.layers),
        base=str(folder),
        fingerprint=fingerprint(folder),
    )


def loss_by_mlx_lm(base, adapter, rows, system=None):
    """(mean loss, number of the answers' tokens), one row and one forward pass at a time."""
    model, tokenizer = mlx_lm.load(str(base), adapter_path=adapter and str(adapter))
    total, count = 0.0, 0
    for row in rows:
        chat = [{"role": "system", "content": system}] if system else []
        chat += [{"role": "user", "content": row["prompt"]}]
        start = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True))
        chat += [{"role": "assistant", "content": row["completion"]}]
        tokens = tokenizer.apply_chat_template(chat)
        end = tokens.index(tokenizer.eos_token_id, start) + 1
        losses = nn.losses.cross_entropy(model(mx.array([tokens]))[0, :-1], mx.array(tokens[1:]))
        total += losses[start - 1 : end - 1].sum().item()
        count += end - start
    return total / count, count


def equal(left, right):
    """Whether two tables of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and mx.array_equal(left[name], right[name]).item()
        for name in left
    )
