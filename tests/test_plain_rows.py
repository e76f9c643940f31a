"""A row that is taken as plain is one that `parse_row` takes, with the same content."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import examples

from mlx_tuner.data.rows import FIELDS, parse_row, plain_digest

FORMS = sorted(FIELDS)
TEXTS = st.text(' \t\n\u00a0\u2003\u3000abc"\\/{}[],:0\u00e9\u4e2d\U0001f600\x00\x7f', max_size=6)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "other"])
EXTRAS = st.dictionaries(
    st.sampled_from(["id", "name", "tools", "text", "input", "conversations"]),
    TEXTS | st.none() | st.integers() | st.lists(TEXTS, max_size=1) | st.just(float("nan")),
    max_size=2,
)
MESSAGES = st.lists(
    st.builds(
        lambda role, content, extra: {"role": role, "content": content, **extra},
        ROLES,
        TEXTS | st.none(),
        st.just({}) | EXTRAS,
    ),
    max_size=4,
)
VALUES = st.one_of(
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}),
    st.fixed_dictionaries({"instruction": TEXTS, "input": TEXTS, "output": TEXTS}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries({"messages": MESSAGES}),
)
NASTY = [
    *(b'"', b"\\", b"\\/", b"\\u0041", b"\\ud800", b'","output":"', b"\n", b"\xc2\xa0", b"}", b"{"),
    *(
        b'"text":"a",',
        b'"id":1e999,',
        b'"id":"\\udc00",',
        b"\xef\xbb\xbf",
        b"9" * 5000,
        b"[" * 5000,
    ),
]


@st.composite
def rows(draw: st.DrawFn) -> bytes:
    """Rows in many spellings, some with a few bytes changed."""
    value = {**draw(st.just({}) | EXTRAS), **draw(VALUES)}
    separators = draw(st.sampled_from([(", ", ": "), (",", ":"), (" ,\t", "\r\n: ")]))
    raw = json.dumps(value, ensure_ascii=draw(st.booleans()), separators=separators).encode()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, cut = draw(st.integers(0, len(raw))), draw(st.integers(0, 3))
        raw = raw[:at] + draw(st.binary(max_size=2) | st.sampled_from(NASTY)) + raw[at + cut :]
    return raw


@settings(max_examples=examples(300))
@given(rows())
@example(b'{"instruction": "a", "output": "b", "output": "c"}')
@example(b'{"instruction": "a", "output": "b", "id": "\\udc00"}')
@example(b'{"instruction": "a", "output": "b", "tools": "x"}')
@example(b'{"text": "a", "id": NaN}')
@example(b'{"text": "\xe3\x80\x80"}')
@example(b'{"text": "\xff"}')
@example(b'{"text": "a"} ')
@example(b'{"messages": [{"role": "user", "content": "a"}]}')
@example(b'{"messages": [{"role": "assistant", "content": ""}],}')
@example(b'{"messages": [{"role": "assistant", "role": "assistant"}]}')
@example(b'{"messages": [[["role", "assistant"], ["content", "x"]]]}')
@example(b'[["text", "a"]]')
@example(b'{"instruction": "\\\\", "input": "\\\\", "output": "\\\\", "output": "\\\\"}')
@example(b'{"prompt": "a", "completion": "b", "\\u0070rompt": "c"}')
@example(b"")
def test_what_is_plain_is_what_parse_row_reads(raw):
    for form in FORMS:
        digest = plain_digest(raw, form)
        if digest is not None:
            row = parse_row(raw, where="rows:1")
            assert row.form == form
            assert row.digest() == digest


@pytest.mark.parametrize(
    ("form", "raw"),
    [
        ("instruction", r'{"instruction": "Sort \"it\"", "input": "", "output": "x\ty\u4e2d"}'),
        ("instruction", '{"output":"","instruction":"中文","input":"é"}'),
        ("prompt", '{"prompt": "a", "completion": "{\\\\}"}'),
        ("text", '{"text": "Привет"}'),
        (
            "messages",
            '{"messages": [{"role": "system", "content": ""}, {"content": "?", "role": "user"}, '
            '{"role": "assistant", "content": "!"}]}',
        ),
    ],
)
def test_rows_as_they_are_usually_written_are_plain(form, raw):
    row = parse_row(raw.encode(), where=":1")
    assert plain_digest(raw.encode(), form) == row.digest()
    assert [plain_digest(raw.encode(), other) is None for other in FORMS if other != form]


def test_real_rows_are_plain(shared):
    lines = (shared / "codealpaca" / "train.jsonl").read_bytes().split(b"\n")[:-1]
    assert all(plain_digest(line, "instruction") is not None for line in lines)
