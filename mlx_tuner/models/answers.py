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

SIDE_BY_SIDE = 64
"""Answers that are made at once: each has keys and values of its own in memory."""
_TAIL = 12
"""Last tokens of an answer, in which a text that ends it is looked for."""


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
    *,
    ends: Sequence[str] = (),
    on_token: Callable[[], None] = lambda: None,
    on_answer: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The likeliest answer to each prompt (token ids); mlx-lm answers them side by side.

    Args:
        ends: texts before which an answer ends, as it does before an end-of-sequence token.
        on_token: is called after each token of all the answers, so that waiting is seen to go on.
        on_answer: is called with 1 where an answer is complete.
    """
    if not prompts:
        return []
    generator = BatchGenerator(
        model.eval(),
        stop_tokens=[[id] for id in tokenizer.eos_token_ids],
        completion_batch_size=SIDE_BY_SIDE,
    )
    # Prompts of like length are read together, so that few of their places are padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    uids = generator.insert([prompts[i] for i in order], [max_tokens] * len(prompts))
    made: dict[int, list[int]] = {uid: [] for _, uid in sorted(zip(order, uids, strict=True))}
    cut: dict[int, str] = {}
    """What was said before one of `ends`."""
    while responses := generator.next_generated():
        on_token()
        for response in responses:
            uid, ids = response.uid, made[response.uid]
            if response.finish_reason != "stop":  # the token that ends an answer is not of it
                ids.append(response.token)
            tail = tokenizer.decode(ids[-_TAIL:]) if ends else ""
            if any(end in tail for end in ends):
                text = tokenizer.decode(ids)
                if found := [text.index(end) for end in ends if end in text]:
                    cut[uid] = text[: min(found)]
                    generator.remove([uid])
            if uid in cut or response.finish_reason:
                on_answer(1)
    generator.close()
    return [
        Answer(cut.get(uid, tokenizer.decode(ids)), uid in cut or len(ids) < max_tokens, len(ids))
        for uid, ids in made.items()
    ]
