"""Models and rows made of random numbers, in real shapes and in tiny ones: no download."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_tuner.engine.batching import Example
from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.models import model as models
from mlx_tuner.models.architecture import skeleton
from mlx_tuner.models.folder import check_folder

# family-size: hidden, intermediate, layers, heads, kv heads, vocabulary; the head is tied to the
# embedding where the vocabulary is 151,936 and the size is below 7B. From the published configs.
_QWEN2_5 = {
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "3b": (2048, 11008, 36, 16, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "14b": (5120, 13824, 48, 40, 8, 152064),
    "32b": (5120, 27648, 64, 40, 8, 152064),
    "72b": (8192, 29568, 80, 64, 8, 152064),
}
_QWEN3 = {
    "0.6b": (1024, 3072, 28, 16, 8, 151936),
    "1.7b": (2048, 6144, 28, 16, 8, 151936),
    "4b": (2560, 9728, 36, 32, 8, 151936),
    "8b": (4096, 12288, 36, 32, 8, 151936),
    "14b": (5120, 17408, 40, 40, 8, 151936),
    "32b": (5120, 25600, 64, 64, 8, 151936),
}
_UNTIED = frozenset({"7b", "8b", "14b", "32b", "72b"})

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "tie_word_embeddings": False},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION},
    "qwen3_5": _LINEAR_ATTENTION,
    "qwen3_5_moe": {**_EXPERTS, **_LINEAR_ATTENTION},
}
"""Every family that we take, and what its tiny config has beside `TINY`."""


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a model of a few thousand parameters, of every family that we take.

    Args:
        changes: other sizes than `TINY`'s.
    """
    config = {**TINY, **FAMILIES[family], **changes}
    if not family.startswith("qwen3_5"):
        return {"model_type": family, **config}
    return {"model_type": family, "text_config": {"model_type": f"{family}_text", **config}}


SHAPES = (
    *(f"qwen2.5-{size}" for size in _QWEN2_5),
    *(f"qwen3-{size}" for size in _QWEN3),
)

PREFIX_TOKENS = 24
"""Qwen2.5's own system prompt in its chat template: the same in every row without one."""


def config_of(shape: str) -> dict[str, Any]:
    """The ``config.json`` of a shape such as "qwen2.5-1.5b", "Qwen2.5-Coder-1.5B" or "qwen3-4b".

    Raises:
        UsageError: there is none of that name.
    """
    name = shape.lower().replace("coder-", "").removesuffix("-instruct").removesuffix("-base")
    if name not in SHAPES:
        close = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SHAPES)}"
        raise UsageError(Fault(shape, "--model", f"no such shape, folder or Hub name; {hint}"))
    family, _, size = name.partition("-")
    sizes = (_QWEN3 if family == "qwen3" else _QWEN2_5)[size]
    hidden, intermediate, layers, heads, kv_heads, vocabulary = sizes
    config: dict[str, Any] = {
        "model_type": "qwen3" if family == "qwen3" else "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": size not in _UNTIED,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }
    return config | ({"head_dim": 128} if family == "qwen3" else {})


def find(name: str) -> tuple[dict[str, Any], Path | None]:
    """Config and folder of a folder or Hub name; the config alone of a shape."""
    if name.startswith(models.BUILTIN) or "/" in name or Path(name).is_dir():
        folder = models.resolve(name)
        return check_folder(folder), folder
    return config_of(name), None


def hub_name(shape: str) -> str:
    """The published model of a shape: "Qwen/Qwen2.5-1.5B-Instruct" for "qwen2.5-1.5b"."""
    family, _, size = shape.partition("-")
    return f"Qwen/{family.title()}-{size.upper()}{'-Instruct' if family != 'qwen3' else ''}"


def random_model(config: dict[str, Any], dtype: mx.Dtype) -> nn.Module:
    """A model of the config with random weights, in memory; quantised where the config says so."""
    mx.random.seed(0)
    model = skeleton(config)
    model.set_dtype(dtype)
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)  # one by one: never all the intermediate values at once
    return model


def twin(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Another model of the same config on the same weights, which take no memory twice."""
    other = skeleton(config)
    other.update(model.parameters())
    return other


def rows(count: int, vocabulary: int, *, length: int | None = None, seed: int = 0) -> list[Example]:
    """Rows of random tokens with the lengths of CodeAlpaca-20k in Qwen2.5's chat template.

    A row is a prefix of 24 tokens that all rows share; a prompt of its own, log-normal (mean of
    the logarithm 3.3, standard deviation 0.4: mean 30 tokens, 95 % below 53); and an answer, the
    targets, gamma (shape 1.2, mean 56 tokens: a quarter below 20, 5 % above 155). Together 110
    tokens on average, as measured on 1,400 real rows; batches of 8 padded to their longest
    would be 1.8 times as large as the rows, as those of the real ones are.

    Args:
        length: give every row exactly this many tokens, half of them targets, instead.
    """
    random = np.random.default_rng(seed)
    shared = random.integers(0, vocabulary, PREFIX_TOKENS)
    made = []
    for _ in range(count):
        prompt = max(1, round(random.lognormal(3.3, 0.4)))
        answer = max(1, round(random.gamma(1.2, 56 / 1.2)))
        if length is not None:
            answer = max(1, length // 2)
            prompt = max(1, length - answer - PREFIX_TOKENS)
        own = random.integers(0, vocabulary, prompt + answer)
        tokens = np.concatenate([shared, own]).astype(np.int32)[:length]
        made.append(Example(tokens, np.arange(len(tokens)) >= len(tokens) - answer))
    return made
