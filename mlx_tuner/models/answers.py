"""Answers of a model to prompts, side by side, up to its end-of-sequence ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from mlx_tuner.errors import Fault, ModelError, first_line

Message = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    stopped: bool
    """By an end-of-sequence token, not by the limit."""
    tokens: int
    """How many, without the one that ended it."""


def prompt_tokens(
    tokenizer: Any, messages: Sequence[Message], folder: Path, variables: Mapping[str, Any] = {}
) -> list[int]:
    """The messages, and the beginning of the assistant's turn, as token ids.

    Args:
        folder: the model's, for messages.
        variables: for the chat template.

    Raises:
        ModelError: the model has no chat template, or it refuses the messages.
    """
    if not tokenizer.has_chat_template:
        what = "missing from the tokenizer; take an instruct model"
        raise ModelError(Fault(str(folder), "chat_template", what))
    try:
        tokens: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, **variables
        )
    except Exception as error:  # the template is the model's code, and may fail in any way
        what = f"refuses these messages: {first_line(error)}"
        raise ModelError(Fault(str(folder), "chat_template", what)) from None
    return tokens


def answer_all(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The likeliest answer to each prompt (token ids); mlx-lm answers them side by side.

    Args:
        on_token: is called after each token of all the answers, so that waiting is seen to go on.
    """
    if not prompts:
        return []
    generator = BatchGenerator(model.eval(), stop_tokens=[[id] for id in tokenizer.eos_token_ids])
    made: dict[int, list[int]] = {
        uid: [] for uid in generator.insert(list(prompts), [max_tokens] * len(prompts))
    }
    while responses := generator.next_generated():
        on_token()
        for response in responses:
            if response.finish_reason != "stop":  # the token that ends an answer is not of it
                made[response.uid].append(response.token)
    generator.close()
    return [Answer(tokenizer.decode(ids), len(ids) < max_tokens, len(ids)) for ids in made.values()]
