"""A whole run on the built-in model: its files, its numbers, and that it can be stopped."""

import html
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import mlx.core as mx
import pytest
from launched import training_of
from safetensors.numpy import load_file

from mlx_tuner.commands.generate import answer, load
from mlx_tuner.errors import (
    DataError,
    Fault,
    ModelError,
    RecipeError,
    RunError,
    UsageError,
)
from mlx_tuner.models.answers import prompt_tokens
from mlx_tuner.models.model import load_tokenizer, resolve
from mlx_tuner.recipe.load import load_recipe, parse_recipe
from mlx_tuner.runs import run as runs
from mlx_tuner.runs.metrics import EvalRecord, TrainRecord, train_records
from mlx_tuner.runs.place import is_running
from mlx_tuner.show import story, trackers
from mlx_tuner.show.progress import Display
from mlx_tuner.training import assembly, session
from mlx_tuner.training import finetune as training
from mlx_tuner.training.finetune import finetune

RECIPE = """
[model]
path = "builtin:tiny-qwen"
[data]
train = "python_100.jsonl"
valid = "python_valid.jsonl"
limit = 20
[lora]
rank = 4
dropout = 0.1
target_modules = "all-linear"
[train]
epochs = 3
batch_size = 8
learning_rate = 5e-3
warmup_steps = 2
log_every = 2
eval_every = 3
save_every = 2
[sample]
prompts = ["Write a function that adds two numbers."]
max_tokens = 12
"""


def recipe_of(root, text=RECIPE, **changes):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return parse_recipe(text, source="small.toml", folder=root / "data", overrides=overrides)


def run_recipe(recipe, path, **options):
    with Display() as display:
        return finetune(recipe, path, display, **options)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "small"
    return path, run_recipe(recipe_of(root), path)


@pytest.mark.slow
def test_a_run_leaves_every_file_of_the_contract(finished):
    path, _ = finished
    files = {p.name for p in path.iterdir() if not p.name.startswith(".")}
    assert files == {
        "adapters.safetensors",
        "adapter_config.json",
        "recipe.toml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "samples.jsonl",
        "loss.png",
        "grad_norm.png",
        "checkpoints",
    }
    checkpoint = max((path / "checkpoints").iterdir())
    assert checkpoint.name == "step-00000009"
    assert {p.name for p in checkpoint.iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "state.json",
        "MANIFEST.json",
    }


@pytest.mark.slow
def test_prompts_are_answered_by_the_base_and_at_each_evaluation(finished):
    path, summary = finished
    samples = runs.read_samples(path)
    assert [sample.step for sample in samples] == [0, 3, 6, 9]
    assert samples[-1].answer != samples[0].answer
    loaded = load(str(path))
    asked = [{"role": "user", "content": samples[0].prompt}]
    by_hand = "".join(answer(loaded, asked, max_tokens=12, temperature=0.0))
    assert by_hand == next(s.answer for s in samples if s.step == summary.best_step)
    assert all(s.answer[:40] in html.unescape((path / "report.html").read_text()) for s in samples)


@pytest.mark.slow
def test_metrics_come_at_the_recipes_intervals(finished):
    path, summary = finished
    records = runs.read_records(path)
    trained = [r for r in records if isinstance(r, TrainRecord)]
    evaluated = [r for r in records if isinstance(r, EvalRecord)]
    assert [r.step for r in trained] == [2, 4, 6, 8, 9]
    assert [r.epoch for r in trained] == [0.8, 1.4, 2.0, 2.8, 3.0]
    assert [len(r.losses) for r in trained] == [2, 2, 2, 2, 1]
    assert [r.step for r in evaluated] == [0, 3, 6, 9]
    assert summary.steps == 9
    assert summary.epochs == 3
    assert summary.final_loss < summary.first_loss
    assert evaluated[-1].val_loss < evaluated[0].val_loss
    best = min(evaluated[1:], key=lambda r: r.val_loss)
    assert (summary.best_step, summary.best_val_loss) == (best.step, best.val_loss)


