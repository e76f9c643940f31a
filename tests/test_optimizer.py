import mlx.core as mx
import numpy as np
import pytest

from mlx_tuner.engine import optimizer
from mlx_tuner.engine.optimizer import Shapes, State


def test_arrays_become_one_vector_and_come_back():
    arrays = {"b": mx.arange(6.0).reshape(2, 3), "a": mx.array([7.0])}
    shapes = Shapes(arrays)
    vector = shapes.flatten(dict(reversed(arrays.items())))
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7]
    back = shapes.unflatten(vector)
    assert all(mx.array_equal(back[name], arrays[name]) for name in arrays)


def test_clipping_by_hand():
    clipped, norm = optimizer.clip(mx.array([3.0, 4.0]), 1.0)
    assert norm.item() == 5
    np.testing.assert_allclose(np.array(clipped), [0.6, 0.8], rtol=1e-6)
    unclipped, _ = optimizer.clip(mx.array([0.3, 0.4]), 1.0)
    np.testing.assert_array_equal(np.array(unclipped), np.array([0.3, 0.4], np.float32))


def test_the_first_update_moves_each_parameter_by_the_learning_rate():
    # m_hat / sqrt(v_hat) = g / |g| in the first step
    state = optimizer.adamw(State.start(mx.array([1.0, 1.0])), mx.array([0.5, -20.0]), 0.1)
    np.testing.assert_allclose(np.array(state.parameters), [0.9, 1.1], rtol=1e-6)
    assert state.updates.item() == 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_updates_are_torchs(weight_decay):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.normal(size=50).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    peer = torch.optim.AdamW([theirs], lr=1.0, weight_decay=weight_decay)
    state = State.start(mx.array(start))
    for step in range(20):
        gradient = rng.normal(size=50).astype(np.float32) * 10 ** rng.uniform(-3, 1)
        rate = 1e-2 * (1 - step / 20)
        peer.param_groups[0]["lr"] = rate
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        peer.step()
        clipped, _ = optimizer.clip(mx.array(gradient), 1.0)
        state = optimizer.adamw(state, clipped, rate, weight_decay=weight_decay)
    np.testing.assert_allclose(np.array(state.parameters), theirs.detach().numpy(), rtol=2e-5)


def test_a_refused_update_leaves_everything_and_an_accepted_one_takes_everything():
    old = State.start(mx.array([1.0]))
    new = optimizer.adamw(old, mx.array([float("nan")]), 0.1)
    kept = optimizer.choose(mx.array(False), new, old)
    assert [part.tolist() for part in kept] == [[1.0], [0.0], [0.0], 0]
    taken = optimizer.choose(mx.array(True), optimizer.adamw(old, mx.array([2.0]), 0.1), old)
    assert taken.updates.item() == 1
