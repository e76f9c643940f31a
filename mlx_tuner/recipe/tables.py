"""What to train: a recipe's tables, read from TOML and written back as TOML that runs again.

Each option is declared once, with its unit and its bounds. All faults of a recipe are reported
together, each with its file, line and key.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from mlx_tuner.errors import Fault, RecipeError
from mlx_tuner.recipe import peer_names, shipped
from mlx_tuner.recipe.toml_lines import NestingError, key_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 1024 * 1024
_MAX_FAULTS = 100
_HUGE = 10**9  # steps, rows or tokens that no run reaches: a larger number is a slip

_TEMPLATE_OWN = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What a chat template is given already, and how its text becomes tokens."""

logger = logging.getLogger(__name__)


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


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelTable(_Table):
    """The model that is fine-tuned."""

    path: Annotated[str, AfterValidator(_path)] = Field(
        description='a Hub name, a folder or "builtin:tiny-qwen"'
    )
    revision: Annotated[str, AfterValidator(_path)] | None = Field(
        None, description="the commit of a Hub model"
    )


class DataTable(_Table):
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


class LoraTable(_Table):
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
        "lora", description="rslora: scale = alpha / sqrt(rank); dora: learned lengths of rows"
    )
    init_from: Annotated[str, AfterValidator(_path)] | None = Field(
        None, description="a run or adapter folder to start from"
    )

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)


class TrainTable(_Table):
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


class SampleTable(_Table):
    """Prompts that are answered while training, so that a person sees what is learnt."""

    prompts: list[str] = Field([], description="answered at each evaluation")
    max_tokens: int = Field(200, ge=1, le=1_000_000, description="of an answer")


class ReportTable(_Table):
    """Where a run's numbers go beside its own files."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="trackers, each an extra"
    )


TABLES: dict[str, type[_Table]] = {
    "model": ModelTable,
    "data": DataTable,
    "lora": LoraTable,
    "train": TrainTable,
    "sample": SampleTable,
    "report": ReportTable,
}
_LENGTHS = ("epochs", "max_steps")  # of [train], exactly one is given
_EXAMPLE = 'lora.target_modules=["q_proj", "v_proj"]'


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Its paths are absolute; Hub and built-in names are as written."""

    name: str
    """The file's stem; of a file called recipe.toml, as a run has it, its folder's name."""
    folder: Path
    """Where relative paths started from."""
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


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True
) -> Recipe:
    """Read the recipe at `path`, or the shipped one of that name, with `table.key=value` overrides.

    Relative paths start from the recipe's folder, those of overrides from the current directory.
    `check_paths = False` is for reading the record of a run whose data may have moved.
    Raises RecipeError with all faults.
    """
    path = shipped.locate(Path(path))
    return parse_recipe(
        _read(path),
        source=str(path),
        folder=path.parent,
        overrides=overrides,
        check_paths=check_paths,
    )


def parse_recipe(
    text: str,
    *,
    source: str,
    folder: Path,
    overrides: Sequence[str] = (),
    check_paths: bool = False,
) -> Recipe:
    """`load_recipe` for a text; `source` is what faults call it."""
    tables, lines = _parse_toml(text, source)
    report = _Report(source, lines)
    _apply_overrides(tables, overrides, report)
    checked = _check_tables(tables, report)
    _check_lengths(tables.get("train"), report)
    _check_together(tables, checked, report)
    folder = Path(_absolute(folder))
    for key, path in _absolute_paths(tables, folder, report, check_paths):
        if key[0] in checked:
            checked[key[0]] = checked[key[0]].model_copy(update={key[1]: path})
    report.raise_faults()
    name = Path(source).stem
    return Recipe(folder.name if name == "recipe" else name, folder, **checked)


@dataclass
class _Report:
    """The faults found so far, and where each key was given."""

    source: str
    lines: dict[tuple[str, ...], int]
    overridden: set[tuple[str, str]] = field(default_factory=set)
    reported: set[tuple[str, ...]] = field(default_factory=set)
    faults: list[tuple[int, Fault]] = field(default_factory=list)

    def add(self, key: tuple[str, ...], what: str) -> None:
        self.reported.add(key)
        name = ".".join(map(_shown_key, key))
        if key in self.overridden:
            self.add_override(name, what)
        else:
            line = self.lines.get(key[:2]) or self.lines.get(key[:1])
            where = f"{self.source}:{line}" if line else self.source
            self.faults.append((line or sys.maxsize, Fault(where, name, what)))
        if len(self.faults) == _MAX_FAULTS:
            self.raise_faults()

    def add_override(self, name: str, what: str) -> None:
        self.faults.append((sys.maxsize, Fault("", f"--set {name}", what)))

    def raise_faults(self) -> None:
        if self.faults:
            raise RecipeError(*(fault for _, fault in sorted(self.faults, key=lambda f: f[0])))


