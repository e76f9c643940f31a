"""What a row may be, and what is said about one that is not."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tuner.data.rows import ParsedRow, parse_row
from mlx_tuner.data.strict_json import MAX_DEPTH
from mlx_tuner.errors import DataError

QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def parse(value: Any) -> ParsedRow:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_row(raw, where="rows.jsonl:7")


def faults(value: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        parse(value)
    assert caught.value.faults
    lines = [str(fault) for fault in caught.value.faults]
    assert all("\n" not in line and line.isprintable() for line in lines)
    return lines


def fault(value: Any) -> str:
    (line,) = faults(value)
    return line


# --- The four forms -----------------------------------------------------------------------------


def test_messages_are_taken_as_they_are() -> None:
    messages = [
        {"role": "system", "content": ""},
        QUESTION,
        ANSWER,
        {"role": "user", "content": "?"},
    ]
    row = parse({"messages": messages, "id": 3})
    assert (row.form, row.messages, row.tools, row.text) == ("messages", messages, None, "")
    assert row.unused == ("id",)


def test_tools_and_tool_calls_are_taken_as_they_are() -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": [1.5]}}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call, {**call["function"]}]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {**ANSWER, "reasoning_content": "easy"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = parse({"tools": tools, "messages": messages})
    assert (row.messages, row.tools) == (messages, tools)


def test_prompt_and_completion_are_a_question_and_an_answer() -> None:
    row = parse({"prompt": "2 + 2?", "completion": "4"})
    assert (row.form, row.messages) == ("prompt", [QUESTION, ANSWER])


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}])
def test_an_instruction_without_input_is_the_question(extra: dict[str, Any]) -> None:
    row = parse({"instruction": "2 + 2?", "output": "4", **extra})
    assert (row.form, row.messages) == ("instruction", [QUESTION, ANSWER])


def test_an_input_follows_its_instruction_after_an_empty_line() -> None:
    row = parse({"instruction": "Add", "input": "2 2", "output": "4"})
    assert row.messages[0]["content"] == "Add\n\n2 2"


def test_text_is_taken_as_it_is() -> None:
    row = parse({"text": " a\u0000b\u2028\n"})
    assert (row.form, row.text, row.messages) == ("text", " a\u0000b\u2028\n", [])


def test_fields_that_are_null_do_not_make_a_second_form() -> None:
    row = parse({"text": None, "messages": None, "tools": None, "prompt": "a", "completion": "b"})
    assert row.form == "prompt"


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "a", "completion": ""},
        {"instruction": "a", "output": ""},
        {"messages": [QUESTION, {"role": "assistant", "content": ""}]},
    ],
)
def test_an_answer_may_be_empty(value: dict[str, Any]) -> None:
    assert parse(value).messages[-1]["content"] == ""


def test_equal_content_has_an_equal_digest_in_whatever_form() -> None:
    same = [
        parse({"prompt": "a", "completion": "é"}),
        parse(b'{"completion":"\xc3\xa9", "id": 1, "prompt":"a"}'),
        parse({"messages": [{"content": "a", "role": "user"}, {**ANSWER, "content": "é"}]}),
    ]
    other = [parse({"prompt": "a", "completion": "e"}), parse({"text": "a"}), parse({"text": "b"})]
    assert len({row.digest() for row in same}) == 1
    assert len({row.digest() for row in same + other}) == 4
    assert len(same[0].digest()) == 8


# --- JSON, strictly -----------------------------------------------------------------------------

NESTED = b'{"text": "a", "deep": ' + b"[" * 100_000

STRICT: dict[bytes, str] = {
    b'{"text": "a",}': "column 14: a trailing comma",
    b'{"text": ["a",]}': "column 15: a trailing comma",
    b'{"text": "a"}{"text": "b"}': "column 14: more text after the row's end",
    b'{"text": "a"}, ': "column 14: a comma after the row",
    b'{"text": "a", "b': "column 15: the row stops before its end",
    b'{"text": ': "column 10: the row stops before its end",
    b"": "column 1: nothing between two commas",
    b"{'text': 1}": "column 2: single quotes",
    b'{"text" "a"}': "column 9: broken JSON: expecting ':' delimiter",
    b'{"text": 01}': "column 11: broken JSON",
    b'{"text": "a\\x"}': "column 12: broken JSON: invalid \\escape",
    b'{"text": "a\x00"}': "column 12: a raw control character in a string; write it as \\u0000",
    b'{"text": "a\tb"}': "column 12: a raw control character in a string; write it as \\u0009",
    b'\xef\xbb\xbf{"text": "a"}': "column 1: a byte order mark",
    b'{"text": "a\xffb"}': "byte 12: not UTF-8 (0xff)",
    b'{"text": "\xed\xa0\x80"}': "byte 11: not UTF-8 (0xed)",
    b'{"text": "\xc0\xae"}': "byte 11: not UTF-8 (0xc0)",
    b'{"text": "\\ud800"}': "text: a lone surrogate, \\ud800,",
    b'{"text": "\\uDC00\\uD800"}': "text: a lone surrogate, \\udc00,",
    b'{"text": "a", "\\udfff": 1}': "\\udfff: a lone surrogate, \\udfff,",
    b'{"text": "a", "b": [{"c": 1, "c": 2}]}': "b[0].c: given twice",
    b'{"text": "a", "text": "a"}': "text: given twice",
    b'{"text": "a", "b": NaN}': "b: NaN is not JSON",
    b'{"text": "a", "b": [0, -Infinity]}': "b[1]: -Infinity is not JSON",
    b'{"text": "a", "b": 1e999}': "b: 1e999 is too large",
    b'{"text": "a", "b": ' + b"7" * 5_000 + b"}": "b: an integer of 5000 digits",
    NESTED: "nested more than 100 deep",
    b'{"a": 1, "a": 2, "text": ': "column 26: the row stops before its end",
    b'{"b": NaN, "deep": ' + b"[" * 100_000: "nested more than 100 deep",
}


@pytest.mark.parametrize("raw", STRICT, ids=lambda raw: repr(raw[:40]))
def test_json_that_python_takes_or_garbles_is_refused(raw: bytes) -> None:
    assert fault(raw).startswith(f"rows.jsonl:7: {STRICT[raw]}")


def test_a_fault_in_a_row_of_several_lines_names_its_own_line() -> None:
    assert fault(b'{\n  "text":\n    oops\n}').startswith("rows.jsonl:9: column 5: broken JSON")


def test_every_value_that_json_refuses_is_named() -> None:
    raw = b'{"prompt": NaN, "a": 1, "a": [1e400, "\\ud9aa"], "completion": "\\udbff"}'
    assert [line.split(": ")[1] for line in faults(raw)] == [
        "a",
        "prompt",
        "a[0]",
        "a[1]",
        "completion",
    ]


def test_surrogate_pairs_are_characters() -> None:
    assert parse(b'{"text": "\\ud83d\\ude00\\\\ud800"}').text == "😀\\ud800"


def test_a_users_key_cannot_break_the_line_or_the_terminal() -> None:
    line = fault(b'{"\\u001b[31m\\n\\u2028' + b"x" * 1_000 + b'": NaN, "text": "a"}')
    assert len(line) < 200


# --- Fields -------------------------------------------------------------------------------------

FIELDS: list[tuple[Any, list[str]]] = [
    ([1, 2], ["an array, not an object"]),
    (3, ["a number, not an object"]),
    (None, ["null, not an object"]),
    (True, ["true, not an object"]),
    ("a", ["a string, not an object"]),
    ({}, ["no known row form, but no fields"]),
    ({"question": "a", "answer": "b"}, ["no known row form, but `question`, `answer`"]),
    ({"conversations": []}, ["conversations: not read; rename it to `messages`"]),
    ({"text": "a", "prompt": "b"}, ["fields of several row forms, `text`, `prompt`"]),
    ({"prompt": "b", "output": "c"}, ["fields of several row forms, `prompt`, `output`"]),
    ({"text": ""}, ["text: empty"]),
    ({"text": " \n"}, ["text: empty"]),
    ({"text": ["a"]}, ["text: an array, not a string"]),
    ({"text": None}, ["text: null, not a string"]),
    ({"prompt": "a"}, ["completion: missing"]),
    ({"prompt": "", "completion": 3}, ["prompt: empty", "completion: a number, not a string"]),
    ({"input": "a", "output": "b"}, ["instruction: missing"]),
    ({"instruction": "a", "input": {}, "output": "b"}, ["input: an object, not a string"]),
    ({"tools": []}, ["messages: missing"]),
    ({"messages": "hi"}, ["messages: a string, not an array of messages"]),
    ({"messages": []}, ["messages: empty"]),
    ({"messages": [QUESTION]}, ["messages: no assistant turn"]),
    ({"messages": [ANSWER, "hi"]}, ["messages[1]: a string, not an object"]),
    ({"messages": [ANSWER, {"content": "a"}]}, ["messages[1].role: missing"]),
    ({"messages": [ANSWER, {"role": 1, "content": "a"}]}, ["messages[1].role: a number, not"]),
    (
        {"messages": [ANSWER, {"role": "usr", "content": "a"}]},
        ['messages[1].role: unknown role "usr"; use one of system, user, assistant, tool'],
    ),
    ({"messages": [{"role": "assistant"}]}, ["messages[0].content: missing"]),
    (
        {"messages": [QUESTION, ANSWER, {"role": "user", "content": ["parts"]}]},
        ["messages[2].content: an array, not a string"],
    ),
    ({"messages": [{"role": "user", "content": ""}, ANSWER]}, ["messages[0].content: empty"]),
    (
        {"messages": [{**QUESTION, "tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER]},
        ["messages[0].tool_calls: only an assistant calls tools"],
    ),
    ({"messages": [{**ANSWER, "tool_calls": {}}]}, ["messages[0].tool_calls: an object, not"]),
    (
        {"messages": [{**ANSWER, "tool_calls": [3, {"function": {"name": 1}}]}]},
        [
            "messages[0].tool_calls[0]: a number, not an object",
            "messages[0].tool_calls[1].function.name: a number, not a string",
            "messages[0].tool_calls[1].function.arguments: missing",
        ],
    ),
    (
        {"messages": [{**ANSWER, "tool_calls": [{"name": "f", "arguments": 3}]}]},
        ["messages[0].tool_calls[0].arguments: a number, not an object"],
    ),
    ({"messages": [ANSWER], "tools": "[]"}, ["tools: a string, not an array"]),
    ({"messages": [ANSWER], "tools": [{}, "f"]}, ["tools[1]: a string, not an object"]),
    (
        {"messages": [{"role": "x", "content": 1}, {"role": "user"}, 7]},
        [
            'messages[0].role: unknown role "x"',
            "messages[0].content: a number",
            "messages[1].content: missing",
            "messages[2]: a number",
        ],
    ),
]


@pytest.mark.parametrize(("value", "expected"), FIELDS, ids=lambda item: str(item)[:50])
def test_every_fault_of_a_row_is_named(value: Any, expected: list[str]) -> None:
    lines = faults(value)
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"rows.jsonl:7: {start}")


@pytest.mark.parametrize("levels", [MAX_DEPTH // 2, MAX_DEPTH + 1, 400])
def test_tools_nest_only_so_deep(levels: int) -> None:
    schema: Any = {}
    for _ in range(levels):
        schema = {"items": schema}
    value = {"messages": [{**ANSWER, "extra": [schema]}], "tools": [schema]}
    if levels < MAX_DEPTH:
        assert parse(value).tools == [schema]
    else:
        assert [line.split(": ")[1] for line in faults(value)] == ["messages[0].extra", "tools[0]"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4)
    ),
    max_leaves=12,
)
FILLED = st.text(min_size=1).filter(lambda text: not text.isspace())


@given(FILLED, st.text(), JSON, st.booleans())
def test_a_good_row_is_what_json_says_it_is(
    question: str, answer: str, extra: Any, ascii_only: bool
) -> None:
    messages = [
        {"role": "user", "content": question, "extra": extra},
        {"role": "assistant", "content": answer},
    ]
    value = {"messages": messages, "tools": [{"a": extra}], "also": extra}
    row = parse_row(json.dumps(value, ensure_ascii=ascii_only).encode(), where="rows.jsonl:1")
    assert (row.messages, row.tools, row.unused) == (messages, value["tools"], ("also",))


@given(st.text(alphabet='{}[]",:\\ntrue0123.eE+-NaInfity \n\u2028é', max_size=60))
def test_any_text_parses_as_json_does_or_is_a_fault(text: str) -> None:
    raw = b'{"text": "x", "any": ' + text.encode() + b"}"
    with contextlib.suppress(DataError):
        assert parse_row(raw, where="rows.jsonl:1").text == json.loads(raw)["text"]
