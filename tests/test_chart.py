"""chart.py: the characters are where the numbers are."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mlx_tuner.show.chart import Chart, Series


def drawn(chart: Chart, width: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(chart)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right():
    lines = drawn(Chart([Series([(0, 2.0), (10, 1.0)], "cyan")]))
    assert lines[0].startswith("2.000 ┤─")
    assert lines[12].startswith("1.000 ┤")
    assert lines[12].endswith("╰───")
    assert lines[13].startswith("      └──")
    assert lines[14].split() == ["0", "5", "10"]


def test_every_column_of_a_line_is_drawn_and_corners_join():
    lines = drawn(Chart([Series([(0, 2.0), (5, 1.0), (10, 1.7)], "cyan")]))[:13]
    columns = list(zip(*(line.ljust(60)[7:60] for line in lines), strict=True))
    assert all("".join(column).strip() for column in columns[:-1])
    for column in columns:
        assert column.count("╮") == column.count("╰")
        assert column.count("╭") == column.count("╯")


def test_the_mark_is_at_its_step_and_value():
    points = [(0, 2.0), (5, 1.0), (10, 2.0)]
    lines = drawn(Chart([Series(points, "yellow", dotted=True)], mark=(5, 1.0)))
    assert "★" in lines[12]
    assert abs(lines[12].index("★") - (7 + 52 / 2)) <= 1
    assert sum(line.count("●") for line in lines) == 2  # the third point is the marked one


def test_a_dotted_series_leaves_a_line_below_it_alone():
    line = Series([(0, 1.0), (10, 1.0)], "cyan")
    dots = Series([(0, 1.0), (10, 1.0)], "yellow", dotted=True)
    (row,) = [row for row in drawn(Chart([line, dots])) if "●" in row]
    assert row.count("●") == 2
    assert "·" not in row
    assert row.count("─") > 40


def test_fewer_than_two_steps_are_no_chart():
    assert drawn(Chart([Series([(1, 1.0)], "cyan")])) == []
    assert drawn(Chart([Series([], "cyan")])) == []
    assert drawn(Chart([Series([(1, 1.0), (2, float("nan"))], "cyan")])) == []


def test_labels_have_digits_enough_to_differ():
    for points in ([(0, 1.0), (1, 1.0001)], [(0, 0.0), (1, 5000.0)], [(0, 3.0), (1, 3.0)]):
        labels = [row.split("┤")[0].strip() for row in drawn(Chart([Series(points, "")]))]
        labels = [label for label in labels if label and label[0].isdigit()][:5]
        assert len(set(labels)) == 5


finite = st.floats(-1e6, 1e6)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), finite), max_size=40, unique_by=lambda p: p[0]),
    st.lists(st.tuples(st.integers(0, 10**6), finite), max_size=8, unique_by=lambda p: p[0]),
    st.sampled_from([40, 60, 80, 200]),
)
def test_any_points_fit_any_width(line, dots, width):
    chart = Chart([Series(sorted(line), "cyan"), Series(sorted(dots), "yellow", dotted=True)])
    lines = drawn(chart, width)
    assert len(lines) in (0, 15)
    assert all(len(row) <= width for row in lines)


@pytest.mark.parametrize("width", [10, 20])
def test_a_terminal_too_narrow_is_no_error(width):
    drawn(Chart([Series([(0, 2.0), (10, 1.0)], "cyan")]), width)
