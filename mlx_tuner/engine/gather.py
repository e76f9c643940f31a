"""Moving flat tokens to slots of their rows, where they see nothing else, and back."""

from __future__ import annotations

import mlx.core as mx


class Gather:
    """``x[there]``, (A, …) to (B, …), and ``back``, its transpose. Both are gathers.

    (MLX would differentiate a gather by a scatter-add, which is slow, and on a GPU atomic.)

    Args:
        there: (B,) indices into A, none twice but where nothing depends on the result.
        back: (A,) the index in B of each of A; B where it has none, which gives zero.
    """

    def __init__(self, there: mx.array, back: mx.array) -> None:
        found = (back < there.shape[0])[:, None]
        back = mx.where(found[:, 0], back, 0)

        def gather(x: mx.array) -> mx.array:
            return x[there]

        def fill(x: mx.array) -> mx.array:
            return mx.where(found, x[back], 0)

        self._gather = mx.custom_function(gather)
        self.back = mx.custom_function(fill)
        self._gather.vjp(lambda _, cotangent, __: fill(cotangent))
        self.back.vjp(lambda _, cotangent, __: gather(cotangent))

    def __call__(self, x: mx.array) -> mx.array:
        return self._gather(x)
