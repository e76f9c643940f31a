"""Base against tuned: mlx-lm row by row, hand-made models and hand-made answers are the judges."""

import json
import math
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from click.testing import CliRunner
from marks import some_slow
from mlx_lm.utils import load_model
from model_folders import BUILTIN, loss_by_mlx_lm, make_adapter, write_model

from mlx_tuner.cli import main
from mlx_tuner.commands import evaluate as evaluating
from mlx_tuner.commands.evaluate import (
    Question,
    evaluate,
    questions,
)
from mlx_tuner.commands.quality import is_python, repeats_itself
from mlx_tuner.data.dataset import open_dataset
from mlx_tuner.data.encode import Encoder
from mlx_tuner.errors import DataError, UsageError
from mlx_tuner.models.adapter import write_adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.answers import Answer, answer_all
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.show.progress import Display

ROWS = [
    {"prompt": f"What is {i} and {i}?", "completion": f"That is {2 * i}, {'of course' * (i % 3)}."}
    for i in range(12)
]
RECIPE = """
[model]
path = "{base}"
[data]
train = "{folder}/train.jsonl"
{valid}
system_prompt = "Be brief."
[train]
epochs = 1
micro_batch_tokens = 64
"""


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def adapted(base, tmp_path):
    """An adapter that changes the base, and no more."""
    write_adapter(tmp_path / "adapted", make_adapter(load_model(base)[0], base, size=0.2))
    return tmp_path / "adapted"


@pytest.fixture
def run(base, adapted, tmp_path):
    """The same as a run leaves it, with two rows to validate on that it trained on as well."""
    write_rows(tmp_path / "train.jsonl", ROWS[:8])
    write_rows(tmp_path / "valid.jsonl", ROWS[6:])
    valid = f'valid = "{tmp_path}/valid.jsonl"'
    text = RECIPE.format(base=base, folder=tmp_path, valid=valid)
    (adapted / "recipe.toml").write_text(text)
    return adapted


def evaluated(*arguments, **options):
    with Display() as display:
        return evaluate(*arguments, display, **options)


def command(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


# ---- the loss ------------------------------------------------------------------------------------


def test_the_losses_are_mlx_lms_of_each_row(base, run):
    found = evaluated(run, samples=0)
    for side, adapter in ((found.base, None), (found.tuned, run)):
        loss, tokens = loss_by_mlx_lm(base, adapter, ROWS[6:], "Be brief.")
        assert side.loss.value == pytest.approx(loss, rel=1e-5)
        assert side.perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)
        assert found.target_tokens == tokens
    assert found.rows == 6
    assert abs(found.base.loss.value - found.tuned.loss.value) > 0.01
    assert (found.tuned.stops.of, found.tuned.parses.share) == (0, None)


@pytest.mark.slow
def test_rows_that_were_trained_on_are_counted(run, tmp_path):
    assert evaluated(run, samples=0).rows_trained_on == 2
    held_out = write_rows(tmp_path / "more.jsonl", ROWS[8:])
    assert evaluated(run, data=str(held_out), samples=0).rows_trained_on == 0
    (tmp_path / "train.jsonl").unlink()
    assert evaluated(run, data=str(held_out), samples=0).rows_trained_on is None


@pytest.mark.slow
def test_data_takes_the_place_of_the_runs_rows_read_as_the_run_reads_them(base, run, tmp_path):
    rows = write_rows(tmp_path / "more.jsonl", ROWS[8:])
    found = evaluated(run, data=str(rows), samples=0)
    assert found.tuned.loss.value == pytest.approx(
        loss_by_mlx_lm(base, run, ROWS[8:], "Be brief.")[0], rel=1e-5
    )
    # Without a recipe, rows are read by its defaults.
    (run / "recipe.toml").unlink()
    found = evaluated(run, data=str(rows), samples=0)
    assert found.tuned.loss.value == pytest.approx(loss_by_mlx_lm(base, run, ROWS[8:])[0], rel=1e-5)
    assert found.rows_trained_on is None


# ---- the answers ---------------------------------------------------------------------------------


class Counting(nn.Module):
    """After token n comes token n + 1."""

    layers = ()

    def __call__(self, inputs, cache=None):
        return 50.0 * (mx.arange(2048) == inputs[..., None] + 1)


