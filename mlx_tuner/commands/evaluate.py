"""Base against tuned on rows that were held out: loss, answers, programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import computed_field

from mlx_tuner.commands import tasks
from mlx_tuner.commands.intervals import Interval, Share, mean_over_targets
from mlx_tuner.commands.quality import code_blocks, is_python, repeats_itself
from mlx_tuner.data.dataset import Dataset, shared_rows
from mlx_tuner.data.encode import END, HEADER, START
from mlx_tuner.engine import lora
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.errors import Fault, TunerError, UsageError
from mlx_tuner.models import model as models
from mlx_tuner.models.adapter import Adapter, apply
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.answers import Answer, answer_all, prompt_tokens
from mlx_tuner.models.base import check_base, resolve_base
from mlx_tuner.recipe.load import load_recipe, recipe_for
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.runs.metrics import Figures
from mlx_tuner.runs.place import RECIPE, TASKS
from mlx_tuner.runs.verdict import against_base
from mlx_tuner.show.progress import Display
from mlx_tuner.system import device, files
from mlx_tuner.training import assembly
from mlx_tuner.words import plural


class Side(Figures):
    """What the base, or the tuned model, made of the rows."""

    loss: Interval
    """Mean over the target tokens of all rows."""
    stops: Share
    """Answers that it ended by itself."""
    repeats: Share
    """Answers that end in the same words again and again."""
    fenced: Share
    """Answers with a block of code."""
    parses: Share
    """Answers whose Python parses, of those to rows that ask for Python."""
    exact: Share
    """Answers that are the row's own."""
    answer_tokens: float | None
    """Mean length of its answers."""
    passes: Share
    """Tasks whose program passed its test: pass@1."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> Interval:
        """exp of the loss, which past 700 no float holds."""
        ends = {name: _exp(getattr(self.loss, name)) for name in Interval.model_fields}
        return Interval(**ends)


class Evaluation(Figures):
    """A base and its fine-tune on the same rows."""

    run: str
    model: str
    """The base, as its user names it."""
    rows: int
    target_tokens: int
    rows_trained_on: int | None
    """How many of them are training rows too; None where those are not known."""
    own_answer_tokens: float | None
    """Mean length of the answers that the rows have themselves."""
    max_tokens: int
    """Of an answer."""
    base: Side
    tuned: Side
    difference: Interval
    """Of the losses, tuned less base, row by row."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> str:
        """What it comes to, in plain words."""
        change, stops = self.difference, self.tuned.stops
        said = []
        if self.rows:
            sure = change.high < 0 or change.low > 0
            found = against_base(self.base.loss.value, self.tuned.loss.value, sure=sure)
            said.append(found.text)
        if stops.of:
            words = "stops properly" if stops.count == stops.of else "runs on past its answer"
            said.append(f"It {words}: {stops} answers end by themselves, {self.base.stops} before.")
        if self.tuned.repeats.count:
            said.append(f"It repeats itself in {self.tuned.repeats} answers.")
        if self.tuned.passes.of:
            said.append(f"{self.tuned.passes} tasks pass, {self.base.passes} before.")
        return " ".join(said)


class Tasks(NamedTuple):
    """What `--tasks` asks for."""

    path: Path
    limit: int | None
    """The first ones only."""
    results: Path | None
    """Where each task's answers and outcomes go; by default beside the adapter."""


