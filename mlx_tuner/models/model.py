"""A model by name or folder, loaded through mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.utils import logging as transformers_logging

from mlx_tuner.errors import Fault, ModelError, first_line
from mlx_tuner.models import chat_template
from mlx_tuner.models.folder import check_folder, check_tokens
from mlx_tuner.models.model_files import check_model_folder

BUILTIN = "builtin:"
_PROBE = "def f(x):\n    return 'é'  # 漢字 1,234\n"


@dataclass(frozen=True)
class Loaded:
    """A model in memory."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """What its chat template is given beside the messages."""


def resolve(name: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """The folder of ``builtin:NAME``, of a path, or of a Hub name (downloaded where needed).

    Args:
        fetch: whether the network may be asked; else a Hub name is what the cache has of it.

    Raises:
        ModelError: there is no such model.
    """
    if name.startswith(BUILTIN):
        builtin = name.removeprefix(BUILTIN)
        folder = Path(str(files("mlx_tuner") / "builtin" / builtin))
        if "/" in builtin or not folder.is_dir():
            raise ModelError(Fault(name, "model.path", "no such built-in model; try tiny-qwen"))
        return folder
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(Fault(name, "model.path", f"no such folder: {error}")) from None
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(Fault(name, "model.path", "no such folder"))
    from mlx_tuner.system import hub

    return (hub.download_model if fetch else hub.cached_model)(name, revision)


def load(folder: Path) -> Loaded:
    """Load a checked model folder; its code, if it holds any, is never run.

    Raises:
        ModelError: the folder is not a Qwen model that can be trained.
    """
    check_model_folder(folder)
    model, config = mlx_lm_utils.load_model(folder)
    return Loaded(model, load_tokenizer(folder), config, folder)


def load_tokenizer(folder: Path) -> TokenizerWrapper:
    """The folder's tokenizer with its chat template and every end-of-sequence id.

    Raises:
        ModelError: the folder must not be read, its tokenizer cannot be loaded or has ids that
            the model's embedding lacks, or a chat template takes too much time or memory.
    """
    config = check_folder(folder)
    check_tokens(folder)
    eos = mlx_lm_utils.load_config(folder).get("eos_token_id")
    settings = {"trust_remote_code": False}
    transformers_logging.set_verbosity_error()  # it prints a stranger's keys and values
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(folder, settings, eos_token_ids=eos)
        vocabulary = tokenizer.get_vocab()
        tokenizer.decode(tokenizer.encode(_PROBE))
        template = tokenizer.chat_template
    except BaseException as error:  # a panic of the Rust library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"cannot be loaded: {first_line(error)}"
        raise ModelError(Fault(str(folder), "tokenizer", what)) from None
    rows = config.get("text_config", config)["vocab_size"]
    highest = max([*vocabulary.values(), *tokenizer.eos_token_ids], default=0)
    if highest >= rows:
        what = f"token id {highest}, but the embedding has {rows} rows"
        raise ModelError(Fault(str(folder), "tokenizer", what))
    templates = template.values() if isinstance(template, dict) else [template]
    for each in templates:
        if isinstance(each, str):
            chat_template.require_bounded(each, folder)
    inner = tokenizer._tokenizer
    inner.apply_chat_template = chat_template.Bounded(inner)
    return tokenizer
