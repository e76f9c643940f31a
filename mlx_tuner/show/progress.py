"""Progress on standard error: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from mlx_tuner.runs.metrics import EvalRecord, Facts, Record, Sample, TrainRecord
from mlx_tuner.show.terminal import console
from mlx_tuner.words import duration, plural, rate, scientific

if TYPE_CHECKING:
    from mlx_tuner.engine.trainer import StepResult

_RECENT_STEPS = 20
"""Over which the displayed speeds are taken."""
_SPARKS = 48
"""Characters of the loss's small curve at most, each the mean of some steps."""
_PLAIN_INTERVAL = 15.0
"""Seconds between the lines of a long task without a terminal."""
_LONGEST_ANSWER = 400
"""Characters of a sample that are shown."""


class Display:
    """Shows how far a command is. Use it in a `with` block.

    Nothing that happens to standard error stops the command: not a reader that leaves, nor an
    encoding without the characters.

    Args:
        stream: where to, instead of standard error.
        quiet: show nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._console = console(io.StringIO() if quiet else stream or sys.stderr)
        self._training: _Training | None = None
        spinner = "dots" if self._console.encoding.startswith("utf") else "line"
        self._bars = Progress(
            SpinnerColumn(spinner, style="cyan"),
            TextColumn("{task.description}"),
            BarColumn(40, style="bright_black", complete_style="cyan"),
            _Count(),
            TimeElapsedColumn(),
            console=self._console,
        )
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

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def start(self, facts: Facts, *, first_step: int = 0, restarts: int = 0) -> None:
        """Say what is about to be trained, and show the steps from now on.

        Args:
            first_step: steps that an earlier process has finished.
            restarts: how often the run has gone on after one that died.
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
        self._training = _Training(facts, first_step, restarts)

    def step(self, result: StepResult) -> None:
        """One more optimizer step is finished."""
        if self._training:
            self._training.step(result)

    def record(self, record: Record, *, best: bool = False) -> None:
        """Leave a line for a record; `best` marks an evaluation better than those before."""
        total = ""
        if self._training:
            self._training.record(record, best)
            total = f"/{self._training.facts.total_steps:,}"
        line = Text.assemble(
            (f"step {record.step:,}{total}", "bold"), f"  epoch {record.epoch:.2f}"
        )
        if isinstance(record, TrainRecord) and not record.rows:
            line.append("  no rows: all of them were left out")
        elif isinstance(record, TrainRecord):
            line.append(f"  loss {record.loss:.4f}", "cyan")
            line.append(f"  grad norm {record.grad_norm:.3f}")
            line.append(f"  LR {scientific(record.learning_rate)}")
            line.append(f"  {rate(record.samples_per_second)} samples/s")
            line.append(f"  {rate(record.tokens_per_second)} tokens/s")
            left = self._training.seconds_left if self._training else None
            if not self._live and left is not None:
                line.append(f"  {duration(left)} left")
        else:
            line.append(f"  val loss {record.val_loss:.4f}", "yellow")
            if record.step == 0:
                line.append("  before training", "dim")
            elif best:
                line.append("  ★ best so far", "bold green")
        self._print(line)

    def sample(self, sample: Sample) -> None:
        """Leave an answer to one of the recipe's prompts, the end of a long one left out."""
        answer = " ".join(sample.answer[:_LONGEST_ANSWER].split())
        answer += "" if sample.stopped and len(sample.answer) <= _LONGEST_ANSWER else " …"
        self._print(Text.assemble((f"  {sample.prompt} ", "bold"), (f"→ {answer}", "dim")))

    def note(self, text: str) -> None:
        """Leave a line about something else that happened."""
        self._print(Text(text, "dim"))

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show that something is under way: a bar up to `total`, or one that only moves.

        The value is to be called with what has been done since the last call.
        """
        bar = self._bars.add_task(description, total=total)
        started = said = time.monotonic()
        done = 0
        if not self._live and not self._training:
            self._print(Text(f"{description} …"))

        def advance(amount: int) -> None:
            nonlocal said, done
            done += amount
            self._bars.advance(bar, amount)
            if not self._live and (now := time.monotonic()) - said >= _PLAIN_INTERVAL:
                said = now
                of = f" of {total:,}" if total else ""
                self._print(Text(f"{description}: {done:,}{of}, {duration(now - started)}"))

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        """What is under way just now."""
        parts: list[RenderableType] = [self._training.panel()] if self._training else []
        return Group(*parts, *([self._bars] if self._bars.tasks else []))


class _Count(MofNCompleteColumn):
    """Such as "50/200"; nothing where nobody knows how much it is."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{int(task.completed):,}" if task.completed else "")
        return Text(f"{int(task.completed):,}/{int(task.total):,}")