def evaluate(
    source: Path,
    display: Display,
    *,
    model: str | None = None,
    data: str | None = None,
    samples: int = 10,
    max_tokens: int = 512,
    programs: Tasks | None = None,
) -> Evaluation:
    """Compare a run's adapter, or any adapter, with its base.

    Args:
        model: the base; by default the one that the adapter names.
        data: a file of rows; by default the run's validation rows, without which tasks suffice.
        samples: how many rows are answered, by the likeliest tokens.
        max_tokens: of an answer.
        programs: tasks, for which programs that the models write are run.

    Raises:
        UsageError: there are no held-out rows.
        DataError: the rows or tasks are wrong.
        ModelError: adapter or base cannot be used, or do not belong together.
        RunError: programs cannot be run here.
    """
    trained = read_adapter(source)
    is_run = (source / RECIPE).exists()
    recipe = _recipe_of(source, data, is_run, needed=programs is None)
    to_do = tasks.read_tasks(programs.path, programs.limit) if programs else []
    if programs:
        tasks.require_runs()
    folder = resolve_base(trained, model)
    check_base(trained, folder)
    with display.task("reading the rows"):
        tokenizer = models.load_tokenizer(folder)
        rows, training_rows = _open(recipe, data, tokenizer, is_run) if recipe else (None, None)
    overlap = shared_rows(training_rows, rows) if rows and training_rows else None
    if overlap:
        display.note(f"{plural(overlap, 'row')} trained on as well, which flatters the fine-tune")
    count = len(rows) if rows else 0
    asked = questions(tokenizer, rows.examples(range(min(samples, count)))) if rows else []
    exercises = task_prompts(tokenizer, to_do, folder)
    exam = _Exam(rows, asked, to_do, exercises, tokenizer, max_tokens, display)
    trainer = _load(folder, trained, recipe, rows, display)
    with device.limits():
        factors = trainer.state.parameters
        neutral = trainer.shapes.flatten(lora.neutral(trainer.model))
        sides: dict[str, _Taken] = {}
        for name, state in (("base", neutral), ("tuned", factors)):
            trainer.state = State.start(state)
            sides[name] = exam.taken(name, trainer)
            if programs:  # a side may take an hour
                _keep_outcomes(programs.results or source / TASKS, to_do, sides)
    base, tuned = sides["base"], sides["tuned"]
    differences = [t - b for b, t in zip(base.losses, tuned.losses, strict=True)]
    own = [len(tokenizer.encode(q.answer, add_special_tokens=False)) for q in asked]
    return Evaluation(
        run=str(source),
        model=model or trained.base,
        rows=count,
        target_tokens=sum(base.targets),
        rows_trained_on=overlap,
        own_answer_tokens=_mean(own),
        max_tokens=max_tokens,
        base=_side(base, asked),
        tuned=_side(tuned, asked),
        difference=mean_over_targets(differences, base.targets),
    )


def _load(
    folder: Path,
    trained: Adapter,
    recipe: Recipe | None,
    rows: Dataset | None,
    display: Display,
) -> Trainer:
    """The base with the adapter, in a trainer that measures losses."""
    budget = device.memory_budget()
    with display.task("loading the model"):
        loaded = models.load(folder)
        apply(loaded.model, trained)
    micro = 1
    if recipe and rows:
        needs = assembly.step_memory(loaded.model, loaded.config)
        micro = assembly.micro_batch_tokens(recipe, needs, budget, rows.survey.longest)
    return Trainer(loaded.model, micro_batch_tokens=micro, backend=assembly.backend())


# ---- the evaluation of one model -----------------------------------------------------------------


class _Taken(NamedTuple):
    """One model's results."""

    losses: list[float]
    """Of each row, the sum over its target tokens."""
    targets: list[int]
    """Their number."""
    answers: list[Answer]
    """To the questions."""
    written: list[str]
    """Its answers to the tasks."""
    outcomes: list[tasks.Outcome]
    """Of the programs that they make."""


@dataclass(frozen=True)
class _Exam:
    """Rows, questions and tasks, the same for base and tuned model."""

    rows: Dataset | None
    asked: Sequence[Question]
    to_do: Sequence[tasks.Task]
    exercises: Sequence[list[int]]
    """The prompts of the tasks."""
    tokenizer: Any
    max_tokens: int
    display: Display

    def taken(self, name: str, trainer: Trainer) -> _Taken:
        """Measure the trainer's model, as it is now, on all of them."""
        losses: list[float] = []
        targets: list[int] = []
        if self.rows:
            with self.display.task(f"measuring the {name} model", len(self.rows)) as advance:
                losses, targets = _losses(trainer, self.rows, advance)
        prompts = [question.prompt for question in self.asked]
        answers = self._answers(trainer, prompts, f"answering with the {name} model")
        what = f"programming with the {name} model"
        written = [a.text for a in self._answers(trainer, self.exercises, what, tasks.ENDS)]
        return _Taken(losses, targets, answers, written, self._outcomes(name, written))

    def _outcomes(self, name: str, written: Sequence[str]) -> list[tasks.Outcome]:
        if not written:
            return []
        programs = [task.program(text) for task, text in zip(self.to_do, written, strict=True)]
        with self.display.task(f"running its programs ({name})", len(programs)) as advance:
            return tasks.run_all(programs, advance)

    def _answers(
        self, trainer: Trainer, prompts: Sequence[list[int]], what: str, ends: Sequence[str] = ()
    ) -> list[Answer]:
        if not prompts:
            return []
        model = trainer.tuned()
        with self.display.task(what, len(prompts)) as advance:
            return answer_all(
                model,
                self.tokenizer,
                prompts,
                self.max_tokens,
                ends=ends,
                on_token=lambda: advance(0),  # the first answer may be long in coming
                on_answer=advance,
            )


