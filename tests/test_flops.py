"""FLOP counts against the products in the graph that really runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_tuner.bench.model import config_of
from mlx_tuner.bench.model import rows as bench_rows
from mlx_tuner.data.order import shuffled
from mlx_tuner.engine import batching, flops, forward, lora, mlp, sums
from mlx_tuner.engine.backend import CPU, GPU, Backend
from mlx_tuner.engine.forward import Layout, prefix_states
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.models import architecture

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
QWEN3 = {
    **CONFIG,
    "model_type": "qwen3",
    "head_dim": 8,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _transparent_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Custom gradients as plain graphs: `mx.export_function` cannot look through the real ones.

    A pair of outputs is a loss and its gradient, and the gradient is taken as it is; any other
    function here has no products, and MLX differentiates it by itself.
    """

    def transparent(function: Any) -> Any:
        def call(*inputs: mx.array) -> Any:
            outputs = function(*inputs)
            if not isinstance(outputs, tuple):
                return outputs
            loss, gradient = map(mx.stop_gradient, outputs)
            x = inputs[0]
            return loss + ((x - mx.stop_gradient(x)) * gradient).sum(), gradient

        call.vjp = lambda function: function  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(mx, "custom_function", transparent)
    monkeypatch.setattr(mlp, "swiglu", lambda gate, up, fused: gate * mx.sigmoid(gate) * up)
    monkeypatch.setattr(lora, "product", lambda x, factor: x @ factor)
    monkeypatch.setattr(lora, "add_product", lambda scale: lambda y, z, b: y + scale * (z @ b))
    monkeypatch.setattr(sums, "row_sums", lambda x: x.sum(axis=-1, keepdims=True))


def _products(function: Any, *arguments: Any) -> int:
    """FLOP of all matrix products in the graph of a function of arrays."""
    total = 0

    def visit(node: Mapping[str, Any]) -> None:
        nonlocal total
        if node["type"] != "primitive":
            return
        assert node["name"] not in ("ScaledDotProductAttention", "QuantizedMatmul", "GatherMM")
        if node["name"] in ("Matmul", "AddMM"):
            *_, inner = node["inputs"][0][1]
            total += 2 * inner * math.prod(node["outputs"][0][1])

    mx.export_function(visit, function, *arguments)
    return total


def _rows(lengths: Sequence[int], targets: Sequence[int], prefix: int) -> list[batching.Example]:
    """Rows with a common prefix and their last so many tokens as targets."""
    random = np.random.default_rng(0)
    shared = random.integers(0, 50, prefix)
    rows = []
    for i, (length, count) in enumerate(zip(lengths, targets, strict=True)):
        own = random.integers(0, 50, length - prefix)
        own[0] = i  # the prefix ends here
        mask = np.arange(length) >= length - count
        rows.append(batching.Example(np.concatenate([shared, own]).astype(np.int32), mask))
    return rows


def _trainer(
    config: dict[str, Any], targets: Sequence[str], num_layers: int, micro_batch_tokens: int
) -> Trainer:
    mx.random.seed(0)
    tiny = architecture.skeleton(config)
    lora.attach(tiny, rank=3, scale=2.0, target_modules=targets, num_layers=num_layers)
    return Trainer(tiny, micro_batch_tokens=micro_batch_tokens)


def _counted(trainer: Trainer, step: batching.Step) -> int:
    """FLOP of the products of the micro-batches' gradients and of the prefix before them."""
    past: list[Any] = []
    total = 0
    if len(step.prefix):
        prefix = mx.array(step.prefix)
        past = prefix_states(trainer.model, prefix)
        mx.eval(past)
        total += _products(lambda tokens: [*chain(*prefix_states(trainer.model, tokens))], prefix)
    for batch in step.micro_batches:
        outside, carried = past if batch.past else [], past if batch.prefix else []
        gradients = partial(_gradients, trainer, outside, Layout.of(batch), carried)
        total += _products(gradients, trainer.state.parameters)
    return total


def _gradients(
    trainer: Trainer, outside: Any, layout: Layout, carried: Any, parameters: mx.array
) -> list[mx.array]:
    factors = trainer.shapes.unflatten(parameters)
    (_, loss), (gradients, of_past) = trainer._gradients(factors, outside, layout, carried)
    return [loss, *gradients.values(), *chain(*of_past)]


