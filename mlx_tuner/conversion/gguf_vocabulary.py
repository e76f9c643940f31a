"""A tokenizer as llama.cpp knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from mlx_tuner.data.encode import END
from mlx_tuner.errors import Fault, ModelError

_SPLITS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How text is cut before it is encoded, by llama.cpp's names; any other would be cut wrongly."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int, folder: Path) -> None:
    """Write the tokenizer, a token an embedding row; rows without one are named [PADi].

    Raises:
        ModelError: llama.cpp would cut text in another way.
    """
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splits = table["model"], table["pre_tokenizer"]
    patterns = [
        part["pattern"].get("Regex")
        for part in (splits or {}).get("pretokenizers", [])
        if part["type"] == "Split"
    ]
    split = next((name for name, pattern in _SPLITS.items() if patterns == [pattern]), None)
    if model["type"] != "BPE" or split is None:
        what = "cuts text in another way than Qwen's, so llama.cpp would give it other tokens"
        raise ModelError(Fault(str(folder / "tokenizer.json"), "pre_tokenizer", what))
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
    for added in table["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    )
    _add_special(writer, tokenizer, tokens)


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any, tokens: list[str]) -> None:
    """Write which tokens end a turn or a text, and the chat template."""
    chats = tokenizer.chat_template
    end = tokens.index(END) if chats and END in tokens else None
    if end is not None:
        writer.add_eot_token_id(end)
    writer.add_eos_token_id(tokenizer.eos_token_id if end is None else end)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)
    if chats:
        writer.add_chat_template(chats)
