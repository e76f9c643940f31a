"""Checked rows -> token ids and loss masks, through the model's own ChatML template.

A rendered conversation is split at the tokenizer's added tokens, and only the text between them is
tokenised: the template alone says what is a control token, never what a row's content spells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from os.path import commonprefix
from typing import Any, Literal

import numpy as np

from mlx_tuner.data.rows import ParsedRow
from mlx_tuner.data.text_encoder import ID_BYTES, TextEncoder, packed
from mlx_tuner.errors import Fault, ModelError, first_line

LongRowPolicy = Literal["truncate", "skip", "error"]

START, END = "<|im_start|>", "<|im_end|>"
HEADER = "assistant\n"
"""In ChatML an assistant's turn is START HEADER answer END; answer and END are the targets."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a row from being trained on."""

    kind: Literal["too long", "without a target", "refused by the template"]
    what: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as the model sees it."""

    tokens: np.ndarray
    """Token ids, int32, shape (n,)."""
    loss_mask: np.ndarray
    """Whether a token is a target, bool, shape (n,); the first token never is."""
    truncated_tokens: int = 0
    """Tokens cut off the end, the row's EOS among them."""
    control_tokens: int = 0
    """Control tokens that the conversation's content spells; they were encoded as text."""
    problem: Problem | None = None
    """Why the row cannot be trained on."""

    @property
    def length(self) -> int:
        """Tokens before anything was cut off."""
        return len(self.tokens) + self.truncated_tokens


