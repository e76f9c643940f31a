"""Rows to micro-batches: flat tokens with nothing between them, and where each row's tokens lie.

Notation: R rows of a group, T the longest of them, P shared prefix tokens, N flat tokens,
S slots (N tokens and the padding of the groups), M targets.

    rows            A: s s s a a a a      B: s s s b b        (s: the prefix that they share)
    flat   [N]      s s s a a a b         inputs only: a row ends at the token before its last
                                          target, which nothing needs the hidden state of
    slots  [S]      s s s | a a a | b . . linears run on flat tokens, attention on groups of
                                          rows of like length, [R, T], after the prefix's P
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

MIN_SHARED_PREFIX = 8
"""Tokens; a shorter prefix is not worth a second set of keys."""


class Example(NamedTuple):
    """A row as the model sees it."""

    tokens: np.ndarray
    """(n,) token ids, int32."""
    loss_mask: np.ndarray
    """(n,) whether a token is a target, bool; the first token never is."""
    row: int = 0
    """Its number in the file, from 0."""

    @property
    def inputs(self) -> int:
        """Leading tokens whose hidden states anything depends on."""
        return int(np.flatnonzero(self.loss_mask)[-1])


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on. All index arrays are int32."""

    tokens: np.ndarray
    """(N,) input ids: the prefix's, where it is inside, then each row's own."""
    prefix: int
    """P, the tokens of the prefix that lie at the front of ``tokens``."""
    past: int
    """Tokens of a prefix that was computed elsewhere and is only attended to."""
    lengths: tuple[int, ...]
    """Tokens of each row's own, longest first."""
    groups: tuple[tuple[int, int], ...]
    """``(R, T)`` of each attention group, in the order of their slots."""
    token_of_slot: np.ndarray
    """(S,) the flat position of each slot's token; N where the slot is padding."""
    slot_of_token: np.ndarray
    """(N,) the slot of each flat token."""
    sources: np.ndarray
    """(M,) flat positions of the hidden states that predict a target."""
    targets: np.ndarray
    """(M,) the ids that they should predict."""
    weights: np.ndarray
    """(M,) fp32: how many rows have this target here; 0 where it is padding."""
    bucketed: bool = False
    """Padded to a shape of a `ShapeTable`, and so worth compiling for."""

    @property
    def real_tokens(self) -> int:
        """Tokens that are some row's, not padding."""
        return int((self.token_of_slot < len(self.tokens)).sum())

    @property
    def shape(self) -> Shape:
        """What a compiled graph depends on; of a micro-batch with one attention group.

        A slot more than the longest row has, so that padding tokens have an empty one to share.
        """
        ((rows, longest),) = self.groups
        return Shape(len(self.tokens), rows, longest + 1, len(self.sources), self.prefix, self.past)


class Shape(NamedTuple):
    """The sizes of a micro-batch that has one attention group."""

    tokens: int
    rows: int
    longest: int
    targets: int
    prefix: int
    past: int

    def holds(self, other: Shape) -> bool:
        """Whether a micro-batch of the other shape can be padded to this one."""
        return self[4:] == other[4:] and all(a >= b for a, b in zip(self, other, strict=True))

    def rounded_up(self) -> Shape:
        """Each size up to a multiple of a sixteenth of its power of two: 3 % more on average."""
        tokens, rows, longest, targets = map(_round_up, self[:4])
        return Shape(tokens, rows, longest, targets, self.prefix, self.past)


