"""Compares the logits of a model that was converted or fused with its source's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import numpy as np
from mlx_lm import utils as mlx_lm_utils

from mlx_tuner.conversion.logits import in_float32, load_in_float32, logits_of, mean_loss
from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.models.adapter import Adapter, apply
from mlx_tuner.models.model import load_tokenizer

PROMPT = '''def fibonacci(n):
    """Return the n-th Fibonacci number."""
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
'''
"""What both models read; short, since they read it in float32."""

PROMPTS = (
    "Write a Python function that reverses a string.",
    "What is the difference between a list and a tuple?",
    "Explain in two sentences what a hash table is.",
    "Fix this code: for i in range(10) print(i)",
)
"""What the models read where the run's own rows cannot be had."""

ROWS = 4
_ROW_TOKENS = 256
_ROW_POSITIONS = 64
"""Compared positions of a row: of 4 rows, 160 MB of float32 logits a model at 152k tokens."""

_WORST_ERROR = 0.5
_LEAST_KEPT = 0.5


@dataclass(frozen=True)
class LogitError:
    """The result's logits against the source's on `PROMPT`, both computed in float32."""

    max_error: float
    mean_error: float
    relative_error: float
    """Root mean square of the error, in standard deviations of the source's logits."""
    source_perplexity: float
    perplexity: float

    def lines(self) -> list[tuple[str, str]]:
        """What it found, as names and values to show."""
        change = 100 * (self.perplexity / self.source_perplexity - 1)
        return [
            ("largest error of a logit", f"{self.max_error:.3g}"),
            ("mean error of a logit", f"{self.mean_error:.3g}"),
            ("error, in standard deviations", f"{self.relative_error:.3g}"),
            ("perplexity of the source", f"{self.source_perplexity:.4g}"),
            ("perplexity", f"{self.perplexity:.4g} ({change:+.2f} %)"),
        ]


def compare_logits(source: Path, result: Path, tokens: list[int]) -> LogitError:
    """Compare two checked folders of a model; each passes through memory a layer at a time."""
    batch, every = np.array([tokens]), np.arange(len(tokens))
    expected, found = (
        logits_of(lambda folder=folder: load_in_float32(folder), batch, every)  # type: ignore[misc]
        for folder in (source, result)
    )
    error = np.abs(found - expected)
    spread = float(np.sqrt(expected.var(axis=-1).mean()))
    rms = float(np.sqrt(np.mean(np.square(error))))
    return LogitError(
        max_error=float(error.max()),
        mean_error=float(error.mean()),
        relative_error=rms / spread if rms else 0.0,
        source_perplexity=math.exp(mean_loss(expected[:-1], batch[0, 1:])),
        perplexity=math.exp(mean_loss(found[:-1], batch[0, 1:])),
    )


@dataclass(frozen=True)
class Fidelity:
    """The fused model against the adapter on its base, as changes that each makes to logits.

    With t the logits of the adapter on its base, b of the base, f of the fused model and g of the
    base in the fused model's form (which is b, unless that is quantised), all in float32, the
    wanted change is t - b, and the one that is there is f - g.
    """

    rows: str
    """What was read, in words."""
    kept: float
    """How much of the wanted change is there: ⟨f - g, t - b⟩ / ‖t - b‖²."""
    error: float
    """How much else is there: ‖(f - g) - (t - b)‖ / ‖t - b‖."""
    base_loss: float
    tuned_loss: float
    fused_loss: float
    """Mean negative log-likelihood of the rows' target tokens."""

    def lines(self) -> list[tuple[str, str]]:
        """What it found, as names and values to show."""
        return [
            ("compared on", self.rows),
            ("kept of the fine-tune", f"{100 * self.kept:.1f} %"),
            ("error", f"{100 * self.error:.2g} % of the fine-tune's change"),
            ("loss of the base", f"{self.base_loss:.4f}"),
            ("loss with the adapter", f"{self.tuned_loss:.4f}"),
            ("loss of the fused model", f"{self.fused_loss:.4f}"),
        ]


