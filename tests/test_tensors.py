"""The safetensors gate against hand-made lies and against the reference parser."""

import json
import math
import os
import random
import struct
from pathlib import Path

import pytest
from marks import examples
from safetensors import SafetensorError, deserialize

from mlx_tuner.errors import ModelError
from mlx_tuner.models.tensors import ITEM_BYTES, read_header

MUTANTS = int(os.environ.get("MLX_TUNE_MUTANTS", str(examples(4000))))


def pack(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file's bytes, whatever the header says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    [fault] = caught.value.faults
    assert fault.where == str(path)
    assert "\n" not in str(fault)
    return str(fault)


def test_a_good_header_gives_names_dtypes_shapes_and_offsets(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("BF16", (2, 3), (0, 12)),
        "scalar": entry("F32", (), (12, 16)),
        "empty": entry("I64", (0, 7), (16, 16)),
        "b": entry("U32", (1,), (16, 20)),
    }
    path.write_bytes(pack(json.dumps(header).encode() + b"   ", bytes(20)))
    tensors = read_header(path)
    assert list(tensors) == ["a", "scalar", "empty", "b"]
    assert [(t.dtype, t.shape, t.start, t.end) for t in tensors.values()] == [
        ("BF16", (2, 3), 0, 12),
        ("F32", (), 12, 16),
        ("I64", (0, 7), 16, 16),
        ("U32", (1,), 16, 20),
    ]


LIES = {
    "overlap": (
        pack({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "invalid offset for tensor `b`",
    ),
    "hole": (
        pack({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "invalid offset for tensor `b`",
    ),
    "hole at the start": (
        pack({"a": entry(offsets=(4, 12))}, bytes(12)),
        "invalid offset for tensor `a`",
    ),
    "bytes after the end": (pack({"a": entry()}, bytes(9)), "file not fully covered"),
    "cut in the data": (
        pack({"a": entry()}, bytes(7)),
        "truncated or damaged: incomplete metadata",
    ),
    "cut in the header": (pack({"a": entry()})[:20], "truncated: 20 bytes in all"),
    "cut in the prefix": (b"\x01\x00", "truncated: 2 bytes"),
    "empty file": (b"", "truncated: 0 bytes"),
    "negative size": (pack({"a": entry(shape=(-1, -2))}, bytes(8)), "integer `-1`"),
    "size over 2^31": (pack({"a": entry(shape=(0, 2**31), offsets=(0, 0))}), "a: shape"),
    "product overflows": (pack({"a": entry(shape=[65536] * 4, offsets=(0, 0))}), "overflow"),
    "product hidden by a zero": (
        pack({"a": entry(shape=[2**30] * 3 + [0], offsets=(0, 0))}),
        "over",
    ),
    "offsets wrap": (
        pack({"a": entry(offsets=(2**64 - 8, 2**64))}, bytes(8)),
        "invalid type: floating point",
    ),
    "offsets reversed": (
        pack({"a": entry(offsets=(8, 0))}, bytes(8)),
        "invalid offset for tensor `a`",
    ),
    "three offsets": (pack({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "invalid length 3"),
    "float shape": (pack({"a": entry(shape=(2.0,))}, bytes(8)), "floating point `2.0`"),
    "boolean shape": (pack({"a": entry(shape=(True, 2))}, bytes(8)), "boolean `true`"),
    "text shape": (pack({"a": {**entry(), "shape": "2"}}, bytes(8)), "expected a seque"),
    "exponent": (
        pack(b'{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', bytes(8)),
        "floating point `2.0`",
    ),
    "minus zero": (
        pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8)),
        "floating point `-0.0`",
    ),
    "number of 5,000 digits": (pack(b'{"a":' + b"9" * 5000 + b"}"), "out of range"),
    "not a number": (pack(b'{"a": NaN}'), "expected value at line 1"),
    "wrong size": (pack({"a": entry(shape=(3,))}, bytes(8)), "invalid shape, data type, or offset"),
    "unknown dtype": (pack({"a": entry("F128")}, bytes(8)), "unknown variant `F128`"),
    "dtype of another kind": (pack({"a": entry(["F32"])}, bytes(8)), "invalid type: sequence"),
    "1,000 dimensions": (
        pack({"a": entry(shape=[1] * 1000, offsets=(0, 4))}, bytes(4)),
        "at most 16",
    ),
    "missing key": (pack({"a": {"dtype": "F32", "shape": []}}), "missing field"),
    "further key": (pack({"a": {**entry(), "x": 1}}, bytes(8)), "must have exactly"),
    "entry is no table": (pack({"a": 1}), "invalid type: integer `1`"),
    "metadata is no table": (
        pack({"__metadata__": [], "a": entry()}, bytes(8)),
        "sequence, expected a map",
    ),
    "metadata holds a number": (pack({"__metadata__": {"x": 1}}), "expected a string"),
    "same tensor twice": (
        pack(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "a: damaged: its header has this key twice",
    ),
    "same key twice": (
        pack(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "duplicate field `dtype`",
    ),
    "lone surrogate": (pack(b'{"\\ud800":1}'), "hex escape"),
    "bad UTF-8": (pack(b'{"\xff":1}'), "utf-8"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "where a JSON object"),
    "broken JSON": (pack(b'{"a":'), "EOF while parsing"),
    "two objects": (pack(b"{}{}"), "trailing characters"),
    "an array": (pack(b"[]"), "where a JSON object"),
    "nested 100,000 deep": (pack(b'{"a":' + b"[" * 100_000), "recursion limit"),
    "control characters in a name": (
        pack({"a\nb": entry("F8_E5M2", (8,))}, bytes(8)),
        r"a\nb: dtype 'F8_E5M2' is not one that MLX reads",
    ),
    "header over 10 MB": (pack(b"{}", length=10_000_001), "10,000,001 bytes"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "Git LFS pointer",
    ),
    "HTML page": (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x02}q\x00." + bytes(60), "pickle"),
    "gzip": (b"\x1f\x8b\x08" + bytes(5) + b"x" * 60, "gzip"),
    "GGUF": (b"GGUF\x03" + bytes(60), "GGUF"),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_in_a_header_is_refused_and_named(lie, tmp_path):
    content, named = LIES[lie]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert named in refusal(path)


def test_a_header_over_10_megabytes_is_refused_even_when_the_file_is_that_long(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(pack(b"{}", length=10_000_001))
        file.truncate(200_000_000)  # sparse
    assert "10,000,001 bytes" in refusal(path)


@pytest.mark.parametrize("length", [0x0280, 0x8B1F])
def test_a_header_whose_size_looks_like_another_format_is_read(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(b"{}".ljust(length)))
    assert read_header(path) == {}


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    fifo, folder = tmp_path / "fifo.safetensors", tmp_path / "folder.safetensors"
    os.mkfifo(fifo)
    folder.mkdir()
    assert "not a regular file" in refusal(fifo)
    assert "not a regular file" in refusal(folder)
    assert "No such file" in refusal(tmp_path / "absent.safetensors")


# ---- against the reference parser --------------------------------------------------------------

NASTY_NUMBERS = [
    "-1", "-0", "0", "1", "7", "8", "2147483648", "4294967296", "9223372036854775807",
    "9223372036854775808", "18446744073709551608", "18446744073709551615", "18446744073709551616",
    "1e2", "2.0", "true", "null", '"2"', "[]", "NaN", "Infinity", "01", "+1", "0x10",
]  # fmt: skip
NASTY_NAMES = ['"a"', '"__metadata__"', '""', '"\\ud800"', '"\\u0000"', '"é"', "'a'", "a"]


NASTY_VALUES = [[], ["1"], ["0", "0", "0"], "null", "{}", '"x"', '"F64"', '"f32"', '"U8"', '"BF16"']
NASTY_KEYS = ['"x"', '"dtype"', '"shape"', '"data_offsets"', '"dtype "']
NASTY_TAILS = [" ", "  \n\t", "\0", "}", ",", "{}", "\ufeff"]
METADATA = ['{"format":"pt"}', "{}", '{"a":1}', '{"a":"b","a":"c"}', "null", "[]"]


def mutant(rng: random.Random) -> bytes:
    """A small file, right but for up to three changes of structure."""
    tensors, position = [], 0  # [name, [[key, value], ...]] in JSON, a value being a list or a text
    for index in range(rng.randrange(4)):
        dtype = rng.choice(list(ITEM_BYTES))
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        offsets = [str(position), str(end)]
        fields = [['"dtype"', f'"{dtype}"'], ['"shape"', [*map(str, shape)]]]
        tensors.append([f'"t{index}"', [*fields, ['"data_offsets"', offsets]]])
        position = end
    rng.shuffle(tensors)
    metadata = rng.choice(METADATA[:2]) if rng.random() < 0.3 else None
    tail, surplus_length = "", 0
    for _ in range(rng.randrange(4)):
        tensor = rng.choice(tensors) if tensors else ["", [["", ""]]]
        field = rng.choice(tensor[1])
        match rng.randrange(12):
            case 0 | 1 if isinstance(field[1], list) and field[1]:
                number = rng.randrange(len(field[1]))
                field[1][number] = rng.choice(NASTY_NUMBERS)
            case 2 | 3 if isinstance(field[1], list) and field[1]:
                number = rng.randrange(len(field[1]))
                if field[1][number].isdigit():
                    moved = int(field[1][number]) + rng.choice([-8, -4, -1, 1, 4, 8])
                    field[1][number] = str(max(moved, 0))
            case 4:
                field[1] = rng.choice(NASTY_VALUES)
            case 5:
                field[0] = rng.choice(NASTY_KEYS)
            case 6:
                tensor[1].append([rng.choice(NASTY_KEYS), rng.choice(NASTY_NUMBERS)])
            case 7:
                tensor[0] = rng.choice([*NASTY_NAMES, *(name for name, _ in tensors)])
            case 8:
                position = max(position + rng.choice([-8, -1, 1, 8, 100]), 0)
            case 9:
                surplus_length = rng.choice([-2, -1, 1, 2, 1 << 32])
            case 10:
                tail = rng.choice(NASTY_TAILS)
            case 11:
                metadata = rng.choice(METADATA)
    entries = [
        f"{name}:{{{','.join(f'{key}:{json_text(value)}' for key, value in fields)}}}"
        for name, fields in tensors
    ]
    if metadata is not None:
        entries.insert(rng.randrange(len(entries) + 1), f'"__metadata__":{metadata}')
    raw = bytearray(("{" + ",".join(entries) + "}" + tail).encode())
    if rng.random() < 0.1:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return pack(bytes(raw), bytes(position), length=max(len(raw) + surplus_length, 0))


def json_text(value: list[str] | str) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else value


def test_no_mutant_is_accepted_that_the_reference_parser_rejects(tmp_path):
    path = tmp_path / "model.safetensors"
    accepted = 0
    for seed in range(MUTANTS):
        content = mutant(random.Random(seed))
        path.write_bytes(content)
        try:
            ours = read_header(path)
        except ModelError:
            continue
        accepted += 1
        try:
            theirs = dict(deserialize(content))
        except SafetensorError as error:
            pytest.fail(f"mutant {seed} {content!r}: accepted, but {error}")
        assert {n: (t.dtype, t.shape, t.end - t.start) for n, t in ours.items()} == {
            n: (t["dtype"], tuple(t["shape"]), len(t["data"])) for n, t in theirs.items()
        }
    # The comparison has teeth only if a good share is accepted, and a good share is not.
    assert 0.2 * MUTANTS < accepted < 0.8 * MUTANTS
