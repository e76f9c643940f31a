"""Rows to micro-batches: flat tokens with nothing between them, and where each row's tokens lie.

Notation: R rows of a group, T the longest of them, P shared prefix tokens, N flat tokens,
S slots (the prefix's, and the groups' R x T), U sources, M targets.

    rows            A: s s s a a a a      B: s s s b b        (s: the prefix that they share)
    flat   [N]      s s s a a a b         inputs only: a row ends at the token before its last
                                          target, which nothing needs the hidden state of
    slots  [S]      s s s | a a a | b . . linears run on flat tokens, attention on groups of
                                          rows of like length, [R, T], after the prefix's P

How rows are put together is a function of their lengths, the limit and the backend's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_tuner.engine.backend import CPU, Backend

MIN_SHARED_PREFIX = 9
"""Tokens; a shorter prefix is not worth a second set of keys. (Metal's attention kernels for up to
8 queries leave out what a gradient needs, which some versions of MLX do not look at.)"""

SLOTS_PER_TOKEN = 1.5
"""Slots that a micro-batch may have for each of the tokens that it may have."""


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
        """How many tokens come before the last target: nothing after them is computed."""
        return int(np.flatnonzero(self.loss_mask)[-1])


class Sizes(NamedTuple):
    """What a micro-batch's time and memory depend on."""

    tokens: int
    """N, in whole tiles."""
    slots: int
    scores: int
    """Attention scores a head: Σ R · T · (P + T) over the groups, and the prefix's own P²."""
    targets: int = 0
    """M, in whole tiles."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass works on. All index arrays are int32."""

    tokens: np.ndarray
    """(N,) input ids: the prefix's, where it is inside, then each row's own, then padding."""
    rows: np.ndarray
    """(N,) the number of each token's row, `Example.row`; the first row's for the prefix."""
    positions: np.ndarray
    """(N,) where each token is in its row."""
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
    """(N,) the slot of each flat token; an empty one for padding."""
    sources: np.ndarray
    """(U,) the flat positions whose hidden states predict a target, each once; then padding."""
    source_of_token: np.ndarray
    """(N,) the index in ``sources`` of each flat position; U where it is none."""
    repeats: int
    """How many of the first targets ``sources[0]`` predicts; the other sources predict one each."""
    targets: np.ndarray
    """(M,) the ids to be predicted; M = U - 1 + repeats."""
    weights: np.ndarray
    """(M,) fp32: how many rows have this target here; 0 where it is padding."""


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

    @property
    def empty(self) -> bool:
        """Whether no row is left in it, so that there is nothing to update by."""
        return not self.micro_batches


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
    backend: Backend = CPU,
) -> Step:
    """Put one optimizer step's rows into micro-batches of at most ``micro_batch_tokens``.

    The sum of the micro-batches' losses and gradients does not depend on how. A row longer than
    ``micro_batch_tokens`` has a micro-batch of its own.

    Args:
        rows: each with at least one target; may be empty.
        micro_batch_tokens: flat tokens that one pass may hold, the prefix included. Its slots and
            attention scores are held to what so many tokens may have.
        share_prefix: compute the longest common prefix once.
        backend: the machine's tiles.
    """
    prefix = shared_prefix(rows) if share_prefix else 0
    longest_first = sorted(rows, key=lambda row: -row.inputs)
    lengths = [row.inputs - prefix for row in longest_first]
    parts = list(partition(lengths, prefix, micro_batch_tokens, backend))
    micro_batches, first = [], 0
    for groups in parts:
        count = sum(rows_of_group for rows_of_group, _ in groups)
        part = longest_first[first : first + count]
        first += count
        last = first == len(rows)
        micro_batches.append(lay_out(part, groups, prefix, rows if last else None, backend))
    return Step(
        micro_batches=tuple(micro_batches),
        prefix=rows[0].tokens[:prefix].astype(np.int32)
        if len(parts) > 1
        else np.zeros(0, np.int32),
        rows=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        target_tokens=sum(int(row.loss_mask.sum()) for row in rows),
    )


