"""The engine is exact: its losses and gradients are those of rows run alone, in float64."""

import math
import time
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import examples, some_slow
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner import lora as mlx_lm_lora
from mlx_lm.tuner.trainer import default_loss
from tiny import BASE, FAMILIES, plain_loss, random_rows, relative_error, tiny_model

from mlx_tuner.engine import batching, lora
from mlx_tuner.engine.backend import CPU, GPU
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.forward import Layout, head_of, hidden_at_targets
from mlx_tuner.engine.loss import linear_cross_entropy
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.trainer import Trainer, train

MODEL = tiny_model()
TILES = replace(GPU, fused=False)
"""A GPU's numbers, but for the kernels that the CPU backend would call a C++ compiler for."""
LENGTHS = [2, 30, 3, 17, 9, 25, 2, 11]


def sums(trainer, rows, number=0):
    loss, gradient = trainer.sum_of_micro_batches(trainer.make_micro_batches(rows), number)
    mx.eval(loss, gradient)
    return loss.item(), trainer.shapes.unflatten(gradient)


def assert_exact(model, rows, *each, **options):
    """Our error is below 1e-5, with the options and any of the other ones."""
    truth, gradients = plain_loss(model, rows)
    for other in each or [{}]:
        trainer = Trainer(model, **{"micro_batch_tokens": 10_000, **options, **other})
        loss, ours = sums(trainer, rows)
        assert loss == pytest.approx(truth, rel=1e-6)
        assert relative_error(ours, gradients) < 1e-5


def well_conditioned(family):
    """A config for which rounding is not made many times larger.

    Gated DeltaNet divides outputs by their own size. With random weights some are near zero, and
    where nothing but an epsilon of 1e-6 is added, a rounding of the embeddings alone changes the
    gradient by 1e-5, in float64 too.
    """
    return changed(FAMILIES[family], rms_norm_eps=1e-4)


def changed(config, **sizes):
    if text := config.get("text_config"):
        return {**config, "text_config": {**text, **sizes}}
    return {**config, **sizes}


@pytest.mark.parametrize("family", some_slow(FAMILIES, FAMILIES.keys() - {"qwen2"}))
def test_every_family_has_the_loss_and_gradients_of_rows_run_alone(family):
    model = tiny_model(well_conditioned(family))
    options = {"micro_batch_tokens": 60, "backend": replace(CPU, recurrence_chunk=8)}
    for seed in range(3):
        rows = random_rows(LENGTHS[:5], prefix=12, seed=seed)
        assert_exact(model, rows, {}, {"checkpointing": True}, **options)


@pytest.mark.parametrize("prefix", some_slow([0, 5, 12, 60], {5}))
@pytest.mark.parametrize("micro_batch_tokens", some_slow([10_000, 80, 1], {1}))
@pytest.mark.parametrize("mask_prompt", some_slow([True, False], {False}))
def test_a_shared_prefix_changes_nothing(prefix, micro_batch_tokens, mask_prompt):
    rows = random_rows(LENGTHS, prefix=prefix, mask_prompt=mask_prompt)
    assert_exact(MODEL, rows, micro_batch_tokens=micro_batch_tokens)


@pytest.mark.parametrize("prefix", some_slow([0, 12, 60], {0}))
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 80])
@pytest.mark.parametrize("mask_prompt", some_slow([True, False], {False}))
def test_a_gpus_tiles_change_nothing(prefix, micro_batch_tokens, mask_prompt):
    rows = random_rows(LENGTHS, prefix=prefix, mask_prompt=mask_prompt)
    options = {"micro_batch_tokens": micro_batch_tokens, "backend": TILES}
    for batch in Trainer(MODEL, **options).make_micro_batches(rows).micro_batches:
        assert len(batch.tokens) % 64 == len(batch.sources) % 64 == len(batch.targets) % 64 == 0
        assert all(longest % 32 == 0 for _, longest in batch.groups)
    assert_exact(MODEL, rows, **options)


@pytest.mark.parametrize("family", some_slow(["qwen3_moe", "qwen3_5"], {"qwen3_5"}))
def test_a_gpus_tiles_change_nothing_in_other_families(family):
    rows = random_rows(LENGTHS[:5], prefix=12, seed=1)
    assert_exact(tiny_model(well_conditioned(family)), rows, backend=TILES)


def test_one_row_and_equal_rows_are_exact():
    assert_exact(MODEL, random_rows([20]))
    assert_exact(MODEL, random_rows([20]) * 3)


