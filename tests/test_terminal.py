"""terminal.py: a reader that leaves and an encoding without the characters stop nothing."""

import io
import math
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from mlx_tuner.show.terminal import console, safe
from mlx_tuner.words import duration, plural, rate, scientific, size

WRITER = """
import sys, time
from mlx_tuner.show.terminal import console
out = console(sys.{stream})
for number in range(3000):
    out.print(f"line {{number}} " + "x" * 100)
open(sys.argv[1], "w").write("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_does_not_stop_the_writer(tmp_path, stream):
    done = tmp_path / "done"
    command = [sys.executable, "-c", WRITER.format(stream=stream), str(done)]
    pipes = {stream: subprocess.PIPE, "stderr" if stream == "stdout" else "stdout": None}
    with subprocess.Popen(command, **pipes) as process:
        pipe = getattr(process, stream)
        assert pipe.readline().startswith(b"line 0")
        pipe.close()
    assert process.returncode == 0
    assert done.read_text() == "went on"


def test_an_escape_sequence_in_what_is_printed_is_shown_as_text():
    """Out of a row or a name, it could forge lines, set the title or turn the direction."""
    stream = io.StringIO()
    table = Table("a", "b")
    table.add_row("\x1b]0;title\x07", Text("\x1b[2K\u202eback\r", style="bold"))
    console(stream).print(table)
    safe(stream).write("one\x1b[1Atwo\n")
    assert "\\x1b]0;t" in stream.getvalue()
    assert not set(stream.getvalue()) & {"\x1b", "\x07", "\r", "\u202e"}


def test_brackets_and_colons_in_a_name_are_no_markup():
    stream = io.StringIO()
    table = Table.grid()
    table.add_row("adapters/[old]/:x:.jsonl")
    console(stream).print(table)
    assert stream.getvalue() == "adapters/[old]/:x:.jsonl\n"


def test_an_ascii_terminal_gets_ascii_in_the_same_columns():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    out = console(stream)
    out.print("loss ╭─╮ 1.0 → 0.5 ★ ● ü 漢")
    stream.flush()
    assert stream.buffer.getvalue() == b"loss .-. 1.0 > 0.5 * o ? ?\n"


def test_a_closed_stream_is_no_error():
    stream = io.StringIO()
    out = console(stream)
    stream.close()
    out.print("nobody reads this")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0354, "0.035 s"),
        (0.999, "1 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (204.34, "3 min 24 s"),
        (3599.9, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (97_200, "1 d 03 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_numbers_read_as_people_write_them():
    assert [rate(v) for v in (0.191, 1.468, 23.44, 742.4, 12345.6)] == [
        "0.191",
        "1.47",
        "23.4",
        "742",
        "12,346",
    ]
    assert [scientific(v) for v in (2e-4, 1.379e-4, 6.897e-5, 0.0, 1.0)] == [
        "2e-4",
        "1.379e-4",
        "6.897e-5",
        "0",
        "1e0",
    ]
    assert scientific(math.nan) == "nan"
    assert [plural(n, "row") for n in (0, 1, 1000)] == ["0 rows", "1 row", "1,000 rows"]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 MB"), (4_826_000, "4.8 MB"), (3_090_000_000, "3.09 GB")]
)
def test_bytes_are_told_in_the_unit_that_shows_them(count, text):
    assert size(count) == text
