"""NEFTune: uniform noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_tuner.engine.lora import token_keys

_OF_NOISE = 2**32
"""Added to the seed, which is below: noise and dropout masks have nothing in common."""


class Noise(NamedTuple):
    """What decides the noise of tokens, wherever they are computed."""

    keys: mx.array
    """(N, 2) uint32, of each token's row and position."""
    sizes: mx.array
    """(N,) ``α / √L``, for a token of a row of L; 0 for padding."""

    @classmethod
    def of(
        cls,
        alpha: float,
        seed: int,
        step: int,
        rows: np.ndarray,
        positions: np.ndarray,
        lengths: Sequence[int],
    ) -> Noise:
        """For tokens (N,) by the numbers of their rows and their positions in them.

        Args:
            lengths: of the rows, in the order in which their tokens lie; the rest is padding.
        """
        keys = token_keys(seed + _OF_NOISE, step, rows, positions)
        of_tokens = alpha / np.sqrt(np.repeat(lengths, lengths))
        sizes = np.pad(of_tokens, (0, len(rows) - len(of_tokens))).astype(np.float32)
        return cls(mx.array(keys), mx.array(sizes))

    def on(self, embeddings: mx.array) -> mx.array:
        """Embeddings (N, D) with noise from U(-1, 1) · α / √(L · D)."""
        width = embeddings.shape[1]
        noise = mx.vmap(lambda key: mx.random.uniform(-1, 1, (width,), key=key))(self.keys)
        return (embeddings + noise * (self.sizes[:, None] / width**0.5)).astype(embeddings.dtype)
