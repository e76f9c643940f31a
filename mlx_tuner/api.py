"""What `import mlx_tuner` offers: a run and an answer, each as one call."""

from __future__ import annotations

from pathlib import Path

from mlx_tuner.commands.generate import answer, load
from mlx_tuner.recipe.tables import Recipe
from mlx_tuner.runs.metrics import Summary
from mlx_tuner.show.progress import Display
from mlx_tuner.system.awake import awake
from mlx_tuner.training import finetune as training


class Finished(Summary):
    """The numbers of a run's `summary.json`, and where the run is."""

    run: Path


def finetune(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_change: bool = False,
    progress: bool = False,
) -> Finished:
    """Train what the recipe says, in this process, as `mlx-tune run` does.

    Args:
        run_dir: the run's folder; by default `adapters/` and the recipe's name.
        resume: go on from the newest checkpoint of the run there.
        overwrite: replace the run there, once this one has a checkpoint.
        allow_change: resume with another length, learning rate, eval_every or patience.
        progress: show it on standard error.

    Raises:
        TunerError: what is wrong with recipe, data, model or machine; nothing is written then.
        RunStopped: a signal came (an interrupted notebook's too); the run is saved.
    """
    run = Path("adapters") / recipe.name if run_dir is None else Path(run_dir)
    with awake(), Display(quiet=not progress) as display:
        summary = training.finetune(
            recipe, run, display, resume=resume, overwrite=overwrite, allow_change=allow_change
        )
    return Finished(**dict(summary), run=run)


def generate(
    run_or_model: str | Path,
    prompt: str,
    *,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    base: bool = False,
    model: str | None = None,
) -> str:
    """The answer of a run or a model to a prompt, as `mlx-tune generate` gives it.

    Args:
        run_or_model: a run, an adapter folder, or a model by name or folder.
        system: the system message.
        temperature: 0 takes the likeliest token each time.
        base: leave a run's adapter off.
        model: the base of an adapter; by default the one that it names.

    Raises:
        TunerError: there is no such model, or it cannot answer.
    """
    loaded = load(str(run_or_model), base=base, model=model)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return "".join(answer(loaded, messages, max_tokens=max_tokens, temperature=temperature))
