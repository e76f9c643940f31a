"""The bench on a micro model, the harness of the benchmark scripts, and what they reckon with."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from test_device import FakeMac

from mlx_tuner.bench import bench, model, sweep, workload
from mlx_tuner.bench import report as bench_report
from mlx_tuner.bench.measure import Spread, interleave, ratio
from mlx_tuner.bench.peer import MlxLmTrainer
from mlx_tuner.bench.workload import Settings
from mlx_tuner.cli import main
from mlx_tuner.engine import batching, lora
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.errors import ModelError, UsageError
from mlx_tuner.models import architecture
from mlx_tuner.show.progress import Display
from mlx_tuner.show.terminal import console
from mlx_tuner.system import device

MICRO = model.tiny_config("qwen2", num_hidden_layers=2)


def _add_micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape named "micro", on a machine of 10 GFLOP/s."""
    real = model.config_of
    monkeypatch.setattr(model, "config_of", lambda n: MICRO if n == "micro" else real(n))
    for module in (bench, sweep):
        monkeypatch.setattr(module, "gemm_tflops", lambda bits=None: 0.01)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder with a place for results, as in a clone."""
    monkeypatch.chdir(tmp_path)
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    """The shape "micro", and a working folder."""
    _add_micro(monkeypatch)


@pytest.fixture(scope="module")
def result() -> bench.Result:
    """A quick bench of the micro shape."""
    settings = Settings(model="micro", batch_size=2, rows=4, steps=2, quick=True)
    with pytest.MonkeyPatch.context() as monkeypatch, Display() as display:
        _add_micro(monkeypatch)
        return bench.bench(settings, display, command="mlx-tune bench")


# ---- the command -------------------------------------------------------------------------------


def test_a_bench_has_every_figure_and_says_what_it_measured(result: bench.Result) -> None:
    told = json.loads(json.dumps(result))
    assert told["workload"]["model"] == "micro"
    assert told["workload"]["rows"] == 4
    speeds = told["training"]
    assert speeds["samples_per_second"]["repeats"] == 3
    assert speeds["samples_per_second"]["low"] <= speeds["samples_per_second"]["median"]
    tokens_a_row = told["workload"]["tokens"] / told["workload"]["rows"]
    assert speeds["tokens_per_second"]["median"] == pytest.approx(
        tokens_a_row * speeds["samples_per_second"]["median"]
    )
    assert speeds["steps_per_second"]["median"] == pytest.approx(
        speeds["samples_per_second"]["median"] / 2
    )
    assert speeds["tflops"] == pytest.approx(
        speeds["flops_per_step"] * speeds["steps_per_second"]["median"] / 1e12
    )
    assert (speeds["peak_source"], speeds["peak_tflops"]) == ("measured", 0.01)
    assert speeds["percent_of_peak"] == pytest.approx(speeds["tflops"] / 0.01 * 100)
    assert set(told["generation"]) == {"base", "adapter", "fused"}
    assert told["projection"]["20000"] == pytest.approx(
        60_000 / speeds["samples_per_second"]["median"]
    )
    assert told["machine"]["mlx"]


def test_forward_and_backward_are_all_of_a_step(result: bench.Result) -> None:
    phases = result["phases"]
    assert phases["forward"] + phases["backward"] == pytest.approx(phases["step"])
    assert 0 < phases["rows"] < phases["forward"]
    assert 0 < phases["python"] < phases["step"]


def test_a_result_can_be_read_and_pasted(result: bench.Result, capsys: Any) -> None:
    console(sys.stdout).print(bench_report.report(result))
    text = capsys.readouterr().out
    for word in (
        "samples/s",
        "tokens/s",
        " GFLOP/s",
        "1.468",
        "20,000 rows",
        "limit",
        "fusing",
        "backward",
    ):
        assert word in text
    row = bench_report.markdown_row(result)
    assert row.count("|") == len(bench_report.MARKDOWN_COLUMNS) + 1
    assert result["machine"]["chip"] in row


def test_a_mac_is_told_how_far_it_is_from_its_chips_peak_and_from_its_products(
    result: bench.Result, capsys: Any
) -> None:
    training = {
        **result["training"],
        "flops_per_step": 4e12,
        "tflops": 4.0,
        "gemm_tflops": 7.0,
        "peak_tflops": 8.08,
        "peak_source": "table",
        "percent_of_peak": 49.5,
    }
    machine = device.facts(FakeMac("Apple M4 Pro", 20)).to_json()
    told = {**result, "machine": machine, "training": training}
    console(sys.stdout).print(bench_report.report(told))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "machine     Apple M4 Pro, 20 GPU cores, 48 GB, 273 GB/s" in lines
    assert "low power mode off, thermal pressure nominal" in lines
    assert "FLOPs       4 TFLOP a step, 4 TFLOP/s" in lines
    assert "50 % of the chip's FP32 peak, 8.08 TFLOP/s" in lines
    assert "57 % of large float32 products, measured: 7 TFLOP/s" in lines


def test_an_earlier_result_is_compared_with_what_differs(
    result: bench.Result, results: Path
) -> None:
    path = bench.save(result, "before")
    assert path == results / "before.json"
    before = json.loads(json.dumps(bench.load_result(path)))
    before["training"]["samples_per_second"] = Spread(1.0, 0.5, 2.0, 3).to_json()
    before["workload"]["batch_size"] = 4
    before["machine"]["chip"] = "Apple M1"
    training = {**result["training"], "samples_per_second": Spread(3.0, 2.0, 4.0, 3).to_json()}
    told = bench.earlier_ratios({**result, "training": training}, before)
    assert told["ratios"]["samples_per_second"] == Spread(3.0, 1.0, 8.0, 3).to_json()
    assert told["differs"] == [
        "batch_size: 2 here, 4 there",
        f"chip: {result['machine']['chip']} here, Apple M1 there",
    ]


def test_outside_a_clone_a_result_goes_to_the_users_cache(
    result: bench.Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "anywhere").mkdir()
    monkeypatch.chdir(tmp_path / "anywhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert bench.save(result, "mine") == tmp_path / "cache" / "mlx-tune" / "bench" / "mine.json"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"benchmark": "x", "schema_version": 1}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="--against"):
        bench.load_result(path)


@pytest.mark.slow
def test_the_command_prints_one_json_object_and_keeps_it(micro: None) -> None:
    flags = ["--model", "micro", "--rows", "2", "--batch-size", "2", "--steps", "1", "--quick"]
    flags += ["--quantize", "4", "--name", "mine", "--json"]
    done = CliRunner().invoke(main, ["bench", *flags])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(Path("benchmarks/results/mine.json").read_text())
    assert json.loads(done.stdout)["workload"]["quantize"] == 4


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """mlx-lm compiles its step, for which MLX's CPU backend takes half a minute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_a_sweep_compares_with_nothing() -> None:
    done = CliRunner().invoke(main, ["bench", "--sweep", "--against", "mlx-lm"])
    assert done.exit_code == 2
    assert "--sweep" in done.stderr