@pytest.mark.slow
def test_metrics_and_summary_have_the_contracts_keys(finished):
    path, _ = finished
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["event"] == "train")
    assert set(train) >= {
        "event",
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "samples_per_second",
        "tokens_per_second",
        "trained_tokens",
        "peak_memory_gb",
        "elapsed_seconds",
    }
    evaluation = next(line for line in lines if line["event"] == "eval")
    assert list(evaluation) == ["event", "step", "epoch", "val_loss"]
    summary = json.loads((path / "summary.json").read_text())
    wanted = (
        "steps epochs trainable_parameters total_parameters train_loss first_loss final_loss "
        "best_step best_val_loss runtime_seconds samples_per_second steps_per_second "
        "tokens_per_second peak_memory_gb stopped_early"
    )
    assert set(wanted.split()) <= set(summary)


@pytest.mark.slow
def test_the_resolved_recipe_runs_again_to_the_same_adapter(finished, tmp_path):
    path, _ = finished
    again = load_recipe(path / "recipe.toml")
    run_recipe(again, tmp_path / "again")
    assert_same_adapter(path, tmp_path / "again")


@pytest.mark.slow
def test_mlx_lm_loads_the_adapter_and_generates_the_same_tokens(finished, root):
    import mlx_lm

    from mlx_tuner.commands.generate import answer, load
    from mlx_tuner.models.model import resolve

    path, _ = finished
    prompt = "Write a Python function that doubles a number."
    chat = [{"role": "user", "content": prompt}]
    ours = "".join(answer(load(str(path)), chat, max_tokens=40, temperature=0))
    model, tokenizer = mlx_lm.load(str(resolve("builtin:tiny-qwen")), adapter_path=str(path))[:2]
    theirs = mlx_lm.generate(
        model,
        tokenizer,
        tokenizer.apply_chat_template(chat, add_generation_prompt=True),
        max_tokens=40,
    )
    assert ours == theirs
    base = "".join(answer(load(str(path), base=True), chat, max_tokens=40, temperature=0))
    assert base != ours


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_bit_for_bit_as_if_never_stopped(finished, root, tmp_path):
    path, summary = finished
    stop_after(root, tmp_path / "cut", steps=5)
    resumed = run_recipe(recipe_of(root), tmp_path / "cut", resume=True)
    assert_same_adapter(path, tmp_path / "cut")
    assert resumed.train_loss == summary.train_loss
    assert losses(tmp_path / "cut") == losses(path)


def stop_after(root, path, steps):
    """Run with a SIGTERM that comes in the given step."""
    done = run_with(recipe_of(root), path, f"if i == {steps}: os.kill(os.getpid(), signal.SIGTERM)")
    assert done.returncode == 143, done.stderr
    assert f"stopped after step {steps}; continue with --resume" in done.stderr
    assert "Traceback" not in done.stderr


def run_with(recipe, path, in_step):
    """`mlx-tune run`, whose child runs a line of code in each step, the i-th."""
    child = (
        "import os, signal, time\n"
        "from mlx_tuner.training import session\n"
        "steps = session.train\n"
        "def train(*args, **kwargs):\n"
        "    for i, result in enumerate(steps(*args, **kwargs), 1):\n"
        f"        {in_step}\n"
        "        yield result\n"
        "session.train = train\n"
    )
    arguments = ["run", str(path.parent / "small.toml"), "--run-dir", str(path)]
    code = (
        "from mlx_tuner import cli\n"
        "from mlx_tuner.runs import supervisor\n"
        f"supervisor._CHILD = {child!r} + supervisor._CHILD\n"
        f"cli.main({arguments!r})\n"
    )
    (path.parent / "small.toml").write_text(recipe.to_toml())
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def losses(path):
    return [(r.step, getattr(r, "loss", None) or r.val_loss) for r in runs.read_records(path)]


