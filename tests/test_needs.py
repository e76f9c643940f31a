"""needs.py: what is asked of a machine, and what is said where it has not got that."""

import json

import mlx.core as mx
import pytest
from model_folders import BUILTIN, CONFIGS

from mlx_tuner.commands.plan import padding, plan
from mlx_tuner.errors import ModelError
from mlx_tuner.models.architecture import dtype_of
from mlx_tuner.models.folder import check_folder
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.recipe.load import parse_recipe
from mlx_tuner.show import story
from mlx_tuner.system import device
from mlx_tuner.training import assembly, needs
from mlx_tuner.training import finetune as training

RECIPE = """
[model]
path = "builtin:tiny-qwen"
[data]
train = "{rows}"
max_seq_length = 2048
[train]
epochs = 2
batch_size = 2
"""


@pytest.fixture
def recipe(tmp_path):
    rows = [{"text": "word " * length} for length in (20, 40, 400, 30, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.format(rows=tmp_path / "rows.jsonl")
    return parse_recipe(text, source="small.toml", folder=tmp_path)


def memory_with(budget, recipe, monkeypatch):
    monkeypatch.setattr(device, "memory_budget", lambda: budget)
    config = check_folder(BUILTIN)
    data = assembly.open_data(recipe, load_tokenizer(BUILTIN))
    return needs.memory_of(recipe, needs.skeleton(recipe, config), config, data.train)


@pytest.mark.slow
def test_the_parts_are_the_peak_and_the_advice_is_the_first_setting_that_helps(recipe, monkeypatch):
    plenty = memory_with(10**12, recipe, monkeypatch)
    assert plenty.fits
    assert list(plenty.parts) == ["weights", "adapter and moments", "activations", "logits"]
    assert plenty.peak == sum(plenty.parts.values())
    fixed = plenty.peak - plenty.parts["activations"]
    for budget in range(fixed, plenty.peak, (plenty.peak - fixed) // 8 + 1):
        scarce = memory_with(budget, recipe, monkeypatch)
        if not scarce.fits:
            with pytest.raises(ModelError, match=r"needs about .* can be had; .*, or --force"):
                scarce.require("small")
    assert "set " in memory_with(plenty.peak - 1, recipe, monkeypatch).advice
    assert "--quantize 4" in memory_with(1000, recipe, monkeypatch).advice


def test_a_model_is_planned_in_the_dtype_that_its_config_has_of_its_text_model(recipe):
    config = CONFIGS["qwen3_5"]
    assert not config.keys() & {"dtype", "torch_dtype"}
    halved = config | {"text_config": config["text_config"] | {"dtype": "bfloat16"}}
    assert dtype_of(needs.skeleton(recipe, config)) == mx.float32
    assert dtype_of(needs.skeleton(recipe, halved)) == mx.bfloat16


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "memory_budget", lambda: 1000)
    with pytest.raises(ModelError, match="--force"):
        training.finetune(recipe, tmp_path / "run")
    assert not any(path.suffix for path in tmp_path.glob("run/*"))


def test_padding_is_what_the_longest_row_of_each_step_would_cost(recipe):
    unshuffled = recipe.data.model_copy(update={"shuffle": False})
    rows = assembly.open_data(recipe, load_tokenizer(BUILTIN)).train
    first, second, third, fourth, last = rows.survey.tokens.tolist()
    padded = 2 * max(first, second) + 2 * max(third, fourth) + last
    told = padding(needs.replace(recipe, data=unshuffled), rows)
    assert told == pytest.approx(padded / (first + second + third + fourth + last) - 1)


def test_time_is_that_of_the_longest_run_here_else_of_the_bench_else_a_guess(
    recipe, tmp_path, monkeypatch
):
    from run_records import summary_of, train_record

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needs.cache, "user_folder", lambda: tmp_path / "cache")
    machine = device.facts()
    seconds, by = needs.seconds_of(recipe, tokens=1000, total_parameters=10**6)
    assert (seconds, "mlx-tune bench" in by) == (None, True) or "guess" in by
    (tmp_path / "cache" / "bench").mkdir(parents=True)
    result = {"benchmark": "bench", "machine": {"chip": machine.chip}, "training": {"tflops": 0.5}}
    (tmp_path / "cache" / "bench" / "bench-x.json").write_text(json.dumps(result))
    seconds, by = needs.seconds_of(recipe, tokens=1000, total_parameters=10**6)
    # 4 FLOP a parameter and token, at 0.5 TFLOP/s.
    assert (seconds, by) == (pytest.approx(0.008), "by `mlx-tune bench`, bench-x.json")
    run = tmp_path / "adapters" / "earlier"
    run.mkdir(parents=True)
    summary = summary_of(
        [train_record(1, 1.0)], model=recipe.model.path, machine=story.machine(machine)
    )
    (run / "summary.json").write_text(json.dumps(summary.to_json()))
    seconds, by = needs.seconds_of(recipe, tokens=1000, total_parameters=10**6)
    # 974 tokens took 1.3125 s.
    assert (seconds, by) == (pytest.approx(1000 * 1.3125 / 974), "by the run in adapters/earlier")
    short = {**summary.to_json(), "tokens": 10, "training_seconds": 10.0}
    (tmp_path / "adapters" / "short").mkdir()
    (tmp_path / "adapters" / "short" / "summary.json").write_text(json.dumps(short))
    assert needs.seconds_of(recipe, tokens=1000, total_parameters=10**6) == (seconds, by)
    shared = {**summary.to_json(), "machine": story.machine(machine, ranks=2)}
    (run / "summary.json").write_text(json.dumps(shared))
    seconds, by = needs.seconds_of(recipe, tokens=1000, total_parameters=10**6)
    assert seconds == pytest.approx(2 * 1000 * 1.3125 / 974)


def test_a_summary_that_no_run_of_ours_wrote_is_passed_over(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = needs.seconds_of(recipe, tokens=1000, total_parameters=10**6)
    (tmp_path / "adapters" / "other").mkdir(parents=True)
    for text in ("{}", "no JSON"):
        (tmp_path / "adapters" / "other" / "summary.json").write_text(text)
        assert needs.seconds_of(recipe, tokens=1000, total_parameters=10**6) == before


def test_a_plan_says_what_memory_goes_to(recipe):
    planned = plan(recipe)
    assert planned.peak_memory_gb == pytest.approx(sum(planned.memory_gb.values()))
    assert planned.budget_gb == pytest.approx(device.memory_budget() / 1e9, rel=0.5)
    assert planned.advice is None
