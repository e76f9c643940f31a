"""One row of training data: JSON in, a checked `ParsedRow` out, or every fault by name.

Forms: `messages` (and `tools`), `prompt`/`completion`, `instruction`/`input`/`output`, `text`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from mlx_tuner.data.strict_json import MAX_DEPTH, decode, has_repeats, join, shown
from mlx_tuner.errors import DataError, Fault
from mlx_tuner.system.foreign import is_deep

Form = Literal["messages", "prompt", "instruction", "text"]

FIELDS: dict[Form, frozenset[str]] = {
    "messages": frozenset({"messages", "tools"}),
    "prompt": frozenset({"prompt", "completion"}),
    "instruction": frozenset({"instruction", "input", "output"}),
    "text": frozenset({"text"}),
}
"""The fields of each form; a row has those of exactly one."""

ROLES = ("system", "user", "assistant", "tool")

_ALL_FIELDS = frozenset().union(*FIELDS.values())
_FORMS_IN_WORDS = (
    "a row has `messages`, or `prompt` and `completion`, "
    "or `instruction` and `output` (and `input`), or `text`"
)


class ParsedRow(msgspec.Struct, frozen=True):
    """A checked row: a conversation, or a text (form "text")."""

    form: Form
    messages: list[dict[str, Any]]
    """Chat messages as the chat template takes them; empty for form "text"."""
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    unused: tuple[str, ...] = ()
    """Fields of the row that nothing is trained on, such as an id."""

    def digest(self) -> bytes:
        """8 bytes that are equal for rows with the same content, however they were written."""
        content = f"text {len(self.text)} {self.text}" if self.form == "text" else ""
        for message in self.messages:
            text = message.get("content")
            if len(message) > 2 or type(text) is not str or self.tools is not None:
                content = json.dumps([self.messages, self.tools], sort_keys=True)
                break
            content += f"{message['role']} {len(text)} {text}"
        return blake2b(content.encode(), digest_size=8).digest()


def parse_row(raw: bytes, *, where: str) -> ParsedRow:
    """The row that the UTF-8 JSON object `raw` holds.

    `where` is FILE:LINE of its first line. Raises `DataError` with all of the row's faults.
    """
    value = decode(raw, where)
    if type(value) is not dict:
        what = f"{_kind(value)}, not an object; {_FORMS_IN_WORDS}"
        raise DataError(Fault(where, "", what))
    form, unused = _form_of_keys(tuple(value))
    if form is None:
        form = _form(value, where)
    faults: list[Fault] = []
    if form == "messages":
        messages = _messages(value.get("messages"), where, faults)
    elif form == "text":
        messages = []
    else:
        asked, told = ("prompt", "completion") if form == "prompt" else ("instruction", "output")
        question = _text(value, asked, where, faults)
        answer = _text(value, told, where, faults, may_be_empty=True)
        if form == "instruction" and value.get("input") is not None:
            extra = _text(value, "input", where, faults, may_be_empty=True)
            question = f"{question}\n\n{extra}" if extra else question
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    tools = _tools(value.get("tools"), where, faults) if "tools" in value else None
    text = _text(value, "text", where, faults) if form == "text" else ""
    if faults:
        raise DataError(*faults)
    return ParsedRow(form, messages, tools, text, unused)


# --- Plain rows ---------------------------------------------------------------------------------


class _Prompt(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    prompt: str
    completion: str


class _Instruction(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    instruction: str
    output: str
    input: str | msgspec.UnsetType = msgspec.UNSET


class _Text(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    text: str


class _Turn(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _Messages(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[_Turn]


_PLAIN = {
    "prompt": msgspec.json.Decoder(_Prompt).decode,
    "instruction": msgspec.json.Decoder(_Instruction).decode,
    "text": msgspec.json.Decoder(_Text).decode,
    "messages": msgspec.json.Decoder(_Messages).decode,
}


def plain_digest(raw: bytes, form: Form) -> bytes | None:
    """`parse_row(raw).digest()` of a good row of `form`, at twice the speed.

    None where a row has more than its form's own strings: then only `parse_row` can tell.
    """
    try:
        row: Any = _PLAIN[form](raw)
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors too
        return None
    strings, is_answered = 4, True
    if form == "prompt":
        question, answer = row.prompt, row.completion
    elif form == "instruction":
        question, answer = row.instruction, row.output
        if row.input is not msgspec.UNSET:
            strings = 6
    elif form == "text":
        question, strings = row.text, 2
    else:
        turns = row.messages
        strings, is_answered = 1 + 4 * len(turns), any(t.role == "assistant" for t in turns)
        question = "" if any(t.role == "user" and not t.content.strip() for t in turns) else "?"
    if not question or question.isspace() or not is_answered or has_repeats(raw, strings):
        return None
    if form == "messages":
        content = "".join([f"{t.role} {len(t.content)} {t.content}" for t in turns])
    elif form == "text":
        content = f"text {len(question)} {question}"
    else:
        if strings == 6 and row.input:
            question = f"{question}\n\n{row.input}"
        content = f"user {len(question)} {question}assistant {len(answer)} {answer}"
    return blake2b(content.encode(), digest_size=8).digest()


# --- Form and fields ----------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _form_of_keys(keys: tuple[str, ...]) -> tuple[Form | None, tuple[str, ...]]:
    """The form of a row with these keys, where they alone tell it; the keys that are not used."""
    forms = [form for form, fields in FIELDS.items() if not fields.isdisjoint(keys)]
    unused = tuple(key for key in keys if key not in _ALL_FIELDS)
    return forms[0] if len(forms) == 1 else None, unused


def _form(value: dict[str, Any], where: str) -> Form:
    forms = [form for form, fields in FIELDS.items() if not fields.isdisjoint(value)]
    # Tools that write tables fill the fields that a row does not have with null.
    given = {key for key, item in value.items() if item is not None}
    forms = [form for form in forms if not FIELDS[form].isdisjoint(given)] or forms[:1]
    if len(forms) == 1:
        return forms[0]
    if forms:
        fields = ", ".join(f"`{key}`" for key in value if key in _ALL_FIELDS)
        raise DataError(Fault(where, "", f"fields of several row forms, {fields}; keep one form"))
    if "conversations" in value:
        what = "not read; rename it to `messages`, its items' `from` and `value` to `role` and"
        raise DataError(Fault(where, "conversations", f"{what} `content`"))
    names = ", ".join(f"`{shown(key)}`" for key in list(value)[:8]) or "no fields"
    raise DataError(Fault(where, "", f"no known row form, but {names}; {_FORMS_IN_WORDS}"))


def _text(
    value: dict[str, Any],
    key: str,
    where: str,
    faults: list[Fault],
    *,
    path: str = "",
    may_be_empty: bool = False,
) -> str:
    """`value[key]`, or "" and a fault."""
    text = value.get(key)
    if type(text) is str and (may_be_empty or (text and not text.isspace())):
        return text
    if type(text) is str:
        what = "empty; fill it in or remove the row"
    elif key not in value:
        what = "missing; add it or remove the row"
    else:
        what = f"{_kind(text)}, not a string"
    faults.append(Fault(where, join(path, key), what))
    return ""


def _messages(value: Any, where: str, faults: list[Fault]) -> list[dict[str, Any]]:
    if type(value) is not list:
        what = "missing; add it" if value is None else f"{_kind(value)}, not an array of messages"
        faults.append(Fault(where, "messages", what))
        return []
    if not value:
        faults.append(Fault(where, "messages", "empty; a row needs an assistant's turn"))
        return []
    before = len(faults)
    for i, message in enumerate(value):
        if type(message) is not dict or not _is_plain(message):
            _check_message(message, f"messages[{i}]", where, faults)
    if len(faults) == before and not any(m["role"] == "assistant" for m in value):
        what = "no assistant turn, so nothing to learn; add one or remove the row"
        faults.append(Fault(where, "messages", what))
    return value


def _is_plain(message: dict[str, Any]) -> bool:
    """Whether nothing more needs checking: a role and a text, as nearly all messages are."""
    role, content = message.get("role"), message.get("content")
    if len(message) != 2 or role not in ROLES or type(content) is not str:
        return False
    return bool(content) and not content.isspace()


def _check_message(message: Any, path: str, where: str, faults: list[Fault]) -> None:
    if type(message) is not dict:
        faults.append(Fault(where, path, f"{_kind(message)}, not an object"))
        return
    role = message.get("role")
    if role not in ROLES:
        hint = f"; use one of {', '.join(ROLES)}"
        what = (
            f'unknown role "{shown(role)}"{hint}'
            if type(role) is str
            else f"{_kind(role)}, not a string{hint}"
            if "role" in message
            else f"missing{hint}"
        )
        faults.append(Fault(where, f"{path}.role", what))
    calls = message.get("tool_calls")
    if calls is not None:
        _check_calls(calls, role, f"{path}.tool_calls", where, faults)
    if message.get("content") is not None or not calls:
        # An answer may be empty, and so may a system prompt or a tool's result; a question not.
        _text(message, "content", where, faults, path=path, may_be_empty=role != "user")
    for key, item in message.items():
        if type(item) is not str:
            _check_depth(item, f"{path}.{key}", where, faults)


def _check_calls(calls: Any, role: Any, path: str, where: str, faults: list[Fault]) -> None:
    if role != "assistant" and role in ROLES:
        faults.append(Fault(where, path, f"only an assistant calls tools, this is the {role}"))
    if type(calls) is not list:
        faults.append(Fault(where, path, f"{_kind(calls)}, not an array of calls"))
        return
    for i, call in enumerate(calls):
        at = f"{path}[{i}]"
        if type(call) is dict and "function" in call:
            at, call = f"{at}.function", call["function"]
        if type(call) is not dict:
            faults.append(Fault(where, at, f"{_kind(call)}, not an object"))
            continue
        _text(call, "name", where, faults, path=at)
        arguments = call.get("arguments")
        if type(arguments) not in (dict, str):
            what = f"{_kind(arguments)}, not an object" if "arguments" in call else "missing"
            faults.append(Fault(where, f"{at}.arguments", f"{what}; give the call's arguments"))


def _tools(value: Any, where: str, faults: list[Fault]) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if type(value) is not list:
        faults.append(Fault(where, "tools", f"{_kind(value)}, not an array of tool schemas"))
        return None
    for i, tool in enumerate(value):
        if type(tool) is not dict:
            faults.append(Fault(where, f"tools[{i}]", f"{_kind(tool)}, not an object"))
        _check_depth(tool, f"tools[{i}]", where, faults)
    return value


def _check_depth(value: Any, path: str, where: str, faults: list[Fault]) -> None:
    if is_deep(value, MAX_DEPTH):
        faults.append(Fault(where, path, f"nested more than {MAX_DEPTH} deep; flatten it"))


def _kind(value: Any) -> str:
    """A JSON value's kind in words."""
    if isinstance(value, bool):
        return "true" if value else "false"
    for kind, name in _KINDS.items():
        if isinstance(value, kind):
            return name
    return "null"


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
}
