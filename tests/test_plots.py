"""plots.py: PNG files of a sensible size with what was asked for in them."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from run_records import train_record, users_run, validated

from mlx_tuner.show import plots


def png_size(path: Path) -> tuple[int, int]:
    """Pixels, from the header."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are drawn."""
    seen: list[Figure] = []
    real = plots.FigureCanvasAgg

    def canvas(figure):
        seen.append(figure)
        return real(figure)

    monkeypatch.setattr(plots, "FigureCanvasAgg", canvas)
    return seen


def lines_of(axes) -> dict[str, tuple[list, list]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
    }


def test_the_loss_plot_has_both_curves_and_the_best_step(tmp_path, figures):
    records = validated([1.0, 0.7, 0.9], base=1.3)
    plots.loss_curve(tmp_path / "loss.png", records, best_step=20)
    assert png_size(tmp_path / "loss.png") == (1350, 750)
    assert 10_000 < (tmp_path / "loss.png").stat().st_size < 500_000
    lines = lines_of(figures[0].axes[0])
    every_step = (list(range(1, 31)), [2.0] * 10 + [1.0] * 10 + [2 / 3] * 10)
    assert every_step in lines.values()
    assert lines["training"] == ([10, 20, 30], pytest.approx([2.0, 1.0, 2 / 3]))
    assert lines["validation"] == ([0, 10, 20, 30], [1.3, 1.0, 0.7, 0.9])
    assert lines["best: 0.7 at step 20"] == ([20], [0.7])


@pytest.mark.slow
def test_many_log_lines_get_a_smoothed_curve_between_their_extremes(tmp_path, figures):
    records = [train_record(step, 1.0 + (step % 2)) for step in range(1, 101)]
    plots.loss_curve(tmp_path / "loss.png", records, None)
    steps, values = lines_of(figures[0].axes[0])["training, smoothed"]
    assert steps == list(range(1, 101))
    assert all(1.3 < value < 1.7 for value in values[5:-5])


@pytest.mark.slow
def test_epochs_are_marked_where_they_end(tmp_path, figures):
    plots.loss_curve(tmp_path / "loss.png", users_run(), None)
    labels = {text.get_text(): text.xy[0] for text in figures[0].axes[0].texts}
    assert labels == {
        "epoch 1": pytest.approx(30 / 2.32),
        "epoch 2": pytest.approx(2 * 30 / 2.32),
    }
    many = [train_record(step, 1.0, epoch=step) for step in range(1, 101)]
    plots.loss_curve(tmp_path / "loss.png", many, None)
    assert len(figures[1].axes[0].texts) <= 8


@pytest.mark.slow
def test_the_gradient_norm_plot_has_the_learning_rate_on_its_own_axis(tmp_path, figures):
    plots.grad_norm_curve(tmp_path / "grad_norm.png", users_run())
    assert png_size(tmp_path / "grad_norm.png") == (1350, 750)
    left, right = figures[0].axes
    assert lines_of(left)["gradient norm (left)"][1] == pytest.approx([0.619, 0.611, 0.41])
    assert lines_of(right)["learning rate (right)"][1] == [1.8e-4, 1.379e-4, 6.897e-5]
    assert [label.get_text() for label in right.get_yticklabels()][1] == "5e-5"


@pytest.mark.slow
def test_runs_are_compared_by_training_and_validation_loss(tmp_path, figures):
    runs = {"a": validated([1.0, 0.8]), "b": users_run(), "c": []}
    plots.comparison(tmp_path / "compare.png", runs)
    width, height = png_size(tmp_path / "compare.png")
    assert width > 2 * height
    train, valid = figures[0].axes
    assert set(lines_of(train)) == {"a", "b"}
    assert set(lines_of(valid)) == {"a"}
    plots.comparison(tmp_path / "compare.png", {"b": users_run()})
    assert len(figures[1].axes) == 1


@pytest.mark.slow
def test_more_runs_than_colours_are_told_apart_by_line_and_marker(tmp_path, figures):
    plots.comparison(tmp_path / "compare.png", {str(n): users_run() for n in range(14)})
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker())
        for line in figures[0].axes[0].get_lines()
    }
    assert len(looks) == 14


@pytest.mark.slow
@pytest.mark.parametrize(
    "records",
    [[], [train_record(1, 1.0)], [train_record(s, math.nan, grad_norm=math.inf) for s in (1, 2)]],
)
def test_nothing_or_little_to_draw_is_no_error(tmp_path, records):
    plots.loss_curve(tmp_path / "a.png", records, 10)
    plots.grad_norm_curve(tmp_path / "b.png", records)
    plots.comparison(tmp_path / "c.png", {"$x_1$ 漢字": records})
    assert [png_size(tmp_path / name)[1] for name in ("a.png", "b.png", "c.png")] == [750] * 3


@pytest.mark.slow
def test_plots_leave_no_state_and_no_temporary_files(tmp_path):
    script = (
        "import sys; from pathlib import Path; from mlx_tuner.show import plots;"
        "plots.loss_curve(Path(sys.argv[1]) / 'loss.png', [], None);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
