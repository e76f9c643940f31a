"""Progress on standard error: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_tuner.runs.metrics import Facts, Record, TrainRecord
from mlx_tuner.show.terminal import console
from mlx_tuner.words import duration, plural, rate, scientific

if TYPE_CHECKING:
    from mlx_tuner.engine.trainer import StepResult

_RECENT_STEPS = 20
"""Over which the displayed speeds are taken."""
_PLAIN_INTERVAL = 15.0
"""Seconds between the lines of a long task without a terminal."""
_WIDEST_BAR = 40


@dataclass
class _Task:
    """Something that takes its time; `total` is None where nobody knows how much it is."""

    description: str
    total: int | None
    started: float
    done: int = 0
    spinner: Spinner | None = None


class Display:
    """Shows how far a command is. Use it in a `with` block.

    Nothing that happens to standard error stops the command: not a reader that leaves, nor an
    encoding without the characters.

    Args:
        stream: where to, instead of standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._tasks: list[_Task] = []
        self._training: _Task | None = None
        self._steps: deque[tuple[float, StepResult]] = deque(maxlen=_RECENT_STEPS)
        self._console = console(stream or sys.stderr)
        self._live: Live | None = None
        # A notebook, and whoever sets FORCE_COLOR, wants colours but has no cursor.
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=5,
                transient=True,
                redirect_stdout=False,
            )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def start(self, facts: Facts, *, first_step: int = 0) -> None:
        """Say what is about to be trained, and show the steps from now on.

        Args:
            first_step: steps that an earlier process has finished.
        """
        share = 100 * facts.trainable_parameters / facts.total_parameters
        self._print(
            Text.assemble(
                (facts.recipe, "bold"),
                f": {plural(facts.total_steps, 'step')} on {plural(facts.rows, 'row')}, "
                f"{facts.trainable_parameters:,} of {facts.total_parameters:,} parameters "
                f"trainable ({share:.4f} %)",
            )
        )
        self._training = _Task(facts.recipe, facts.total_steps, time.monotonic(), done=first_step)

    def step(self, result: StepResult) -> None:
        """One more optimizer step is finished."""
        self._steps.append((time.monotonic(), result))
        if self._training:
            self._training.done += 1

    def record(self, record: Record, *, best: bool = False) -> None:
        """Leave a line for a record; `best` marks an evaluation better than those before."""
        total = f"/{self._training.total:,}" if self._training else ""
        line = Text.assemble(
            (f"step {record.step:,}{total}", "bold"), f"  epoch {record.epoch:.2f}"
        )
        if isinstance(record, TrainRecord):
            line.append(f"  loss {record.loss:.4f}", "cyan")
            line.append(f"  grad norm {record.grad_norm:.3f}")
            line.append(f"  LR {scientific(record.learning_rate)}")
            line.append(f"  {rate(record.samples_per_second)} samples/s")
            line.append(f"  {rate(record.tokens_per_second)} tokens/s")
            if not self._live and (left := self._seconds_left()) is not None:
                line.append(f"  {duration(left)} left")
        else:
            line.append(f"  val loss {record.val_loss:.4f}", "yellow")
            if record.step == 0:
                line.append("  base model", "dim")
            elif best:
                line.append("  ★ best so far", "bold green")
        self._print(line)

    def note(self, text: str) -> None:
        """Leave a line about something else that happened."""
        self._print(Text(text, "dim"))

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show that something is under way: a bar up to `total`, or a spinner.

        The value is to be called with what has been done since the last call.
        """
        task = _Task(description, total, time.monotonic())
        said = task.started
        if not self._live and not self._training:
            self._print(Text(f"{description} …"))

        def advance(amount: int) -> None:
            nonlocal said
            task.done += amount
            if not self._live and (now := time.monotonic()) - said >= _PLAIN_INTERVAL:
                said = now
                of = f" of {total:,}" if total else ""
                self._print(
                    Text(f"{description}: {task.done:,}{of}, {duration(now - task.started)}")
                )

        self._tasks.append(task)
        try:
            yield advance
        finally:
            self._tasks.remove(task)

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)

    def _seconds_left(self) -> float | None:
        """From the pace of the latest steps, evaluations and saving between them included."""
        training, steps = self._training, self._steps
        if not training or not training.total or not steps:
            return None
        if len(steps) > 1:
            pace = (steps[-1][0] - steps[0][0]) / (len(steps) - 1)
        else:
            pace = steps[0][1].seconds
        return pace * (training.total - training.done)

    def _render(self) -> RenderableType:
        """What is under way just now."""
        parts: list[RenderableType] = []
        if self._training:
            left = self._seconds_left()
            ending = "" if left is None else f"{duration(left)} left"
            parts.append(self._bar(self._training, ending))
            if self._steps:
                parts.append(self._speeds())
        for task in tuple(self._tasks):
            elapsed = time.monotonic() - task.started
            ending = duration(elapsed) if elapsed >= 1 else ""
            parts.append(self._bar(task, ending) if task.total else self._spinning(task, ending))
        return Group(*parts)

    def _bar(self, task: _Task, ending: str) -> RenderableType:
        total = task.total or 1
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(max_width=_WIDEST_BAR, ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total, task.done, style="bright_black", complete_style="cyan")
        numbers = f"{task.done:,}/{total:,}  {100 * task.done / total:.0f} %  {ending}"
        grid.add_row(Text(task.description, "bold"), bar, numbers)
        return grid

    def _spinning(self, task: _Task, ending: str) -> RenderableType:
        if task.spinner is None:
            name = "dots" if self._console.encoding.startswith("utf") else "line"
            task.spinner = Spinner(name, style="cyan")
        done = f"{task.done:,}" if task.done else ""
        task.spinner.update(text=Text("  ".join(filter(None, [task.description, done, ending]))))
        return task.spinner

    def _speeds(self) -> RenderableType:
        steps = [result for _, result in self._steps]
        last, seconds = steps[-1], sum(step.seconds for step in steps) or 1.0
        numbers = (
            f"loss {last.loss:.4f}",
            f"grad norm {last.grad_norm:.3f}",
            f"LR {scientific(last.learning_rate)}",
            f"{rate(sum(step.rows for step in steps) / seconds)} samples/s",
            f"{rate(sum(step.tokens for step in steps) / seconds)} tokens/s",
        )
        return Text("  ".join(numbers), "dim")
