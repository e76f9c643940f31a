"""Text to token ids, where no text is ever a control token: each distinct word is encoded once."""

from __future__ import annotations

import json
import random
import re
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

from tokenizers import Tokenizer, pre_tokenizers

CACHED_WORDS = 200_000
CACHED_WORD_CHARS = 2_000_000
CACHED_PIECES = 2_000
CACHED_PIECE_CHARS = 2_000
"""Bounds of what is remembered between batches, about 50 MB in all."""

ID_BYTES = 4
"""Of a packed token id."""


class TextEncoder:
    """Text -> token ids (packed: see `packed`), where no text is ever an added token.

    ASCII text, such as code, is split into words by the tokenizer's own pattern and each distinct
    word is tokenised once; other text goes through the tokenizer as it is.
    """

    def __init__(self, backend: Tokenizer) -> None:
        # Shares the model with the user's tokenizer, but neither its added tokens nor its
        # truncation, padding and special tokens.
        self._tokenizer = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._tokenizer.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._tokenizer.pre_tokenizer = backend.pre_tokenizer
        self._pattern = _word_pattern(backend)
        # A word of ASCII is split and normalised already: only its bytes are left to be mapped.
        self._word_tokenizer = Tokenizer(backend.model)
        self._word_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        self._words: dict[str, bytes] = {}
        self._word_chars = 0
        self._pieces: dict[str, bytes] = {}

    def encode(self, texts: Iterable[str]) -> dict[str, bytes]:
        """The token ids of each distinct text."""
        # A full cache is replaced, not cleared: another thread may be reading it.
        if len(self._pieces) > CACHED_PIECES:
            self._pieces = {}
        known = self._pieces
        ids: dict[str, bytes] = {}
        words: dict[str, list[str]] = {}
        others: list[str] = []
        for text in texts:
            if text in known:
                ids[text] = known[text]
            elif (split := self._split(text)) is not None:
                words[text] = split
            else:
                others.append(text)
        ids |= self._by_words(words)
        ids |= _encoded(self._tokenizer, others)
        known |= {text: ids[text] for text in ids if len(text) <= CACHED_PIECE_CHARS}
        return ids

    def token_at(self, text: str, position: int) -> int:
        """The index of the token that holds the character at `position`, else of the next one."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return next((i for i, (_, stop) in enumerate(offsets) if stop > position), len(offsets))

    def _split(self, text: str) -> list[str] | None:
        if self._pattern is None or not text.isascii():
            return None
        words = self._pattern.findall(text)
        return words if len("".join(words)) == len(text) else None

    def _by_words(self, words: dict[str, list[str]]) -> dict[str, bytes]:
        if len(self._words) > CACHED_WORDS or self._word_chars > CACHED_WORD_CHARS:
            self._words, self._word_chars = {}, 0
        known = self._words
        new = set(chain.from_iterable(words.values())).difference(known)
        known |= _encoded(self._word_tokenizer, list(new))
        self._word_chars += sum(map(len, new))
        ids = known.__getitem__
        return {text: b"".join(map(ids, split)) for text, split in words.items()}


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> dict[str, bytes]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return {text: packed(one.ids) for text, one in zip(texts, encodings, strict=True)}


def _word_pattern(backend: Tokenizer) -> re.Pattern[str] | None:
    """How a byte-level BPE splits ASCII text into words; None where Python cannot do the same."""
    if backend.pre_tokenizer is None:
        return None
    steps = json.loads(backend.pre_tokenizer.__getstate__()).get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    others = [step for step in steps if step["type"] != "Split"]
    if (
        len(patterns) != 1
        or patterns[0] is None
        or [step["type"] for step in others] != ["ByteLevel"]
    ):
        return None
    if others[0]["add_prefix_space"] or others[0]["use_regex"]:
        return None
    try:
        pattern = re.compile(_for_ascii(patterns[0]), re.ASCII)
    except re.error:
        return None
    # Any other way of splitting or normalising shows on text with all ASCII characters in it.
    probe = "".join(random.Random(0).choices([chr(code) for code in range(128)], k=2_000))
    normalizer = backend.normalizer
    if normalizer is not None and normalizer.normalize_str(probe) != probe:
        return None
    split = [probe[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(probe)]
    return pattern if pattern.findall(probe) == split else None


def _for_ascii(pattern: str) -> str:
    """A tokenizer's pattern in Python's syntax, which has no `\\p{…}`; the same on ASCII text."""
    members = {"\\p{L}": "A-Za-z", "\\p{N}": "0-9", "\\p{M}": r"\x80"}
    translated, in_class = "", False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part in members:
            translated += members[part] if in_class else f"[{members[part]}]"
        else:
            translated += part
            in_class = part == "[" or (in_class and part != "]")
    return translated


def packed(ids: Sequence[int]) -> bytes:
    """Token ids as the bytes of an int32 array, which are joined much faster than lists."""
    return array("i", ids).tobytes()