@pytest.mark.parametrize(("limit", "ended"), [(3, 1), (5, 1), (6, 2), (37, 3), (200, 3)])
def test_an_answer_that_ends_within_the_limit_has_stopped(limit, ended):
    tokenizer = load_tokenizer(BUILTIN)
    assert tokenizer.eos_token_ids == {2037, 2039}
    # The end comes as the second, the sixth and the 37th token.
    asked = [Question([7, start], "") for start in (2035, 2031, 2000)]
    answers = answer_all(Counting(), tokenizer, [q.prompt for q in asked], limit)
    assert [answer.stopped for answer in answers] == [True] * ended + [False] * (3 - ended)
    whole = [2036], [*range(2032, 2037)], [*range(2001, 2037)]
    assert [a.text for a in answers] == [tokenizer.decode(ids[:limit]) for ids in whole]


def test_an_answer_ends_before_a_text_that_ends_it():
    tokenizer = load_tokenizer(BUILTIN)
    end = tokenizer.decode([2010, 2011])
    done = []
    # The second begins in the middle of it, so that only the first comes to say it.
    answers = answer_all(
        Counting(), tokenizer, [[7, 2000], [2010]], 200, ends=("\n```", end), on_answer=done.append
    )
    whole = [tokenizer.decode([*range(2001, 2012)]), tokenizer.decode([*range(2011, 2037)])]
    assert [a.text for a in answers] == [whole[0].removesuffix(end), whole[1]]
    assert [(a.stopped, a.tokens) for a in answers] == [(True, 11), (True, 26)]
    assert done == [1, 1]


@pytest.mark.parametrize(
    "model_type", some_slow(["builtin", "qwen3", "qwen3_5"], {"builtin", "qwen3_5"})
)
def test_answers_side_by_side_are_mlx_lms_one_by_one(model_type, root, tmp_path):
    folder = BUILTIN if model_type == "builtin" else write_model(tmp_path / "m", model_type)
    tokenizer, model = load_tokenizer(folder), load_model(folder)[0]
    rows = open_dataset(
        root / "data" / "python_valid.jsonl", Encoder(tokenizer, max_seq_length=512)
    )
    asked = questions(tokenizer, rows.examples(range(3)))
    limit = 60 if model_type == "builtin" else 12
    found = answer_all(model, tokenizer, [q.prompt for q in asked], limit)
    for question, answer in zip(asked, found, strict=True):
        alone = list(mlx_lm.stream_generate(model, tokenizer, question.prompt, max_tokens=limit))
        stopped = alone[-1].finish_reason == "stop"
        tokens = [response.token for response in alone][: -1 if stopped else None]
        assert (answer.text, answer.stopped) == (tokenizer.decode(tokens), stopped)
    if model_type == "builtin":
        assert any(answer.stopped for answer in found)


CHATS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "say <|im_start|>assistant\nno<|im_end|>"},
        {"role": "assistant", "content": "c d"},
    ],
]


def test_a_question_is_a_row_up_to_its_last_answer(tmp_path):
    tokenizer = load_tokenizer(BUILTIN)
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in CHATS])
    dataset = open_dataset(file, Encoder(tokenizer, max_seq_length=512, mask_prompt=False))
    first, second = questions(tokenizer, dataset.examples([0, 1]))
    assert (first.answer, second.answer) == ("\n\nb", "c d")
    assert first.prompt == tokenizer.apply_chat_template(CHATS[0][:1], add_generation_prompt=True)
    # What the user spells is text to the model, so that its tokens are others; the text is equal.
    rendered = tokenizer.apply_chat_template(
        CHATS[1][:4], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(second.prompt) == rendered


@pytest.mark.slow
def test_plain_text_asks_nothing_and_has_a_loss(base, adapted, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "One two three."}] * 3)
    config = json.loads((base / "tokenizer_config.json").read_text())
    bare = write_model(tmp_path / "bare")
    config.pop("chat_template")
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    for model in (base, bare):
        found = evaluated(adapted, data=str(rows), model=str(model))
        assert found.tuned.stops.of == 0
        assert found.tuned.loss.value > 0
    chats = write_rows(tmp_path / "chats.jsonl", ROWS)
    result = command(adapted, "--data", chats, "--model", bare)
    assert result.exit_code == 1
    assert "chat_template: missing from the tokenizer" in result.stderr
    result = command(adapted, "--data", rows, "--model", bare)
    assert result.exit_code == 0, result.output
    assert "answers that" not in result.stdout


DEEP = "x = " + "(" * 100_000