def shared_prefix(rows: Sequence[Example]) -> int:
    """P, the tokens at the front of all rows that are worth computing once."""
    if len(rows) < 2:
        return 0
    # Each row keeps a token of its own, so that each micro-batch has a target.
    shortest = min(row.inputs for row in rows) - 1
    prefix = min(longest_common_prefix([row.tokens for row in rows]), shortest)
    return prefix if prefix >= MIN_SHARED_PREFIX else 0


Groups = tuple[tuple[int, int], ...]
"""``(R, T)`` of each attention group of a micro-batch, longest rows first."""


def partition(
    lengths: Sequence[int], prefix: int, micro_batch_tokens: int, backend: Backend = CPU
) -> Iterator[Groups]:
    """The attention groups of each micro-batch, for rows of ``lengths`` after the prefix.

    Args:
        lengths: longest first; the next micro-batch begins with the first row that does not fit.
    """
    most_slots = SLOTS_PER_TOKEN * micro_batch_tokens
    most_scores = (backend.keys_per_token or 0) * micro_batch_tokens

    def fits(part: Sequence[int], groups: Groups) -> bool:
        sizes = _sizes(prefix + sum(part), groups, prefix, 0)
        return (
            sizes.tokens <= micro_batch_tokens
            and sizes.slots <= most_slots
            and (not most_scores or sizes.scores <= most_scores)
        )

    first = 0
    while first < len(lengths):
        # Most rows that fit, by bisection: each size grows with every row.
        ends = np.cumsum(lengths[first:])
        low, high = 1, max(1, int(np.searchsorted(ends, micro_batch_tokens - prefix, "right")))
        while low < high:
            middle = (low + high + 1) // 2
            part = lengths[first : first + middle]
            if fits(part, group(part, prefix, backend)):
                low = middle
            else:
                high = middle - 1
        yield group(lengths[first : first + low], prefix, backend)
        first += low


def sizes_of(
    lengths: Sequence[int], prefix: int, micro_batch_tokens: int, backend: Backend = CPU
) -> list[Sizes]:
    """Sizes of the micro-batches of rows of so many tokens, each of which may be a target."""
    own = sorted((length - prefix for length in lengths), reverse=True)
    found, first = [], 0
    for groups in partition(own, prefix, micro_batch_tokens, backend):
        count = sum(rows for rows, _ in groups)
        tokens = backend.rounded_up(prefix + sum(own[first : first + count]))
        found.append(_sizes(tokens, groups, prefix, tokens))
        first += count
    return found


def _sizes(tokens: int, groups: Groups, prefix: int, targets: int) -> Sizes:
    """Sizes of a micro-batch of so many flat tokens, those of its prefix among them."""
    return Sizes(
        tokens,
        prefix + sum(rows * longest for rows, longest in groups),
        prefix**2 + sum(rows * longest * (prefix + longest) for rows, longest in groups),
        targets,
    )


