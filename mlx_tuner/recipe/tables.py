"""What to train: a recipe's tables, each option declared once, with its unit and its bounds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

_HUGE = 10**9  # steps, rows or tokens that no run reaches: a larger number is a slip

_TEMPLATE_OWN = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What a chat template is given already, and how its text becomes tokens."""


def _path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("a path")
    return value


def _source(value: str) -> str:
    if value.startswith("hub:") and not re.fullmatch(r"hub:[\w.-]+/[\w.-]+(/[^\0]+)?", value):
        raise ValueError('"hub:OWNER/NAME" or "hub:OWNER/NAME/FILE"')
    return _path(value)


def _source_or_fraction(value: object) -> str | float:
    if isinstance(value, str):
        return _source(value)
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError("a path, or a fraction between 0 and 1")


def _auto_or_tokens(value: object) -> Literal["auto"] | int:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _HUGE:
        return value
    raise ValueError(f'"auto", or a whole number from 1 to {_HUGE}')


def _modules(value: object) -> Literal["all-linear"] | tuple[str, ...]:
    if value == "all-linear":
        return "all-linear"
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise ValueError('a list of module names such as ["q_proj", "v_proj"], or "all-linear"')


def _variables(value: dict[str, Any]) -> dict[str, Any]:
    for name, item in value.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in _TEMPLATE_OWN:
            raise ValueError("variables under names that are the template's own to set")
        if not isinstance(item, bool | int | float | str):
            raise ValueError("variables that are true, false, a number or a string")
    return value


class Table(BaseModel):
    """Keys and their values, as they are written: nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelTable(Table):
    """The model that is fine-tuned."""

    path: Annotated[str, AfterValidator(_path)] = Field(
        description='a Hub name, a folder or "builtin:tiny-qwen"'
    )
    revision: Annotated[str, AfterValidator(_path)] | None = Field(
        None, description="the commit of a Hub model"
    )


class DataTable(Table):
    """The rows, and how they become tokens."""

    train: Annotated[str, AfterValidator(_source)] = Field(
        description='the training rows: a path or "hub:OWNER/NAME[/FILE]"'
    )
    valid: Annotated[str | float | None, PlainValidator(_source_or_fraction)] = Field(
        None, description="the validation rows, or their part of train"
    )
    limit: int | None = Field(None, ge=1, le=10**12, description="rows used, from the first on")
    shuffle: bool = Field(True, description="a new order of the rows each epoch")
    mask_prompt: bool = Field(True, description="loss on the assistant's tokens only")
    max_seq_length: int = Field(2048, ge=2, le=_HUGE, description="tokens of a row")
    system_prompt: str | None = Field(
        None, description="the system message of rows that have none of their own"
    )
    chat_template: Annotated[dict[str, Any], AfterValidator(_variables)] = Field(
        default_factory=dict,
        description="variables for the chat template, such as enable_thinking = false",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what a row that cannot be read does"
    )
    on_long_row: Literal["truncate", "skip", "error"] = Field(
        "truncate", description="what a row of more than max_seq_length tokens does"
    )


class LoraTable(Table):
    """The adapter."""

    rank: int = Field(16, ge=1, le=65_536, description="inner size of the two factors")
    alpha: float = Field(32.0, gt=0, le=1e6, description="strength: scale = alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability on the adapter's input")
    target_modules: Annotated[Literal["all-linear"] | tuple[str, ...], PlainValidator(_modules)] = (
        Field(
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            description="the layers that get an adapter, by the last part of their names",
        )
    )
    num_layers: int | None = Field(
        None, ge=1, le=100_000, description="the last N blocks; all of them where absent"
    )
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="rslora: scale = alpha / sqrt(rank); dora: with learned magnitudes"
    )
    init_from: Annotated[str, AfterValidator(_path)] | None = Field(
        None, description="a run or adapter folder to start from, whose modules are adapted"
    )

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)


class TrainTable(Table):
    """The optimization. A step is one optimizer update over `batch_size` rows."""

    epochs: int | None = Field(None, ge=1, le=_HUGE, description="passes over the rows")
    max_steps: int | None = Field(None, ge=1, le=_HUGE, description="optimizer steps")
    batch_size: int = Field(8, ge=1, le=1_000_000, description="rows an optimizer step")
    micro_batch_tokens: Annotated[Literal["auto"] | int, PlainValidator(_auto_or_tokens)] = Field(
        "auto", description="tokens a forward pass, the memory knob"
    )
    learning_rate: float = Field(2e-4, gt=0, le=1, description="the highest of the schedule")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="how the learning rate goes on after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, le=_HUGE, description="steps of rising learning rate")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, a step and learning rate")
    max_grad_norm: float = Field(
        1.0, ge=0, le=1e9, description="gradients are clipped to this L2 norm; 0 = never"
    )
    lora_plus_ratio: float = Field(
        1.0, gt=0, le=1e4, description="LoRA+: learning rate of B over that of A; 1 = off"
    )
    neftune_noise: float = Field(
        0.0, ge=0, le=1e4, description="NEFTune: alpha of the noise on the embeddings; 0 = off"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    log_every: int = Field(10, ge=1, le=_HUGE, description="steps between log lines")
    eval_every: int | None = Field(
        None, ge=1, le=_HUGE, description="steps between evaluations; twice an epoch where absent"
    )
    save_every: int = Field(10, ge=1, le=_HUGE, description="steps between checkpoints")
    early_stopping_patience: int = Field(
        0, ge=0, le=_HUGE, description="evaluations without improvement; 0 = off"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of order, dropout and initial weights")


class SampleTable(Table):
    """Prompts that are answered while training, so that a person sees what is learnt."""

    prompts: list[str] = Field([], description="answered at each evaluation")
    max_tokens: int = Field(200, ge=1, le=1_000_000, description="of an answer")


class ReportTable(Table):
    """Where a run's numbers go beside its own files."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="trackers, each an extra"
    )


TABLES: dict[str, type[Table]] = {
    "model": ModelTable,
    "data": DataTable,
    "lora": LoraTable,
    "train": TrainTable,
    "sample": SampleTable,
    "report": ReportTable,
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Its paths are absolute; Hub and built-in names are as written."""

    name: str
    """The file's stem; of a file called recipe.toml, as a run has it, its folder's name."""
    model: ModelTable
    data: DataTable
    lora: LoraTable
    train: TrainTable
    sample: SampleTable
    report: ReportTable

    def to_toml(self) -> str:
        """The recipe with every default written out: it parses to an equal recipe."""
        return tomli_w.dumps(self.plain_tables())

    def plain_tables(self) -> dict[str, dict[str, Any]]:
        """Every table as plain values; a key without one is left out."""
        return {name: getattr(self, name).model_dump(exclude_none=True) for name in TABLES}
