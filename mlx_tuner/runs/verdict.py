"""What the validation curve says about a run, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_tuner.runs.metrics import EvalRecord, Record, TrainRecord, best_evaluation, change_of

Kind = Literal[
    "no validation",
    "too few",
    "worse than base",
    "like the base",
    "better than base",
    "overfitting",
    "rising",
    "flat",
    "improving",
]

_NOISE = 0.01
"""Relative changes of the validation loss up to this say nothing."""
_FEWEST = 3
"""Evaluations after the start of training that make a curve."""


Tone = Literal["bad", "warn", "good", ""]

_TONES: dict[Kind, Tone] = {
    "worse than base": "bad",
    "overfitting": "warn",
    "rising": "warn",
    "improving": "good",
    "flat": "good",
}


@dataclass(frozen=True)
class Verdict:
    """How training went for rows that it did not see."""

    kind: Kind
    text: str
    """One or two sentences: what the curve shows, and what to do."""

    @property
    def tone(self) -> Tone:
        """By which it is coloured."""
        return _TONES.get(self.kind, "")


def judge(records: Sequence[Record]) -> Verdict:
    """The verdict on a run's records; an evaluation of step 0 is from before training."""
    evaluations = [r for r in records if isinstance(r, EvalRecord) and math.isfinite(r.val_loss)]
    base = next((r for r in evaluations if r.step == 0), None)
    curve = sorted((r for r in evaluations if r.step > 0), key=lambda record: record.step)
    best = best_evaluation(curve)
    if best is None:
        return Verdict(
            "no validation",
            "Overfitting cannot be judged: there is no validation loss. Give data.valid a file, "
            "or a fraction of the training rows such as 0.1.",
        )
    if base and best.val_loss >= base.val_loss * (1 + _NOISE):
        return against_base(base.val_loss, best.val_loss, named="before training")
    if len(curve) < _FEWEST:
        change = ""
        if base:
            change = f" ({_change(base.val_loss, best.val_loss)} since the start)"
        times = "once" if len(curve) == 1 else "twice"
        return Verdict(
            "too few",
            f"Too early to judge overfitting: evaluated {times}, best {best.val_loss:.4g}{change}. "
            "Lower train.eval_every to see a curve.",
        )
    last, after = curve[-1], [r for r in curve if r.step > best.step]
    if last.val_loss > best.val_loss * (1 + _NOISE):
        return _risen(records, best, last, len(after))
    return _not_risen(curve, best, last)


def against_base(
    base: float, tuned: float, *, sure: bool = True, named: str = "the base model"
) -> Verdict:
    """What two losses on the same held-out rows say.

    Args:
        sure: whether they differ by more than chance, where that is known.
        named: what the first one is of.
    """
    if not (math.isfinite(base) and math.isfinite(tuned)):
        return Verdict("too few", "No verdict: a loss is not finite.")
    if not sure or abs(tuned - base) <= _NOISE * base:
        text = f"No better than {named} on these rows, and no worse"
        if not sure:
            text = f"Too few rows to tell it from {named}: the difference may be chance"
        return Verdict("like the base", f"{text}: loss {base:.4g} → {tuned:.4g}.")
    change = f"loss {base:.4g} → {tuned:.4g} ({_change(base, tuned)}) on rows held out"
    if tuned < base:
        return Verdict("better than base", f"Better than {named}: {change}.")
    return Verdict(
        "worse than base",
        f"Worse than {named}: {change}. Lower train.learning_rate, or check that training "
        "and held-out rows are alike.",
    )


def _risen(records: Sequence[Record], best: EvalRecord, last: EvalRecord, after: int) -> Verdict:
    """The curve ends above its lowest point."""
    rise = f"from {best.val_loss:.4g} to {last.val_loss:.4g}"
    rise += f" ({_change(best.val_loss, last.val_loss)})"
    if after == 1:
        return Verdict(
            "rising",
            f"Perhaps beginning to overfit: validation loss rose {rise} at the last evaluation. "
            f"The adapter of step {best.step}, the best, was kept.",
        )
    train = [r for r in records if isinstance(r, TrainRecord) and r.step >= best.step]
    fell = change_of(train, "losses").percent < 0
    while_training = " while training loss went on falling" if fell else ""
    return Verdict(
        "overfitting",
        f"Overfitting since step {best.step}: validation loss rose {rise}{while_training}. The "
        f"adapter of step {best.step}, the best, was kept; fewer epochs, more rows or a lower "
        "rank would help.",
    )


def _not_risen(curve: Sequence[EvalRecord], best: EvalRecord, last: EvalRecord) -> Verdict:
    """The curve ends at its lowest point, or within the noise of it."""
    level = len(curve)
    while level and curve[level - 1].val_loss <= best.val_loss * (1 + _NOISE):
        level -= 1
    if len(curve) - level >= max(_FEWEST, len(curve) / 3):
        return Verdict(
            "flat",
            f"No overfitting: validation loss has been flat since step {curve[level].step}, at "
            f"{best.val_loss:.4g}. More epochs of the same rows would hardly change it.",
        )
    before = curve[level - 1]
    return Verdict(
        "improving",
        f"No overfitting: validation loss was still falling at the end, to {last.val_loss:.4g} "
        f"({_change(before.val_loss, last.val_loss)} since step {before.step}). "
        "More epochs may improve it further.",
    )


def _change(before: float, after: float) -> str:
    """The change in percent, such as "-12.3 %"; of 0 the amount that was added."""
    if before == 0:
        return f"+{after:.4g}"
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "−")
