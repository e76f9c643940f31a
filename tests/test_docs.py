"""What the documents say exists: commands, options, recipe keys, rows, links, tests and modules."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mlx_tuner
from mlx_tuner.cli import main
from mlx_tuner.data.rows import FIELDS, parse_row
from mlx_tuner.recipe.load import parse_recipe
from mlx_tuner.recipe.tables import TABLES

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "data/README.md",
    "adapters/README.md",
    "docs/coming-from.md",
    "docs/compatibility.md",
    "docs/real-run.md",
    "docs/serving.md",
    "docs/several-macs.md",
    "docs/troubles.md",
]
RECIPES = ["quickstart", "first", "improved", "codealpaca"]


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest, root: Path) -> Path:
    path: Path = root / request.param
    return path


@pytest.fixture
def readme(root: Path) -> str:
    return (root / "README.md").read_text("utf-8")


def fences(text: str, language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def inline_code(text: str) -> list[str]:
    """What stands in backticks outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^(```|~~~).*?^\1$", "", text, flags=re.M | re.S))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each `make` and `mlx-tune` command of a document."""
    blocks = "".join(fences(text, "sh")).replace("\\\n", " ")
    for line in [*blocks.splitlines(), *inline_code(text)]:
        words = shlex.split(re.sub(r"\s#.*", "", line)) if line.count("'") % 2 == 0 else []
        if words and words[0] in ("make", "mlx-tune"):
            yield words


def check_command(words: list[str]) -> None:
    """A line of `mlx-tune` names a command and options that there are."""
    if len(words) == 1 or words[1].startswith("-"):
        known, rest = [main, *main.commands.values()], words[1:]
    else:
        assert words[1] in main.commands, words
        known, rest = [main.commands[words[1]]], words[2:]
    options = {
        name
        for command in known
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }
    given = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert given <= options | {"-h", "--help"}, words
    for word in rest:
        if word.startswith("recipes/"):
            assert Path(word).stem in [*RECIPES, "NAME"], words


def test_every_command_of_a_document_is_one(document: Path, root: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.M))
    for words in command_lines(document.read_text("utf-8")):
        if words[0] == "make":
            assert set(words[1:]) - {"TORCH="} <= targets, words
        else:
            check_command(words)


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_in_a_recipes_comments_is_one(name: str, root: Path) -> None:
    comments = re.findall(r"^# ?(.*\n)", (root / "recipes" / f"{name}.toml").read_text(), re.M)
    lines = re.findall(r"mlx-tune .*", "".join(comments).replace("\\\n", " "))
    assert lines
    for line in lines:
        check_command(shlex.split(line))


def test_the_readme_names_every_command(readme: str) -> None:
    assert set(main.commands) <= {
        words[1] for words in command_lines(readme) if words[0] == "mlx-tune" and len(words) > 1
    }


def test_every_recipe_key_of_a_document_is_one(document: Path) -> None:
    keys = {f"{table}.{key}" for table in TABLES for key in TABLES[table].model_fields}
    for code in inline_code(document.read_text("utf-8")):
        found = re.match(r"(?:model|data|lora|train)\.[a-z_]+", code)
        if found and not found.group().endswith(".py"):
            assert found.group() in keys, code


def test_every_recipe_of_the_readme_is_a_good_one(readme: str, root: Path) -> None:
    recipes = fences(readme, "toml")
    assert recipes
    for text in recipes:
        parse_recipe(text, source="README.md", folder=root)


def test_every_form_of_rows_is_shown_and_good(readme: str) -> None:
    rows = [line for block in fences(readme, "json") for line in block.splitlines()]
    assert {parse_row(row.encode(), where="README.md").form for row in rows} == set(FIELDS)


def test_every_link_of_a_document_leads_to_a_file_or_heading(document: Path) -> None:
    text = document.read_text("utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith(("https://", "http://")):
            assert (document.parent / target.split("#")[0]).exists(), target


def test_every_test_that_a_document_cites_is_one(document: Path, root: Path) -> None:
    tests = "".join(path.read_text("utf-8") for path in (root / "tests").glob("test_*.py"))
    for code in inline_code(document.read_text("utf-8")):
        if re.fullmatch(r"test_\w+", code):
            assert f"def {code}(" in tests, code
        elif re.match(r"(tests|mlx_tuner|recipes|data|benchmarks|scripts)/[\w/.-]+$", code):
            assert (root / code).exists(), code


def test_the_gate_runs_what_the_readme_begins_with(readme: str, root: Path) -> None:
    first = [words for words in command_lines(readme) if words[0] == "make"][:2]
    assert first == [["make", "demo"], ["make", "test"]]
    gate = (root / ".ci" / "run").read_text().splitlines()
    assert {"make demo", "make test"} <= set(gate)


def test_the_layout_names_every_module(root: Path) -> None:
    table = re.findall(r"^\| (`.*?) \|", (root / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    listed = re.findall(r"`(\w+)\.py`", "".join(table))
    there = [path.stem for path in (root / "mlx_tuner").rglob("[!_]*.py")]
    assert sorted(listed) == sorted(there)


def test_every_ratio_of_the_readme_is_the_one_that_was_measured(readme: str, root: Path) -> None:
    row = r"\| ([\d.]+) × \| `(.+?)` `(.+?)` `(\w+)` \|$"
    figures = re.findall(row, readme, re.M)
    assert figures
    for figure, benchmark, variant, measure in figures:
        result = json.loads((root / "benchmarks" / "results" / f"{benchmark}.json").read_text())
        # Close enough that measuring again is no reason to write another figure.
        assert float(figure) == pytest.approx(result["ratios"][variant][measure]["median"], rel=0.2)


def test_the_changelog_and_the_readme_are_about_this_version(readme: str, root: Path) -> None:
    assert mlx_tuner.__version__ in (root / "CHANGELOG.md").read_text("utf-8")
    assert len(readme.splitlines()) < 180


def test_every_tick_of_the_readme_stands_for_tests(readme: str, root: Path) -> None:
    """Its table of who loads what has a tick exactly where docs/compatibility.md names a test."""

    def cells(text: str) -> dict[str, list[str]]:
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
        return {row[0]: row[1:] for row in rows if len(row) == 5}

    tests = cells((root / "docs" / "compatibility.md").read_text("utf-8"))
    assert len(tests) > 8
    ticks = {row: c for row, c in cells(readme).items() if "✓" in c}
    for row, found in ticks.items():
        assert [cell == "✓" for cell in found] == ["`test_" in cell for cell in tests[row]], row