def _round_up(size: int) -> int:
    unit = 1 << max(0, size.bit_length() - 5)
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Step:
    """The micro-batches of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    """Longest first; where there is a shared prefix, only the last one holds it."""
    prefix: np.ndarray
    """(P,) the shared prefix where more than one micro-batch needs it, else empty."""
    rows: int
    tokens: int
    """Tokens of the rows, as they are in the file."""
    target_tokens: int


class ShapeTable:
    """At most ``limit`` shapes for the micro-batches of a run to be padded to.

    Each distinct shape is compiled once and keeps its graph; a run with as many shapes as steps
    would compile without end and exhaust Metal's resources.
    """

    FINE = 1.1
    """Tokens more than needed for which a known shape is taken without making a new one."""
    COARSE = 1.5
    """… and for which it is still taken where the table is full."""

    def __init__(self, limit: int = 16) -> None:
        self.limit = limit
        self.shapes: list[Shape] = []

    def fit(self, batch: MicroBatch) -> MicroBatch:
        """The micro-batch padded to a shape of the table, or as it is where none will do."""
        need = batch.shape
        fitting = [shape for shape in self.shapes if shape.holds(need)]
        best = min(fitting, key=lambda shape: shape.tokens, default=None)
        if best is None or best.tokens > self.FINE * need.tokens:
            if len(self.shapes) < self.limit:
                best = need.rounded_up()
                self.shapes.append(best)
            elif best is None or best.tokens > self.COARSE * need.tokens:
                return batch
        return pad(batch, best)


def pad(batch: MicroBatch, shape: Shape) -> MicroBatch:
    """The same micro-batch in a larger shape; no padding is attended to or has a target."""
    flat, ((rows, longest),) = len(batch.tokens), batch.groups
    slots = np.full((shape.rows, shape.longest), flat, np.int32)
    slots[:rows, :longest] = batch.token_of_slot[batch.prefix :].reshape(rows, longest)
    token_of_slot = np.concatenate([batch.token_of_slot[: batch.prefix], slots.ravel()])
    used = np.flatnonzero(token_of_slot < flat)
    # Padding tokens share an empty slot: zero goes in, nothing real comes out of it.
    slot_of_token = np.full(shape.tokens, batch.prefix + longest, np.int32)
    slot_of_token[token_of_slot[used]] = used
    token_of_slot[token_of_slot == flat] = shape.tokens
    more = (0, shape.targets - len(batch.targets))
    return replace(
        batch,
        tokens=np.pad(batch.tokens, (0, shape.tokens - flat)),
        groups=((shape.rows, shape.longest),),
        token_of_slot=token_of_slot,
        slot_of_token=slot_of_token,
        sources=np.pad(batch.sources, more),
        targets=np.pad(batch.targets, more),
        weights=np.pad(batch.weights, more),
        bucketed=True,
    )


def longest_common_prefix(rows: Sequence[np.ndarray]) -> int:
    """Leading tokens that all rows have in common."""
    shortest = min(map(len, rows))
    block = np.stack([row[:shortest] for row in rows])
    same = (block == block[0]).all(axis=0)
    return int(shortest if same.all() else same.argmin())


def make_micro_batches(
    rows: Sequence[Example],
    micro_batch_tokens: int,
    *,
    share_prefix: bool = True,
    prefix_unit: int = 1,
    group_overhead: int = 20_000,
) -> Step:
    """Cut one optimizer step's rows into micro-batches of at most ``micro_batch_tokens``.

    The sum of the micro-batches' losses and gradients does not depend on the cut. A row longer
    than ``micro_batch_tokens`` has a micro-batch of its own.

    Args:
        rows: each with at least one target.
        micro_batch_tokens: flat tokens that one pass may hold, the prefix included.
        share_prefix: compute the longest common prefix once.
        prefix_unit: share a multiple of this many tokens, so that there are few shapes.
        group_overhead: attention scores that one more attention group must save to be worth it.
    """
    prefix = 0
    if share_prefix and len(rows) > 1:
        # Each row keeps a token of its own, so that each micro-batch has a target.
        shortest = min(row.inputs for row in rows) - 1
        prefix = min(longest_common_prefix([row.tokens for row in rows]), shortest)
        prefix = prefix // prefix_unit * prefix_unit if prefix >= MIN_SHARED_PREFIX else 0
    longest_first = sorted(rows, key=lambda row: -row.inputs)
    parts: list[list[Example]] = [[]]
    room = micro_batch_tokens - prefix
    for row in longest_first:
        own = row.inputs - prefix
        if parts[-1] and own > room:
            parts.append([])
            room = micro_batch_tokens - prefix
        parts[-1].append(row)
        room -= own
    shared = rows[0].tokens[:prefix] if len(parts) > 1 else rows[0].tokens[:0]
    return Step(
        micro_batches=tuple(
            lay_out(part, prefix, group_overhead, holds_prefix=rows if part is parts[-1] else None)
            for part in parts
        ),
        prefix=shared.astype(np.int32),
        rows=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        target_tokens=sum(int(row.loss_mask.sum()) for row in rows),
    )


def lay_out(
    rows: Sequence[Example],
    prefix: int,
    group_overhead: int,
    holds_prefix: Sequence[Example] | None,
) -> MicroBatch:
    """Lay rows, longest first, out as a micro-batch.

    Args:
        prefix: P, the tokens that all rows share at their front.
        holds_prefix: None where the prefix is computed elsewhere; else the step's rows, whose
            targets inside the prefix and right after it are counted here.
    """
    inside = prefix if holds_prefix is not None else 0
    lengths = [row.inputs - prefix for row in rows]
    starts = inside + np.cumsum([0, *lengths])
    tokens = [rows[0].tokens[:inside]] + [row.tokens[prefix : row.inputs] for row in rows]
    groups = group(lengths, prefix, group_overhead)
    flat = int(starts[-1])

    token_of_slot = [np.arange(inside, dtype=np.int32)]
    first = 0
    for count, longest in groups:
        slots = np.full((count, longest), flat, np.int32)
        for r in range(count):
            length = lengths[first + r]
            slots[r, :length] = np.arange(starts[first + r], starts[first + r] + length)
        token_of_slot.append(slots.ravel())
        first += count
    slots_all = np.concatenate(token_of_slot)
    used = np.flatnonzero(slots_all < flat)
    slot_of_token = np.empty(flat, np.int32)
    slot_of_token[slots_all[used]] = used

    sources, targets, weights = _targets(rows, starts, prefix, holds_prefix)
    return MicroBatch(
        tokens=np.concatenate(tokens).astype(np.int32),
        prefix=inside,
        past=prefix - inside,
        lengths=tuple(lengths),
        groups=groups,
        token_of_slot=slots_all,
        slot_of_token=slot_of_token,
        sources=sources,
        targets=targets,
        weights=weights,
    )


def _targets(
    rows: Sequence[Example], starts: np.ndarray, prefix: int, holds_prefix: Sequence[Example] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, targets and weights; equal (source, target) pairs of the prefix count as one."""
    sources, targets = [], []
    for row, start in zip(rows, starts, strict=False):
        at = np.flatnonzero(row.loss_mask)
        at = at[at > prefix]
        sources.append(start + at - 1 - prefix)
        targets.append(row.tokens[at])
    weights = np.ones(sum(map(len, sources)), np.float32)
    if prefix and holds_prefix is not None:
        pairs = [
            (at - 1, int(row.tokens[at]))
            for row in holds_prefix
            for at in np.flatnonzero(row.loss_mask[: prefix + 1])
        ]
        if pairs:
            unique, counts = np.unique(np.array(pairs), axis=0, return_counts=True)
            sources.append(unique[:, 0])
            targets.append(unique[:, 1])
            weights = np.concatenate([weights, counts.astype(np.float32)])
    return (
        np.concatenate(sources).astype(np.int32),
        np.concatenate(targets).astype(np.int32),
        weights,
    )


def group(lengths: Sequence[int], prefix: int, overhead: int) -> tuple[tuple[int, int], ...]:
    """Cut rows, longest first, into groups whose padded attention costs least.

    A group of R rows, the longest of T tokens, computes ``R · T · (P + T)`` scores a head;
    ``overhead`` is what one more group costs in the same unit.

    Returns:
        ``(R, T)`` of each group.
    """
    n = len(lengths)
    t = np.asarray(lengths, np.int64)
    area = t * (prefix + t)
    best = np.zeros(n + 1, np.int64)  # best[i]: the least cost of rows i …
    end = np.zeros(n, np.int64)
    for i in range(n - 1, -1, -1):
        costs = np.arange(1, n - i + 1) * area[i] + overhead + best[i + 1 :]
        end[i] = i + 1 + costs.argmin()
        best[i] = costs.min()
    groups, i = [], 0
    while i < n:
        groups.append((int(end[i]) - i, int(t[i])))
        i = int(end[i])
    return tuple(groups)
