"""When a step comes and how fast it learns: pure functions of plain numbers.

A step is one optimizer update over `batch_size` rows. The last step of an epoch takes the rows
that are left, so that no row is dropped. Steps are counted from 0.
"""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """The steps that use each of `rows` once."""
    return -(-rows // batch_size)


def total_steps(rows: int, batch_size: int, epochs: int | None, max_steps: int | None) -> int:
    """The steps of a run, of which exactly one of `epochs` and `max_steps` is given."""
    if max_steps is None and epochs is not None:
        return epochs * steps_per_epoch(rows, batch_size)
    if max_steps is not None and epochs is None:
        return max_steps
    raise ValueError("give exactly one of epochs and max_steps")


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, schedule: Schedule
) -> float:
    """The learning rate that 0-based `step` uses.

    transformers' get_{constant,linear,cosine}_schedule_with_warmup, operation for operation: it
    rises from 0 in `warmup_steps`, so that a step at their end uses `peak`, and then is constant,
    or falls so that it would reach 0 at `total_steps`, which is never used.
    """
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    after = max(1, total_steps - warmup_steps)
    if schedule == "constant":
        factor = 1.0
    elif schedule == "linear":
        factor = max(0, total_steps - step) / after
    else:
        factor = max(0.0, 0.5 * (1 + math.cos(math.pi * ((step - warmup_steps) / after))))
    return peak * factor


def epoch_at(step: int, rows: int, batch_size: int) -> float:
    """The epochs passed when `step` steps are finished: rows consumed / rows."""
    epochs, steps = divmod(step, steps_per_epoch(rows, batch_size))
    return (epochs * rows + steps * batch_size) / rows


def rows_of_step(step: int, rows: int, batch_size: int) -> tuple[int, int, int]:
    """(epoch, first, last) of 0-based `step`: it uses positions first ≤ i < last of the epoch."""
    epoch, step_of_epoch = divmod(step, steps_per_epoch(rows, batch_size))
    first = step_of_epoch * batch_size
    return epoch, first, min(first + batch_size, rows)
