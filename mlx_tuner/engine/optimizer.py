"""AdamW with global-norm clipping, on one flat vector of all trainable numbers.

One vector instead of hundreds of small arrays: an update is a dozen kernels, a non-finite
gradient is refused by one choice, and ranks add their gradients in one message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from mlx_tuner.engine import sums


class Shapes:
    """Names and shapes of arrays that are kept as one vector, in the order that they come in."""

    def __init__(self, arrays: Mapping[str, mx.array]) -> None:
        self._shapes = {name: array.shape for name, array in arrays.items()}
        self._ends = list(accumulate(math.prod(shape) for shape in self._shapes.values()))

    def flatten(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """The arrays by name to one fp32 vector."""
        parts = [arrays[name].reshape(-1).astype(mx.float32) for name in self._shapes]
        return mx.concatenate(parts)

    def unflatten(self, vector: mx.array) -> dict[str, mx.array]:
        """One vector to the arrays by name, in the vector's dtype."""
        parts = mx.split(vector, self._ends[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


class State(NamedTuple):
    """What an update reads and writes; all fp32 vectors of one length, and a count."""

    parameters: mx.array
    first_moment: mx.array
    second_moment: mx.array
    updates: mx.array
    """How many updates have been made, an int32 scalar; skipped ones do not count."""

    @classmethod
    def start(cls, parameters: mx.array) -> State:
        zeros = mx.zeros_like(parameters)
        return cls(parameters, zeros, zeros, mx.array(0, mx.int32))


def clip(gradient: mx.array, max_norm: float) -> tuple[mx.array, mx.array]:
    """Scale a gradient down to ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns:
        The clipped gradient, and its L2 norm from before.
    """
    norm = sums.norm(gradient)
    return gradient * mx.minimum(max_norm / (norm + 1e-6), 1.0), norm


def adamw(
    state: State,
    gradient: mx.array,
    learning_rate: mx.array | float,
    *,
    weight_decay: float = 0.0,
) -> State:
    """One update with decoupled weight decay and bias correction, as torch's AdamW.

    (Loshchilov & Hutter 2019, arXiv:1711.05101.)
    """
    b1, b2, eps = 0.9, 0.999, 1e-8
    updates = state.updates + 1
    m = b1 * state.first_moment + (1 - b1) * gradient
    v = b2 * state.second_moment + (1 - b2) * mx.square(gradient)
    m_hat = m / (1 - mx.power(b1, updates))
    v_hat = v / (1 - mx.power(b2, updates))
    decayed = state.parameters * (1 - learning_rate * weight_decay)
    parameters = decayed - learning_rate * m_hat / (mx.sqrt(v_hat) + eps)
    return State(parameters, m, v, updates)


def choose(ok: mx.array, new: State, old: State) -> State:
    """``new`` where ``ok`` holds, else ``old``: decided in the graph, without a synchronisation."""
    return State(*(mx.where(ok, a, b) for a, b in zip(new, old, strict=True)))