@dataclass(frozen=True)
class Rows:
    """Token rows padded on the right, and the positions whose logits count."""

    name: str
    tokens: np.ndarray
    """(B, T)"""
    positions: np.ndarray
    """Flat into (B, T); each predicts the token after it."""

    @property
    def targets(self) -> np.ndarray:
        return self.tokens.reshape(-1)[self.positions + 1]

    @classmethod
    def of(cls, name: str, rows: Sequence[tuple[Sequence[int] | np.ndarray, np.ndarray]]) -> Rows:
        """Rows of tokens, each with a mask of its targets, cut to what is compared."""
        width = min(max(len(tokens) for tokens, _ in rows), _ROW_TOKENS)
        table = np.zeros((len(rows), width), np.int32)
        positions = []
        for i, (tokens, mask) in enumerate(rows):
            table[i, : len(tokens)] = tokens[:width]
            targets = np.flatnonzero(mask[1:width])[:_ROW_POSITIONS]
            positions.append(i * width + targets)
        return cls(name, table, np.concatenate(positions))


def fixed_rows(base: Path) -> Rows:
    """A few prompts, for where there are no rows of a run."""
    tokenizer = load_tokenizer(base)
    rows = []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        if tokenizer.has_chat_template:
            message = {"role": "user", "content": prompt}
            tokens = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        rows.append((tokens, np.ones(len(tokens), bool)))
    return Rows.of("fixed prompts", rows)


def compare(
    rows: Rows,
    base: Path,
    adapter: Adapter,
    fused: Callable[[], nn.Module],
    quantise_alike: Callable[[nn.Module], nn.Module] | None,
) -> Fidelity:
    """Compare a fused model with the adapter on its base.

    Each model passes through memory a layer at a time.

    Args:
        rows: what the models read.
        base: the base's folder.
        fused: loads the fused model in float32, lazily.
        quantise_alike: gives a dense model the fused one's form, where that is quantised.
    """

    def tuned() -> nn.Module:
        model = load_in_float32(base)
        apply(model, adapter)
        return model.eval()

    def base_alike(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        model, _ = mlx_lm_utils.load_model(base, lazy=True)
        return in_float32(change(mlx_lm_utils.dequantize_model(model)))

    b = logits_of(lambda: load_in_float32(base), rows.tokens, rows.positions)
    t = logits_of(tuned, rows.tokens, rows.positions)
    f = logits_of(fused, rows.tokens, rows.positions)
    losses = [mean_loss(logits, rows.targets) for logits in (b, t, f)]
    f -= (
        b
        if quantise_alike is None
        else logits_of(lambda: base_alike(quantise_alike), rows.tokens, rows.positions)
    )
    t -= b
    wanted = _dot(t, t)
    if not wanted:  # an adapter as it was before training
        return Fidelity(rows.name, 1.0, float("inf") if f.any() else 0.0, *losses)
    kept = _dot(f, t) / wanted
    f -= t
    return Fidelity(rows.name, kept, (_dot(f, f) / wanted) ** 0.5, *losses)


def require_kept(check: Fidelity, output: Path, *, quantised: bool) -> None:
    """Refuse a result without the fine-tune.

    Rounding to a few bits adds noise, in no direction; so of a quantised result the change only
    has to be there. Any other may be off by half of what the adapter changes.

    Raises:
        ModelError: the fine-tune is lost.
    """
    if quantised:
        lost = not check.kept >= _LEAST_KEPT
        what = f"only {100 * check.kept:.0f} % of the fine-tune outlives the rounding"
        todo = "keep more bits"
    else:
        lost = not check.error <= _WORST_ERROR
        what = f"off by {100 * check.error:.0f} % of what the fine-tune changes"
        todo = "it changes too little for the base's dtype; train longer"
    if lost:
        raise ModelError(Fault(str(output), "", f"{what}; nothing was written; {todo}"))


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """⟨x, y⟩ of (positions, vocabulary); one product over all numbers would lose digits."""
    return float(np.sum([np.dot(a, b) for a, b in zip(x, y, strict=True)], dtype=np.float64))