@pytest.mark.slow
def test_mlx_lms_trainer_runs_the_same_rows(micro: None, uncompiled: None) -> None:
    settings = Settings(model="micro", batch_size=2, rows=2, steps=1, quick=True, peer=True)
    with Display() as display:
        result = bench.bench(settings, display, command="")
    other = result["against"]["mlx-lm"]
    assert other["figures"]["computed_per_token"]["median"] > 1
    assert other["ratios"]["samples_per_second"]["repeats"] == 3


def test_the_first_loss_of_mlx_lms_trainer_is_ours(uncompiled: None) -> None:
    mine = model.random_model(MICRO, mx.float32)
    rows = [Example(row.tokens, np.arange(40) >= 30) for row in model.rows(2, 64, length=40)]
    peer = MlxLmTrainer(
        model.twin(mine, MICRO),
        rank=4,
        scale=1.0,
        target_modules=["q_proj"],
        learning_rate=1e-4,
    )
    theirs, computed = peer.step(rows)
    lora.attach(mine, rank=4, scale=1.0, target_modules=["q_proj"])
    # mlx-lm counts the first padding token, of id 0, as a target.
    padded = [Example(np.append(r.tokens, 0), np.append(r.loss_mask, True)) for r in rows]
    (ours,) = train(Trainer(mine, micro_batch_tokens=512), [padded], [1e-4])
    assert computed == 2 * 65  # padded to a multiple of 32, and one
    assert ours.loss == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_a_sweep_finds_the_fastest_setting_and_draws_it(
    micro: None, readme: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_grid", lambda quick: ((1, 2), (32, 64)))
    with Display() as display:
        swept = sweep.measure(Settings(model="micro", quick=True), display, command="")
    assert [cell["skipped"] for cell in swept["cells"]] == ["", "", "", ""]
    best = max(swept["cells"], key=lambda cell: cell["tokens_per_second"])
    assert swept["fastest"] == best
    lines = sweep.recipe_lines(swept)
    assert f"batch_size = {best['batch_size']}" in lines
    assert f"max_seq_length = {best['seq']}" in lines
    assert "| 2 rows |" in readme.table_of_sweep(swept)
    path = bench.save(swept, None)
    assert path.name.startswith("sweep-")
    assert json.loads(path.read_text())["cells"] == swept["cells"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    console(sys.stderr).print(bench_report.report(swept))


@pytest.mark.parametrize(
    ("shape", "name"),
    [("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct"), ("qwen3-0.6b", "Qwen/Qwen3-0.6B")],
)
def test_a_sweeps_recipe_lines_name_a_model_that_can_be_had(shape: str, name: str) -> None:
    cell = {"quantize": None, "batch_size": 8, "seq": 128, "micro_batch_tokens": 512}
    swept = {"fastest": cell, "workload": {"model": shape}}
    assert f'path = "{name}"' in sweep.recipe_lines(swept)
    quantised = {**swept, "fastest": {**cell, "quantize": 4}}
    assert f"mlx-tune convert {name} --quantize 4" in sweep.recipe_lines(quantised)


def test_a_sweep_leaves_out_what_does_not_fit_or_takes_too_long(
    micro: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = model.random_model(MICRO, mx.float32)
    setting = Settings(batch_size=1, seq=64, quick=True)
    subject = workload.workload_of("micro", setting, steps=1)
    assert sweep._cell(mine, subject, setting, gemm=1e-9)["skipped"] == "too slow"
    monkeypatch.setattr(device, "memory_budget", lambda: 1000)
    assert sweep._cell(mine, subject, setting, gemm=1.0)["skipped"] == "too large"


# ---- what is measured --------------------------------------------------------------------------


def test_a_slow_or_small_machine_measures_a_smaller_model_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = workload.choose(Settings(), gemm=7.0)
    assert fast.name == "qwen2.5-1.5b"
    assert not any("smaller" in note for note in fast.notes)
    slow = workload.choose(Settings(quick=True), gemm=0.005)
    assert slow.name == "builtin:tiny-qwen"
    assert "qwen2.5-1.5b: would take about" in slow.notes[0]
    monkeypatch.setattr(device, "memory_budget", lambda: 6_000_000_000)
    small = workload.choose(Settings(), gemm=7.0)
    assert small.name == "qwen2.5-0.5b"
    assert "GB can be used" in small.notes[0]


def test_a_model_that_was_asked_for_and_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "memory_budget", lambda: 6_000_000_000)
    with pytest.raises(ModelError, match="--quantize 4"):
        workload.choose(Settings(model="qwen2.5-7b"), gemm=7.0)
    assert workload.choose(Settings(model="qwen2.5-0.5b"), gemm=0.001).name == "qwen2.5-0.5b"


def test_a_step_is_compared_with_the_peak_the_bandwidth_and_the_baseline_by_its_flops() -> None:
    done = {"samples_per_second": 8.0, "tokens_per_second": 880.0, "steps_per_second": 1.0}
    ours = {**done, "peak_memory_gb": 6.0, "python_seconds": 0.011}
    runs = {"ours": [ours], "forward": [{"rows_seconds": 0.001, "forward_seconds": 0.4}]}
    told = {
        "flops": 8 * 4_000_000_000_000,
        "steps": 8,
        "weight_bytes": 3_100_000_000,
        "passes_over_weights": 16,
    }
    machine = device.facts(FakeMac("Apple M4 Pro", 20))
    found = bench.training_figures(runs, told, machine, gemm=7.0, dense=7.5)
    assert found["training"]["peak_source"] == "table"
    assert found["training"]["percent_of_peak"] == pytest.approx(100 * 4 / 8.08, rel=0.001)
    # 4 TFLOP/s at the 0.46 to 0.52 TFLOP that a row of the recorded run takes.
    assert 4 / 0.55 < found["baseline"]["here"] < 4 / 0.43
    assert found["baseline"]["factor"] == pytest.approx(found["baseline"]["here"] / 1.468)
    assert found["phases"]["backward"] == pytest.approx(0.6)
    limit = found["limit"]
    assert limit["verdict"] == "products"
    assert limit["products"] == pytest.approx(4 / 7)
    assert limit["weights"] == pytest.approx(3.1 * 2 / 273)
    assert limit["python"] == pytest.approx(0.011)
    busy = {**runs, "ours": [{**ours, "python_seconds": 0.9}]}
    again = bench.training_figures(busy, told, machine, gemm=7.0, dense=7.5)
    assert again["limit"]["verdict"] == "python"


def test_rows_have_the_lengths_of_codealpaca() -> None:
    rows = model.rows(2000, 1000)
    lengths = np.array([len(row.tokens) for row in rows])
    targets = np.array([row.loss_mask.sum() for row in rows])
    assert lengths.mean() == pytest.approx(110, abs=3)
    assert targets.mean() == pytest.approx(56, abs=3)
    assert batching.longest_common_prefix([row.tokens for row in rows[:8]]) == 24
    padded = sum(8 * lengths[i : i + 8].max() for i in range(0, 2000, 8)) / lengths.sum()
    assert padded == pytest.approx(1.8, abs=0.1)
    assert not any(row.loss_mask[0] for row in rows)


@pytest.mark.parametrize("length", [32, 128, 2048])
def test_rows_of_one_length_are_of_that_length(length: int) -> None:
    assert {len(row.tokens) for row in model.rows(5, 100, length=length)} == {length}


# Parameters as the model cards give them, in 10^9.
@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("Qwen2.5-Coder-0.5B", 0.494),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-3b", 3.086),
        ("Qwen2.5-7B-Instruct", 7.616),
        ("qwen2.5-14b", 14.770),
        ("qwen2.5-32b", 32.764),
        ("qwen2.5-72b", 72.706),
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.721),
        ("qwen3-4b", 4.022),
        ("qwen3-8b", 8.191),
        ("qwen3-14b", 14.768),
        ("qwen3-32b", 32.762),
    ],
)
def test_shapes_have_the_parameters_of_the_models(shape: str, billions: float) -> None:
    skeleton = architecture.skeleton(model.config_of(shape))
    skeleton.freeze()
    assert architecture.parameter_count(skeleton) / 1e9 == pytest.approx(billions, abs=0.0006)


