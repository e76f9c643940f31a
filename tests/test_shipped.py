"""Recipes by name, and as files of one's own."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_tuner.cli import main
from mlx_tuner.commands.init import init, listed
from mlx_tuner.errors import UsageError
from mlx_tuner.recipe import shipped
from mlx_tuner.recipe.load import load_recipe, parse_recipe

NAMES = ["codealpaca", "first", "improved", "quickstart"]


def test_a_recipe_is_found_by_its_name_wherever_one_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("first") == load_recipe(root / "recipes" / "first.toml")
    done = CliRunner().invoke(main, ["recipes"])
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


def test_a_file_of_ones_own_goes_before_the_shipped_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").write_text(shipped.recipes()["quickstart"].read_text())
    assert load_recipe("first", check_paths=False).train.epochs == 8


@pytest.mark.parametrize("name", NAMES)
def test_what_init_writes_is_the_shipped_recipe_whose_comments_are_its_defaults(
    name: str, tmp_path: Path
) -> None:
    written, *rows = init(name, tmp_path)
    ours, theirs = load_recipe(written), load_recipe(name)
    assert (ours.lora, ours.train, ours.model) == (theirs.lora, theirs.train, theirs.model)
    for row in rows:
        assert row.read_bytes() == (shipped.folder() / "data" / row.name).read_bytes()
    # Whoever takes the comments away of all that has a default changes nothing.
    text = re.sub(r"^# (\w+ = [^…\n]+)$", r"\1", written.read_text(), flags=re.M)
    assert text.count("\n# ") < written.read_text().count("\n# ") - 8
    again = parse_recipe(text, source=str(written), folder=tmp_path)
    assert again == ours


def test_nothing_is_written_where_one_of_the_files_is_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "first.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"data/first\.jsonl: is there already"):
        init("first", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "first.jsonl"]


def test_a_name_that_is_no_recipe_is_answered_with_those_that_are(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["init", "frist", "-o", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.endswith(f"the shipped ones are {', '.join(NAMES)}\n")


def test_every_recipe_is_listed_with_a_sentence() -> None:
    assert all(about.endswith(".") and len(about) < 120 for about in listed().values())
