"""A run from recipe to adapter. Read this first: it is the table of contents of the package."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_tuner import assembly
from mlx_tuner.data.dataset import Dataset, shared_rows
from mlx_tuner.data.stream import prefetch
from mlx_tuner.engine.batching import Example
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.trainer import StepResult, Trainer, train
from mlx_tuner.errors import Fault, RecipeError, RunError, RunStopped
from mlx_tuner.models import adapter
from mlx_tuner.models import model as models
from mlx_tuner.models.adapter import Adapter
from mlx_tuner.recipe import schedule
from mlx_tuner.recipe.tables import Recipe, load_recipe
from mlx_tuner.runs.metrics import (
    FINISHED,
    STOPPED,
    STOPPED_EARLY,
    EvalRecord,
    Facts,
    Meter,
    Summary,
    summarise,
)
from mlx_tuner.runs.run import (
    GRAD_NORM_PLOT,
    LOSS_PLOT,
    QUARANTINE,
    RECIPE,
    Checkpoint,
    Run,
    read_records,
)
from mlx_tuner.show import plots
from mlx_tuner.show.progress import Display
from mlx_tuner.system import device, files, interrupt
from mlx_tuner.words import plural

OPTIMIZER = "optimizer.safetensors"

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
    meter: Meter = field(default_factory=Meter)

    def state(self) -> dict[str, Any]:
        """Plain values, for `resumed`."""
        return {
            "best_step": self.best_step,
            "best_val_loss": self.best_val_loss,
            "evaluations_since_best": self.evaluations_since_best,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "meter": self.meter.state(),
        }

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> Progress:
        """The progress that a checkpoint has kept."""
        names = ("step", "best_step", "best_val_loss", "evaluations_since_best")
        kept = {name: state[name] for name in (*names, "nonfinite_in_a_row")}
        return cls(**kept, meter=Meter.from_json(state["meter"]))


def finetune(
    recipe: Recipe,
    run_path: Path,
    display: Display,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Train the recipe's adapter and leave adapter, metrics, plots and summary in ``run_path``.

    Args:
        resume: go on from the newest checkpoint of the run there.
        overwrite: replace the run there.

    Raises:
        TunerError: what is wrong with recipe, data, model or machine; nothing is written then.
        RunStopped: a signal came; the run is saved and can be resumed.
    """
    if resume:
        check_unchanged(recipe, run_path)
    folder = models.resolve(recipe.model.path, recipe.model.revision)
    with display.task("reading the rows"):
        data = assembly.open_data(recipe, models.load_tokenizer(folder))
    rates = assembly.learning_rates(recipe, len(data.train))
    with display.task("loading the model"):
        loaded = models.load(folder)
        assembly.attach_adapter(loaded.model, recipe)

    longest = assembly.longest_row(recipe, data.train)
    trainer = Trainer(
        loaded.model,
        micro_batch_tokens=assembly.micro_batch_tokens(
            recipe, loaded.model, loaded.config, longest
        ),
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.train.seed,
        checkpointing=recipe.train.gradient_checkpointing,
        compile=assembly.on_gpu(),
    )
    with device.limits():
        if assembly.on_gpu():
            rehearse(trainer, data.train, recipe.train.batch_size)
        if resume:
            run, checkpoint = Run.resume(run_path)
            progress = restore(trainer, checkpoint)
        else:
            run = Run.create(run_path, recipe.to_toml(), overwrite=overwrite, keep_out_of=[folder])
            progress = Progress()
        with run:
            base = adapter.fingerprint(folder)
            return _Session(recipe, run, display, trainer, data, rates, base, progress).run_all()