@pytest.mark.parametrize(
    ("config", "targets", "num_layers", "lengths", "prefix", "micro_batch_tokens"),
    [
        (CONFIG, ("q_proj", "k_proj", "v_proj", "o_proj"), 3, (30, 30), 0, 100),
        (CONFIG, ("q_proj", "k_proj", "v_proj", "o_proj"), 3, (30, 21, 25), 12, 100),
        (CONFIG, ("q_proj", "k_proj", "v_proj", "o_proj"), 3, (30, 21, 25), 12, 40),
        (QWEN3, ("q_proj", "v_proj"), 2, (30, 21), 0, 100),
        (QWEN3, ("q_proj", "v_proj"), 2, (30, 21, 17), 10, 30),
        (CONFIG, ("q_proj",), 1, (19,), 0, 100),
        (CONFIG, ("k_proj",), 3, (19, 18), 9, 100),
        (CONFIG, ("o_proj",), 2, (19, 18), 9, 20),
        (CONFIG, ("down_proj",), 2, (19, 18), 9, 100),
        (CONFIG, ("gate_proj", "down_proj"), 1, (19, 18), 9, 20),
        (CONFIG, flops.LINEARS, 3, (30, 21, 25), 12, 40),
    ],
)
def test_counted_flops_are_those_of_the_products_that_run(
    config: dict[str, Any],
    targets: tuple[str, ...],
    num_layers: int,
    lengths: tuple[int, ...],
    prefix: int,
    micro_batch_tokens: int,
) -> None:
    trainer = _trainer(config, targets, num_layers, micro_batch_tokens)
    step = trainer.make_micro_batches(_rows(lengths, [3 + i for i in range(len(lengths))], prefix))
    adapters = flops.Adapters(3, targets, num_layers)
    counted = flops.step_flops(flops.ModelDims.from_config(config), step, adapters)
    assert counted == _counted(trainer, step)


def test_checkpointing_runs_the_forward_again_but_for_the_down_projections() -> None:
    trainer = _trainer(CONFIG, ("q_proj", "down_proj"), 3, 100)
    step = trainer.make_micro_batches(_rows((30, 21), (3, 4), 12))
    (batch,) = step.micro_batches
    layout = Layout.of(batch)

    def run(parameters: mx.array) -> mx.array:
        trainer._set(trainer.shapes.unflatten(parameters))
        return forward.hidden_at_targets(trainer.model, layout)[0]

    forward_again = _products(run, trainer.state.parameters)
    down_rows = 2 * len(batch.tokens) + len(batch.sources)
    forward_again -= 2 * down_rows * (40 * 24 + 3 * 24)  # the product with B goes with it

    def count(checkpointing: bool) -> int:
        shape, adapters = (
            flops.ModelDims.from_config(CONFIG),
            flops.Adapters(3, ("q_proj", "down_proj"), 3),
        )
        return flops.step_flops(shape, step, adapters, checkpointing=checkpointing)

    assert count(True) - count(False) == forward_again


def test_a_step_of_the_1_5b_shape_costs_what_was_measured_by_hand(shared: Path) -> None:
    config = json.loads((shared / "qwen2.5-coder" / "config-1.5B.json").read_text())
    rows = _rows([110] * 8, [56] * 8, 24)
    step = batching.make_micro_batches(rows, 4096)
    adapters = flops.Adapters(8, ("q_proj", "k_proj", "v_proj", "o_proj"), 28)
    counted = flops.step_flops(flops.ModelDims.from_config(config), step, adapters)
    # 517 GFLOP a row, counted as 4 x parameters a token; rows of one length differ a little.
    assert counted / 8 == pytest.approx(517e9, rel=0.05)


@pytest.mark.parametrize(
    ("rows", "epochs"), [(100, 3), pytest.param(1000, 1, marks=pytest.mark.slow)]
)
def test_a_gpus_tiles_add_a_twentieth_and_its_groups_nothing(rows: int, epochs: int) -> None:
    """The recorded job on the 1.5B shape, and ten times its rows, 8 a step."""
    shape = flops.ModelDims.from_config(config_of("qwen2.5-1.5B"))
    adapters = flops.Adapters(16, ("q_proj", "k_proj", "v_proj", "o_proj"), shape.layers)
    given = bench_rows(rows, shape.vocabulary)

    def job(backend: Backend) -> int:
        total = 0
        for epoch, first in product(range(epochs), range(0, rows, 8)):
            at = shuffled(42, epoch, rows)[first : first + 8]
            step = batching.make_micro_batches([given[i] for i in at], 4096, backend=backend)
            total += flops.step_flops(shape, step, adapters)
        return total

    exact, laid_out = job(CPU), job(GPU)
    assert exact < laid_out < 1.06 * exact
    # Beyond the tiles of the matrix products, which the hardware computes anyway:
    assert laid_out < 1.01 * job(replace(GPU, attention_tile=1))
