"""Moving flat tokens to the slots of rows, where they see their own row alone, and back."""

from __future__ import annotations

import mlx.core as mx


class Slots:
    """Moves flat tokens to slots and back. Each is the other's transpose, gathers both.

    (MLX would differentiate a gather by a scatter-add, which is slow, and on a GPU atomic.)
    """

    def __init__(self, token_of_slot: mx.array, slot_of_token: mx.array) -> None:
        real = (token_of_slot < slot_of_token.shape[0])[:, None]
        token_of_slot = mx.where(real[:, 0], token_of_slot, 0)

        def fill(x: mx.array) -> mx.array:
            return mx.where(real, x[token_of_slot], 0)

        def gather(x: mx.array) -> mx.array:
            return x[slot_of_token]

        self._slot_of_token = slot_of_token
        self.fill = mx.custom_function(fill)
        self.gather = mx.custom_function(gather)
        self.fill.vjp(lambda _, cotangent, __: gather(cotangent))
        self.gather.vjp(lambda _, cotangent, __: fill(cotangent))

    def gather_at(self, x: mx.array, tokens: mx.array | None) -> mx.array:
        """(S, D) to flat, or to (M, D) at some ``tokens`` alone."""
        return self.gather(x) if tokens is None else x[self._slot_of_token[tokens]]
