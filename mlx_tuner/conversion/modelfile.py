"""How Ollama runs a GGUF file: its Modelfile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_tuner.conversion.fuse import recipe_of
from mlx_tuner.data.encode import END
from mlx_tuner.errors import Fault, ModelError

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
    """How Ollama runs the file: the turns as the model's own template writes them.

    Raises:
        ModelError: a text of the run's or the model's cannot be quoted there.
    """
    lines = [f"FROM ./{name}"]
    if tokenizer.chat_template:
        message = [{"role": "user", "content": "Hello"}]
        turns = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if chatml := _CHATML_TURNS.fullmatch(turns):
            lines += [f'TEMPLATE """{_CHATML}"""']
            recipe = recipe_of(source)
            if system := (recipe and recipe.data.system_prompt) or chatml["system"]:
                if '"""' in system or system.endswith('"'):
                    what = 'holds """ or ends in a quote, which would end it in a Modelfile early'
                    raise ModelError(Fault(str(source), "system prompt", f"{what}; change it"))
                lines += [f'SYSTEM """{system}"""']
        lines += [f'PARAMETER stop "{END}"']
    if not tokenizer.eos_token.isprintable() or '"' in tokenizer.eos_token:
        what = f"{tokenizer.eos_token!r} cannot be written into a Modelfile"
        raise ModelError(Fault(str(source), "eos_token", what))
    lines += [f'PARAMETER stop "{tokenizer.eos_token}"']
    return "\n".join(dict.fromkeys(lines)) + "\n"
