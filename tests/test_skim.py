"""A row that is skimmed is one that `parse_row` takes, with the same content."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_tuner import skim
from mlx_tuner.errors import DataError
from mlx_tuner.rows import FIELDS, parse_row
from mlx_tuner.skim import plain_content

FORMS = sorted(FIELDS)
TEXTS = st.text(
    ' \t\n\u00a0\u2003\u3000\u1680abc"\\/{}[],:\u00e9\u4e2d\U0001f600\x00\x7f', max_size=6
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "other"])
VALUES = st.one_of(
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}),
    st.fixed_dictionaries({"instruction": TEXTS, "input": TEXTS, "output": TEXTS}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries({"text": TEXTS}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS}), max_size=4)}
    ),
)


@st.composite
def rows(draw: st.DrawFn) -> bytes:
    """Rows in many spellings, some with a few bytes changed."""
    separators = draw(st.sampled_from([(", ", ": "), (",", ":"), (" ,\t", "\r\n: ")]))
    text = json.dumps(draw(VALUES), ensure_ascii=draw(st.booleans()), separators=separators)
    raw = text.encode()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(raw)))
        cut = draw(st.integers(0, 3))
        raw = raw[:at] + draw(st.binary(max_size=2) | st.sampled_from(NASTY)) + raw[at + cut :]
    return raw


NASTY = [
    b'"',
    b"\\",
    b"\\/",
    b"\\u0041",
    b'","output":"',
    b"\n",
    b"\xc2\xa0",
    b"\xe3\x80\x80",
    b"}",
]


@settings(max_examples=400, deadline=None)
@given(rows())
@example(b'{"instruction": "a", "output": "b", "output": "c"}')
@example(b'{"text": "\xe3\x80\x80"}')
@example(b'{"text": "\xff"}')
@example(b'{"messages": [{"role": "user", "content": "a"}]}')
@example(b'{"messages": [{"role": "assistant", "content": ""}],}')
def test_what_is_skimmed_is_what_parse_row_reads(raw):
    for form in FORMS:
        content = plain_content(raw, form)
        if content is not None:
            row = parse_row(raw, where="rows:1")
            assert row.form == form
            assert row.content() == content


@pytest.mark.parametrize(
    ("form", "raw"),
    [
        ("instruction", r'{"instruction": "Sort \"it\"", "input": "", "output": "x\ty\n"}'),
        ("instruction", '{"instruction":"中文","input":"é","output":""}'),
        ("instruction", '{"instruction": "a", "output": "b"}'),
        ("prompt", ' {"prompt": "a", "completion": "{\\\\}"} '.strip()),
        ("text", '{"text": "Привет"}'),
        (
            "messages",
            '{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "?"}, '
            '{"role": "assistant", "content": "!"}]}',
        ),
    ],
)
def test_rows_as_they_are_usually_written_are_plain(form, raw):
    assert plain_content(raw.encode(), form) == parse_row(raw.encode(), where=":1").content()


def test_real_rows_are_plain(shared):
    lines = (shared / "codealpaca" / "train.jsonl").read_bytes().split(b"\n")[:-1]
    assert all(plain_content(line, "instruction") is not None for line in lines)


@pytest.mark.parametrize("filler", [b"\\n", b"\\\\", b"a", b'\\"', b"\\", b" ", b'"', b"[", b"{"])
def test_hostile_rows_take_no_longer_than_their_length(filler):
    begin = time.perf_counter()
    for form in FORMS:
        head = b'{"messages": [{"role": "user", "content": "a' if form == "messages" else b'{"'
        if form != "messages":
            head += b'", "'.join(f'{name}": "a'.encode() for name in sorted(FIELDS[form]))
        raw = (head + filler * skim.MAX_BYTES)[: skim.MAX_BYTES]
        assert plain_content(raw, form) is None
        assert plain_content(raw + b'"}', form) is None
    assert time.perf_counter() - begin < 2


def test_rows_of_other_forms_and_long_ones_are_left_to_parse_row():
    raw = b'{"text": "a"}'
    assert [plain_content(raw, form) is None for form in FORMS] == [f != "text" for f in FORMS]
    long = b'{"text": "' + b"a" * skim.MAX_BYTES + b'"}'
    assert plain_content(long, "text") is None
    with pytest.raises(DataError):
        parse_row(b'{"text": ""}', where=":1")