def test_an_unknown_shape_is_answered_with_a_known_one() -> None:
    with pytest.raises(UsageError, match=r"did you mean qwen2\.5-1\.5b"):
        model.config_of("qwen2-1.5b")


def test_a_twin_shares_its_weights() -> None:
    one = model.random_model(MICRO, mx.float32)
    before = mx.get_active_memory()
    other = model.twin(one, MICRO)
    mx.eval(other.parameters())
    assert mx.get_active_memory() - before < 1000
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(one(tokens), other(tokens))


# ---- measuring ---------------------------------------------------------------------------------


def test_variants_run_in_turns_and_warm_ups_are_thrown_away() -> None:
    order: list[str] = []
    numbers = iter(range(100))

    def run(name: str) -> Mapping[str, float]:
        order.append(name)
        return {"seconds": next(numbers)}

    heard: list[str] = []
    runs = interleave(
        {"a": lambda: run("a"), "b": lambda: run("b")},
        repeats=2,
        warmups=1,
        on_result=lambda name, measures: heard.append(name),
    )
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert heard == ["a", "b", "a", "b"]
    assert runs == {"a": [{"seconds": 2}, {"seconds": 4}], "b": [{"seconds": 3}, {"seconds": 5}]}


def test_no_turn_begins_after_its_time_but_the_first_that_is_kept() -> None:
    runs = interleave({"a": lambda: {"x": 1.0}}, repeats=9, warmups=2, seconds=0.0)
    assert runs == {"a": [{"x": 1.0}]}


