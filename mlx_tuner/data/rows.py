"""One row of training data: strict JSON in, a checked `Row` out, or every fault by name.

Forms: `messages` (and `tools`), `prompt`/`completion`, `instruction`/`input`/`output`, `text`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mlx_tuner.errors import DataError, Fault

Form = Literal["messages", "prompt", "instruction", "text"]

FIELDS: dict[Form, frozenset[str]] = {
    "messages": frozenset({"messages", "tools"}),
    "prompt": frozenset({"prompt", "completion"}),
    "instruction": frozenset({"instruction", "input", "output"}),
    "text": frozenset({"text"}),
}
"""The fields of each form; a row has those of exactly one."""

ROLES = ("system", "user", "assistant", "tool")

MAX_DEPTH = 100
"""Levels of nesting in tools and tool calls: far above any real schema, below Python's stack."""

MAX_INT_DIGITS = 4300
"""Digits of an integer: Python's own limit for reading and writing one."""

_ALL_FIELDS = frozenset().union(*FIELDS.values())
_FORMS_IN_WORDS = (
    "a row has `messages`, or `prompt` and `completion`, "
    "or `instruction` and `output` (and `input`), or `text`"
)


@dataclass(frozen=True, slots=True)
class Row:
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
        return hashlib.blake2b(self.content(), digest_size=8).digest()

    def content(self) -> bytes:
        """What is trained on: the same bytes for all rows that have it, and for no others."""
        if self.form == "text":
            return turn("text", self.text).encode()
        if self.tools is None and all(map(_is_text_alone, self.messages)):
            return "".join(turn(m["role"], m["content"]) for m in self.messages).encode()
        return json.dumps([self.messages, self.tools], sort_keys=True).encode()


def turn(role: str, text: str) -> str:
    """One message's part of a row's content."""
    return f"{role} {len(text)} {text}"


def _is_text_alone(message: dict[str, Any]) -> bool:
    return message.keys() == {"role", "content"} and type(message["content"]) is str


def parse_row(raw: bytes, *, where: str) -> Row:
    """The row that the UTF-8 JSON object `raw` holds.

    `where` is FILE:LINE of its first line. Raises `DataError` with all of the row's faults.
    """
    try:
        text = raw.decode()
        try:
            value = _strict(text)
        except _NotStrict:
            raise DataError(*_faults_within(_marked(text), where)) from None
    except UnicodeDecodeError as error:
        raise DataError(_bad_encoding(raw, where, error)) from None
    except json.JSONDecodeError as error:
        raise DataError(_bad_syntax(raw, where, error)) from None
    except RecursionError:
        what = f"nested more than {MAX_DEPTH} deep; flatten it"
        raise DataError(Fault(where, "", what)) from None
    # JSON's only way to a lone surrogate is an escape: most rows have none and skip the walk.
    if (b"\\ud" in raw or b"\\uD" in raw) and (faults := _faults_within(value, where)):
        raise DataError(*faults)
    return _row(value, where)


# --- JSON, strictly -----------------------------------------------------------------------------


class _NotStrict(Exception):
    """Python's parser takes this value, JSON does not or loses something of it."""


class _Mark:
    """Stands in a marked tree for a value that strict JSON refuses."""

    def __init__(self, what: str) -> None:
        self.what = what


class _Repeated(dict):
    """An object of a marked tree that gives `keys_twice` more than once."""

    keys_twice: list[str]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _NotStrict
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0.0:
        raise _NotStrict
    return number


def _short_int(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise _NotStrict
    return int(digits)


def _no_constant(name: str) -> Any:
    raise _NotStrict


def _mark_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _Repeated(pairs)
    times = Counter(key for key, _ in pairs)
    found.keys_twice = [key for key, count in times.items() if count > 1]
    return found


def _mark_infinite(digits: str) -> float | _Mark:
    number = float(digits)
    return (
        number
        if number - number == 0.0
        else _Mark(f"{digits[:20]} is too large; use a number or null")
    )


def _mark_long(digits: str) -> int | _Mark:
    if len(digits) <= MAX_INT_DIGITS:
        return int(digits)
    return _Mark(f"an integer of {len(digits)} digits, more than {MAX_INT_DIGITS}; shorten it")


def _mark_constant(name: str) -> _Mark:
    return _Mark(f"{name} is not JSON; use a number or null")


_strict = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_float=_finite,
    parse_int=_short_int,
    parse_constant=_no_constant,
).decode
_marked = json.JSONDecoder(
    object_pairs_hook=_mark_repeated,
    parse_float=_mark_infinite,
    parse_int=_mark_long,
    parse_constant=_mark_constant,
).decode


