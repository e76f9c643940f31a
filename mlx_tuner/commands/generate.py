"""Answers from a model, or from a run's adapter on its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx_lm
from mlx_lm.sample_utils import make_sampler

from mlx_tuner.errors import Fault, UsageError
from mlx_tuner.models import adapter, adapter_config
from mlx_tuner.models import model as models
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.answers import Message, prompt_tokens
from mlx_tuner.models.base import check_base, resolve_base
from mlx_tuner.models.model import Loaded
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.runs.place import RECIPE


def load(name: str, *, base: bool = False, model: str | None = None) -> Loaded:
    """A model by name or folder; of a run or adapter folder, its base with the adapter on it.

    Args:
        base: leave the adapter off.
        model: the base of an adapter folder; by default the one that it names.

    Raises:
        UsageError: a base is given for what is no adapter.
        ModelError: there is no such model, or the adapter was trained on another one.
    """
    if not (Path(name) / adapter_config.CONFIG).is_file():
        if model is not None:
            raise UsageError(Fault(name, "", "is no run or adapter, so --model has no meaning"))
        return models.load(models.resolve(name))
    trained = read_adapter(Path(name))
    folder = resolve_base(trained, model)
    check_base(trained, folder)
    loaded = models.load(folder)
    if (record := Path(name) / RECIPE).is_file():
        table = load_recipe(record, check_paths=False).data
        loaded = replace(loaded, template_variables=table.chat_template)
    if not base:
        adapter.apply(loaded.model, trained)
        loaded.model.eval()
    return loaded


def answer(
    loaded: Loaded, messages: list[Message], *, max_tokens: int, temperature: float
) -> Iterator[str]:
    """The assistant's next turn, piece by piece, up to the model's end-of-sequence ids.

    Args:
        temperature: 0 takes the likeliest token each time.

    Raises:
        ModelError: the model has no chat template, or it refuses the messages.
    """
    prompt = prompt_tokens(loaded.tokenizer, messages, loaded.path, loaded.template_variables)
    sampler = make_sampler(temp=temperature)
    for response in mlx_lm.stream_generate(
        loaded.model, loaded.tokenizer, prompt, max_tokens=max_tokens, sampler=sampler
    ):
        yield response.text
