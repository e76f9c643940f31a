"""Base against tuned on rows that were held out: loss, and whether answers end and parse."""

from __future__ import annotations

import ast
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mlx_tuner import assembly
from mlx_tuner.commands.inspect_data import recipe_for
from mlx_tuner.data.dataset import Dataset, shared_rows
from mlx_tuner.data.encode import END, HEADER, START
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.errors import Fault, TunerError, UsageError
from mlx_tuner.models import adapter
from mlx_tuner.models import model as models
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.answers import answer_all
from mlx_tuner.models.base import check_base, resolve_base
from mlx_tuner.recipe.tables import Recipe, load_recipe
from mlx_tuner.runs.place import RECIPE
from mlx_tuner.show.progress import Display
from mlx_tuner.system import device
from mlx_tuner.words import plural

_NOISE = 0.01
"""Relative differences of the loss up to this say nothing."""
_FEW_ROWS = 10
"""Fewer say little of the rows to come."""

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_PYTHON = {"", "py", "python", "python3"}


@dataclass(frozen=True)
class Side:
    """What the base, or the tuned model, made of the rows."""

    loss: float
    """Mean over the target tokens of all rows."""
    stops: float | None
    """Share of its answers that it ended by itself; None where there are none."""
    parses: float | None
    """Share of its answers whose Python parses, of those to rows that ask for Python."""

    @property
    def perplexity(self) -> float:
        """exp of the loss, which past 700 no float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, float | None]:
        """Plain values; None for what is not finite, which JSON has no word for."""
        values = {"loss": self.loss, "perplexity": self.perplexity}
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return known | {"stops": self.stops, "parses": self.parses}


@dataclass(frozen=True)
class Evaluation:
    """A base and its fine-tune on the same rows."""

    run: str
    model: str
    """The base, as its user names it."""
    rows: int
    target_tokens: int
    rows_trained_on: int | None
    """How many of them are training rows too; None where those are not known."""
    answers: int
    """Rows, from the first on, that both models answered."""
    python_answers: int
    """Those of them whose own answer is Python."""
    max_tokens: int
    """Of an answer."""
    base: Side
    tuned: Side

    @property
    def verdict(self) -> str:
        """What it comes to, in a sentence."""
        if not (math.isfinite(self.base.loss) and math.isfinite(self.tuned.loss)):
            return "No verdict: a loss is not finite."
        change = self.tuned.loss / self.base.loss - 1 if self.base.loss else 0.0
        if abs(change) <= _NOISE:
            said = "No better than the base model on these rows, and no worse"
        else:
            said = "Better than the base model" if change < 0 else "Worse than the base model"
            said += f" on these rows: loss {100 * abs(change):.1f} % "
            said += "lower" if change < 0 else "higher"
        if self.tuned.stops is not None:
            said += f"; {_of(self.tuned.stops, self.answers)} answers end by themselves"
        few = f" ({plural(self.rows, 'row')} say little.)" if self.rows < _FEW_ROWS else ""
        return f"{said}.{few}"

    def to_json(self) -> dict[str, Any]:
        """What `mlx-tune eval --json` prints."""
        facts = {name: value for name, value in vars(self).items() if not isinstance(value, Side)}
        sides = {"base": self.base.to_json(), "tuned": self.tuned.to_json()}
        return facts | sides | {"verdict": self.verdict}


def evaluate(
    source: Path,
    display: Display,
    *,
    model: str | None = None,
    data: str | None = None,
    samples: int = 10,
    max_tokens: int = 512,
) -> Evaluation:
    """Compare a run's adapter, or any adapter, with its base.

    Args:
        model: the base; by default the one that the adapter names.
        data: a file of rows; by default the run's validation rows.
        samples: how many rows are answered, by the likeliest tokens.
        max_tokens: of an answer.

    Raises:
        UsageError: there are no held-out rows.
        DataError: the rows are wrong.
        ModelError: adapter or base cannot be used, or do not belong together.
    """
    trained = read_adapter(source)
    is_run = (source / RECIPE).exists()
    recipe = _recipe_of_run(source, data) if is_run else _default_recipe(source, data)
    folder = resolve_base(trained, model)
    check_base(trained, folder)
    with display.task("reading the rows"):
        tokenizer = models.load_tokenizer(folder)
        rows, training_rows = _open(recipe, data, tokenizer, is_run)
    overlap = None if training_rows is None else shared_rows(training_rows, rows)
    if overlap:
        display.note(f"{plural(overlap, 'row')} trained on as well, which flatters the fine-tune")
    with display.task("loading the model"):
        loaded = models.load(folder)
        adapter.apply(loaded.model, trained)
    longest = rows.survey.longest
    micro = assembly.micro_batch_tokens(recipe, loaded.model, loaded.config, longest)
    trainer = Trainer(loaded.model, micro_batch_tokens=micro)
    asked = questions(tokenizer, rows.examples(range(min(samples, len(rows)))))
    in_python = [is_python(question.answer) for question in asked]
    factors = trainer.state.parameters
    sides: dict[str, Side] = {}
    with device.limits():
        # With factors of zero an adapter adds zero: the base model itself, to the bit.
        for name, parameters in (("base", mx.zeros_like(factors)), ("tuned", factors)):
            trainer.state = State.start(parameters)
            with display.task(f"measuring the {name} model", len(rows)) as advance:
                targets, loss = _loss(trainer, rows, advance)
            with display.task(f"answering with the {name} model"):
                answers = answer_all(loaded.model, tokenizer, [q.prompt for q in asked], max_tokens)
            python = [is_python(a.text) for a, due in zip(answers, in_python, strict=True) if due]
            sides[name] = Side(loss, _share([a.stopped for a in answers]), _share(python))
    return Evaluation(
        run=str(source),
        model=model or trained.base,
        rows=len(rows),
        target_tokens=targets,
        rows_trained_on=overlap,
        answers=len(asked),
        python_answers=sum(in_python),
        max_tokens=max_tokens,
        base=sides["base"],
        tuned=sides["tuned"],
    )


# ---- the rows ------------------------------------------------------------------------------------


def _recipe_of_run(run: Path, data: str | None) -> Recipe:
    """A run's recipe, by which its rows are read; they may have moved."""
    recipe = load_recipe(run / RECIPE, check_paths=False)
    if data is None and recipe.data.valid is None:
        what = "trained without validation rows; give held-out rows with --data FILE"
        raise UsageError(Fault(str(run), "", what))
    return recipe


