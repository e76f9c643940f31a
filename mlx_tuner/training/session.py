"""One process's part of a run: from its first step to the last that it makes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlx.core as mx

from mlx_tuner.data.dataset import shared_rows
from mlx_tuner.data.stream import prefetch
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.trainer import StepResult, Trainer, train
from mlx_tuner.errors import EverywhereError, Fault, RunStopped
from mlx_tuner.models.answers import answer_all
from mlx_tuner.models.architecture import parameter_count
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.runs.identity import Identity
from mlx_tuner.runs.meter import Meter
from mlx_tuner.runs.metrics import (
    FINISHED,
    STOPPED,
    STOPPED_EARLY,
    EvalRecord,
    Facts,
    Sample,
    Summary,
)
from mlx_tuner.runs.place import QUARANTINE
from mlx_tuner.runs.pulse import Pulse
from mlx_tuner.runs.run import Run, read_summary
from mlx_tuner.show import story
from mlx_tuner.show.progress import Display
from mlx_tuner.show.reporter import Reporter
from mlx_tuner.system import device, files, interrupt
from mlx_tuner.training import agreement, assembly, snapshot
from mlx_tuner.words import plural

NONFINITE_LIMIT = 3
"""Steps in a row without a finite loss and gradient that end a run."""


@dataclass
class Progress:
    """How far a run is: what a checkpoint keeps beside adapter and optimizer."""

    step: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    evaluations_since_best: int = 0
    nonfinite_in_a_row: int = 0
    restarts: int = 0
    """Of the training process, by its supervisor."""
    run_id: str = field(default_factory=lambda: uuid4().hex[:16])
    """What trackers know the run by: drawn at its start, since a later run may replace it."""
    meter: Meter = field(default_factory=Meter)

    def state(self) -> dict[str, Any]:
        """Plain values, for `resumed`."""
        kept = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**kept, "meter": self.meter.state()}

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> Progress:
        """The progress that a checkpoint has kept."""
        kept = {each.name: state[each.name] for each in fields(cls)}
        return cls(**{**kept, "meter": Meter.from_json(state["meter"])})


@dataclass
class Session:
    """Trains, evaluates and saves at the recipe's intervals."""

    recipe: Recipe
    run: Run
    display: Display
    trainer: Trainer
    data: assembly.Data
    learning_rates: list[float]
    identity: Identity
    pulse: Pulse
    tokenizer: Any
    prompts: list[list[int]]
    """The recipe's sample prompts as token ids."""
    progress: Progress = field(default_factory=Progress)

    def run_all(self) -> Summary:
        """Go on until the end, or a signal.

        Raises:
            EverywhereError: steps in a row were not finite, or a rank has another adapter.
            RunError: the disk failed.
            RunStopped: a signal came; the run is saved.
        """
        self._announce()
        every, steps = self.recipe.train, len(self.learning_rates)
        eval_every = assembly.eval_every(self.recipe, len(self.data.train))
        status = FINISHED
        if self.progress.step == 0:
            self._look()
        with interrupt.deferred() as signal:
            for result in self._steps(lambda: signal.received is not None):
                step = self.progress.step
                self._check_finite(result)
                if step % every.log_every == 0 or step == steps:
                    self._log()
                if step % eval_every == 0 or step == steps:
                    self._look()
                if self._is_out_of_patience():
                    status = STOPPED_EARLY
                elif self._is_to_stop(result, signal) and step < steps:
                    status = STOPPED
                due = step % every.save_every == 0 or step == self.progress.best_step
                if due or step == steps or status != FINISHED:
                    self._save()
                if status != FINISHED:
                    break
        if late := self.data.train.left_out.late:
            rows = plural(late, "row")
            self.display.note(f"{rows} left out of their steps: see {QUARANTINE}")
        summary = self._finish(status)
        if status == STOPPED:
            number = agreement.largest(self.trainer.ranks, signal.received or 0)
            raise RunStopped(number, self.progress.step, self.run.path)
        return summary

    def _is_to_stop(self, result: StepResult, signal: interrupt.Interrupt) -> bool:
        """Whether a signal ends the run here; several ranks all stop after the same step."""
        return result.stop if self.trainer.ranks.size > 1 else signal.received is not None

    def is_finished(self) -> bool:
        """Whether no step is left: all are made, or the run has stopped early."""
        return self.progress.step >= len(self.learning_rates) or self._is_out_of_patience()

    def already_finished(self) -> Summary:
        """Say that the resumed run had ended; its summary, written now if it was missing."""
        early = " early, by its evaluations" if self._is_out_of_patience() else ""
        what = f"{self.run.path}: has finished{early}, after step {self.progress.step}"
        self.display.note(f"{what}; nothing is left to train")
        summary = read_summary(self.run.path) if self.trainer.ranks.leads else None
        status = STOPPED_EARLY if early else FINISHED
        if summary and (summary.steps, summary.status) == (self.progress.step, status):
            return self._told(summary)
        self.run.go_on(self.recipe.to_toml())
        self.publish_kept()
        return self._finish(status)

    def publish_kept(self) -> None:
        """Publish the best adapter that the checkpoint knows of, as its process may not have."""
        if self._is_to_publish:
            self._publish()
        elif (best := self.progress.best_step) is not None:
            self.run.publish_kept(best)

    def _announce(self) -> None:
        if self.pulse.restarts is not None:
            self.progress.restarts = self.pulse.restarts
        self.pulse.restarted(self.progress.restarts)
        self.pulse.started(self.trainer.micro_batch_tokens)
        self.display.start(
            self._facts, first_step=self.progress.step, restarts=self.progress.restarts
        )
        for reason in self.run.rejected:
            self.display.note(reason)
        if self.progress.step:
            restarts = plural(self.progress.restarts, "restart")
            so_far = f", after {restarts}" if self.progress.restarts else ""
            self.display.note(f"goes on after step {self.progress.step}{so_far}")
        for note in self.data.train.notes:
            self.display.note(note)
        valid = self.data.valid
        if valid is not None and valid.file is not self.data.train.file:
            for note in valid.notes:
                self.display.note(f"validation: {note}")
        if valid is not None and (shared := shared_rows(self.data.train, valid)):
            rows = plural(shared, "validation row")
            self.display.note(f"{rows} trained on as well, so that validation flatters")
        self._quarantine()

    def _quarantine(self) -> None:
        """Name the rows that are left out, beside those that an earlier process named."""
        if (rows := self.data.train.left_out.first) and self.trainer.ranks.leads:
            path = self.run.path / QUARANTINE
            before = path.read_text("utf-8").splitlines() if path.exists() else []
            lines = dict.fromkeys([*before, *(row.to_json() for row in rows)])
            files.write_text(path, "".join(f"{line}\n" for line in lines))

    def _steps(self, stopping: Callable[[], bool]) -> Iterator[StepResult]:
        """Train step after step and count each one in."""
        rows, first = len(self.data.train), self.progress.step
        order = assembly.row_order(self.recipe, rows, first, len(self.learning_rates))
        self._examples: deque[list[Example]] = deque()

        def batches() -> Iterator[list[Example]]:
            for examples in prefetch(self.data.train, order):
                self._examples.append(examples)
                yield examples

        rates, save_every = self.learning_rates[first:], self.recipe.train.save_every
        eval_every = assembly.eval_every(self.recipe, rows)
        steps = train(
            self.trainer,
            batches(),
            rates,
            first_step=first,
            # What is done between two steps is no part of the next one's time, nor hides it.
            pause_after=lambda step: step % save_every == 0 or step % eval_every == 0,
            stopping=stopping,
        )
        for result in steps:
            self.progress.step += 1
            self.progress.meter.step(result)
            self.display.step(result)
            self.pulse.step()
            yield result
            self._examples.popleft()

    @cached_property
    def _reporter(self) -> Reporter:
        self.pulse.quiet()  # a tracker may take its time to answer
        return Reporter(
            self.run,
            self.display,
            recipe=self.recipe.to_toml(),
            config=self.recipe.plain_tables(),
            trackers=self.recipe.report.to if self.trainer.ranks.leads else (),
            run_id=self.progress.run_id,
        )

    @property
    def _speeds(self) -> dict[str, Any]:
        rows = self.data.train.rows_per_second
        return {"tokenized_rows_per_second": rows, "restarts": self.progress.restarts}

    @cached_property
    def _facts(self) -> Facts:
        valid = self.data.valid
        return Facts(
            recipe=self.recipe.name,
            model=self.recipe.model.path,
            rows=len(self.data.train),
            rank=self.recipe.lora.rank,
            total_steps=len(self.learning_rates),
            trainable_parameters=assembly.trainable_parameters(self.trainer.model),
            total_parameters=parameter_count(self.trainer.model),
            valid_rows=len(valid) if valid is not None else 0,
            data_notes=self.data.train.notes,
            machine=story.machine(device.facts(), self.trainer.ranks.size),
        )

    @property
    def _facts_now(self) -> Facts:
        """The same, with the rows that were left out since."""
        return self._facts.model_copy(update={"data_notes": self.data.train.notes})

    @property
    def _epoch(self) -> float:
        rows, batch_size = len(self.data.train), self.recipe.train.batch_size
        return schedule.epoch_at(self.progress.step, rows, batch_size)

    def _log(self) -> None:
        record = self.progress.meter.record(
            self.progress.step,
            self._epoch,
            memory_gb=(mx.get_active_memory() + mx.get_cache_memory()) / 1e9,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            restarts=self.progress.restarts,
        )
        self._reporter.record(record)

    def _look(self) -> None:
        """Evaluate, and refresh what a person looks at while the run goes on."""
        self._evaluate()
        self._answer()
        if self.progress.step and self.trainer.ranks.leads:
            self._reporter.refresh(self._facts_now, self.progress.meter, **self._speeds)

    def _evaluate(self) -> None:
        """Measure the validation loss."""
        if self.data.valid is None:
            return
        with self.display.task("evaluating"), self.progress.meter.timing("evaluating"):
            loss = self.trainer.evaluate(assembly.in_order(self.data.valid), self.pulse.beat)
        progress = self.progress
        record = EvalRecord(step=progress.step, epoch=self._epoch, val_loss=loss)
        lowest = math.inf if progress.best_val_loss is None else progress.best_val_loss
        best = progress.step > 0 and loss < lowest
        self._reporter.record(record, best=best)
        if best:
            progress.best_step, progress.best_val_loss = progress.step, loss
            progress.evaluations_since_best = 0
        elif progress.step > 0:
            progress.evaluations_since_best += 1

    def _answer(self) -> None:
        """Answer the recipe's prompts with the adapter as it is now; the first time, the base's."""
        asked, meter = self.recipe.sample, self.progress.meter
        if not self.prompts:
            return
        with self.display.task("answering the prompts"), meter.timing("answering"):
            self.pulse.quiet()
            model = self.trainer.tuned()
            answers = answer_all(
                model, self.tokenizer, self.prompts, asked.max_tokens, on_token=self.pulse.beat
            )
        for prompt, answer in zip(asked.prompts, answers, strict=True):
            sample = Sample(
                step=self.progress.step, prompt=prompt, answer=answer.text, stopped=answer.stopped
            )
            self._reporter.sample(sample)

    def _is_out_of_patience(self) -> bool:
        """Whether the evaluations end the run before its last step."""
        patience, total = self.recipe.train.early_stopping_patience, len(self.learning_rates)
        stale = bool(patience) and self.progress.evaluations_since_best >= patience
        return stale and self.progress.step < total

    def _check_finite(self, result: StepResult) -> None:
        """Say which rows made a step that was not finite; enough of them in a row end the run."""
        if result.finite:
            self.progress.nonfinite_in_a_row = 0
            return
        self.progress.nonfinite_in_a_row += 1
        lines = ", ".join(str(self.data.train.line(example.row)) for example in self._examples[0])
        what = f"step {self.progress.step} had no finite loss or gradient; its rows: lines {lines}"
        self.display.note(f"{what}; it changed nothing")
        if self.progress.nonfinite_in_a_row == NONFINITE_LIMIT:
            cause = f"{what}; {NONFINITE_LIMIT} steps in a row: lower train.learning_rate"
            raise EverywhereError(Fault(self.recipe.data.train, "", cause))

    def _save(self) -> None:
        """Keep a checkpoint; its adapter is the run's, unless an earlier one was better."""
        agreement.require_one_state(self.trainer.ranks, self.trainer.state, self.progress.step)
        if self.data.train.left_out.late:
            self._quarantine()
        state = {
            **self.progress.state(),
            "identity": self.identity.to_state(),
            "micro_batch_tokens": self.trainer.micro_batch_tokens,
        }
        with self.progress.meter.timing("saving"):
            self.run.save_checkpoint(
                self.progress.step,
                self._write_checkpoint,
                state,
                best_step=self.progress.best_step,
                size=snapshot.checkpoint_bytes(self.trainer),
            )
            self.pulse.saved(self.progress.step)
            if self._is_to_publish:
                self._publish()

    @property
    def _is_to_publish(self) -> bool:
        """Whether the adapter as it is now is the best so far, or none was evaluated."""
        return self.progress.best_step in (None, self.progress.step)

    def _publish(self) -> None:
        self.run.publish(self._write_adapter, size=snapshot.adapter_bytes(self.trainer))

    def _write_checkpoint(self, folder: Path) -> None:
        self._write_adapter(folder)
        snapshot.write_optimizer(folder, self.trainer)

    def _write_adapter(self, folder: Path) -> None:
        snapshot.write_adapter(folder, self.trainer, self.recipe, self.identity.base)

    def _finish(self, status: str) -> Summary:
        meter = self.progress.meter
        if meter.losses:  # steps since the last log line
            self._log()
        if not self.trainer.ranks.leads:
            return self._told(None)
        self.pulse.quiet()
        return self._told(self._reporter.end(status, self._facts_now, meter, **self._speeds))

    def _told(self, summary: Summary | None) -> Summary:
        """Rank 0's summary, for which the others wait."""
        told = agreement.from_first(self.trainer.ranks, summary.to_json() if summary else {})
        return summary or Summary.from_json(told)