# From a file to tables


def _read(path: Path) -> str:
    """The text of a recipe's file, which may be none at all."""

    def refuse(what: str, line: int | None = None) -> RecipeError:
        return RecipeError(Fault(f"{path}:{line}" if line else str(path), "", what))

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise refuse("is a directory; give a recipe's file")
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would hang
            raise refuse("is not a regular file; give a recipe's file")
        if status.st_size > MAX_RECIPE_BYTES:
            raise refuse(
                f"has {status.st_size} bytes, more than the {MAX_RECIPE_BYTES} of a recipe; "
                "is it the right file?"
            )
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        names = ", ".join(shipped.recipes())
        what = f"cannot be read ({reason}); give a recipe's file, or a shipped one: {names}"
        raise refuse(what) from None

    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse("is UTF-16; save it as UTF-8", 1)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refuse(
            f"byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8", line
        ) from None


def _parse_toml(text: str, source: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The tables of a TOML text, and the lines of their keys."""

    def refuse(what: str, position: str) -> RecipeError:
        return RecipeError(Fault(f"{source}:{position}", "", what))

    def line_of(offset: int) -> str:
        return str(text.count("\n", 0, offset) + 1)

    if text.startswith("\ufeff"):
        logger.warning("%s: starts with a byte order mark, which is ignored", source)
        text = text[1:]
    if bad := re.search(r"\0|\r(?!\n)", text):
        what = (
            "a NUL character; save the file as UTF-8 text"
            if bad.group() == "\0"
            else "a carriage return without a line feed; save the file with LF line ends"
        )
        raise refuse(what, line_of(bad.start()))
    try:
        lines = key_lines(text)
        return tomllib.loads(text), lines
    except NestingError as error:
        raise refuse(f"{error}; a recipe has tables of plain keys", str(error.line)) from None
    except tomllib.TOMLDecodeError as error:
        what, _, at = str(error).partition(" (at ")
        if what.startswith("Cannot "):  # overwrite, declare, mutate
            what = "a key or table is given twice; keep one"
        else:
            what = f"{what}; correct the TOML here"
        numbers = re.findall(r"\d+", at)
        raise refuse(what, ":".join(numbers) or line_of(len(text.rstrip()))) from None
    except ValueError:  # Python's limit on the digits of a number
        runs = re.finditer(r"[0-9_]+", text)
        start = next((run.start() for run in runs if len(run.group()) > 4000), 0)
        raise refuse("a number of thousands of digits; shorten it", line_of(start)) from None


def _apply_overrides(tables: dict[str, Any], overrides: Iterable[str], report: _Report) -> None:
    """Put `table.key=value` texts into `tables`; a value is TOML or a bare word."""
    for override in overrides:
        name, equals, text = override.partition("=")
        table, dot, key = (part.strip() for part in name.partition("."))
        if not (equals and dot and table and key):
            what = "is not of the form table.key=value; write it like --set lora.rank=8"
            report.add_override(_shown(override), what)
            continue
        value = _override_value(text.strip())
        if table not in TABLES:
            report.add_override(name, _unknown_table(table))
        elif value is None:
            what = f"{_shown(text)} is not a TOML value; write it like --set '{_EXAMPLE}'"
            report.add_override(name, what)
        elif isinstance(content := tables.setdefault(table, {}), dict):
            content[key] = value
            report.overridden.add((table, key))

    # A length from the command line takes the place of the recipe's.
    given = {length for length in _LENGTHS if ("train", length) in report.overridden}
    if given and isinstance(train := tables.get("train"), dict):
        for length in set(_LENGTHS) - given:
            train.pop(length, None)


def _override_value(text: str) -> Any:
    """A TOML value, or the bare word itself; None if it is neither."""
    try:
        key_lines(f"value = {text}")  # bounds the nesting
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except ValueError:
        if text and text[0] not in "\"'[{" and text.isprintable():
            return text
    return None


# Checks


def _check_tables(tables: dict[str, Any], report: _Report) -> dict[str, Any]:
    """The tables that are right, checked one by one; the faults of the others are reported."""
    for name, content in tables.items():
        if name not in TABLES:
            report.add((name,), _unknown_table(name))
        elif not isinstance(content, dict):
            report.add((name,), f"is {_shown(content)}; write its keys under [{name}]")

    checked = {}
    for name, table in TABLES.items():
        content = tables.get(name, {})
        if not isinstance(content, dict):
            continue
        known = {key: value for key, value in content.items() if key in table.model_fields}
        for key in content:
            if key not in known:
                report.add((name, key), _unknown_key(name, key))
        try:
            checked[name] = table.model_validate(known)
        except ValidationError as error:
            for detail in error.errors():
                key = str(detail["loc"][0])
                description = table.model_fields[key].description
                if detail["type"] == "missing":
                    report.add((name, key), f"is missing; give {description}")
                else:
                    wanted = _EXPECTED.get(detail["type"], detail["msg"])
                    wanted = wanted.format(**detail.get("ctx", {}))
                    what = f"is {_shown(known[key])}; give {wanted} ({description})"
                    report.add((name, key), what)
    return checked


_EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "string_type": "a string",
    "value_error": "{error}",
}
"""What pydantic's kinds of error ask for."""


def _check_lengths(train: Any, report: _Report) -> None:
    """Exactly one of the keys that say how long to train."""
    given = [key for key in _LENGTHS if key in train] if isinstance(train, dict) else []
    if not given and isinstance(train, dict | None):
        report.add(("train", "epochs"), "is missing; give train.epochs or train.max_steps")
    elif len(given) == 2:
        report.add(("train", "max_steps"), "is given beside train.epochs; keep one of them")


def _check_together(tables: dict[str, Any], checked: dict[str, Any], report: _Report) -> None:
    """What must fit between keys that are right by themselves."""
    lora, train = checked.get("lora"), checked.get("train")
    if lora and lora.variant == "dora" and lora.dropout:
        what = 'is given beside lora.variant = "dora", where PEFT and mlx-lm differ; give 0'
        report.add(("lora", "dropout"), what)
    if not train:
        return
    if train.max_steps and train.warmup_steps > train.max_steps:
        what = f"is {train.warmup_steps}, more than the {train.max_steps} steps; lower it"
        report.add(("train", "warmup_steps"), what)
    data = tables.get("data", {})
    if train.early_stopping_patience and isinstance(data, dict) and "valid" not in data:
        what = "needs validation rows; give data.valid, or 0 to never stop early"
        report.add(("train", "early_stopping_patience"), what)


def _unknown_table(name: str) -> str:
    for table, model in TABLES.items():
        if name in model.model_fields:
            return f"is outside its table; write it under [{table}]"
    if answer := _peer_answer(name):
        return answer
    tables = ", ".join(f"[{table}]" for table in TABLES)
    return f"unknown table; {_did_you_mean(name, TABLES) or f'a recipe has {tables}'}"


def _unknown_key(table: str, key: str) -> str:
    for other, model in TABLES.items():
        if key in model.model_fields:
            return f"is in the wrong table; write it under [{other}]"
    if answer := _peer_answer(key):
        return answer
    own = TABLES[table].model_fields
    every = chain.from_iterable(model.model_fields for model in TABLES.values())
    hint = _did_you_mean(key, own) or _did_you_mean(key, every)
    return f"unknown key; {hint or f'[{table}] has ' + ', '.join(own)}"


def _peer_answer(key: str) -> str | None:
    name = key.replace("-", "_").lower()
    if ours := peer_names.RENAMED.get(name):
        return f"unknown key; here it is `{ours}`"
    if answer := peer_names.ANSWERED.get(name):
        return f"unknown key; {answer}"
    return None


def _did_you_mean(word: str, known: Iterable[str]) -> str | None:
    matches = difflib.get_close_matches(word[:64], known, 1)
    return f"did you mean `{matches[0]}`?" if matches else None


# Paths


def _absolute_paths(
    tables: dict[str, Any], folder: Path, report: _Report, check_paths: bool
) -> Iterator[tuple[tuple[str, str], str]]:
    """The keys that name files, with absolute paths; those that lead nowhere are reported."""
    for key in (("model", "path"), ("data", "train"), ("data", "valid"), ("lora", "init_from")):
        table = tables.get(key[0])
        value = table.get(key[1]) if isinstance(table, dict) else None
        if not isinstance(value, str) or value.startswith(("hub:", "builtin:")):
            continue
        if key in report.reported:
            continue
        start = Path.cwd() if key in report.overridden else folder
        path = _absolute(start / os.path.expanduser(value))  # noqa: PTH111 - never raises
        exists = os.access(path, os.F_OK)
        if key[0] == "model" and not (exists or _is_path(value)):
            continue  # a Hub name
        if check_paths and not exists:
            report.add(key, f"is {_shown(value)}, but there is no {path}; correct the path")
        yield key, path


def _absolute(path: Path) -> str:
    """`path` from the root and without "..", but with its symbolic links: they carry file names."""
    return os.path.abspath(path)  # noqa: PTH100


def _is_path(value: str) -> bool:
    return value in (".", "..") or value.startswith(("./", "../", "/", "~"))


# For messages


def _shown(value: Any) -> str:
    """A TOML value for a message, on one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    try:
        text = repr(value) if isinstance(value, str | list) else str(value)
    except ValueError:  # Python's limit on the digits of a number
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _shown_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,60}", key) else _shown(key)