def test_the_median_and_the_spread_are_of_all_repeats() -> None:
    assert Spread.of([5.0, 1.0, 3.0]) == Spread(3.0, 1.0, 5.0, 3)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.0, 2.0, 2)


def test_ratios_are_taken_turn_by_turn() -> None:
    ours, theirs = [{"x": 2.0}, {"x": 30.0}, {"x": 8.0}], [{"x": 1.0}, {"x": 10.0}, {"x": 2.0}]
    assert ratio(ours, theirs, "x") == Spread(3.0, 2.0, 4.0, 3)


# ---- the scripts' harness ----------------------------------------------------------------------


@pytest.fixture
def harness(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/harness.py`, as the scripts import it."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("harness")


@pytest.fixture
def readme(harness: ModuleType) -> ModuleType:
    """`benchmarks/readme.py`."""
    return importlib.import_module("readme")


CHILD = """
import sys
sys.path.insert(0, {folder!r})
from harness import report
block = bytearray({size})
print("chatter")
report(seconds=float(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_child_reports_its_figures_and_its_own_peak_memory(
    harness: ModuleType, root: Path, tmp_path: Path
) -> None:
    peaks = []
    for size in (1, 200_000_000):
        script = tmp_path / f"child{size}.py"
        script.write_text(CHILD.format(folder=str(root / "benchmarks"), size=size))
        measures = harness.child("2.5", script=script)()
        assert measures["seconds"] == 2.5
        assert measures["wall_seconds"] > 0
        peaks.append(measures["peak_rss_gb"])
    assert peaks[1] - peaks[0] == pytest.approx(0.2, abs=0.02)


def test_a_child_that_fails_or_reports_nothing_stops_the_benchmark(
    harness: ModuleType, tmp_path: Path
) -> None:
    for code, message in (("raise SystemExit(3)", "ended with 3"), ("", "reported nothing")):
        script = tmp_path / "child.py"
        script.write_text(code)
        with pytest.raises(SystemExit, match=message):
            harness.child(script=script)()


def test_a_result_file_has_machine_date_command_spreads_and_ratios(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    runs = {
        "ours": [{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 9.0}],
        "theirs": [{"seconds": 4.0}, {"seconds": 8.0}, {"seconds": 9.0}],
    }
    path = harness.save("x", runs, baseline="theirs", settings={"rows": 8})
    told = json.loads(path.read_text())
    assert told["measures"]["ours"]["seconds"]["median"] == 2.0
    assert told["ratios"] == {
        "ours": {"seconds": {"median": 0.25, "low": 0.25, "high": 1.0, "repeats": 3}}
    }
    assert told["settings"] == {"rows": 8}
    assert {"date", "command", "machine", "schema_version"} <= told.keys()
    table = harness.table(runs, baseline="theirs")
    assert harness.table_of(told) == table
    assert "0.25 (0.25 … 1)" in table
    assert table.splitlines()[0].split("|")[2:5] == [
        f" {name} ".ljust(len(cell))
        for name, cell in zip(
            ("ours", "theirs", "ours / theirs"), table.splitlines()[0].split("|")[2:5], strict=True
        )
    ]


def test_the_steps_that_both_trainers_tell_of_are_read(harness: ModuleType, tmp_path: Path) -> None:
    chaos = importlib.import_module("chaos")
    ours, theirs = chaos.Ours(tmp_path, 40), chaos.MlxLm(tmp_path, 40)
    ours.log.write_text(
        "step 0/40  epoch 0.00  val loss 4.3584  base model\n"
        "step 1/40  epoch 0.08  loss 3.9987  grad norm 0.582\n"
        "step 2/40  epoch 0.16  loss 4.4613  grad norm 0.665\n"
    )
    assert chaos.told(ours) == [1, 2]
    theirs.offset = 5
    theirs.log.write_text(
        "  iter   train_loss     tok/s     tokens\n"
        "  \x1b[38;5;244m   1\x1b[0m    \x1b[1;32m4.198 ▼\x1b[0m    \x1b[1m  652\x1b[0m\n"
        "  save  0000005_adapters.safetensors\n"
    )
    assert chaos.told(theirs) == [6]


def test_the_readme_has_every_result_with_where_it_comes_from(
    readme: ModuleType, harness: ModuleType, result: bench.Result
) -> None:
    runs = {"ours": [{"seconds": 1.0}], "theirs": [{"seconds": 4.0}]}
    training = harness.result("training", runs, baseline="theirs", settings={"rows": 8, "x": None})
    found = [result, training]
    text = readme.readme(found)
    assert bench_report.markdown_row(found[0]) in text
    assert harness.table(runs, baseline="theirs") in text
    assert text.count(f"mlx {result['machine']['mlx']} on") == 2
    assert "(rows 8)" in text


def test_the_readme_is_that_of_the_results(readme: ModuleType, root: Path) -> None:
    paths = sorted((root / "benchmarks" / "results").glob("*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    written = (root / "benchmarks" / "README.md").read_text()
    assert written == readme.readme(found), "run: python benchmarks/readme.py"
