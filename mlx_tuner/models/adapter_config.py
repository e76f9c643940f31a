"""`adapter_config.json` as mlx-lm and as PEFT write it; what changes an adapter, checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mlx_tuner.errors import Fault, ModelError
from mlx_tuner.system.foreign import read_json

CONFIG = "adapter_config.json"
ALL_LAYERS = -1
"""`num_layers` of an adapter that may touch any block, as mlx-lm writes it."""

_MAX_RANK = 65_536

# Patterns come with the file: only those that no regular expression engine can take long over.
_PATTERN = re.compile(r"(?:[\w.^$|\\-]|\[[\w-]+\]|\([\w.|\\]+\)(?![*+?])|[*+?](?![*+?])){1,200}")
MAX_REPEATS = 2

# Other ways to initialise (PiSSA, OLoRA, LoftQ, …) change the base's weights as well.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


def _is_off(value: Any) -> Any:
    if value:
        raise ValueError("is set, which is not supported")
    return value


def _keeps_the_base(value: Any) -> Any:
    if value not in _HARMLESS_INITS:
        raise ValueError(
            f"{str(value)[:40]!r} changes the base's weights; save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return value


def _is_simple(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+?")) > MAX_REPEATS:
        raise ValueError(
            f"the pattern {pattern[:40]!r} is too complicated; write the modules' names"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern[:40]!r}: {error}") from None
    return pattern


def _is_a_name(text: str) -> str:
    if not text.isprintable() or len(text) > 500:
        raise ValueError("must be at most 500 characters, and none that moves the cursor")
    return text


_Name = Annotated[str, AfterValidator(_is_a_name)]
_Off = Annotated[Any, AfterValidator(_is_off)]
_Scale = Annotated[float, Field(ge=-1e12, le=1e12)]
_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
_Pattern = Annotated[str, AfterValidator(_is_simple)]


class LoraParameters(_Config):
    """mlx-lm's `lora_parameters`."""

    rank: _Rank
    scale: _Scale
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keys: list[str] | None = None


class MlxConfig(_Config):
    """mlx-lm's, with three keys of our own at its end."""

    fine_tune_type: Literal["lora", "dora"] = "lora"
    num_layers: Annotated[int, Field(ge=ALL_LAYERS, le=_MAX_RANK)]
    lora_parameters: LoraParameters
    model: _Name | None = None
    revision: _Name | None = None
    fingerprint: _Name | None = None


class PeftConfig(_Config):
    """PEFT's: what LoRA and DoRA consist of here, and what must be off, as nothing follows it."""

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Scale
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    base_model_name_or_path: _Name | None = None
    revision: _Name | None = None
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Scale] | None = None
    bias: Literal["none"] = "none"
    init_lora_weights: Annotated[Any, AfterValidator(_keeps_the_base)] = True
    use_qalora: _Off = None
    use_bdlora: _Off = None
    lora_bias: _Off = None
    fan_in_fan_out: _Off = None
    modules_to_save: _Off = None
    trainable_token_indices: _Off = None
    layer_replication: _Off = None
    target_parameters: _Off = None
    alora_invocation_tokens: _Off = None
    arrow_config: _Off = None
    kasa_config: _Off = None
    monteclora_config: _Off = None


_Kind = TypeVar("_Kind", MlxConfig, PeftConfig)


def read_config(directory: Path, kind: type[_Kind]) -> _Kind:
    """The folder's ``adapter_config.json``.

    Raises:
        ModelError: it is missing, broken, or says what cannot be followed; all of that.
    """
    path = directory / CONFIG
    if not path.is_file():  # opening a FIFO would wait for a writer
        raise ModelError(Fault(str(path), "", "missing, or not a regular file"))
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        faults = [
            Fault(str(path), ".".join(map(str, fault["loc"])), _said(fault))
            for fault in error.errors(include_url=False)
        ]
        raise ModelError(*faults) from None


def _said(fault: Any) -> str:
    what = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] in ("missing", "value_error"):
        return what
    return f"{what}, not {repr(fault['input'])[:40]}"
