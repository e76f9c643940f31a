"""links.py: what sharing steps with other machines saves and costs."""

import io

import pytest
from model_folders import BUILTIN

from mlx_tuner.bench import ranks as bench_ranks
from mlx_tuner.commands import links
from mlx_tuner.commands.links import LINKS, Link
from mlx_tuner.commands.plan import plan, tokens_of_steps
from mlx_tuner.commands.plan_report import report
from mlx_tuner.engine.ranks import Ranks
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.show.terminal import console
from mlx_tuner.training import assembly


class Two(Ranks):
    """This process twice."""

    size = 2

    def gather(self, content):
        return [content, content]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without results, and no cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_sum_moves_most_of_the_bytes_twice_in_each_of_its_messages() -> None:
    link = Link(100e6, 2e-3, "by hand")
    # Two messages of half the bytes: 0.5 s and 1 ms each.
    assert link.sum_seconds(100_000_000, 2) == pytest.approx(1.002)
    # Six messages of a quarter.
    assert link.sum_seconds(100_000_000, 4) == pytest.approx(6 * 0.251)


def test_a_step_takes_as_long_as_the_machine_with_most_of_it() -> None:
    assert links.largest_share([[10, 10], [30, 20, 10]], 2) == pytest.approx((10 + 30) / 80)
    assert links.largest_share([[7]], 3) == 1.0
    assert links.largest_share([[7, 5, 3]], 1) == 1.0


def test_a_link_is_as_it_was_measured_last(elsewhere, monkeypatch) -> None:
    assert links.measured("ethernet") == LINKS["ethernet"]
    seconds = iter([0.0005] * 3 + [0.5005] * 3)
    monkeypatch.setattr(bench_ranks, "SIZES", (0, 50_000_000))
    monkeypatch.setattr(bench_ranks, "_seconds", lambda *_: [next(seconds) for _ in range(3)])
    found = bench_ranks.measure(Two(), "ring", "ethernet", command="", repeats=3)
    assert "sum of 50 MB     500.50 ms" in bench_ranks.report(found)
    bench_ranks.save(found)
    link = links.measured("ethernet")
    assert link.by == "by `mlx-tune bench`, links-ethernet-2.json"
    assert link.sum_seconds(50_000_000, 2) == pytest.approx(0.5005)
    assert links.measured("thunderbolt") == LINKS["thunderbolt"]


@pytest.mark.slow
def test_a_plan_shares_the_time_and_adds_the_sums(root, elsewhere, monkeypatch) -> None:
    monkeypatch.setattr("mlx_tuner.training.needs.seconds_of", lambda *_, **__: (100.0, "by hand"))
    recipe = load_recipe(root / "recipes" / "quickstart.toml")
    alone, both = plan(recipe), plan(recipe, machines=2, link="ethernet")
    rows = assembly.open_data(recipe, load_tokenizer(BUILTIN)).train
    share = links.largest_share([own.tolist() for own in tokens_of_steps(recipe, rows)], 2)
    sums = LINKS["ethernet"].sum_seconds(4 * alone.trainable_parameters, 2)
    assert (alone.seconds, alone.sum_seconds) == (pytest.approx(100.0), 0.0)
    assert both.seconds == pytest.approx(100 * share + sums * both.steps)
    assert 0.5 <= share < 0.6
    shown = io.StringIO()
    console(shown).print(report(both))
    assert "machines" in shown.getvalue()
    assert f"a sum takes {1000 * sums:.1f} ms a step, 1 Gbit/s" in shown.getvalue()
