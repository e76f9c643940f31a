"""The checks of `doctor --self-test`, on the default device; and that they can fail."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from marks import some_slow

from mlx_tuner.cli import main
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.proof import operations, self_test, steps
from mlx_tuner.proof.sides import Outcome, Side, trial

SIDE = trial()
CHECKS = self_test.checks(SIDE)
STEPS = {name for name in CHECKS if name.startswith(("20 steps", "repeated", "resumed"))}


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on the CPU, whose numbers are not what a user's Mac has to prove."""
    if SIDE.device.type == mx.cpu:
        monkeypatch.setattr(steps, "STEPS", 3)


@pytest.mark.metal
@pytest.mark.parametrize("name", some_slow(CHECKS, {"memory"} | STEPS))
def test_this_device_computes_what_the_cpu_computes(name: str) -> None:
    ok, told = CHECKS[name](SIDE)
    assert ok, told


def test_a_wrong_gradient_of_the_gate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "swiglu", lambda gate, up, fused: gate * mx.sigmoid(gate * up))
    assert not operations.check_swiglu(SIDE)[0]


def test_attention_that_sees_the_next_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = mx.fast.scaled_dot_product_attention
    blind = lambda *args, mask, **kwargs: real(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", blind)
    assert not operations.check_attention(SIDE, 64)[0]


@pytest.mark.slow
def test_a_gradient_that_is_a_thousandth_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Trainer):
        def sum_of_micro_batches(self, step, number):
            loss, gradient = super().sum_of_micro_batches(step, number)
            return loss, gradient * 1.001

    monkeypatch.setattr(steps, "Trainer", Off)
    ok, told = steps.check_training(SIDE, "qwen3", "fp32")
    assert not ok, told


@pytest.mark.slow
def test_steps_that_depend_on_what_happened_before_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = np.random.default_rng(0)

    class Loose(Trainer):
        def sum_of_micro_batches(self, step, number):
            loss, gradient = super().sum_of_micro_batches(step, number)
            return loss, gradient * (1 + 1e-6 * drawn.random())

    real = steps._trainer
    loose = lambda *args, **kwargs: real(*args, **{**kwargs, "kind": Loose})  # noqa: E731
    monkeypatch.setattr(steps, "_trainer", loose)
    for check in (steps.check_repeatability, steps.check_resume):
        ok, told = check(SIDE, "qwen3", "fp32")
        assert not ok
        assert "numbers differ" in told


@pytest.mark.slow
def test_a_peak_beyond_the_estimate_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.Workload, "step_bytes", lambda *_: 1_000_000)
    assert not steps.check_memory(SIDE)[0]


def test_the_command_tells_each_check_and_fails_where_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(side: Side) -> Outcome:
        raise RuntimeError("[metal::malloc] no memory")

    few = {"gathers": operations.check_gathers, "broken": broken}
    monkeypatch.setattr(self_test, "checks", lambda side: few)
    report = tmp_path / "report.md"
    done = CliRunner().invoke(main, ["doctor", "--self-test", "--report", str(report)])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert [line[0] for line in lines[:2]] == ["✓", "✗"]
    assert "RuntimeError: [metal::malloc] no memory" in lines[1]
    assert lines[2].startswith("1 of 2 checks failed on ")
    assert "| **not ok** | broken |" in report.read_text()
    monkeypatch.setattr(self_test, "checks", lambda side: {"gathers": operations.check_gathers})
    done = CliRunner().invoke(main, ["doctor", "--self-test", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["ok"]
    assert told["findings"][0]["name"] == "gathers"
    assert CliRunner().invoke(main, ["doctor", "--report", "x.md"]).exit_code == 2