def group(lengths: Sequence[int], prefix: int, backend: Backend = CPU) -> Groups:
    """Put rows, longest first, into groups whose padded attention costs least.

    A group of R rows, the longest of T tokens, computes ``R · T · (P + T)`` scores a head;
    ``backend.group_overhead`` is what one more group costs in the same unit.

    Returns:
        ``(R, T)`` of each group.
    """
    n, tile = len(lengths), backend.attention_tile
    t = -(-np.asarray(lengths, np.int64) // tile) * tile
    area = t * (prefix + t)
    best = np.zeros(n + 1, np.int64)  # best[i]: the least cost of rows i …
    end = np.zeros(n, np.int64)
    for i in range(n - 1, -1, -1):
        costs = np.arange(1, n - i + 1) * area[i] + backend.group_overhead + best[i + 1 :]
        end[i] = i + 1 + costs.argmin()
        best[i] = costs.min()
    groups, i = [], 0
    while i < n:
        groups.append((int(end[i]) - i, int(t[i])))
        i = int(end[i])
    return tuple(groups)


def lay_out(
    rows: Sequence[Example],
    groups: Groups,
    prefix: int,
    holds_prefix: Sequence[Example] | None,
    backend: Backend = CPU,
) -> MicroBatch:
    """Lay rows, longest first, out as a micro-batch of these attention groups.

    Args:
        prefix: P, the tokens that all rows share at their front.
        holds_prefix: None where the prefix is computed elsewhere; else the step's rows, whose
            targets inside the prefix and right after it are counted here.
    """
    inside = prefix if holds_prefix is not None else 0
    lengths = np.array([row.inputs - prefix for row in rows])
    starts = inside + np.cumsum([0, *lengths])
    size = backend.rounded_up(int(starts[-1]))
    if size > starts[-1] and sum(count * longest for count, longest in groups) == lengths.sum():
        # Tokens that pad need an empty slot: zero goes in, nothing real comes out of it.
        count, longest = groups[-1]
        groups = (*groups[:-1], (count + 1, longest))
        lengths, starts = np.append(lengths, 0), np.append(starts, starts[-1])

    token_of_slot = [np.arange(inside, dtype=np.int32)]
    first = 0
    for count, longest in groups:
        at = np.arange(longest)
        own = lengths[first : first + count, None]
        slots = np.where(at < own, starts[first : first + count, None] + at, size)
        token_of_slot.append(slots.ravel().astype(np.int32))
        first += count
    slots_all = np.concatenate(token_of_slot)
    used = np.flatnonzero(slots_all < size)
    slot_of_token = np.full(size, np.argmax(slots_all), np.int32)
    slot_of_token[slots_all[used]] = used

    def flat(front: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate([front[:inside], *parts])
        return np.pad(joined, (0, size - len(joined))).astype(np.int32)

    sources, repeats, targets, weights = _targets(rows, starts, prefix, holds_prefix)
    padded = np.pad(sources, (0, backend.rounded_up(len(sources)) - len(sources)))
    source_of_token = np.full(size, len(padded), np.int32)
    source_of_token[sources] = np.arange(len(sources))
    # Targets that pad are the first source's too, of weight 0.
    more = backend.rounded_up(repeats - 1 + len(padded)) - (repeats - 1 + len(padded))
    behind = len(padded) - len(sources)
    targets, weights = (
        np.concatenate([x[:repeats], np.zeros(more, x.dtype), np.pad(x[repeats:], (0, behind))])
        for x in (targets, weights)
    )
    return MicroBatch(
        tokens=flat(rows[0].tokens, [row.tokens[prefix : row.inputs] for row in rows]),
        rows=flat(
            np.full(inside, rows[0].row),
            [np.full(row.inputs - prefix, row.row) for row in rows],
        ),
        positions=flat(np.arange(inside), [np.arange(prefix, row.inputs) for row in rows]),
        prefix=inside,
        past=prefix - inside,
        lengths=tuple(lengths.tolist()),
        groups=groups,
        token_of_slot=slots_all,
        slot_of_token=slot_of_token,
        sources=padded,
        source_of_token=source_of_token,
        repeats=repeats + more,
        targets=targets,
        weights=weights,
    )


def _targets(
    rows: Sequence[Example],
    starts: np.ndarray,
    prefix: int,
    holds_prefix: Sequence[Example] | None,
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Sources, how many targets the first one has, targets and weights.

    Rows that share a prefix agree on all targets inside it, and may differ in the one right after
    it: equal ones count as one, and the different ones have a common source, which goes first.
    """
    sources, targets = [], []
    for row, start in zip(rows, starts, strict=False):
        at = np.flatnonzero(row.loss_mask)
        at = at[at > prefix]
        sources.append(start + at - 1 - prefix)
        targets.append(row.tokens[at])
    weights: list[np.ndarray] = [np.ones(sum(map(len, sources)))]
    repeats = 1
    if prefix and holds_prefix is not None:
        masks = np.stack([row.loss_mask[: prefix + 1] for row in holds_prefix])
        after = [row.tokens[prefix] for row in holds_prefix if row.loss_mask[prefix]]
        if after:
            ids, counts = np.unique(np.array(after), return_counts=True)
            repeats = len(ids)
            sources.insert(0, np.array([prefix - 1]))
            targets.insert(0, ids)
            weights.insert(0, counts)
        within = np.flatnonzero(masks[:, :prefix].any(axis=0))
        sources.append(within - 1)
        targets.append(holds_prefix[0].tokens[within])
        weights.append(masks[:, within].sum(axis=0))
    return (
        np.concatenate(sources).astype(np.int32),
        repeats,
        np.concatenate(targets).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
    )
