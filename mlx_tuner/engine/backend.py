"""What a machine asks of a training step, as plain numbers: its way is the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """Sizes that suit a machine; the defaults are those of MLX's CPU backend."""

    tile: int = 1
    """Flat tokens and targets are rounded up to a multiple: a GPU's matrix products compute whole
    tiles of rows anyway."""
    attention_tile: int = 1
    """The same for the length of an attention group's rows, where its kernel has tiles."""
    group_overhead: int = 20_000
    """Attention scores a head that one more attention group must save, to pay for its kernels."""
    keeps_scores: bool = True
    """Whether attention keeps its scores for the backward pass. (Metal's and CUDA's are fused.)"""
    keys_per_token: int | None = 512
    """Attention scores a head that a micro-batch may have for each of its tokens; None: any."""
    recurrence_chunk: int = 32
    """Tokens of a chunk of linear attention, a power of two: products grow with it, and chunks wait
    for one another."""
    chunk_bytes: int = 32 * 2**20
    """Bytes of fp32 logits that the loss holds at once."""
    fused: bool = False
    """Compile small element-wise functions into one kernel each. (The CPU backend would call a C++
    compiler for them.)"""

    def rounded_up(self, size: int) -> int:
        """``size`` tokens or targets in whole tiles."""
        return -(-size // self.tile) * self.tile


CPU = Backend()

GPU = Backend(
    tile=64,
    attention_tile=32,
    keeps_scores=False,
    keys_per_token=None,
    recurrence_chunk=64,
    chunk_bytes=256 * 2**20,
    fused=True,
)
"""Metal's and CUDA's. Tiles are those of MLX's matrix products and attention (`matmul.cpp` and
`scaled_dot_product_attention.cpp` in mlx/backend/metal)."""
