"""Small random models of every Qwen type that we take, as Hugging Face has them; adapters."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes

from mlx_tuner.bench.model import FAMILIES, tiny_config
from mlx_tuner.engine import lora
from mlx_tuner.models.adapter import Adapter
from mlx_tuner.models.base import fingerprint

BUILTIN = Path(str(files("mlx_tuner") / "builtin" / "tiny-qwen"))
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

_CHANGES = {"vocab_size": 2048, "num_hidden_layers": 3, "eos_token_id": 2039}
CONFIGS = {family: tiny_config(family, **_CHANGES) | {"eos_token_id": 2039} for family in FAMILIES}


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
    named = {"model_type": model_type, "torch_dtype": str(dtype).rpartition(".")[2]}
    settings = {**CONFIGS[model_type], **named, **config}
    model_class, args_class = _get_classes(settings)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(json.loads(json.dumps(settings))))

    def trained(path: str, value: mx.array) -> mx.array:
        # Larger than at initialisation, so that logits differ visibly between tokens.
        if value.ndim > 1:
            value = 3 * value
        elif "norm" in path:
            value = value * mx.random.uniform(0.8, 1.2, value.shape)
        return value.astype(dtype)

    weights = tree_map_with_path(trained, model.parameters())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    for name in TOKENIZER:
        shutil.copyfile(BUILTIN / name, folder / name)
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