def unwrap(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's TokenizerWrapper, or `tokenizer` itself."""
    from transformers import PreTrainedTokenizerBase

    # A transformers tokenizer has a `_tokenizer` as well: the Rust one.
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer._tokenizer


class Encoder:
    """Encodes rows as transformers' `apply_chat_template` does, only faster.

    Args:
        max_seq_length: tokens of a row; what is beyond is cut off, or as `on_long_row` says.
        mask_prompt: whether only the assistants' turns are targets.
        system_prompt: the system message of conversations that have none.
        template_variables: what the chat template is given beside them.
        on_long_row: what a row of too many tokens does: "truncate", "skip" or "error".

    Raises `ModelError` for a tokenizer that it cannot reproduce to the token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_seq_length: int,
        mask_prompt: bool = True,
        system_prompt: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        on_long_row: LongRowPolicy = "truncate",
    ) -> None:
        self._tokenizer = unwrap(tokenizer)
        self._variables = dict(template_variables or {})
        self._mask_prompt = mask_prompt
        self._max_seq_length = max_seq_length
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.on_long_row = on_long_row

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(Fault("", "tokenizer", "has no tokenizer.json, which is needed"))
        added = backend.get_added_tokens_decoder()
        for token in added.values():
            if token.lstrip or token.rstrip or token.single_word:
                what = f"added token {token.content!r} depends on the text around it; not supported"
                raise ModelError(Fault("", "tokenizer", what))
        self._text_encoder = TextEncoder(backend)
        self._ids = {token.content: packed([i]) for i, token in added.items()}
        self._added_tokens = _any_of(self._ids)
        if eos := self._tokenizer.eos_token:
            self._ids.setdefault(eos, packed([self._tokenizer.eos_token_id]))
        control_tokens = [token.content for token in added.values() if token.special]
        self._control_tokens = _any_of(control_tokens)
        self._control_prefix = commonprefix(control_tokens)  # noqa: RUF071 - of characters
        self._header_ids = self._text_encoder.encode([HEADER])[HEADER]
        self._chat_fault = self._why_no_chat()

    def encode(self, rows: Sequence[ParsedRow]) -> list[Encoded]:
        """One `Encoded` for each of `rows`, in their order.

        Raises:
            ModelError: a row is a conversation, and the tokenizer has no ChatML template.
        """
        rendered = self._rendered(rows)
        ids = self._text_encoder.encode({text for one in rendered for text in one.pieces[::2]})
        return [self._encoded(one, ids) for one in rendered]

    # --- Row -> rendered ------------------------------------------------------------------------

    def _rendered(self, rows: Sequence[ParsedRow]) -> list[_Rendered]:
        rendered = [_Rendered([]) if row.messages else self._text(row.text) for row in rows]
        # transformers renders a batch with one set of tools, and most rows have none.
        plain: dict[int, list[dict[str, Any]]] = {}
        for i, row in enumerate(rows):
            if not row.messages:
                continue
            if self._chat_fault:
                raise ModelError(Fault("", "chat_template", self._chat_fault))
            chat = self._chat(row.messages)
            if row.tools is None and not self._spells_control(chat):
                plain[i] = chat
            else:
                rendered[i] = self._rare_chat(chat, row.tools)
        for i, one in zip(plain, self._plain_chats(list(plain.values())), strict=True):
            rendered[i] = one
        return rendered

    def _text(self, text: str) -> _Rendered:
        # A text is already what the model sees: the control tokens that it spells are meant.
        pieces = self._added_tokens.split(text)
        eos = self._tokenizer.eos_token
        if eos and pieces[-2:] != [eos, ""]:
            pieces += [eos, ""]
        return _Rendered(pieces, is_chat=False)

    def _plain_chats(self, chats: list[list[dict[str, Any]]]) -> list[_Rendered]:
        try:
            rendered = self._render(chats)
        except Exception as error:
            # The template is the model's code: it may refuse a row in any way it likes.
            if len(chats) == 1:
                return [_Rendered([], problem=_refusal(error))]
            return [one for chat in chats for one in self._plain_chats([chat])]
        return [_Rendered(self._added_tokens.split(text)) for text in rendered]

    def _rare_chat(
        self, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> _Rendered:
        """A conversation with tools, or one that spells control tokens.

        What it spells is hidden while the template runs, and put back as text between the
        control tokens that the template itself wrote.
        """
        (chat, tools), hidden, restore = _hide(self._control_tokens, [chat, tools])
        try:
            (rendered,) = self._render([chat], tools)
        except Exception as error:
            return _Rendered([], problem=_refusal(error))
        pieces = self._added_tokens.split(rendered)
        pieces[::2] = [restore(text) for text in pieces[::2]]
        return _Rendered(pieces, control_tokens=hidden)

    def _render(
        self, chats: list[list[dict[str, Any]]], tools: list[dict[str, Any]] | None = None
    ) -> list[str]:
        return self._tokenizer.apply_chat_template(
            chats, tools=tools, tokenize=False, **self._variables
        )

    def _chat(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the recipe's system prompt, as every Qwen template takes them."""
        if any(message.get("content") is None for message in messages):
            # A turn that only calls tools: Qwen3's template fails on content that is not there.
            messages = [{**m, "content": m.get("content") or ""} for m in messages]
        return messages if messages[0]["role"] == "system" else self._system + messages

    def _spells_control(self, chat: list[dict[str, Any]]) -> bool:
        return any(
            self._control_prefix in text and self._control_tokens.search(text)
            for message in chat
            for text in (message.values() if len(message) == 2 else _strings(message))
        )

    # --- Rendered -> tokens ---------------------------------------------------------------------

    def _tokens(
        self, rendered: _Rendered, ids: dict[str, bytes]
    ) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The row's tokens, and where each assistant's turn begins and ends among them."""
        pieces = rendered.pieces
        parts = [b""] * len(pieces)
        parts[::2] = map(ids.__getitem__, pieces[::2])
        parts[1::2] = map(self._ids.__getitem__, pieces[1::2])
        ends = list(accumulate(map(len, parts)))
        turns: list[tuple[int, int]] = []
        start: int | None = None
        for i in range(1, len(pieces), 2):
            if pieces[i] == START and (text := pieces[i + 1]).startswith(HEADER):
                start = ends[i] // ID_BYTES + self._header_length(text, ids[text])
            elif pieces[i] == END and start is not None:
                turns.append((start, ends[i] // ID_BYTES))
                start = None
        return np.frombuffer(b"".join(parts), np.int32), turns

    def _encoded(self, rendered: _Rendered, ids: dict[str, bytes]) -> Encoded:
        tokens, spans = self._tokens(rendered, ids)
        if not (rendered.is_chat and self._mask_prompt):
            spans = [(1, len(tokens))]
        loss_mask = np.zeros(len(tokens), np.bool_)
        for start, stop in spans:
            loss_mask[start:stop] = True

        length, limit, problem = len(tokens), self._max_seq_length, rendered.problem
        excess = max(length - limit, 0)
        if excess and self.on_long_row != "truncate":
            what = f"{length} tokens, more than data.max_seq_length = {limit}"
            problem, excess = Problem("too long", what), 0
        elif excess:
            tokens, loss_mask = tokens[:limit], loss_mask[:limit]
        if problem is None and not loss_mask.any():
            what = "no target tokens"
            if excess:
                what += f" within data.max_seq_length = {limit} of its {length} tokens"
            problem = Problem("without a target", what)
        return Encoded(tokens, loss_mask, excess, rendered.control_tokens, problem)

    def _header_length(self, turn: str, ids: bytes) -> int:
        """Tokens before the answer's first. One that straddles the border counts as the answer's.

        That is how transformers' `char_to_token` sees it.
        """
        if ids.startswith(self._header_ids):
            return len(self._header_ids) // ID_BYTES
        return self._text_encoder.token_at(turn, len(HEADER))

    def _why_no_chat(self) -> str | None:
        """What keeps conversations from being encoded with this tokenizer, if anything."""
        if not getattr(self._tokenizer, "chat_template", None):
            return "missing from the tokenizer; train on `text` rows or use an instruct model"
        missing = [token for token in (START, END) if not self._control_tokens.fullmatch(token)]
        if missing:
            return f"the tokenizer lacks {' and '.join(missing)}; only ChatML models are supported"
        chat = [
            {"role": "user", "content": "What's 1 + 1?"},
            {"role": "assistant", "content": "It's  2.\n"},
        ]
        try:
            (rendered,) = self._render([chat])
            (expected,) = self._tokenizer.apply_chat_template(
                [chat], return_dict=False, **self._variables
            )
        except Exception as error:
            return f"cannot render a plain conversation: {first_line(error)}"
        answer = rendered.rpartition(START)[2]
        if not (answer.startswith(HEADER) and END in answer):
            return "not ChatML (<|im_start|>assistant … <|im_end|>), which is all that is supported"
        one = _Rendered(self._added_tokens.split(rendered))
        tokens, _ = self._tokens(one, self._text_encoder.encode(one.pieces[::2]))
        if tokens.tolist() != expected:
            return "the tokenizer encodes a conversation in a way that is not supported"
        return None


@dataclass(slots=True)
class _Rendered:
    """A row as the model reads it, split at added tokens: text, token, text, …, text."""

    pieces: list[str]
    is_chat: bool = True
    control_tokens: int = 0
    problem: Problem | None = None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches one of `tokens`, the longest first; splitting by it keeps them."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, the keys of its objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _hide(tokens: re.Pattern[str], value: Any) -> tuple[Any, int, Callable[[str], str]]:
    """Replace the tokens that strings in `value` spell by placeholders.

    Returns the copy, the number of tokens replaced, and a function that puts them back into a text.
    Placeholders are private-use characters around numbers, so templates carry them through.
    """
    spelled: list[str] = []
    mark = 0
    while any(f"\ue000{mark}:" in text for text in _strings(value)):
        mark += 1

    def placeholder(match: re.Match[str]) -> str:
        spelled.append(match.group())
        return f"\ue000{mark}:{len(spelled) - 1}\ue000"

    def hide(item: Any) -> Any:
        if isinstance(item, str):
            return tokens.sub(placeholder, item)
        if isinstance(item, dict):
            return {hide(key): hide(child) for key, child in item.items()}
        return [hide(child) for child in item] if isinstance(item, list) else item

    placeholders = re.compile(f"\ue000{mark}:(\\d+)\ue000")

    def restore(text: str) -> str:
        return placeholders.sub(lambda match: spelled[int(match.group(1))], text)

    hidden = hide(value)
    return hidden, len(spelled), restore


def _refusal(error: Exception) -> Problem:
    what = f"the model's chat template refuses it: {first_line(error)}"
    return Problem("refused by the template", what)