def test_a_row_that_starts_another_is_exact():
    long = random_rows([30], mask_prompt=False)[0]
    assert_exact(MODEL, [long, Example(long.tokens[:12], long.loss_mask[:12])])


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=9),
    prefix=st.integers(0, 30),
    micro_batch_tokens=st.integers(1, 300),
    mask_prompt=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.too_slow])
def test_no_cut_into_micro_batches_changes_the_gradient(
    lengths, prefix, micro_batch_tokens, mask_prompt, seed
):
    rows = random_rows(lengths, prefix=prefix, seed=seed, mask_prompt=mask_prompt)
    whole_loss, whole = sums(Trainer(MODEL, micro_batch_tokens=10**6), rows)
    loss, cut = sums(Trainer(MODEL, micro_batch_tokens=micro_batch_tokens), rows)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert relative_error(cut, whole) < 1e-5


def test_checkpointing_gives_the_same_gradient_with_dropout_too():
    model = tiny_model(dropout=0.3)
    rows = random_rows(LENGTHS, prefix=12)
    plain = sums(Trainer(model, micro_batch_tokens=60, seed=7), rows, number=3)
    checkpointed = sums(
        Trainer(model, micro_batch_tokens=60, seed=7, checkpointing=True), rows, number=3
    )
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-6)
    assert relative_error(checkpointed[1], plain[1]) < 1e-6


@pytest.mark.parametrize(
    "family", some_slow(["qwen2", "qwen3_moe", "qwen3_5"], {"qwen2", "qwen3_5"})
)
@pytest.mark.parametrize("backend", some_slow([CPU, TILES], {CPU}), ids=["cpu", "tiles"])
def test_with_dropout_no_cut_changes_the_gradient(family, backend):
    model = tiny_model(FAMILIES[family], dropout=0.3)
    rows = [row._replace(row=i) for i, row in enumerate(random_rows(LENGTHS, prefix=12))]
    whole = sums(Trainer(model, micro_batch_tokens=10_000, seed=7), rows, number=3)
    for order, micro_batch_tokens in ((rows, 60), (rows[::-1], 1)):
        trainer = Trainer(model, micro_batch_tokens=micro_batch_tokens, seed=7, backend=backend)
        loss, gradient = sums(trainer, order, number=3)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert relative_error(gradient, whole[1]) < 3e-5  # linear attention rounds most


def test_each_layer_token_and_feature_has_a_dropout_mask_of_its_own():
    model = tiny_model(dropout=0.3)
    Trainer(model, micro_batch_tokens=100)
    keys = lora.token_keys(1, 2, np.array([5, 5, 6]), np.array([0, 1, 0]))
    lora.set_dropout_keys(model, mx.array(keys))
    model.train()
    layers = list(lora.adapted_modules(model).values())
    ones = mx.ones((3, 1000))
    masks = np.array(mx.concatenate([layer.drop(ones) for layer in layers]))
    assert np.allclose(np.unique(masks), [0, 1 / 0.7])
    kept = (masks > 0).astype(float)
    assert np.abs(kept.mean(axis=1) - 0.7).max() < 0.07
    assert np.abs(np.corrcoef(kept) - np.eye(len(kept))).max() < 0.2


def test_a_step_without_rows_updates_nothing():
    model = tiny_model()
    trainer = Trainer(model, micro_batch_tokens=60)
    rows = random_rows(LENGTHS)
    assert trainer.make_micro_batches([]).empty
    results, states = [], []
    for result in train(trainer, [rows, [], rows], [1e-3] * 3):
        results.append(result)
        states.append([np.array(part) for part in trainer.state])
    empty = results[1]
    assert (empty.rows, empty.target_tokens) == (0, 0)
    assert math.isnan(empty.loss)  # so that it has no part in a mean
    assert math.isnan(empty.grad_norm)
    assert empty.finite
    assert all(map(np.array_equal, states[0], states[1]))
    assert not np.array_equal(states[1][0], states[2][0])