def _default_recipe(source: Path, data: str | None) -> Recipe:
    """By which the rows of `data` are read for an adapter that no run of ours left."""
    if data is None:
        what = "an adapter without its run's rows; give held-out rows with --data FILE"
        raise UsageError(Fault(str(source), "", what))
    return recipe_for(data, recipe=None, model=None, valid=None, overrides=())


def _open(
    recipe: Recipe, data: str | None, tokenizer: Any, is_run: bool
) -> tuple[Dataset, Dataset | None]:
    """The held-out rows, and the rows that were trained on where they are known."""
    if data is None:
        opened = assembly.open_data(recipe, tokenizer)
        assert opened.valid is not None  # `_recipe_of_run` has seen to it
        return opened.valid, opened.train
    rows = assembly.open_file(recipe.data, data, tokenizer)
    if is_run:
        with suppress(TunerError):  # the training rows may have moved
            return rows, assembly.open_data(recipe, tokenizer).train
    return rows, None


def _loss(trainer: Trainer, rows: Dataset, advance: Any) -> tuple[int, float]:
    """The number of target tokens of all rows, and the mean loss over them."""
    targets = 0

    def counted() -> Iterator[list[Any]]:
        nonlocal targets
        for batch in assembly.in_order(rows):
            targets += sum(int(row.loss_mask.sum()) for row in batch)
            yield batch
            advance(len(batch))

    loss = trainer.evaluate(counted())
    return targets, loss


# ---- the answers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A row up to its last answer, and that answer."""

    prompt: list[int]
    answer: str


def questions(tokenizer: Any, examples: Sequence[Example]) -> list[Question]:
    """The examples that have an answer to give: where the last assistant's turn begins.

    Taken from the tokens, so that the prompt is that of training: with the recipe's system
    message, and tools. Rows of plain text have none, unless they spell their turns themselves.
    """
    start, header = (
        tokenizer.get_vocab().get(START),
        tokenizer.encode(HEADER, add_special_tokens=False),
    )
    found = []
    for example in examples:
        tokens = example.tokens.tolist()
        for i in reversed([i for i, token in enumerate(tokens) if token == start]):
            turn = tokenizer.decode(tokens[i + 1 :])
            if turn.startswith(HEADER):
                answer = turn.removeprefix(HEADER).partition(END)[0]
                found.append(Question([*tokens[: i + 1], *header], answer))
                break
    return found


def is_python(answer: str) -> bool:
    """Whether an answer holds Python, all of which parses. Nothing of it is run.

    That is its fenced blocks, or else the whole of it. A word or a number parses as well, and is
    no Python here: something must be called, defined, assigned or the like.
    """
    fenced = _FENCE.findall(answer)
    if any(language.lower() not in _PYTHON for language, _ in fenced):
        return False
    trees = [_parsed(block) for block in ([code for _, code in fenced] or [answer])]
    return None not in trees and any(_does_something(tree) for tree in trees if tree)


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of "\d" in a string
            return ast.parse(textwrap.dedent(code).strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # too deep; a NUL
        return None


def _does_something(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Call | ast.Lambda | ast.comprehension)
        or (isinstance(node, ast.stmt) and not isinstance(node, ast.Expr | ast.AnnAssign))
        or (isinstance(node, ast.AnnAssign) and node.value is not None)  # unlike "Answer: 42"
        for node in ast.walk(tree)
    )


def _share(outcomes: Sequence[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None


# ---- on the terminal -----------------------------------------------------------------------------


def report(found: Evaluation) -> RenderableType:
    """The table and the verdict, to print with rich."""
    title = Text.assemble((found.run, "bold"), f" against {found.model or 'its base'}")
    rows, tokens = plural(found.rows, "row"), plural(found.target_tokens, "target token")
    facts = Text(f"{rows}, {tokens}; answers of at most {found.max_tokens:,} tokens", "dim")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name in ("", "base", "tuned"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    base, tuned = found.base, found.tuned
    table.add_row("loss", f"{base.loss:.4f}", f"{tuned.loss:.4f}")
    table.add_row("perplexity", f"{base.perplexity:.4g}", f"{tuned.perplexity:.4g}")
    for name, count, shares in (
        ("answers that end by themselves", found.answers, (base.stops, tuned.stops)),
        ("answers whose Python parses", found.python_answers, (base.parses, tuned.parses)),
    ):
        table.add_row(name, *(_of(share, count) for share in shares))
    style = "green" if tuned.loss < base.loss * (1 - _NOISE) else "bold yellow"
    verdict = Table.grid(padding=(0, 2, 0, 0))
    verdict.add_row(Text("verdict", "bold"), Text(found.verdict, style))
    return Group(*(Padding(part, (1, 0, 0, 2)) for part in (Group(title, facts), table, verdict)))


def _of(share: float | None, count: int) -> str:
    return "–" if share is None else f"{round(share * count):,} of {count:,}"
