"""Sums over many numbers are as exact as torch's, against float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_tuner.conversion.logits import mean_loss
from mlx_tuner.engine import optimizer, sums
from mlx_tuner.engine.loss import linear_cross_entropy, linear_cross_entropy_value

VOCABULARY = 151_936


@pytest.mark.parametrize("size", [155_000, 2_000_000, 18_000_000])
def test_a_gradients_norm_is_as_exact_as_torchs(size):
    torch = pytest.importorskip("torch")
    gradient = np.random.default_rng(size).standard_normal(size, np.float32)
    truth = np.sqrt(np.square(gradient, dtype=np.float64).sum())
    _, norm = optimizer.clip(mx.array(gradient), 1.0)
    theirs = torch.linalg.vector_norm(torch.from_numpy(gradient)).item()
    assert abs(norm.item() - truth) <= max(abs(theirs - truth), 1e-6 * truth)
    assert abs(norm.item() / truth - 1) < 1e-6


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1024, 1025, 1_048_577])
def test_a_total_has_every_number_in_it_once(size):
    assert sums.total(mx.ones(size)).item() == size


@pytest.mark.parametrize("place", [0, 77_777, VOCABULARY - 1])
def test_a_large_number_swallows_no_small_ones(place):
    """A certain token among many unlikely ones, each less than half of the last bit of a 1."""
    row = np.full(VOCABULARY, 5e-8, np.float32)
    row[place] = 1
    truth = row.sum(dtype=np.float64)
    assert sums.row_sums(mx.array(row[None])).item() == pytest.approx(truth, rel=1e-6)
    assert sums.total(mx.array(row)).item() == pytest.approx(truth, rel=1e-6)


def flat_tail(rows):
    """Logits whose few large ones have half of the probability, the other 150,000 the rest."""
    rng = np.random.default_rng(0)
    logits = 0.05 * rng.standard_normal((rows, VOCABULARY), np.float32)
    logits[:, :20] += np.log(VOCABULARY / 20).astype(np.float32)
    return logits


def test_the_loss_of_a_flat_tail_is_as_exact_as_torchs():
    torch = pytest.importorskip("torch")
    logits = flat_tail(8)
    targets = np.arange(8) * 15_000
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    exponentials = np.exp(wide - largest)
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    logsumexps = np.log(exponentials.sum(axis=-1)) + largest[:, 0]
    truth = (logsumexps - wide[np.arange(8), targets]).sum()
    of_logits = probabilities
    of_logits[np.arange(8), targets] -= 1

    # Each row of logits as a head's weights, for a hidden state that picks them out.
    losses, gradients = [], []
    for row, target in zip(logits, targets, strict=True):
        head = nn.Embedding(VOCABULARY, 2)
        head.weight = mx.array(np.stack([row, np.ones_like(row)], axis=1))
        inputs = (head, mx.array([int(target)]), mx.ones(1))
        hidden = mx.array([[1.0, 0.0]])
        loss, gradient = mx.value_and_grad(linear_cross_entropy)(hidden, *inputs)
        assert linear_cross_entropy_value(hidden, *inputs).item() == loss.item()
        losses.append(loss.item())
        gradients.append(np.array(gradient)[0])
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(targets), reduction="none"
    )
    each = logsumexps - wide[np.arange(8), targets]
    assert np.abs(losses - each).max() <= max(
        np.abs(theirs.numpy() - each).max(), 2e-6 * each.max()
    )
    assert sum(losses) == pytest.approx(truth, rel=1e-6)
    # The second number's gradient is the sum of softmax less one-hot, which is 0: nothing is lost.
    expected = np.stack([(of_logits * wide).sum(axis=-1), np.zeros(8)], axis=1)
    np.testing.assert_allclose(gradients, expected, rtol=1e-5, atol=5e-6)


def test_logsumexp_of_a_flat_tail_is_as_exact_as_torchs():
    torch = pytest.importorskip("torch")
    logits = flat_tail(8)
    truth = np.log(np.exp(logits.astype(np.float64)).sum(axis=-1))
    theirs = torch.logsumexp(torch.from_numpy(logits), dim=-1).numpy()
    ours = np.array(sums.logsumexp(mx.array(logits)))
    assert np.abs(ours - truth).max() <= max(np.abs(theirs - truth).max(), 2e-6)
    # A fused model's loss is made of it.
    targets = np.arange(8) * 15_000
    expected = (truth - logits[np.arange(8), targets]).mean()
    assert mean_loss(logits, targets) == pytest.approx(expected, abs=2e-6)
