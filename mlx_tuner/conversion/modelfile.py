"""How Ollama runs a GGUF file: its Modelfile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_tuner.conversion.fuse import TURN_END, recipe_of

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_CHATML_TURNS = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?"
    r"<\|im_start\|>user\nHello<\|im_end\|>\n<\|im_start\|>assistant\n",
    re.DOTALL,
)


def modelfile(name: str, tokenizer: Any, source: Path) -> str:
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