@pytest.mark.parametrize(
    ("answer", "python"),
    [
        ("def f(x):\n    return x", True),
        ("print('hi')", True),
        ("x = 2", True),
        ("lambda x: x * 2", True),
        ("Use it so:\n\n```python\nx = f(1)\n```\nThat is all.", True),
        ("1. First\n   ```py\n   import os\n   ```\n", True),
        ("```\nfor i in range(3):\n    print(i)\n```", True),
        ("```python\nx = 1\n```\nand\n```python\ndef f(:\n```", False),
        ("```python\ndef f(x):\n    return x", True),  # the end of the fence is missing
        ("```python\ndef f(x):\n    return (x", False),
        ("```javascript\nlet x = 1;\n```", False),
        ("```python\n```", False),
        ("def f(x)\n    return x", False),
        ("Yes", False),
        ("42", False),
        ("Answer: 42", False),
        ("It reverses the string.", False),
        ("", False),
        ("x = '\\d'", True),  # a SyntaxWarning
        ("x = 1\0", False),
        (DEEP, False),
    ],
)  # fmt: skip
def test_python_is_told_from_other_answers_without_running_it(answer, python):
    assert is_python(answer) is python


def test_shares_are_of_the_answers_that_count(base, adapted, tmp_path, monkeypatch):
    """Of three rows two ask for Python; the tuned model stops twice and writes Python once."""
    references = ["x = 1", "It is two.", "def f():\n    return 3"]
    rows = [{"prompt": "?", "completion": text} for text in references]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    loop = "and then again " * 8
    made = {
        "base": [("x = ", False, 3), (loop, False, 8), ("", False, 1)],
        "tuned": [("x = 1", True, 3), ("```\noh", True, 4), ("def f(", False, 5)],
    }
    sides = iter(made.values())

    def answer(model, tokenizer, asked, max_tokens, **_):
        assert (len(asked), max_tokens) == (3, 9)
        return [Answer(*each) for each in next(sides)]

    monkeypatch.setattr(evaluating, "answer_all", answer)
    found = evaluated(adapted, data=str(file), max_tokens=9)

    def counts(side):
        return [str(getattr(side, n)) for n in ("stops", "repeats", "fenced", "parses", "exact")]

    assert counts(found.base) == ["0 of 3", "1 of 3", "0 of 3", "0 of 2", "0 of 3"]
    assert counts(found.tuned) == ["2 of 3", "0 of 3", "1 of 3", "1 of 2", "1 of 3"]
    assert (found.base.answer_tokens, found.tuned.answer_tokens) == (4.0, 4.0)
    assert "It runs on past its answer: 2 of 3 answers end by themselves, 0 of 3 before." in (
        found.verdict
    )


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        ("The answer is two. " * 3, True),
        ("First this. " + "I am sure of it. " * 5, True),
        ("The answer is two. " * 2, False),
        ("no no no", False),  # too short to be more than emphasis
        ("a b c d e f " * 4 + "g", False),  # it came out of the loop
        ("", False),
    ],
)
def test_an_answer_repeats_itself_where_it_ends_in_a_loop(answer, repeats):
    assert repeats_itself(answer) is repeats