def assert_same_adapter(one, other):
    ours, theirs = (load_file(path / "adapters.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(root, tmp_path):
    """In a step that never ends, so that the first one alone would wait for ever."""
    ask = "os.kill(os.getppid(), signal.SIGINT)"
    kept = "signal.getsignal(signal.SIGINT) != signal.SIG_DFL"
    hang = f"{ask}; [time.sleep(0.01) for _ in iter(lambda: {kept}, False)]; {ask}; time.sleep(1e6)"
    done = run_with(recipe_of(root), tmp_path / "run", hang)
    assert done.returncode == 130
    assert f"{tmp_path / 'run'}: stopped at once; nothing was saved" in done.stderr
    assert not any((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_run_stopped_before_its_first_evaluation_has_its_last_adapter(root, tmp_path):
    stop_after(root, tmp_path / "run", steps=1)
    assert_same_adapter(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000001")


@pytest.mark.slow
def test_the_adapter_that_a_full_disk_kept_from_being_published_is_so_on_resuming(
    root, tmp_path, monkeypatch
):
    text = RECIPE.replace('valid = "python_valid.jsonl"\n', "")
    recipe = recipe_of(root, text, train__max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "publish", Mock(side_effect=RunError(Fault("here", "", "full"))))
        with pytest.raises(RunError, match="full"):
            run_recipe(recipe, tmp_path / "run")
    assert run_recipe(recipe, tmp_path / "run", resume=True).steps == 2
    assert_same_adapter(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000002")


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_best_adapter_that_its_checkpoint_knows(
    root, tmp_path, monkeypatch
):
    """One of later steps may lie there, of a course that is not taken again."""
    stop_after(root, tmp_path / "run", steps=4)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert_same_adapter(tmp_path / "run", checkpoints / "step-00000003")
    shutil.copy(checkpoints / "step-00000004" / "adapters.safetensors", tmp_path / "run")
    monkeypatch.setattr(session, "train", lambda *_, **__: iter(()))
    run_recipe(recipe_of(root), tmp_path / "run", resume=True)
    assert_same_adapter(tmp_path / "run", checkpoints / "step-00000003")


@pytest.mark.slow
def test_a_run_whose_files_have_moved_is_the_same_run(finished, root, tmp_path):
    path, summary = finished
    (tmp_path / "data").mkdir()
    for name in ("python_100.jsonl", "python_valid.jsonl"):
        shutil.copy(root / "data" / name, tmp_path / "data")
    shutil.copytree(path, tmp_path / "run")
    assert run_recipe(recipe_of(tmp_path), tmp_path / "run", resume=True) == summary
    others = tmp_path / "data" / "others.jsonl"
    (tmp_path / "data" / "python_100.jsonl").rename(others)
    recipe = recipe_of(tmp_path, data__train=f"'{others}'")
    with pytest.raises(RecipeError, match=r"data.train: is .*others.jsonl', but the run began"):
        run_recipe(recipe, tmp_path / "run", resume=True)


@pytest.mark.slow
def test_resuming_with_another_recipe_names_what_differs(finished, root):
    path, _ = finished
    with pytest.raises(RecipeError) as error:
        run_recipe(recipe_of(root, lora__rank=8, train__epochs=4), path, resume=True)
    message = str(error.value)
    assert "lora.rank: is 8, but the run began with 4; resume with the same" in message
    assert "train.epochs: is 4, but the run began with 3" in message
    assert "--allow-change" in message


@pytest.mark.slow
def test_resuming_on_other_rows_or_another_model_is_refused(finished, root, tmp_path):
    """The row's text, the order of two rows, the validation rows: each makes it another run."""
    path, _ = finished
    lines = (root / "data" / "python_100.jsonl").read_text().splitlines(keepends=True)
    valid = (root / "data" / "python_valid.jsonl").read_text().splitlines(keepends=True)
    before = contents(path)
    (tmp_path / "data").mkdir()
    for train, held_out, field in (
        ([lines[0].replace("e", "a", 1), *lines[1:]], valid, "data.train"),
        ([lines[1], lines[0], *lines[2:]], valid, "data.train"),
        (lines, valid[:-1], "data.valid"),
    ):
        (tmp_path / "data" / "python_100.jsonl").write_text("".join(train))
        (tmp_path / "data" / "python_valid.jsonl").write_text("".join(held_out))
        recipe = replace(recipe_of(root), data=recipe_of(tmp_path).data)
        kept = replace(recipe, data=recipe_of(root).data)
        with pytest.raises(DataError, match=f"{field}: has other rows than the run began with"):
            resume_as(recipe, kept, path)
    assert contents(path) == before


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name != ".lock"}


def resume_as(recipe, kept, path):
    """Resume with the recipe's files under the names that the run knows."""
    data = assembly.open_data(recipe, load_tokenizer(resolve("builtin:tiny-qwen")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "open_data", lambda *args: data)
        run_recipe(kept, path, resume=True)


@pytest.mark.slow
def test_another_base_model_is_another_run(finished, root, monkeypatch):
    path, _ = finished
    monkeypatch.setattr(training, "fingerprint", lambda folder: "0" * 64)
    with pytest.raises(ModelError, match=r"model.path: holds other weights .* \(.{12} then, 0000"):
        run_recipe(recipe_of(root), path, resume=True)


@pytest.mark.slow
def test_what_changes_no_result_may_change_in_a_resumed_run(finished, root, tmp_path):
    path, summary = finished
    stop_after(root, tmp_path / "cut", steps=5)
    other = recipe_of(
        root, train__gradient_checkpointing="true", train__log_every=1, train__save_every=3
    )
    resumed = run_recipe(other, tmp_path / "cut", resume=True)
    assert resumed.steps == summary.steps
    assert_same_adapter(path, tmp_path / "cut")
    kept = load_recipe(tmp_path / "cut" / "recipe.toml")
    assert (kept.train.save_every, kept.train.gradient_checkpointing) == (3, True)


@pytest.mark.slow
def test_a_run_that_is_finished_says_so_and_trains_nothing(finished, root, capsys):
    path, summary = finished
    before = contents(path)
    again = run_recipe(recipe_of(root), path, resume=True)
    assert "has finished, after step 9; nothing is left to train" in capsys.readouterr().err
    assert again == summary
    assert contents(path) == before


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_epochs_where_that_is_allowed(finished, root, tmp_path):
    path, _ = finished
    shutil.copytree(path, tmp_path / "more")
    more = recipe_of(root, train__epochs=4)
    summary = run_recipe(more, tmp_path / "more", resume=True, allow_change=True)
    assert (summary.steps, summary.status) == (12, "finished")


@pytest.mark.slow
def test_resuming_nothing_and_overwriting_something_are_errors(finished, root, tmp_path):
    path, _ = finished
    with pytest.raises(RunError, match="no run to resume"):
        run_recipe(recipe_of(root), tmp_path / "none", resume=True)
    with pytest.raises(UsageError, match="--resume, replace it with --overwrite"):
        run_recipe(recipe_of(root), path)


@pytest.mark.slow
def test_a_run_stops_early_and_keeps_its_best(root, tmp_path, capsys):
    same = {
        "train__eval_every": 1,
        "train__log_every": 100,
        "train__learning_rate": 0.02,
        "train__lr_schedule": '"constant"',
        "train__warmup_steps": 0,
    }
    recipe = recipe_of(root, train__epochs=30, train__early_stopping_patience=2, **same)
    summary = run_recipe(recipe, tmp_path / "run")
    assert summary.stopped_early
    assert summary.steps == summary.best_step + 2
    again = run_recipe(recipe, tmp_path / "run", resume=True)
    assert "has finished early, by its evaluations" in capsys.readouterr().err
    assert again == summary
    # Killed between its last log line and its summary:
    records = runs.read_records(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    again = run_recipe(recipe, tmp_path / "run", resume=True)
    kept = ("status", "steps", "trained_rows", "trained_tokens", "train_loss", "best_step")
    assert [getattr(again, key) for key in kept] == [getattr(summary, key) for key in kept]
    assert len(runs.read_records(tmp_path / "run")) == len(records)
    text = RECIPE.replace("epochs = 3\n", "")
    shorter = recipe_of(root, text, **{**same, "train__max_steps": summary.best_step})
    run_recipe(shorter, tmp_path / "best")
    # Patience that ends with the last step has stopped nothing.
    exact = {**same, "train__max_steps": summary.steps, "train__early_stopping_patience": 2}
    assert run_recipe(recipe_of(root, text, **exact), tmp_path / "exact").status == "finished"
    assert_same_adapter(tmp_path / "best", tmp_path / "run")


@pytest.mark.slow
def test_three_steps_without_a_finite_loss_end_the_run_and_name_their_rows(
    root, tmp_path, monkeypatch
):
    real = session.train

    def broken(*args, **kwargs):
        for i, result in enumerate(real(*args, **kwargs)):
            yield replace(result, finite=i == 1, loss=float("nan")) if i != 1 else result

    monkeypatch.setattr(session, "train", broken)
    recipe = recipe_of(root, data__shuffle="false", train__eval_every=100)
    with pytest.raises(RunError) as error:
        run_recipe(recipe, tmp_path / "run")
    kept = json.loads(next((tmp_path / "run").glob("checkpoints/*4/state.json")).read_text())
    assert kept["nonfinite_in_a_row"] == 2
    message = str(error.value)
    assert "step 5 had no finite loss or gradient; its rows: lines 9, 10, 11, 12" in message


@pytest.mark.slow
def test_rows_that_turn_out_unusable_are_left_out_of_their_steps_counted_and_named(
    root, tmp_path, capsys, monkeypatch
):
    lines = (root / "data" / "python_100.jsonl").read_text().splitlines()[:9]
    long = json.dumps({"instruction": "why? " * 300, "output": "so"})
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:5], long, long, *lines[5:]]))
    text = RECIPE.replace("python_100.jsonl", str(tmp_path / "rows.jsonl"))
    text = text.replace("limit = 20", "max_seq_length = 256\nshuffle = false")
    text = text.replace('valid = "python_valid.jsonl"', "").replace("eval_every = 3", "")
    recipe = recipe_of(root, text, train__batch_size=1, train__epochs=1, train__log_every=1)
    opened = partial(assembly.open_dataset, surveyed_rows=5)
    monkeypatch.setattr(assembly, "open_dataset", opened)
    summary = run_recipe(recipe, tmp_path / "run")
    assert (summary.steps, summary.rows) == (11, 11)
    quarantine = (tmp_path / "run" / "quarantine.jsonl").read_text()
    left_out = [json.loads(line) for line in quarantine.splitlines()]
    assert [row["line"] for row in left_out] == [6, 7]
    assert left_out[0]["reason"].startswith("no target tokens within data.max_seq_length = 256")
    shown = capsys.readouterr().err
    assert "2 rows left out of their steps: see quarantine.jsonl" in shown
    assert shown.count("no rows: all of them were left out") == 2
    assert "nan" not in shown
    assert summary.nonfinite_steps == 0
    assert summary.data_notes == ["2 rows left out: 2 without a target"]
    assert summary.data_notes[0] in (tmp_path / "run" / "report.html").read_text()
    trained = [r for r in runs.read_records(tmp_path / "run") if isinstance(r, TrainRecord)]
    assert [r.rows for r in trained] == [1] * 5 + [0] * 2 + [1] * 4
    assert len(story.trajectory(trained, None).rows) == 9
    assert math.isfinite(summary.train_loss)


@pytest.mark.parametrize(("rows", "steps"), [(8, 1), (100, 6), (96, 6), (9, 1)])
def test_evaluations_come_twice_an_epoch_unless_the_recipe_says_otherwise(root, rows, steps):
    text = RECIPE.replace("eval_every = 3", "")
    assert assembly.eval_every(recipe_of(root, text), rows) == steps
    assert assembly.eval_every(recipe_of(root, text, train__eval_every=7), rows) == 7


@pytest.mark.slow
def test_a_runs_template_variables_are_those_of_its_answers(finished, tmp_path):
    path, _ = finished
    shutil.copytree(path, tmp_path / "run")
    record = tmp_path / "run" / "recipe.toml"
    assert load(str(path)).template_variables == {}
    table = "[data.chat_template]\n"
    assert record.read_text().count(table) == 1
    record.write_text(record.read_text().replace(table, f"{table}style = 'x'\n"))
    loaded = load(str(tmp_path / "run"))
    assert loaded.template_variables == {"style": "x"}
    template = "{% for m in messages %}{{ m.content }}{% endfor %} in {{ style }}"
    loaded.tokenizer._tokenizer.chat_template = template
    prompt = prompt_tokens(
        loaded.tokenizer, [{"role": "user", "content": "a"}], path, loaded.template_variables
    )
    assert loaded.tokenizer.decode(prompt) == "a in x"


@pytest.mark.slow
def test_trackers_know_a_resumed_run_again_and_no_run_that_replaces_it(root, tmp_path, monkeypatch):
    told = []

    class Told:
        def __init__(self, run, run_id, config):
            told.append(run_id)

        def log(self, values, step): ...

        def end(self, summary, finished): ...

    monkeypatch.setitem(trackers.KINDS, "wandb", Told)
    text = RECIPE.replace("epochs = 3", "max_steps = 1") + '[report]\nto = ["wandb"]\n'
    first, longer = (
        recipe_of(root, text, train__max_steps=steps, train__warmup_steps=0) for steps in (1, 2)
    )
    run_recipe(first, tmp_path / "run")
    run_recipe(longer, tmp_path / "run", resume=True, allow_change=True)
    run_recipe(first, tmp_path / "run", overwrite=True)
    assert told[0] == told[1] != told[2]


@pytest.mark.slow
def test_a_run_can_overwrite_the_run_that_it_starts_from(root, tmp_path):
    text = RECIPE.replace('valid = "python_valid.jsonl"\n', "")
    run_recipe(recipe_of(root, text, train__max_steps=2), tmp_path / "run")
    start = {"lora__init_from": f'"{tmp_path / "run"}"', "train__max_steps": 3}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    run_recipe(recipe_of(root, text, **start), tmp_path / "run", overwrite=True)
    start["lora__init_from"] = f'"{tmp_path / "copy"}"'
    run_recipe(recipe_of(root, text, **start), tmp_path / "other")
    assert_same_adapter(tmp_path / "run", tmp_path / "other")


@pytest.mark.slow
def test_a_run_without_validation_rows_publishes_its_last_adapter(root, tmp_path):
    text = RECIPE.replace('valid = "python_valid.jsonl"\n', "")
    summary = run_recipe(recipe_of(root, text, train__epochs=1), tmp_path / "run")
    assert summary.best_step is None
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    assert_same_adapter(last, tmp_path / "run")


def test_nothing_is_written_where_the_recipe_data_or_model_is_wrong(root, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n')
    for changes, error, message in (
        ({"data__train": tmp_path / "bad.jsonl"}, DataError, "bad.jsonl:1: output: missing"),
        ({"lora__target_modules": '["qkv"]'}, ModelError, "qkv"),
        ({"train__warmup_steps": 1000}, RecipeError, "train.warmup_steps: 1000 steps, but"),
        ({"model__path": '"./no/such/model"'}, ModelError, "no such folder"),
    ):
        with pytest.raises(error, match=message):
            run_recipe(recipe_of(root, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "improved", "codealpaca", "quickstart"])
def test_every_shipped_recipe_runs_offline_on_the_built_in_model(name, root, tmp_path):
    overrides = [
        "model.path=builtin:tiny-qwen",
        "train.max_steps=2",
        "train.warmup_steps=0",
    ]
    if name == "codealpaca":
        overrides.append(f"data.train={root / 'data' / 'python_100.jsonl'}")
    recipe = load_recipe(root / "recipes" / f"{name}.toml", overrides)
    assert run_recipe(recipe, tmp_path / name).steps == 2


@pytest.mark.slow
def test_the_users_codealpaca_run_has_his_log_lines(shared, root, tmp_path):
    overrides = [
        "model.path=builtin:tiny-qwen",
        f"data.train={shared / 'codealpaca' / 'train.jsonl'}",
    ]
    recipe = load_recipe(root / "recipes" / "codealpaca.toml", overrides)
    summary = run_recipe(recipe, tmp_path / "run")
    records = [r for r in runs.read_records(tmp_path / "run") if isinstance(r, TrainRecord)]
    assert summary.steps == 39
    assert [r.step for r in records] == [10, 20, 30, 39]
    assert [r.epoch for r in records] == [0.8, 1.56, 2.32, 3.0]
    rates = [float(f"{r.learning_rate:.4g}") for r in records[:3]]
    assert rates == [1.8e-4, 1.379e-4, 6.897e-5]


@pytest.mark.slow
def test_peak_memory_is_mlxs(root, tmp_path):
    changes = {"train__epochs": 1, "train__eval_every": 10}
    summary = run_recipe(recipe_of(root, **changes), tmp_path / "run")
    assert 0 < summary.peak_memory_gb <= mx.get_peak_memory() / 1e9


@pytest.mark.slow
def test_the_lock_is_free_again_after_a_kill(root, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(recipe_of(root, train__epochs=1000).to_toml())
    command = [sys.executable, "-m", "mlx_tuner", "run", str(recipe), "--run-dir"]
    path = tmp_path / "run"
    with started([*command, str(path)]) as process:
        wait_for_checkpoint(path, process)
        with pytest.raises(RunError, match=f"process {process.pid}"):
            run_recipe(load_recipe(recipe), path, resume=True)
    wait_until(lambda: not is_running(path))
    with runs.Run(path, resume=True) as run:
        assert run.checkpoint.step > 0


@pytest.mark.slow
def test_a_clock_that_jumps_by_days_changes_neither_adapter_nor_rates(
    finished, root, tmp_path, monkeypatch
):
    path, _ = finished
    real, draw = time.time, random.Random(0)
    monkeypatch.setattr(time, "time", lambda: real() + draw.choice([-86_400, 0, 86_400]))
    summary = run_recipe(recipe_of(root), tmp_path / "run")
    assert_same_adapter(path, tmp_path / "run")
    for record in runs.read_records(tmp_path / "run"):
        if isinstance(record, TrainRecord):
            assert 0 < record.samples_per_second < 10_000
            assert 0 < record.elapsed_seconds < 600
    assert 0 < summary.runtime_seconds < 600


@pytest.mark.slow
def test_a_run_that_sleeps_and_whose_child_is_killed_ends_as_if_nothing_had_been(
    finished, root, tmp_path
):
    path, _ = finished
    (tmp_path / "small.toml").write_text(recipe_of(root).to_toml())
    code = (
        "import sys\n"
        "from mlx_tuner import cli\n"
        "from mlx_tuner.runs import supervisor\n"
        "supervisor.DELAYS = (0.1, 0.1, 0.1)\n"
        "supervisor.TICK, supervisor.PATIENCE = 0.1, 1.5\n"
        "cli.main(['run', 'small.toml', '--run-dir', 'run', '--quiet'])\n"
    )
    with started([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE) as process:
        wait_for_checkpoint(tmp_path / "run", process)
        (child,) = training_of(process.pid)
        os.kill(child, signal.SIGSTOP)
        time.sleep(2)
        os.kill(child, signal.SIGCONT)
        os.kill(child, signal.SIGKILL)
        said = process.communicate()[1].decode()
    assert process.returncode == 0
    assert said.count("training died: the system killed it") == 1
    assert "hung" not in said
    assert_same_adapter(path, tmp_path / "run")
    assert runs.read_summary(tmp_path / "run").restarts == 1
    counts = [line.restarts for line in train_records(runs.read_records(tmp_path / "run"))]
    assert counts == sorted(counts)
    assert counts[-1] == 1


@contextmanager
def started(command, **options):
    """A process that is killed at the end of the block, and gone after it, whatever happens."""
    with subprocess.Popen(command, **{"stderr": subprocess.DEVNULL, **options}) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_checkpoint(run, process):
    wait_until(lambda: process.poll() is not None or any((run / "checkpoints").glob("step-*")))
    assert process.poll() is None


def wait_until(condition):
    """For longer than the slowest machine takes; what never comes ends the test all the same."""
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