class _Training:
    """What the live panel shows of a run."""

    def __init__(self, facts: Facts, first_step: int, restarts: int) -> None:
        self.facts = facts
        self._step = first_step
        self._restarts = restarts
        self._losses: list[float] = []
        self._recent: deque[tuple[float, StepResult]] = deque(maxlen=_RECENT_STEPS)
        """When each step ended, and its result."""
        self._logged: TrainRecord | None = None
        self._evaluated: EvalRecord | None = None
        self._best: EvalRecord | None = None
        self._bar = Progress(
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(None, style="bright_black", complete_style="cyan"),
            _Count(),
            TextColumn("{task.percentage:.0f} %"),
            _Ending(self),
            expand=True,
        )
        self._bar.add_task("step", total=facts.total_steps, completed=first_step)

    def step(self, result: StepResult) -> None:
        self._step += 1
        self._losses.append(result.loss)
        self._recent.append((time.monotonic(), result))
        self._bar.update(self._bar.task_ids[0], completed=self._step)

    def record(self, record: Record, best: bool) -> None:
        if isinstance(record, TrainRecord):
            self._logged = record
        else:
            self._evaluated = record
            self._best = record if best else self._best

    @property
    def seconds_left(self) -> float | None:
        """From the pace of the latest steps, evaluations and saving between them included."""
        steps = self._recent
        if not steps:
            return None
        pace = steps[0][1].seconds
        if len(steps) > 1:
            pace = (steps[-1][0] - steps[0][0]) / (len(steps) - 1)
        return pace * (self.facts.total_steps - self._step)

    def panel(self) -> RenderableType:
        lines = Table.grid(padding=(0, 2, 0, 0))
        lines.add_column(style="bold", no_wrap=True)
        lines.add_column(overflow="fold")
        if self._recent:
            steps = [result for _, result in self._recent]
            last, seconds = steps[-1], sum(step.seconds for step in steps) or 1.0
            curve = Text.assemble(f"{last.loss:.4f}  ", (sparkline(self._losses), "cyan"))
            lines.add_row("loss", curve)
            if self._evaluated:
                lines.add_row("validation", self._validation(self._evaluated))
            norm, lr = f"{last.grad_norm:.3f}", scientific(last.learning_rate)
            lines.add_row("grad norm", f"{norm}  LR {lr}")
            samples = rate(sum(step.rows for step in steps) / seconds)
            tokens = rate(sum(step.tokens for step in steps) / seconds)
            lines.add_row("speed", f"{samples} samples/s  {tokens} tokens/s")
        if self._logged:
            now, peak = self._logged.memory_gb, self._logged.peak_memory_gb
            lines.add_row("memory", f"{now:.2f} GB active and cached  {peak:.2f} GB at most")
        if self._restarts:
            lines.add_row("restarts", Text(str(self._restarts), "yellow"))
        return Panel(Group(self._bar, lines), title=Text(self.facts.recipe), border_style="dim")

    def _validation(self, now: EvalRecord) -> Text:
        text = Text(f"{now.val_loss:.4f}", "yellow")
        if best := self._best:
            text.append(f"  ★ best {best.val_loss:.4f} at step {best.step:,}", "bold green")
        return text


class _Ending(ProgressColumn):
    """The time that a run will still take."""

    max_refresh = None

    def __init__(self, training: _Training) -> None:
        self._training = training
        super().__init__()

    def render(self, task: Task) -> Text:
        left = self._training.seconds_left
        return Text("" if left is None else f"{duration(left)} left")


def sparkline(values: Sequence[float]) -> str:
    """A curve of small blocks, the lowest value the lowest; of many, each the mean of some."""
    finite = [value for value in values if math.isfinite(value)]
    size = math.ceil(len(finite) / _SPARKS) or 1
    means = [sum(part) / len(part) for part in _parts(finite, size)]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span) if span else 0] for mean in means)


def _parts(values: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    return (values[first : first + size] for first in range(0, len(values), size))
