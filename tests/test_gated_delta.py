"""Gated DeltaNet in chunks is the rule applied token by token, as mlx-lm applies it."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_ops

from mlx_tuner.engine import gated_delta

KEY_HEADS, VALUES_PER_KEY, KEY_SIZE, VALUE_SIZE = 2, 3, 8, 12
HEADS = KEY_HEADS * VALUES_PER_KEY
LENGTHS = [50, 33, 16, 5, 1]
INPUTS = ("q", "k", "v", "log_decay", "beta", "state")


def random_inputs(decay=1.0):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    n = sum(LENGTHS)
    k = normal(n, KEY_HEADS, KEY_SIZE)
    return {
        "q": normal(n, KEY_HEADS, KEY_SIZE),
        "k": k / mx.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(n, HEADS, VALUE_SIZE),
        "log_decay": -decay * mx.exp(normal(n, HEADS)),
        "beta": mx.sigmoid(2 * normal(n, HEADS)),
        "state": normal(1, HEADS, VALUE_SIZE, KEY_SIZE),
    }


def token_by_token(q, k, v, log_decay, beta, state):
    """Outputs of all rows, and the longest one's last state, through mlx-lm's loop."""
    outputs, states, start = [], [], 0
    for length in LENGTHS:
        row = slice(start, start + length)
        parts = [x[None, row] for x in (q, k, v, mx.exp(log_decay), beta)]
        out, last = gated_delta_ops(*parts, state)
        outputs.append(out[0])
        states.append(last)
        start += length
    return mx.concatenate(outputs), states[0]


def in_chunks(q, k, v, log_decay, beta, state, *, size=16):
    tokens, rows = gated_delta.chunk(LENGTHS, size)
    used = np.flatnonzero(tokens < sum(LENGTHS))
    slots = np.empty(sum(LENGTHS), np.int32)
    slots[tokens[used]] = used

    def fill(x, *heads):
        padded = mx.concatenate([x, mx.zeros((1, *x.shape[1:]))])[mx.array(tokens)]
        return mx.moveaxis(padded.reshape(-1, size, *heads, *x.shape[2:]), 1, 1 + len(heads))

    grouped = (KEY_HEADS, VALUES_PER_KEY)
    out, last = gated_delta.scan(
        fill(q, KEY_HEADS, 1),
        fill(k, KEY_HEADS, 1),
        fill(v, *grouped),
        fill(log_decay, *grouped),
        fill(beta, *grouped),
        state.swapaxes(-1, -2).reshape(1, *grouped, KEY_SIZE, VALUE_SIZE),
        rows,
    )
    out = mx.moveaxis(out, 3, 1).reshape(-1, HEADS, VALUE_SIZE)[mx.array(slots)]
    return out, last[:1].reshape(1, HEADS, KEY_SIZE, VALUE_SIZE).swapaxes(-1, -2)


def assert_equal(inputs, tolerance, **options):
    """Outputs, last state and every gradient are those of the loop."""
    results = []
    for function in (token_by_token, lambda *x: in_chunks(*x, **options)):
        outputs = function(*inputs.values())
        cotangents = [mx.random.normal(x.shape, key=mx.random.key(9)) for x in outputs]
        results.append(outputs + tuple(mx.vjp(function, [*inputs.values()], cotangents)[1]))
    for name, truth, ours in zip(("out", "last", *INPUTS), *results, strict=True):
        error = mx.linalg.norm((ours - truth).flatten()) / mx.linalg.norm(truth.flatten())
        assert error.item() < tolerance, name


@pytest.mark.parametrize("size", [4, 16, 64])
def test_chunks_give_the_outputs_states_and_gradients_of_the_loop(size):
    assert_equal(random_inputs(), 1e-6, size=size)


def test_a_key_that_repeats_at_full_strength_loses_no_digits():
    """The powers of its system grow to 10^17 in a chunk of 64; its inverse stays small."""
    inputs = random_inputs(decay=1e-3)
    inputs["k"] = mx.broadcast_to(inputs["k"][:1], inputs["k"].shape)
    inputs["beta"] = mx.ones_like(inputs["beta"])
    assert_equal(inputs, 2e-5, size=64)


def test_decay_to_nothing_leaves_what_comes_after_exact():
    inputs = random_inputs(decay=1e-2)
    inputs["log_decay"][1:9] = -1000.0
    assert_equal(inputs, 1e-6, size=64)


def test_the_inverse_is_that_of_numpy():
    a = np.tril(np.random.default_rng(0).normal(size=(3, 32, 32)), -1) / 4
    ours = np.array(gated_delta.inverse(mx.array(a.astype(np.float32))))
    np.testing.assert_allclose(ours, np.linalg.inv(np.eye(32) + a), atol=1e-5)


def test_chunks_go_by_their_place_in_the_row_and_rows_go_longest_first():
    tokens, rows = gated_delta.chunk([5, 2, 1], 2)
    assert rows == (3, 1, 1)
    assert tokens.tolist() == [0, 1, 5, 6, 7, 8, 2, 3, 4, 8]


def test_the_convolution_of_a_row_sees_its_past_and_the_tail_alone():
    lengths, size, channels, width = [7, 3], 4, 5, 4
    x, weight = mx.random.normal((10, channels)), mx.random.normal((width, channels))
    tail = mx.random.normal((1, width - 1, channels))
    conv = nn.Conv1d(channels, channels, width, groups=channels, bias=False)
    conv.weight = weight.T[..., None]
    tokens, rows = gated_delta.chunk(lengths, size)
    padded = mx.concatenate([x, mx.zeros((1, channels))])[mx.array(tokens)]
    ours = gated_delta.causal_conv(padded.reshape(-1, size, channels), weight, tail, rows)
    ours = ours.reshape(-1, channels)
    start = 0
    for length in lengths:
        row = mx.concatenate([tail, x[None, start : start + length]], axis=1)
        slots = [tokens.tolist().index(t) for t in range(start, start + length)]
        assert mx.allclose(ours[mx.array(slots)], conv(row)[0], atol=1e-5)
        start += length
