"""Checks a model folder before anybody reads it: what it names, and how its files are linked.

Only JSON is read here. Every way to a model (`model.load_tokenizer`, `load`, and
`model_files.check_model_folder`) begins here, since mlx-lm and transformers open what they find.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.architecture import DTYPE_KEYS, MODEL_TYPES
from mlx_tuner.system import foreign
from mlx_tuner.system.foreign import read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATES = "additional_chat_templates"

CODE_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal")
"""Config keys by which a folder asks other loaders to run code. They are ignored."""

DTYPES = ("bfloat16", "float16", "float32")

NOT_OURS = "quantised by another tool; take the model's original weights"

_NAMING_CODE: dict[str, frozenset[str | None]] = {
    "tokenizer_class": frozenset(
        {
            *(None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer"),
            *("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"),
        }
    ),
    "chat_template_type": frozenset({None}),
    "tool_parser_type": frozenset({None, "json_tools", "qwen3_coder"}),
    "fast_tokenizer_files": frozenset({None}),
}
"""Keys by which transformers and mlx-lm import modules or open files, and what they may say."""

_TOKEN_KEYS = {
    *("__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special"),
}
"""Of a token. The tokenizers library prints the names of all others, as they are."""

_MOST_BYTES = dict.fromkeys((".json", ".txt", ".model", ".tiktoken"), foreign.MAX_JSON_BYTES) | {
    ".jinja": 1_000_000,
    ".safetensors": math.inf,
}
"""What mlx-lm and transformers may open, by suffix."""

_SIZES = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "num_experts": 100_000,
    "hidden_size": 2**31,
    "intermediate_size": 2**31,
    "vocab_size": 2**31,
}
"""Upper bounds of sizes, so that building the layers of a hostile config ends."""
_MAX_SIZE = 2**31  # of any other number that layers are built from: MLX keeps shapes in 32 bits


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuse a folder with anything unsafe to open, import or build; returns its config.

    Raises:
        ModelError: with all that is wrong.
    """
    if not folder.is_dir():
        raise ModelError(Fault(str(folder), "", "no such folder"))
    path = folder / CONFIG
    if not path.exists() and not path.is_symlink():
        raise ModelError(Fault(str(path), "", "missing; is this a model folder?"))
    if faults := list(_file_faults(folder)):
        raise ModelError(*faults)
    config = read_json(path)
    faults = [Fault(str(path), key, what) for key, what in _config_faults(config)]
    if (folder / "hf_quant_config.json").exists() and "quantization" not in config:
        faults.append(Fault(str(folder / "hf_quant_config.json"), "", NOT_OURS))
    for name in (CONFIG, TOKENIZER_CONFIG):
        table = config if name == CONFIG else read_optional(folder / name)
        faults += [
            Fault(str(folder / name), key, f"{str(table[key])[:40]!r} is not taken here; remove it")
            for key, known in _NAMING_CODE.items()
            if key in table and not _is_one_of(table[key], known)
        ]
    if faults:
        raise ModelError(*faults)
    return config


def check_tokens(folder: Path) -> None:
    """Refuse tokens of a checked folder that say more than a token can.

    Raises:
        ModelError: that, or a file of the tokenizer is broken or nested too deeply.
    """
    faults = [
        Fault(str(path), key[:40], "is not taken here of a token; remove it")
        for path, token in _tokens(folder)
        for key in sorted(token.keys() - _TOKEN_KEYS)
    ]
    if faults:
        raise ModelError(*faults)


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or an empty one where there is none."""
    return read_json(path) if path.exists() else {}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in any form."""
    return any((folder / name).is_file() for name in (TOKENIZER, "vocab.json"))


def _file_faults(folder: Path) -> Iterator[Fault]:
    """Files that must not be opened, of all that mlx-lm and transformers may open."""
    yield from foreign.faults_of_files(folder, _MOST_BYTES)
    for path in folder.glob(f"{TEMPLATES}/*"):
        if fault := foreign.fault_of(path, folder, _MOST_BYTES[".jinja"]):
            yield fault


def _tokens(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The tables that transformers makes tokens of, each with its file."""
    settings = read_optional(folder / TOKENIZER_CONFIG)
    special = read_optional(folder / SPECIAL_TOKENS)
    places = (
        (TOKENIZER, read_optional(folder / TOKENIZER).get("added_tokens")),
        (TOKENIZER_CONFIG, settings.get("added_tokens_decoder")),
        (SPECIAL_TOKENS, special),
        (SPECIAL_TOKENS, special.get("extra_special_tokens")),
    )
    for name, place in places:
        tokens = dict(enumerate(place)) if isinstance(place, list) else place
        for key, token in tokens.items() if isinstance(tokens, dict) else ():
            if isinstance(token, dict) and key != "extra_special_tokens":
                yield folder / name, token
    values: list[Any] = [settings]
    while values:  # elsewhere an object is a token if it has a `__type`
        value = values.pop()
        if isinstance(value, dict):
            if "__type" in value:
                yield folder / TOKENIZER_CONFIG, value
            values += value.values()
        elif isinstance(value, list):
            values += value


def _config_faults(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model_type = config.get("model_type")
    if not _is_one_of(model_type, MODEL_TYPES):
        yield "model_type", f"{model_type!r} is not one of {', '.join(sorted(MODEL_TYPES))}"
    if "model_file" in config:
        yield "model_file", "the model needs code from its own folder, which is never run"
    texts = config.get("text_config", {})
    if not isinstance(texts, dict):
        yield "text_config", "must be an object"
        texts = {}
    elif config.get("text_config", config).get("vocab_size") is None:
        yield "text_config.vocab_size" if texts else "vocab_size", "missing"
    for name, table in (("", config), ("text_config.", texts)):
        for key, size in table.items():
            highest = _SIZES.get(key, _MAX_SIZE)
            is_size = key in _SIZES and size is not None
            if is_size and (type(size) is not int or not 0 <= size <= highest):
                yield name + key, f"{str(size)[:40]} is not a whole number up to {highest:,}"
            elif type(size) is int and abs(size) > highest:
                yield name + key, f"{str(size)[:40]} is over {highest:,}"
        for key in DTYPE_KEYS:
            if not _is_one_of(table.get(key), {None, *DTYPES}):
                what = f"{str(table[key])[:40]!r} is not one of {', '.join(DTYPES)}"
                yield name + key, what
        if isinstance(other := table.get("quantization_config"), dict) and "quant_method" in other:
            yield f"{name}quantization_config", f"{other['quant_method']!r}: {NOT_OURS}"
    quantization = config.get("quantization")
    if quantization is not None and not (
        isinstance(quantization, dict)
        and all(type(quantization.get(key)) is int for key in ("bits", "group_size"))
    ):
        yield "quantization", "must have bits and group_size"


def _is_one_of(value: Any, known: Any) -> bool:
    return (value is None or isinstance(value, str)) and value in known