def _losses(
    trainer: Trainer, rows: Dataset, advance: Callable[[int], None]
) -> tuple[list[float], list[int]]:
    """Of each row, the sum of the loss over its target tokens, and their number."""
    sums, targets = [], []
    for batch in assembly.in_order(rows):
        for row in batch:
            targets.append(int(row.loss_mask.sum()))
            sums.append(trainer.evaluate([[row]]) * targets[-1])
        advance(len(batch))
    return sums, targets


def _side(taken: _Taken, asked: Sequence[Question]) -> Side:
    said = taken.answers
    due = [a.text for q, a in zip(asked, said, strict=True) if is_python(q.answer)]
    same = [q.answer.strip() == a.text.strip() for q, a in zip(asked, said, strict=True)]
    return Side(
        loss=mean_over_targets(taken.losses, taken.targets),
        stops=_share([answer.stopped for answer in said]),
        repeats=_share([repeats_itself(answer.text) for answer in said]),
        fenced=_share([bool(code_blocks(answer.text)) for answer in said]),
        parses=_share([is_python(text) for text in due]),
        exact=_share(same),
        answer_tokens=_mean([answer.tokens for answer in said]),
        passes=_share([outcome == "passed" for outcome in taken.outcomes]),
    )


def _keep_outcomes(path: Path, to_do: Sequence[tasks.Task], sides: Mapping[str, _Taken]) -> None:
    """Write a line for each task: what each side answered, and how the program ended."""
    lines = ""
    for i, task in enumerate(to_do):
        line = {"task_id": task.task_id}
        for name, side in sides.items():
            line |= {name: side.outcomes[i], f"{name}_answer": side.written[i]}
        lines += json.dumps(line) + "\n"
    files.write_text(path, lines)


def _share(outcomes: Sequence[bool]) -> Share:
    return Share(count=sum(outcomes), of=len(outcomes))


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value >= 700 else math.nan


# ---- the rows ------------------------------------------------------------------------------------


def _recipe_of(source: Path, data: str | None, is_run: bool, needed: bool) -> Recipe | None:
    """What to read the rows by: the run's recipe, or the default; None where there are no rows."""
    if data is not None and not is_run:
        return recipe_for(data, recipe=None, model=None, valid=None, overrides=())
    if is_run:
        recipe = load_recipe(source / RECIPE, check_paths=False)  # the rows may have moved
        if data is not None or recipe.data.valid is not None:
            return recipe
    if needed:
        which = "trained without validation rows" if is_run else "an adapter without its run's rows"
        raise UsageError(Fault(str(source), "", f"{which}; give held-out rows with --data FILE"))
    return None


def _open(
    recipe: Recipe, data: str | None, tokenizer: Any, is_run: bool
) -> tuple[Dataset, Dataset | None]:
    """The held-out rows, and the rows that were trained on where they are known."""
    if data is None:
        opened = assembly.open_data(recipe, tokenizer)
        assert opened.valid is not None  # `_recipe_of` has seen to it
        return opened.valid, opened.train
    rows = assembly.open_file(recipe.data, data, tokenizer)
    if is_run:
        with suppress(TunerError):  # the training rows may have moved
            return rows, assembly.open_data(recipe, tokenizer).train
    return rows, None


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


def task_prompts(tokenizer: Any, to_do: Sequence[tasks.Task], folder: Path) -> list[list[int]]:
    """The prompt of each task, with the beginning of its answer, as token ids."""
    spoken = [[{"role": "user", "content": task.question}] for task in to_do]
    begun = tokenizer.encode(tasks.BEGINNING, add_special_tokens=False)
    return [prompt_tokens(tokenizer, each, folder) + begun for each in spoken]