@pytest.mark.slow
@pytest.mark.parametrize("pauses", [False, True])
def test_each_result_comes_with_the_state_of_its_step(pauses):
    """Also while the step after it is being computed."""
    batches = [random_rows(LENGTHS, seed=seed) for seed in range(4)]
    model = tiny_model()
    trainer = Trainer(model, micro_batch_tokens=60)
    start = trainer.state
    pause_after = (lambda steps: steps % 2 == 0) if pauses else (lambda steps: False)
    together = [
        (result.loss, np.array(trainer.state.parameters), trainer.state.updates.item())
        for result in train(trainer, batches, [1e-2] * 4, pause_after=pause_after)
    ]
    trainer.state = start
    for number, (batch, (loss, parameters, updates)) in enumerate(zip(batches, together)):  # noqa: B905
        (alone,) = train(trainer, [batch], [1e-2], first_step=number)
        assert (alone.loss, updates) == (loss, number + 1)
        np.testing.assert_array_equal(parameters, np.array(trainer.state.parameters))


@pytest.mark.slow
@pytest.mark.parametrize("pauses", [False, True])
def test_a_step_is_as_long_as_it_takes_until_its_result_can_be_had(pauses):
    """What is done with a result meanwhile is part of that, unless the device was to be idle."""
    trainer = Trainer(tiny_model(), micro_batch_tokens=60)
    seconds = []
    rows = [random_rows(LENGTHS)] * 3
    for result in train(trainer, rows, [1e-2] * 3, pause_after=lambda steps: pauses):
        seconds.append(result.seconds)
        time.sleep(0.5)
    assert all(each >= 0.5 for each in seconds[1:]) != pauses


def test_dropout_is_a_function_of_seed_and_step():
    model, rows = tiny_model(dropout=0.3), random_rows(LENGTHS)
    losses = {
        (seed, number): sums(Trainer(model, micro_batch_tokens=100, seed=seed), rows, number)[0]
        for seed in (1, 2)
        for number in (0, 1)
    }
    assert len(set(losses.values())) == 4
    again = sums(Trainer(model, micro_batch_tokens=100, seed=1), rows, 1)[0]
    assert again == losses[1, 1]


def test_changing_a_row_changes_no_other_rows_hidden_states():
    rows = random_rows(LENGTHS, mask_prompt=False)
    changed = [Example((rows[1].tokens + 1) % 64, rows[1].loss_mask)]

    def states(rows):
        batch = batching.make_micro_batches(rows, 10_000, share_prefix=False).micro_batches[0]
        hidden, _ = hidden_at_targets(MODEL, Layout.of(batch))
        return np.array(hidden)

    before = states([rows[1], *rows[2:]])
    after = states([*changed, *rows[2:]])
    own = rows[1].inputs
    assert not np.array_equal(before[:own], after[:own])
    np.testing.assert_array_equal(before[own:], after[own:])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3_5"])
def test_in_bf16_our_error_is_no_larger_than_mlx_lms(family):
    """Against fp32 on the same rounded weights, on average over batches."""
    errors = np.array([bf16_errors(family, seed) for seed in range(6)]).mean(axis=0)
    (loss, gradient), (their_loss, their_gradient) = errors
    assert gradient <= their_gradient
    assert loss <= 1.5 * their_loss  # one number a batch, so partly luck


def bf16_errors(family, seed):
    """Relative errors of (loss, gradient) in bf16: ours, then mlx-lm's."""
    rows = random_rows([30] * 4, seed=seed, mask_prompt=False)
    targets = sum(int(row.loss_mask.sum()) for row in rows)

    def error(loss, gradient):
        return abs(loss - truth) / truth, relative_error({"": vector(gradient)}, {"": exact})

    def vector(gradient):
        return mx.concatenate(
            [gradient[n].reshape(-1).astype(mx.float32) for n in sorted(gradient)]
        )

    truth, gradient = plain_loss(half_model(family, mx.float32), rows)
    exact = vector(gradient)
    ours = error(*sums(Trainer(half_model(family), micro_batch_tokens=10_000), rows))

    theirs = half_model(family)
    layers = []
    for path, layer in lora.adapted_modules(theirs).items():
        peer = mlx_lm_lora.LoRALinear.from_base(layer.linear, r=4, scale=2.0)
        peer.lora_a, peer.lora_b = layer.lora_a, layer.lora_b
        layers.append((path, peer))
    theirs.update_modules(tree_unflatten(layers))
    batch, lengths = mx.array(np.stack([row.tokens for row in rows])), mx.array([[0, 29]] * 4)
    (mean, counted), gradient = nn.value_and_grad(theirs, default_loss)(theirs, batch, lengths)
    assert counted.item() == targets
    gradient = {name: targets * value for name, value in tree_flatten(gradient)}
    return ours, error(mean.item() * targets, gradient)