def _faults_within(value: Any, where: str) -> list[Fault]:
    """What strict JSON refuses below `value`: marks, repeated keys, lone surrogates."""
    faults = []
    for path, item in _walk(value):
        if isinstance(item, _Mark):
            faults.append(Fault(where, path, item.what))
        elif isinstance(item, _Repeated):
            faults += [
                Fault(where, _join(path, key), "given twice; keep one") for key in item.keys_twice
            ]
        elif isinstance(item, str) and (code := _lone_surrogate(item)):
            what = f"a lone surrogate, \\u{code:x}, is no character; remove it or write the pair"
            faults.append(Fault(where, path, what))
    return faults


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a JSON tree (keys too), in order, with its path. Needs no call stack."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        path, item = todo.pop()
        yield path, item
        if isinstance(item, dict):
            for key, child in reversed(item.items()):
                todo += [(_join(path, key), child), (_join(path, key), key)]
        elif isinstance(item, list):
            todo += [(f"{path}[{i}]", item[i]) for i in reversed(range(len(item)))]


def _join(path: str, key: str) -> str:
    return f"{path}.{_shown(key)}" if path else _shown(key)


def _lone_surrogate(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start])
    return None


def _bad_encoding(raw: bytes, where: str, error: UnicodeDecodeError) -> Fault:
    if _is_utf16(raw):
        return Fault(where, "", "UTF-16, not UTF-8; save the file as UTF-8")
    what = f"not UTF-8 (0x{raw[error.start]:02x}); save the file as UTF-8"
    return Fault(where, f"byte {error.start + 1}", what)


def _is_utf16(raw: bytes) -> bool:
    return raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:2]


def _bad_syntax(raw: bytes, where: str, error: json.JSONDecodeError) -> Fault:
    if _is_utf16(raw):
        return Fault(where, "", "UTF-16, not UTF-8; save the file as UTF-8")
    file, _, line = where.rpartition(":")
    where = f"{file}:{int(line) + error.lineno - 1}"
    return Fault(where, f"column {error.colno}", _syntax_in_words(error))


def _syntax_in_words(error: json.JSONDecodeError) -> str:
    if not error.doc.strip():
        return "nothing between two commas of the array; remove one"
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if error.msg == "Extra data":
        if after.startswith(","):
            return "a comma after the row; rows of JSONL are parted by line breaks alone"
        return "more text after the row's end; put each row on a line of its own"
    if "control character" in error.msg:
        code = ord(error.doc[error.pos])
        return f"a raw control character in a string; write it as \\u{code:04x}"
    if "Unterminated" in error.msg or not after:
        return "the row stops before its end (a file cut short?); complete or remove it"
    if "trailing comma" in error.msg or (before.endswith(",") and after[0] in "}]"):
        return f"a trailing comma before {after.lstrip(',').lstrip()[:1]}; remove it"
    if "BOM" in error.msg or after.startswith("\ufeff"):
        return "a byte order mark inside the file; remove it"
    if after.startswith("'"):
        return "single quotes; JSON strings take double quotes"
    return f"broken JSON: {error.msg[0].lower()}{error.msg[1:]}"


# --- A row's form and fields --------------------------------------------------------------------


def _row(value: Any, where: str) -> Row:
    if type(value) is not dict:
        what = f"{_kind(value)}, not an object; {_FORMS_IN_WORDS}"
        raise DataError(Fault(where, "", what))
    form = _form(value, where)
    unused = (
        () if _ALL_FIELDS.issuperset(value) else tuple(k for k in value if k not in _ALL_FIELDS)
    )
    faults: list[Fault] = []
    if form == "instruction":
        question = _text(value, "instruction", where, faults)
        answer = _text(value, "output", where, faults, may_be_empty=True)
        if value.get("input") is not None:
            extra = _text(value, "input", where, faults, may_be_empty=True)
            question = f"{question}\n\n{extra}" if extra else question
        messages = _exchange(question, answer)
    elif form == "prompt":
        question = _text(value, "prompt", where, faults)
        answer = _text(value, "completion", where, faults, may_be_empty=True)
        messages = _exchange(question, answer)
    elif form == "messages":
        messages = _messages(value.get("messages"), where, faults)
    else:
        messages = []
    tools = _tools(value.get("tools"), where, faults) if "tools" in value else None
    text = _text(value, "text", where, faults) if form == "text" else ""
    if faults:
        raise DataError(*faults)
    return Row(form, messages, tools, text, unused)


def _form(value: dict[str, Any], where: str) -> Form:
    forms = [form for form, fields in FIELDS.items() if not fields.isdisjoint(value)]
    if len(forms) > 1:
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
    names = ", ".join(f"`{_join('', key)}`" for key in list(value)[:8]) or "no fields"
    raise DataError(Fault(where, "", f"no known row form, but {names}; {_FORMS_IN_WORDS}"))


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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
    faults.append(Fault(where, _join(path, key), what))
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
            f'unknown role "{_shown(role)}"{hint}'
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
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
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


def _shown(text: str) -> str:
    """A string of the user's, printable and short enough for one line."""
    short = text if len(text) <= 40 else text[:39] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