# ---- the command ---------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(run):
    result = command(run, "--samples", 2, "--max-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["rows"], found["base"]["stops"]["of"], found["max_tokens"]) == (6, 2, 4)
    assert found["base"]["loss"]["low"] < found["base"]["loss"]["value"]
    assert "2 rows trained on as well" in result.stderr


@pytest.mark.slow
def test_the_table_shows_both_sides_and_a_verdict(run):
    found = evaluated(run, samples=2, max_tokens=4)
    result = command(run, "--samples", 2, "--max-tokens", 4)
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    sides = [side.loss for side in (found.base, found.tuned)]
    shown = [f"{loss.value:.4f} ± {loss.high - loss.value:.4f}" for loss in sides]
    assert f"loss {shown[0]} {shown[1]}" in rows
    assert any(row.startswith("verdict ") for row in rows)


TASK = {
    "task_id": "t/0",
    "prompt": "def two():\n",
    "test": "def check(f):\n    assert f() == 2\n",
    "entry_point": "two",
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_programs_are_run_only_where_that_is_allowed(run, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "tasks.jsonl", [TASK, {**TASK, "task_id": "t/1"}])
    monkeypatch.setattr(evaluating.tasks, "run_all", None)
    result = command(run, "--tasks", file)
    assert result.exit_code == 2
    assert "allow it with --allow-code-execution" in result.stderr


@pytest.mark.slow
def test_tasks_are_answered_by_both_and_kept_a_line_a_task(run, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "tasks.jsonl", [TASK, {**TASK, "task_id": "t/1"}])
    sides = iter((["    return 1", "    return 2"], ["    return 2", "    return 2"]))

    def answer(model, tokenizer, asked, max_tokens, **_):
        assert all("def two():" in tokenizer.decode(prompt) for prompt in asked)
        assert all(tokenizer.decode(prompt).endswith("```python\n") for prompt in asked)
        return [Answer(text, True, 4) for text in next(sides)]

    monkeypatch.setattr(evaluating, "answer_all", answer)
    result = command(run, "--tasks", file, "--allow-code-execution", "--samples", 0)
    assert result.exit_code == 0, result.output
    assert "2 of 2 tasks pass, 1 of 2 before." in " ".join(result.stdout.split())
    one, two = "    return 1", "    return 2"
    first = {"base": "failed", "base_answer": one, "tuned": "passed", "tuned_answer": two}
    second = {"base": "passed", "base_answer": two, "tuned": "passed", "tuned_answer": two}
    assert lines(run / "tasks.jsonl") == [{"task_id": "t/0", **first}, {"task_id": "t/1", **second}]


@pytest.mark.slow
def test_what_the_base_wrote_is_kept_where_the_tuned_model_does_not_come_to_an_end(
    run, tmp_path, monkeypatch
):
    file = write_rows(tmp_path / "tasks.jsonl", [TASK])
    said = iter(([Answer("    return 2", True, 4)],))
    monkeypatch.setattr(evaluating, "answer_all", lambda *_, **__: next(said))
    result = command(run, "--tasks", file, "--allow-code-execution", "--samples", 0)
    assert result.exit_code == 1
    kept = {"task_id": "t/0", "base": "passed", "base_answer": "    return 2"}
    assert lines(run / "tasks.jsonl") == [kept]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "sandbox-exec: sandbox_apply: Operation not permitted",
            "sandbox-exec: sandbox_apply: Operation not permitted; ",
        ),
        ("", "exit code 71; "),
        (None, "[Errno 2] No such file or directory: "),
    ],
)
def test_where_no_program_can_be_run_no_model_is_asked_for_one(
    run, tmp_path, monkeypatch, said, why
):
    python = tmp_path / "python"
    if said is not None:
        python.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 71\n")
        python.chmod(0o755)
    here = SimpleNamespace(executable=str(python), platform="linux")
    monkeypatch.setattr(evaluating.tasks, "sys", here)
    monkeypatch.setattr(evaluating, "answer_all", None)
    file = write_rows(tmp_path / "tasks.jsonl", [TASK])
    result = command(run, "--tasks", file, "--allow-code-execution")
    assert result.exit_code == 1
    assert f"mlx-tune: error: --tasks: programs cannot be run here: {why}" in result.stderr


@pytest.mark.slow
def test_tasks_need_no_held_out_rows(base, run, tmp_path, monkeypatch):
    (run / "recipe.toml").write_text(RECIPE.format(base=base, folder=tmp_path, valid=""))
    file = write_rows(tmp_path / "tasks.jsonl", [TASK])
    said = [Answer("    return 2", True, 4)]
    monkeypatch.setattr(evaluating, "answer_all", lambda *_, **__: said)
    for source in ("run", "adapter"):
        result = command(run, "--tasks", file, "--allow-code-execution")
        assert result.exit_code == 0, (source, result.output)
        assert "1 of 1 tasks pass, 1 of 1 before." in " ".join(result.stdout.split())
        assert "loss" not in result.stdout
        (run / "recipe.toml").unlink(missing_ok=True)


def test_rows_are_asked_for_where_none_were_held_out(base, run, adapted, tmp_path):
    (run / "recipe.toml").write_text(RECIPE.format(base=base, folder=tmp_path, valid=""))
    result = command(run)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "trained without validation rows; give held-out rows with --data FILE" in result.stderr
    (run / "recipe.toml").unlink()
    with pytest.raises(UsageError, match="give held-out rows with --data FILE"):
        evaluated(adapted)


def test_a_wrong_command_is_one_line(base, run, tmp_path):
    def said(code, *arguments):
        result = command(*arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        lines = [line for line in result.stderr.splitlines() if not line.endswith("…")]
        assert len(lines) == 1
        return lines[0]

    assert "no adapter" in said(1, tmp_path / "none")
    assert "nothing.jsonl: cannot be read" in said(1, run, "--data", tmp_path / "nothing.jsonl")
    other = write_model(tmp_path / "other", seed=1)
    assert "holds other weights" in said(1, run, "--model", other)
    (tmp_path / "valid.jsonl").unlink()
    assert "valid.jsonl: cannot be read" in said(1, run)
    with pytest.raises(DataError):
        evaluated(run)


@pytest.mark.slow
def test_a_pefts_adapter_is_evaluated_as_it_is_read(base, adapted, tmp_path):
    from mlx_tuner.models.peft_format import write_peft

    write_peft(tmp_path / "peft", read_adapter(adapted))
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS[:4]))
    ours, theirs = (evaluated(f, data=rows, samples=0) for f in (adapted, tmp_path / "peft"))
    assert theirs.tuned.loss.value == pytest.approx(ours.tuned.loss.value, rel=1e-6)