def half_model(family, dtype=mx.bfloat16):
    """A model whose frozen weights are rounded to bf16 and kept in ``dtype``."""
    wide = {"vocab_size": 512, "hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    model = tiny_model(changed(FAMILIES[family], **wide), strength=0.02)
    for _, module in model.named_modules():
        if not isinstance(module, lora.LoRALinear) and not list(module.children()):
            module.set_dtype(mx.bfloat16)
            module.set_dtype(dtype)
    return model


def test_a_step_divides_once_by_its_target_tokens():
    rows = random_rows(LENGTHS)
    truth, gradients = plain_loss(MODEL, rows)
    targets = sum(int(row.loss_mask.sum()) for row in rows)
    norm = np.sqrt(sum(float((g.astype(mx.float32) ** 2).sum()) for g in gradients.values()))
    model = tiny_model()
    (result,) = train(Trainer(model, micro_batch_tokens=40), [rows], [1e-3])
    assert result.loss == pytest.approx(truth / targets, rel=1e-5)
    assert result.grad_norm == pytest.approx(norm / targets, rel=1e-4)
    assert (result.rows, result.target_tokens) == (8, targets)
    assert result.tokens == sum(len(row.tokens) for row in rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(bad):
    model, rows = tiny_model(), random_rows(LENGTHS)
    trainer = Trainer(model, micro_batch_tokens=100)
    list(train(trainer, [rows], [1e-3]))
    before = [np.array(part) for part in trainer.state]
    model.model.layers[1].mlp.up_proj.linear.weight[0, 0] = bad
    (result,) = train(trainer, [rows], [1e-3])
    assert not result.finite
    for old, new in zip(before, trainer.state, strict=True):
        np.testing.assert_array_equal(old, np.array(new))


@pytest.mark.slow
def test_training_lowers_the_loss_and_evaluation_sees_it():
    model, rows = tiny_model(), random_rows(LENGTHS, prefix=10)
    trainer = Trainer(model, micro_batch_tokens=60)
    before = trainer.evaluate([rows[:3], rows[3:]])
    results = list(train(trainer, [rows] * 8, [1e-2] * 8))
    assert before == pytest.approx(results[0].loss, rel=1e-5)
    assert results[-1].loss < 0.8 * results[0].loss
    assert trainer.evaluate([rows]) < 0.8 * before


def test_an_evaluation_tells_of_each_micro_batch():
    rows, told = random_rows(LENGTHS), []
    trainer = Trainer(tiny_model(), micro_batch_tokens=60)
    silent = trainer.evaluate([rows[:5], rows[5:]])
    assert trainer.evaluate([rows[:5], rows[5:]], lambda: told.append(1)) == silent
    steps = [trainer.make_micro_batches(part) for part in (rows[:5], rows[5:])]
    assert len(told) == sum(len(step.micro_batches) for step in steps) > 2


def test_evaluation_leaves_training_as_it_was():
    rows = random_rows(LENGTHS)
    runs = []
    for evaluating in (False, True):
        trainer = Trainer(tiny_model(dropout=0.2), micro_batch_tokens=60, seed=3)
        for _ in train(trainer, [rows] * 3, [1e-3] * 3):
            if evaluating:
                trainer.evaluate([rows])
        runs.append(np.array(trainer.state.parameters))
    np.testing.assert_array_equal(*runs)


@pytest.mark.slow
def test_a_run_resumed_after_any_step_is_the_same_to_the_bit():
    """With dropout, and a GPU's tiles; the state is all that is kept, as numbers."""
    batches = [random_rows([3 + i % 5, 17, 9], prefix=8 * (i % 2), seed=i) for i in range(24)]
    batches = [
        [row._replace(row=3 * i + j) for j, row in enumerate(b)] for i, b in enumerate(batches)
    ]
    rates = [1e-3 * (24 - i) / 24 for i in range(24)]

    def run(state, first):
        model = tiny_model(changed(BASE, num_hidden_layers=2), dropout=0.2)
        trainer = Trainer(model, micro_batch_tokens=40, seed=3, backend=TILES)
        if state is not None:
            trainer.state = State(*map(mx.array, state))
        for result in train(trainer, batches[first:], rates[first:], first_step=first):
            yield result.loss, [np.array(part) for part in trainer.state]

    whole = list(run(None, 0))
    assert len({loss for loss, _ in whole}) == 24
    for first in range(1, 24):
        # What is kept after a step leads to all of the next one's numbers, and so to the last's.
        loss, state = next(run(whole[first - 1][1], first))
        assert loss == whole[first][0]
        assert all(map(np.array_equal, state, whole[first][1]))


def test_a_rehearsal_changes_nothing():
    trainer = Trainer(tiny_model(), micro_batch_tokens=60)
    before = np.array(trainer.state.parameters)
    trainer.rehearse(random_rows(LENGTHS))
    np.testing.assert_array_equal(before, np.array(trainer.state.parameters))


def test_training_stops_where_the_rows_or_the_rates_end():
    trainer = Trainer(MODEL, micro_batch_tokens=100)
    rows = random_rows([5])
    assert len(list(train(trainer, [rows] * 2, [0.0] * 5))) == 2
    assert len(list(train(trainer, [rows] * 5, [0.0] * 2))) == 2


def test_the_next_rows_are_taken_while_a_step_is_computed_and_none_after_the_last_rate():
    taken = []

    def batches():
        for number in range(9):
            taken.append(number)
            yield random_rows([5], seed=number)

    trainer = Trainer(MODEL, micro_batch_tokens=100)
    seen = [
        (result.waited <= result.seconds, len(taken))
        for result in train(trainer, batches(), [0.0] * 3)
    ]
    assert seen == [(True, 3), (True, 3), (True, 3)]


@pytest.mark.slow
def test_the_head_of_a_quantised_model_is_never_dequantised_whole():
    quantised = {**BASE, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    for mode, bits in (("affine", 4), ("affine", 8), ("mxfp4", 4), ("mxfp8", 8)):
        config = {**quantised, "quantization": {"group_size": 32, "bits": bits, "mode": mode}}
        model = tiny_model(config)
        assert isinstance(head_of(model), nn.QuantizedEmbedding)
        assert_exact(model, random_rows(LENGTHS[:4], prefix=9))


def test_the_loss_is_the_same_for_any_chunk(monkeypatch):
    hidden = mx.random.normal((100, BASE["hidden_size"]))
    targets, weights = mx.random.randint(0, 64, (100,)), mx.random.uniform(shape=(100,))
    head = head_of(MODEL)

    backend = replace(CPU, chunk_bytes=0)

    def value_and_gradient():
        loss = lambda h: linear_cross_entropy(h, head, targets, weights, backend=backend)  # noqa: E731
        return mx.value_and_grad(loss)(hidden)

    logits = lambda h: (nn.losses.cross_entropy(head.as_linear(h), targets) * weights).sum()  # noqa: E731
    truth, gradient = mx.value_and_grad(logits)(hidden)
    for size in (1, 7, 100):
        monkeypatch.setattr("mlx_tuner.engine.loss.MIN_CHUNK", size)
        loss, ours = value_and_gradient()
        assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
        assert mx.allclose(ours, gradient, atol=1e-6)


@pytest.mark.slow
def test_four_times_the_targets_need_no_more_memory():
    vocabulary, size = 20_000, 8
    head = nn.Embedding(vocabulary, size)
    backend = replace(CPU, chunk_bytes=64 * 4 * vocabulary)

    def peak(count):
        hidden, targets = mx.random.normal((count, size)), mx.zeros(count, mx.int32)
        ones = mx.ones(count)
        loss = lambda h: linear_cross_entropy(h, head, targets, ones, backend=backend)  # noqa: E731
        mx.eval(hidden, targets, head.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory() - before

    # How many chunks are under way at once differs by one or two.
    assert peak(1024) < 1.5 * peak(256)


def test_a_target_of_vanishing_probability_has_its_exact_loss():
    head = nn.Embedding(3, 1)
    head.weight = mx.array([[0.0], [200.0], [-300.0]])
    hidden, weights = mx.array([[1.0]]), mx.array([1.0])
    loss = linear_cross_entropy(hidden, head, mx.array([2]), weights)
    assert loss.item() == 500.0


def test_micro_batches_hold_no_more_tokens_than_allowed_and_each_row_once():
    rows = random_rows([40, 3, 22, 9, 17, 30], prefix=10)
    step = batching.make_micro_batches(rows, 50)
    assert all(len(batch.tokens) + batch.past <= 50 for batch in step.micro_batches)
    real = [(batch.token_of_slot < len(batch.tokens)).sum() for batch in step.micro_batches]
    assert sum(real) == 10 + sum(row.inputs - 10 for row in rows)
    lengths = [batch.groups[0][1] for batch in step.micro_batches]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(batch.weights.sum() for batch in step.micro_batches) == step.target_tokens
    assert replace(step).rows == 6
