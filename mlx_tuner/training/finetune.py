"""A run from recipe to adapter. Read this first: it is the table of contents of the package."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.ranks import Ranks
from mlx_tuner.engine.trainer import Trainer
from mlx_tuner.models import model as models
from mlx_tuner.models.base import fingerprint
from mlx_tuner.models.folder import check_folder
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.runs.identity import Identity
from mlx_tuner.runs.metrics import Summary
from mlx_tuner.runs.pulse import Pulse
from mlx_tuner.runs.run import Elsewhere, Run
from mlx_tuner.show.progress import Display
from mlx_tuner.system import device
from mlx_tuner.training import agreement, assembly, needs, snapshot
from mlx_tuner.training.session import Progress, Session

SILENT = Pulse()


def finetune(
    recipe: Recipe,
    run_path: Path | str,
    display: Display | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_change: bool = False,
    force: bool = False,
    pulse: Pulse = SILENT,
    ranks: Ranks | None = None,
) -> Summary:
    """Train the recipe's adapter and leave adapter, metrics, plots and summary in ``run_path``.

    Args:
        display: shows progress; nothing is shown without one.
        resume: go on from the newest checkpoint of the run there.
        overwrite: replace the run there, once this one has a checkpoint.
        allow_change: what `identity.ON_REQUEST` names may differ from the run that is resumed.
        force: train also where memory seems not to suffice.
        pulse: tells a supervisor how far the run is.
        ranks: the processes that train together; rank 0 alone writes, and all return the same.

    Raises:
        TunerError: what is wrong with recipe, data, model or machine; nothing is written then.
        EverywhereError: the ranks have not the same recipe, rows, model or versions.
        RunStopped: a signal came; the run is saved and can be resumed.
    """
    display = display or Display(quiet=True)
    ranks, path = ranks or Ranks(), Path(run_path)
    if ranks.leads:
        run = Run(path, resume=resume, overwrite=overwrite, held=pulse.lock)
    else:
        run = Elsewhere(path)
    with run:
        kept = run.checkpoint
        folder = models.resolve(recipe.model.path, recipe.model.revision)
        data = assembly.open_data(recipe, models.load_tokenizer(folder), display.task)
        rates = assembly.learning_rates(recipe, len(data.train))
        same = identity(recipe, data, folder)
        if kept:
            same.check(kept.state["identity"], recipe.name, allow_change=allow_change)
        agreement.require_one_run(ranks, same)
        state = agreement.from_first(ranks, kept.state if kept else None)
        config = check_folder(folder)
        place = kept.path if kept else None
        skeleton = needs.skeleton(recipe, config, place)
        memory = needs.memory_of(recipe, skeleton, config, data.train)
        if not force:
            memory.require(recipe.name)
        with display.task("loading the model"):
            loaded = models.load(folder)
            assembly.attach_adapter(loaded.model, recipe, place)

        step = needs.step_memory(recipe, loaded.model, loaded.config)
        trainer = Trainer(
            loaded.model,
            micro_batch_tokens=assembly.micro_batch_tokens(
                recipe,
                step,
                memory.budget,
                data.train.survey.longest,
                kept.state["micro_batch_tokens"] if kept else None,
            ),
            weight_decay=recipe.train.weight_decay,
            max_grad_norm=recipe.train.max_grad_norm,
            lora_plus_ratio=recipe.train.lora_plus_ratio,
            neftune_noise=recipe.train.neftune_noise,
            seed=recipe.train.seed,
            checkpointing=recipe.train.gradient_checkpointing,
            backend=assembly.backend(),
            ranks=ranks,
        )
        with device.limits():
            pulse.started(trainer.micro_batch_tokens)
            needs.rehearse(recipe, trainer, data.train, step, memory.budget)
            run.require_space(needs.disk_bytes(assembly.trainable_parameters(loaded.model)))
            asked = assembly.sample_prompts(recipe, loaded) if ranks.leads else []
            session = Session(
                recipe, run, display, trainer, data, rates, same, pulse, loaded.tokenizer, asked
            )
            if kept:
                snapshot.restore(kept.path, trainer)
            trainer.state = State(*ranks.take_over(trainer.state))
            if state:
                session.progress = Progress.resumed(state)
                if session.is_finished():
                    return session.already_finished()
                run.go_on(recipe.to_toml())
                session.publish_kept()
            else:
                again = bool(pulse.restarts)
                run.begin(recipe.to_toml(), keep_out_of=[folder], restarted=again)
            return session.run_all()


def identity(recipe: Recipe, data: assembly.Data, folder: Path) -> Identity:
    """What a run that goes on must have in common with the one that began."""
    rows = {"train": data.train.fingerprint, "valid": data.valid and data.valid.fingerprint}
    # The first step tells whether the rows still come in the order that they came in.
    first = next(iter(assembly.row_order(recipe, len(data.train), 0, 1)))
    rows["order"] = hashlib.sha256(str(list(first)).encode()).hexdigest()
    return Identity(recipe.plain_tables(), rows, fingerprint(folder))