@dataclass
class _Session:
    """One process's part of a run, from its first step to the last that it makes."""

    recipe: Recipe
    run: Run
    display: Display
    trainer: Trainer
    data: assembly.Data
    learning_rates: list[float]
    base_fingerprint: str
    progress: Progress

    def run_all(self) -> Summary:
        """Train, evaluate and save at the recipe's intervals, until the end or a signal."""
        self._announce()
        every, steps = self.recipe.train, len(self.learning_rates)
        status = FINISHED
        if self.progress.step == 0:
            self._evaluate()
        with interrupt.deferred() as signal:
            for result in self._steps():
                step = self.progress.step
                if step % every.log_every == 0 or step == steps:
                    self._log()
                if step % every.eval_every == 0 or step == steps:
                    self._evaluate()
                if self._is_stale():
                    status = STOPPED_EARLY
                elif signal.received and step < steps:
                    status = STOPPED
                if step % every.save_every == 0 or step == steps or status != FINISHED:
                    self._save()
                self._check_finite(result)
                if status != FINISHED:
                    break
        summary = self._finish(status)
        if signal.received and status == STOPPED:
            raise RunStopped(signal.received, self.progress.step, self.run.path)
        return summary

    def _announce(self) -> None:
        self.display.start(self._facts, first_step=self.progress.step)
        for note in self.data.train.notes:
            self.display.note(note)
        valid = self.data.valid
        if valid is not None and (shared := shared_rows(self.data.train, valid)):
            rows = plural(shared, "validation row")
            self.display.note(f"{rows} trained on as well, so that validation flatters")
        if self.data.train.quarantined:
            lines = [entry.to_json() + "\n" for entry in self.data.train.quarantined]
            files.write_text(self.run.path / QUARANTINE, "".join(lines))

    def _steps(self) -> Iterator[StepResult]:
        """Train step after step and count each one in."""
        rows, first = len(self.data.train), self.progress.step
        order = assembly.row_order(self.recipe, rows, first, len(self.learning_rates))
        self._examples: deque[list[Example]] = deque()

        def batches() -> Iterator[list[Example]]:
            for examples in prefetch(self.data.train, order):
                self._examples.append(examples)
                yield examples

        rates = self.learning_rates[first:]
        for result in train(self.trainer, batches(), rates, first_step=first):
            self.progress.step += 1
            self.progress.meter.step(result)
            self.display.step(result)
            yield result
            self._examples.popleft()

    @property
    def _facts(self) -> Facts:
        return Facts(
            recipe=self.recipe.name,
            model=self.recipe.model.path,
            rows=len(self.data.train),
            rank=self.recipe.lora.rank,
            total_steps=len(self.learning_rates),
            trainable_parameters=assembly.trainable_parameters(self.trainer.model),
            total_parameters=models.parameter_count(self.trainer.model),
        )

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
        )
        self.run.append(record)
        self.display.record(record)

    def _evaluate(self) -> None:
        """Measure the validation loss; the adapter of the best one is the run's."""
        if self.data.valid is None:
            return
        with self.display.task("evaluating"), self.progress.meter.timing("evaluating"):
            loss = self.trainer.evaluate(assembly.in_order(self.data.valid))
        progress = self.progress
        record = EvalRecord(step=progress.step, epoch=self._epoch, val_loss=loss)
        lowest = math.inf if progress.best_val_loss is None else progress.best_val_loss
        best = progress.step > 0 and loss < lowest
        self.run.append(record)
        self.display.record(record, best=best)
        if best:
            progress.best_step, progress.best_val_loss = progress.step, loss
            progress.evaluations_since_best = 0
            self.run.publish(self._write_adapter)
        elif progress.step > 0:
            progress.evaluations_since_best += 1

    def _is_stale(self) -> bool:
        patience = self.recipe.train.early_stopping_patience
        return bool(patience) and self.progress.evaluations_since_best >= patience

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
            raise RunError(Fault(self.recipe.data.train, "", cause))

    def _save(self) -> None:
        """Keep a checkpoint; without validation rows its adapter is the run's too."""
        with self.progress.meter.timing("saving"):
            self.run.save_checkpoint(
                self.progress.step,
                self._write_checkpoint,
                self.progress.state(),
                best_step=self.progress.best_step,
            )
            if self.data.valid is None:
                self.run.publish(self._write_adapter)

    def _write_checkpoint(self, folder: Path) -> None:
        self._write_adapter(folder)
        state = self.trainer.state
        moments = {
            "first_moment": state.first_moment,
            "second_moment": state.second_moment,
            "updates": state.updates,
        }
        adapter.write_tensors(folder / OPTIMIZER, moments, "mlx", None)

    def _write_adapter(self, folder: Path) -> None:
        lora, layers = self.recipe.lora, self.recipe.lora.num_layers
        trained = Adapter(
            self.trainer.adapter,
            rank=lora.rank,
            scale=lora.scale,
            dropout=lora.dropout,
            num_layers=adapter.ALL_LAYERS if layers is None else layers,
            base=self.recipe.model.path,
            revision=self.recipe.model.revision,
            fingerprint=self.base_fingerprint,
        )
        adapter.write_adapter(folder, trained)

    def _finish(self, status: str) -> Summary:
        meter = self.progress.meter
        if meter.losses:  # steps since the last log line
            self._log()
        records = read_records(self.run.path)
        summary = summarise(
            self._facts,
            records,
            status=status,
            runtime_seconds=meter.elapsed_seconds,
            other_seconds=meter.other_seconds,
            tokenized_rows_per_second=self.data.train.rows_per_second,
        )
        with self.display.task("drawing the plots"):
            plots.loss_curve(self.run.path / LOSS_PLOT, records, summary.best_step)
            plots.grad_norm_curve(self.run.path / GRAD_NORM_PLOT, records)
        self.run.write_summary(summary)
        return summary


def rehearse(trainer: Trainer, dataset: Dataset, batch_size: int) -> None:
    """Run the largest micro-batch that the data can give once, so that memory fails here."""
    longest = dataset.byte_lengths.argsort()[::-1][:batch_size]
    trainer.rehearse(dataset.examples(longest.tolist()))


def restore(trainer: Trainer, checkpoint: Checkpoint) -> Progress:
    """Put adapter and optimizer back as a checkpoint has them."""
    kept = adapter.read_adapter(checkpoint.path)
    moments = mx.load(str(checkpoint.path / OPTIMIZER))
    trainer.state = State(trainer.shapes.flatten(kept.tensors), **moments)
    mx.eval(trainer.state)
    return Progress.resumed(checkpoint.state)


def check_unchanged(recipe: Recipe, run_path: Path) -> None:
    """A run goes on with the recipe that it began with.

    Raises:
        RecipeError: the keys that differ, with both values.
    """
    if not (run_path / RECIPE).is_file():
        return  # `Run.resume` says what is missing
    before = load_recipe(run_path / RECIPE, check_paths=False)
    faults = [
        Fault(
            recipe.name,
            f"{table}.{key}",
            f"is {new!r}, but the run began with {old!r}; "
            "resume with the same recipe, or start over with --overwrite",
        )
        for table in ("model", "data", "lora", "train")
        for key, new in getattr(recipe, table).model_dump().items()
        if new != (old := getattr(getattr(before, table), key))
    ]
    if faults:
        raise RecipeError(*faults)
