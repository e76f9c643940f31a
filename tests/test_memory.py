"""The estimate of a step's memory is what a step takes."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from marks import some_slow
from mlx.utils import tree_flatten
from tiny import random_rows

from mlx_tuner.bench.model import tiny_config
from mlx_tuner.engine import batching, lora, memory
from mlx_tuner.engine.backend import CPU, GPU
from mlx_tuner.engine.batching import Sizes
from mlx_tuner.engine.dora import DoRALinear
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.models.architecture import skeleton

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LINEAR_ATTENTION = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"]
ALL = [*QKVO, *MLP, *LINEAR_ATTENTION]
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "vocab_size": 2000,
}

CONFIGURATIONS = {
    "attention": {},
    "checkpointing": {"checkpointing": True},
    "long rows": {"lengths": [500, 500]},
    "one long row": {"lengths": [600] + [40] * 10},
    "the MLP": {"targets": ["gate_proj", "up_proj"]},
    "all linear": {"targets": [*QKVO, *MLP]},
    "queries alone": {"targets": ["q_proj"]},
    "a large vocabulary": {"shape": {"vocab_size": 20_000}},
    "a wide MLP": {"shape": {"intermediate_size": 2048, "num_hidden_layers": 4}},
    "many keys": {"shape": {"num_key_value_heads": 8}, "lengths": [200] * 4},
    "linear attention": {"family": "qwen3_5", "targets": ALL, "lengths": [120] * 8},
    "linear attention again": {"family": "qwen3_5", "targets": ALL, "checkpointing": True},
    "several micro-batches": {"micro_batch_tokens": 300, "lengths": [100] * 12, "prefix": 24},
    "a high rank": {"targets": [*QKVO, *MLP], "rank": 64},
    "DoRA": {"targets": [*QKVO, *MLP], "layer": DoRALinear},
}


@pytest.mark.parametrize("name", some_slow(CONFIGURATIONS, CONFIGURATIONS.keys() - {"attention"}))
def test_a_step_takes_what_is_estimated(name):
    peak, estimate = measured(**CONFIGURATIONS[name])
    assert estimate == pytest.approx(peak, rel=0.15)


def measured(
    family="qwen2",
    shape=None,
    lengths=(100,) * 8,
    targets=QKVO,
    micro_batch_tokens=4096,
    rank=8,
    prefix=0,
    checkpointing=False,
    layer=lora.LoRALinear,
):
    """The peak of four steps, and its estimate, both in bytes and without other arrays."""
    config = tiny_config(family, **{**SIZES, **(shape or {})})
    gc.collect()  # else models of earlier tests would be freed under way
    before = mx.get_active_memory()
    model = skeleton(config)
    mx.eval(model.parameters())
    lora.attach(model, rank=rank, scale=2.0, target_modules=targets, layer=layer)
    mx.eval(model.parameters())
    trainer = Trainer(model, micro_batch_tokens=micro_batch_tokens, checkpointing=checkpointing)
    rows = random_rows(lengths, prefix=prefix)
    mx.reset_peak_memory()
    list(train(trainer, [rows] * 4, [1e-4] * 4))
    peak = mx.get_peak_memory() - before
    needs = memory.step_memory(
        config,
        4,
        weights=sum(value.nbytes for _, value in tree_flatten(model.parameters())),
        trainable_parameters=trainer.state.parameters.size,
        target_modules=targets,
        kept_outputs=sum(one.kept_outputs for one in lora.adapted_modules(model).values())
        / len(model.layers),
        checkpointing=checkpointing,
    )
    step = trainer.make_micro_batches(rows)
    return peak, max(needs.peak(sizes_of(batch)) for batch in step.micro_batches)


def sizes_of(batch):
    """What is in a micro-batch; its scores also with what it attends to elsewhere."""
    attended = batch.prefix + batch.past
    return batching.Sizes(
        len(batch.tokens),
        batch.prefix + sum(rows * longest for rows, longest in batch.groups),
        batch.prefix**2 + sum(rows * n * (attended + n) for rows, n in batch.groups),
        len(batch.targets),
    )


def needs_of(backend=CPU, checkpointing=False, **changes):
    arguments = {"weights": 3_000_000_000, "trainable_parameters": 4_000_000}
    return memory.step_memory(
        tiny_config("qwen2", **{**SIZES, "vocab_size": 150_000, "head_dim": None, **changes}),
        2,
        target_modules=QKVO,
        checkpointing=checkpointing,
        backend=backend,
        **arguments,
    )


def test_what_is_kept_of_a_wide_step_is_what_its_arrays_are_together():
    """By hand: D 1000, F 3000, one query and one key head of 1000, in bf16 on a GPU."""
    wide = {
        "hidden_size": 1000,
        "intermediate_size": 3000,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 100,
    }
    needs = needs_of(GPU, **wide)
    # Two residuals, a normed input, o_proj's input, both branches; q, k, v and attention's outputs.
    assert (needs.token, needs.slot, needs.score) == (2 * (3000 + 1000 + 6000), 2 * 4000, 0)
    assert needs_of(CPU, **wide).score == 2
    kept = needs.peak(Sizes(7, 9, 100)) - needs.fixed
    assert kept == pytest.approx(100 * (7 * 20_000 + 9 * 8000), rel=0.02)
    # Checkpointed, a block's input, and all that three blocks keep.
    needs = needs_of(GPU, checkpointing=True, **wide)
    kept = needs.peak(Sizes(7, 9, 100)) - needs.fixed
    block = 7 * 20_000 + 9 * 8000
    assert kept == pytest.approx(100 * 7 * 2000 + 3 * block, rel=0.05)
    assert needs.fixed == 3_000_000_000 + 20 * 4_000_000
    assert needs.peak(Sizes(0, 0, 0, 10)) == needs.fixed + 10 * 20 * 150_000
    assert needs.peak(Sizes(0, 0, 0, 10_000)) == needs.fixed + 5 * GPU.chunk_bytes


@pytest.mark.parametrize("backend", [CPU, GPU])
def test_auto_takes_the_most_tokens_that_fit_and_plan_fit_the_longest_row(backend):
    needs = needs_of(backend)
    for budget in (6_000_000_000, 7_000_000_000):
        tokens = needs.micro_batch_tokens(budget, 200)
        assert needs.peak(needs.most(tokens, 200)) <= memory.HEADROOM * budget
        if tokens < memory.LARGEST:
            assert needs.peak(needs.most(tokens + 1, 200)) > memory.HEADROOM * budget
        longest = needs.longest_row(budget)
        alone = [needs.peak(Sizes(n, n, n * n, n)) for n in (longest, longest + 1)]
        assert alone[0] <= memory.HEADROOM * budget < alone[1]
    assert needs.micro_batch_tokens(1, 200) == memory.SMALLEST
    assert needs.micro_batch_tokens(10**12, 200) == memory.LARGEST


def test_an_estimate_is_scaled_to_what_was_measured():
    needs, sizes = needs_of(), Sizes(2048, 2100, 400_000, 900)
    beyond = needs.peak(sizes) - needs.fixed
    scaled = needs.measured(sizes, needs.fixed + 2 * beyond)
    assert scaled.peak(sizes) == pytest.approx(needs.fixed + 2 * beyond, rel=1e-6)
    assert scaled.fixed == needs.fixed


@pytest.mark.parametrize("backend", [CPU, replace(GPU, fused=False)], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("lengths", "micro_batch_tokens"),
    [
        ([1000] + [60] * 63, 16_384),
        ([1000] + [60] * 63, 2048),
        ([8000] + [100] * 63, 16_384),
        (list(range(2, 400, 3)), 4096),
        ([2] * 500, 1024),
        ([4000] * 5 + [30] * 90, 8192),
    ],
)
def test_no_mix_of_lengths_passes_what_its_micro_batches_may_take(
    lengths, micro_batch_tokens, backend
):
    rows = random_rows(lengths, mask_prompt=False)
    step = batching.make_micro_batches(rows, micro_batch_tokens, backend=backend)
    needs = needs_of(backend)
    most = needs.peak(needs.most(micro_batch_tokens, max(lengths)))
    assert all(needs.peak(sizes_of(batch)) <= 1.05 * most for batch in step.micro_batches)
    most_slots = max(1.5 * micro_batch_tokens, max(lengths) + 2 * backend.attention_tile)
    assert all(sizes_of(batch).slots <= most_slots for batch in step.micro_batches)


def test_sizes_of_lengths_are_those_of_the_rows():
    rng = np.random.default_rng(0)
    for backend in (CPU, GPU):
        for prefix in (0, 20):
            rows = random_rows(rng.integers(2, 200, 30).tolist(), prefix=prefix, mask_prompt=False)
            step = batching.make_micro_batches(rows, 700, backend=backend)
            shared = batching.shared_prefix(rows)
            found = batching.sizes_of([row.inputs for row in rows], shared, 700, backend)
            assert len(found) == len(step.micro_batches)
            for mine, batch in zip(found, step.micro_batches, strict=True):
                assert mine.slots - sizes_of(batch).slots in (0, shared)
                assert mine.tokens >= sizes_of(batch).tokens
