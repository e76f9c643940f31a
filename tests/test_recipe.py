"""Recipes: what is read, what is refused and how it is said, and that they survive a round trip."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples
from pydantic import ValidationError

from mlx_tuner.errors import RecipeError
from mlx_tuner.recipe import peer_names
from mlx_tuner.recipe.load import MAX_RECIPE_BYTES, load_recipe, parse_recipe
from mlx_tuner.recipe.tables import TABLES, Recipe
from mlx_tuner.recipe.toml_lines import NestingError, key_lines

MINIMAL = """\
[model]
path = "builtin:tiny-qwen"

[data]
train = "rows.jsonl"

[lora]
rank = 16

[train]
epochs = 3
"""


def parse(text: str, *overrides: str, folder: Path = Path("/recipes")) -> Recipe:
    return parse_recipe(text, source="a.toml", folder=folder, overrides=overrides)


def faults(text: str, *overrides: str) -> list[str]:
    """The lines that a recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == 2
    return [str(fault) for fault in caught.value.faults]


def load_faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [str(fault) for fault in caught.value.faults]


# What a recipe says


def test_a_minimal_recipe_has_the_documented_defaults() -> None:
    recipe = parse(MINIMAL)
    assert recipe.name == "a"
    assert recipe.model.path == "builtin:tiny-qwen"
    assert recipe.data.model_dump() == {
        "train": "/recipes/rows.jsonl",
        "valid": None,
        "limit": None,
        "shuffle": True,
        "mask_prompt": True,
        "max_seq_length": 2048,
        "system_prompt": None,
        "chat_template": {},
        "on_bad_row": "error",
        "on_long_row": "truncate",
    }
    assert recipe.lora.model_dump() == {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "num_layers": None,
        "variant": "lora",
        "init_from": None,
    }
    assert recipe.train.model_dump() == {
        "epochs": 3,
        "max_steps": None,
        "batch_size": 8,
        "micro_batch_tokens": "auto",
        "learning_rate": 2e-4,
        "lr_schedule": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lora_plus_ratio": 1.0,
        "neftune_noise": 0.0,
        "gradient_checkpointing": False,
        "log_every": 10,
        "eval_every": None,
        "save_every": 10,
        "early_stopping_patience": 0,
        "seed": 42,
    }


def test_scale_is_alpha_over_rank() -> None:
    assert parse(MINIMAL, "lora.rank=8", "lora.alpha=20").lora.scale == 2.5


def test_a_whole_number_stands_for_a_float_but_not_the_other_way_round() -> None:
    assert parse(MINIMAL + "learning_rate = 1").train.learning_rate == 1.0
    [fault] = faults(MINIMAL + "batch_size = 8.0")
    assert fault.startswith("a.toml:12: train.batch_size: is 8.0; give a whole number")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse(MINIMAL)
    with pytest.raises(ValidationError):
        recipe.lora.rank = 3
    with pytest.raises(AttributeError):
        recipe.name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.valid", "0.1", 0.1),
        ("data.valid", '"v.jsonl"', "/recipes/v.jsonl"),
        ("lora.target_modules", '"all-linear"', "all-linear"),
        ("lora.target_modules", '["q_proj"]', ("q_proj",)),
        ("train.micro_batch_tokens", "4096", 4096),
        ("data.on_long_row", '"skip"', "skip"),
        ("data.system_prompt", '""', ""),
    ],
)
def test_keys_of_several_types_take_each_of_them(key: str, value: str, expected: Any) -> None:
    table, name = key.split(".")
    recipe = parse(MINIMAL.replace(f"[{table}]", f"[{table}]\n{name} = {value}"))
    assert getattr(getattr(recipe, table), name) == expected


def test_every_option_has_a_description_and_every_number_has_bounds() -> None:
    for table in TABLES.values():
        for name, option in table.model_fields.items():
            assert option.description, name
            if option.annotation in (int, float, int | None):
                assert len(option.metadata) >= 2, f"{name} needs a lower and an upper bound"


@pytest.mark.parametrize("name", ["quickstart", "first", "improved", "codealpaca"])
def test_every_shipped_recipe_loads_and_opens_with_its_launch_command(
    root: Path, name: str
) -> None:
    file = root / "recipes" / f"{name}.toml"
    recipe = load_recipe(file)
    assert recipe.name == name
    assert f"mlx-tune run recipes/{name}.toml" in file.read_text("utf-8").split("\n\n")[0]
    offline = ["model.path=builtin:tiny-qwen", f"data.train={root}/data/first.jsonl"]
    assert load_recipe(file, offline).model.path == "builtin:tiny-qwen"


def test_no_other_recipe_is_shipped_untested(root: Path) -> None:
    names = {file.stem for file in (root / "recipes").iterdir()}
    assert names == {"quickstart", "first", "improved", "codealpaca"}


@pytest.mark.parametrize(
    ("name", "rank", "epochs", "batch_size", "warmup_steps", "log_every"),
    [("first", 8, 3, 4, 0, 1), ("improved", 16, 5, 4, 0, 1), ("codealpaca", 16, 3, 8, 10, 10)],
)
def test_the_recorded_runs_are_shipped_with_their_numbers(
    root: Path,
    name: str,
    rank: int,
    epochs: int,
    batch_size: int,
    warmup_steps: int,
    log_every: int,
) -> None:
    recipe = load_recipe(root / "recipes" / f"{name}.toml")
    train = recipe.train
    assert recipe.model.path == "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    assert recipe.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (recipe.lora.rank, train.epochs, train.batch_size) == (rank, epochs, batch_size)
    assert (train.warmup_steps, train.log_every) == (warmup_steps, log_every)
    assert (train.learning_rate, train.lr_schedule) == (2e-4, "linear")


# What is refused


def test_every_fault_is_reported_at_once_in_the_order_of_the_lines() -> None:
    text = MINIMAL.replace("rank = 16", "rank = true\nr = 8").replace("epochs = 3", "seed = -1")
    assert faults(text) == [
        "a.toml:8: lora.rank: is true; give a whole number (inner size of the two factors)",
        "a.toml:9: lora.r: unknown key; here it is `lora.rank`",
        "a.toml:11: train.epochs: is missing; give train.epochs or train.max_steps",
        "a.toml:12: train.seed: is -1; give 0 or more (of order, dropout and initial weights)",
    ]


def test_all_missing_keys_are_listed() -> None:
    assert [fault.split(": is missing; ")[0] for fault in faults("")] == [
        "a.toml: model.path",
        "a.toml: data.train",
        "a.toml: train.epochs",
    ]


@pytest.mark.parametrize(
    ("table", "line", "said"),
    [
        ("model", "path = 3", "model.path: is 3; give a string"),
        ("model", 'path = ""', "model.path: is ''; give a path"),
        ("data", 'train = "a\\u0000b"', "data.train: is 'a\\x00b'; give a path"),
        ("data", 'train = "hub:rows"', "data.train: is 'hub:rows'; give \"hub:OWNER/NAME\""),
        ("data", "valid = 1", "data.valid: is 1; give a path, or a fraction between 0 and 1"),
        ("data", "valid = 1.0", "data.valid: is 1.0; give a path, or a fraction"),
        ("data", "valid = 0.0", "data.valid: is 0.0; give a path, or a fraction"),
        ("data", "valid = true", "data.valid: is true; give a path, or a fraction"),
        ("data", "limit = 0", "data.limit: is 0; give 1 or more"),
        ("data", "shuffle = 1", "data.shuffle: is 1; give true or false"),
        ("data", "max_seq_length = 1", "data.max_seq_length: is 1; give 2 or more"),
        ("data", 'on_bad_row = "x"', "data.on_bad_row: is 'x'; give 'error' or 'skip'"),
        ("data", 'on_long_row = "cut"', "data.on_long_row: is 'cut'; give 'truncate', 'skip' or"),
        ("lora", "rank = 0", "lora.rank: is 0; give 1 or more"),
        ("lora", "rank = true", "lora.rank: is true; give a whole number"),
        ("lora", 'rank = "16"', "lora.rank: is '16'; give a whole number"),
        ("lora", "rank = {}", "lora.rank: is a table; give a whole number"),
        ("lora", "alpha = 0", "lora.alpha: is 0; give more than 0"),
        ("lora", "alpha = nan", "lora.alpha: is nan; give a finite number"),
        ("lora", "dropout = 1.0", "lora.dropout: is 1.0; give less than 1"),
        ("lora", "dropout = false", "lora.dropout: is false; give a number"),
        ("lora", "target_modules = []", "lora.target_modules: is []; give a list"),
        ("lora", 'target_modules = "q_proj"', "lora.target_modules: is 'q_proj'; give a list"),
        ("lora", 'target_modules = ["q", 1]', "lora.target_modules: is ['q', 1]; give a list"),
        ("lora", "num_layers = 0", "lora.num_layers: is 0; give 1 or more"),
        ("train", "learning_rate = inf", "train.learning_rate: is inf; give a finite number"),
        ("train", "learning_rate = 1e999", "train.learning_rate: is inf; give a finite number"),
        ("train", "learning_rate = 0.0", "train.learning_rate: is 0.0; give more than 0"),
        ("train", "learning_rate = 2024-01-01", "train.learning_rate: is 2024-01-01; give a num"),
        ("train", "batch_size = 0", "train.batch_size: is 0; give 1 or more"),
        ("train", f"batch_size = 1{'0' * 30}", f"train.batch_size: is 1{'0' * 30}; give 1000000 "),
        ("train", f"batch_size = 0x1{'0' * 5000}", "is a number of thousands of digits; give 1000"),
        ("train", f"learning_rate = 0x1{'0' * 5000}", "train.learning_rate: is a number of thou"),
        ("train", "micro_batch_tokens = 0", 'train.micro_batch_tokens: is 0; give "auto", or a'),
        ("train", 'lr_schedule = "step"', "is 'step'; give 'constant', 'linear' or 'cosine'"),
        ("train", "seed = 4294967296", "train.seed: is 4294967296; give less than 4294967296"),
        ("train", "max_steps = 3", "train.max_steps: is given beside train.epochs; keep one"),
        ("train", "early_stopping_patience = 2", "needs validation rows; give data.valid, or 0"),
    ],
)
def test_a_wrong_value_is_said_with_its_line_and_what_to_give(
    table: str, line: str, said: str
) -> None:
    key = line.split(" ")[0]
    lines = [row for row in MINIMAL.split("\n") if not row.startswith(f"{key} =")]
    at = lines.index(f"[{table}]") + 1
    lines.insert(at, line)
    [fault] = faults("\n".join(lines))
    assert fault.startswith(f"a.toml:{at + 1}: {table}.{key}: ")
    assert said in fault
    assert len(fault) < 250


def test_warm_up_longer_than_max_steps_is_refused_with_both_numbers() -> None:
    text = MINIMAL.replace("epochs = 3", "max_steps = 5\nwarmup_steps = 6")
    [fault] = faults(text)
    assert fault == "a.toml:12: train.warmup_steps: is 6, more than the 5 steps; lower it"
    assert parse(text.replace("= 6", "= 5")).train.warmup_steps == 5


@pytest.mark.parametrize(
    ("table", "key", "said"),
    [
        ("lora", "rnak", "unknown key; did you mean `rank`?"),
        ("lora", "r", "unknown key; here it is `lora.rank`"),
        ("lora", "lora_alpha", "unknown key; here it is `lora.alpha`"),
        ("lora", "scale", "unknown key; scale is alpha / rank; write `lora.alpha` = scale * rank"),
        ("lora", "mask_prompt", "is in the wrong table; write it under [data]"),
        ("lora", "lora_layers", "unknown key; here it is `lora.num_layers`"),
        ("train", "max_seq_len", "unknown key; here it is `data.max_seq_length`"),
        ("train", "iters", "unknown key; write `train.max_steps` (optimizer steps, not"),
        ("train", "num_train_epochs", "unknown key; here it is `train.epochs`"),
        ("train", "gradient_accumulation_steps", "unknown key; `train.batch_size` is the rows of"),
        ("train", "LR", "unknown key; here it is `train.learning_rate`"),
        ("train", "lr-scheduler-type", "unknown key; here it is `train.lr_schedule`"),
        ("train", "batch-size", "unknown key; did you mean `batch_size`?"),
        ("train", "target_module", "unknown key; did you mean `target_modules`?"),
        ("train", "adapter_path", "unknown key; the run directory is adapters/NAME"),
        ("model", "quux", "unknown key; [model] has path, revision"),
        ("data", '"a\\u001b[31m"', "data.'a\\x1b[31m': unknown key"),
        ("data", "x" * 2000, "unknown key; [data] has train, "),
    ],
)
def test_an_unknown_key_is_answered_with_ours(table: str, key: str, said: str) -> None:
    [fault] = faults(MINIMAL.replace(f"[{table}]", f"[{table}]\n{key} = 1"))
    assert said in fault
    assert fault.startswith("a.toml:")
    assert fault.isprintable()
    assert len(fault) < 250


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\n", "a.toml:1: trian: unknown table; did you mean `train`?"),
        ("[xyz]\n", "a.toml:1: xyz: unknown table; a recipe has [model], [data], [lora], [train]"),
        ("rank = 8\n", "a.toml:1: rank: is outside its table; write it under [lora]"),
        ("iters = 8\n", "a.toml:1: iters: unknown key; write `train.max_steps`"),
    ],
)
def test_an_unknown_table_or_a_key_outside_of_tables_is_told_where_it_belongs(
    text: str, said: str
) -> None:
    [fault] = faults(text + MINIMAL)
    assert fault.startswith(said)


def test_a_value_in_the_place_of_a_table_is_refused() -> None:
    [fault] = faults("lora = 16\n" + MINIMAL.replace("[lora]\nrank = 16\n", ""))
    assert fault == "a.toml:1: lora: is 16; write its keys under [lora]"
    [fault] = faults(MINIMAL.replace("[lora]", "[[lora]]"))
    assert fault.startswith("a.toml:7: lora: is [{'rank': 16}]; write its keys under [lora]")


@pytest.mark.parametrize("name", [*peer_names.RENAMED, *peer_names.ANSWERED])
def test_a_peers_name_is_not_one_of_our_keys_and_is_answered_with_a_key_that_exists(
    name: str,
) -> None:
    assert not any(name in table.model_fields for table in TABLES.values())
    if name in peer_names.RENAMED:
        table, key = peer_names.RENAMED[name].split(".")
        assert key in TABLES[table].model_fields
        assert name not in peer_names.ANSWERED


def test_the_named_keys_of_the_best_known_peers_are_all_answered() -> None:
    names = {
        "adapter_path",
        "grad_accumulation_steps",
        "r",
        "lora_r",
        "lr_scheduler_type",
        "lora_alpha",
        "iters",
        "lr",
        "lora_layers",
        "per_device_train_batch_size",
        "steps_per_eval",
        "num_train_epochs",
        "logging_steps",
        "scale",
        "output_dir",
        "lora_dropout",
        "max_seq_len",
        "num_iters",
        "grad_checkpoint",
        "steps_per_report",
        "eval_steps",
        "val_batches",
        "max_length",
        "gradient_accumulation_steps",
        "num_epochs",
        "save_steps",
    }
    assert names <= peer_names.RENAMED.keys() | peer_names.ANSWERED.keys()


# TOML that cannot be read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\npath = \n", "a.toml:2:8: Invalid value; correct the TOML here"),
        ("[model\n", "a.toml:1:7: "),
        ('[model]\npath = "x', "a.toml:2: "),
        ("[lora]\nrank = 1\nrank = 2\n", "a.toml:3:9: a key or table is given twice; keep one"),
        ("[lora]\n\n[lora]\n", "a.toml:3:6: a key or table is given twice; keep one"),
        ("# a\n\0\n", "a.toml:2: a NUL character; save the file as UTF-8 text"),
        ("# a\n# b\r# c", "a.toml:2: a carriage return without a line feed; save"),
        ("\n\na = " + "9" * 5000, "a.toml:3: a number of thousands of digits; shorten it"),
        ("\na = " + "[" * 100_000, "a.toml:2: nested deeper than 64 levels"),
        ("a = " + "{a=" * 100_000, "a.toml:1: nested deeper than 64 levels"),
        ("\na" + ".a" * 100_000 + " = 1", "a.toml:2: nested deeper than 64 levels"),
        ("[a" + ".a" * 100_000 + "]", "a.toml:1: nested deeper than 64 levels"),
    ],
)
def test_broken_toml_is_refused_with_its_line(text: str, said: str) -> None:
    [fault] = faults(text)
    assert fault.startswith(said)


@pytest.mark.slow
def test_thousands_of_faults_stay_few_and_quick() -> None:
    text = "[train]\n" + "\n".join(f"key_{n} = 1" for n in range(60_000))
    assert len(faults(text)) == 100


def test_crlf_line_ends_are_fine() -> None:
    assert parse(MINIMAL.replace("\n", "\r\n")) == parse(MINIMAL)


@given(text=st.text(st.sampled_from("[]{}=.,\"'\\#\n\t abz_-019:+\r\x00\ufeff"), max_size=60))
@settings(max_examples=examples(300))
def test_no_text_makes_anything_but_recipe_faults(text: str) -> None:
    for mutant in (text, MINIMAL + text, MINIMAL.replace("16", text)):
        try:
            parse(mutant)
            continue
        except RecipeError as error:
            said = [str(fault) for fault in error.faults]
        assert said
        assert all(fault.startswith("a.toml") for fault in said)


# Files that cannot be read


def test_a_missing_file_a_folder_and_an_oversized_file_are_named(tmp_path: Path) -> None:
    assert load_faults(tmp_path / "no.toml") == [
        f"{tmp_path}/no.toml: cannot be read (No such file or directory); give a recipe's file, "
        "or a shipped one: codealpaca, first, improved, quickstart"
    ]
    assert load_faults(tmp_path) == [f"{tmp_path}: is a directory; give a recipe's file"]
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    [fault] = load_faults(big)
    assert fault.startswith(f"{big}: has 1048577 bytes, more than the 1048576 of a recipe")


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    [fault] = load_faults(tmp_path / "fifo")
    assert "is not a regular file" in fault


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (MINIMAL.encode("utf-16"), ":1: is UTF-16; save it as UTF-8"),
        (MINIMAL.encode("utf-16-le"), ":1: a NUL character; save the file as UTF-8 text"),
        (b"# fine\n# caf\xe9\n", ":2: byte 12 is not UTF-8 (invalid continuation byte); save"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    [fault] = load_faults(tmp_path / "r.toml")
    assert fault.startswith(f"{tmp_path}/r.toml{said}")


def test_a_byte_order_mark_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    with caplog.at_level(logging.WARNING):
        assert load_recipe(tmp_path / "r.toml").lora.rank == 16
    assert "starts with a byte order mark" in caplog.text


# Overrides


def test_an_override_is_a_toml_value_or_a_bare_word() -> None:
    recipe = parse(
        MINIMAL,
        "lora.rank=8",
        "train.learning_rate = 1e-3",
        "train.lr_schedule=cosine",
        "data.shuffle=false",
        "data.system_prompt='3'",
        'lora.target_modules=["q_proj"]',
        "model.path=Qwen/Qwen2.5-0.5B=x",
        "lora.rank=4",
    )
    assert recipe.lora.rank == 4
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.lr_schedule == "cosine"
    assert recipe.data.shuffle is False
    assert recipe.data.system_prompt == "3"
    assert recipe.lora.target_modules == ("q_proj",)
    assert recipe.model.path == "Qwen/Qwen2.5-0.5B=x"


def test_an_override_may_give_what_the_recipe_lacks() -> None:
    assert parse('[data]\ntrain="x"', "model.path=builtin:x", "train.max_steps=3").train.max_steps


def test_a_length_from_the_command_line_takes_the_place_of_the_recipes() -> None:
    recipe = parse(MINIMAL, "train.max_steps=5")
    assert (recipe.train.max_steps, recipe.train.epochs) == (5, None)
    [fault] = faults(MINIMAL, "train.max_steps=5", "train.epochs=2")
    assert fault.startswith("--set train.max_steps: is given beside train.epochs")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rank=8", "--set 'rank=8': is not of the form table.key=value"),
        ("lora.rank", "--set 'lora.rank': is not of the form table.key=value"),
        ("=8", "--set '=8': is not of the form"),
        ("lora.=8", "--set 'lora.=8': is not of the form"),
        ("lora.rank=", "--set lora.rank: '' is not a TOML value"),
        ("lora.rank=0", "--set lora.rank: is 0; give 1 or more"),
        ("lora.rank=eight", "--set lora.rank: is 'eight'; give a whole number"),
        ("lora.rank.x=8", "--set lora.'rank.x': unknown key; did you mean `rank`?"),
        ("lora.r=8", "--set lora.r: unknown key; here it is `lora.rank`"),
        ("lroa.rank=8", "--set lroa.rank: unknown table; did you mean `lora`?"),
        ("lora.target_modules=[q_proj]", "--set lora.target_modules: '[q_proj]' is not a TOML"),
        ("model.path='x", '--set model.path: "\'x" is not a TOML value'),
        ("model.path=1\n[lora]", "--set model.path: '1\\n[lora]' is not a TOML value"),
        ("lora.rank=" + "9" * 5000, "--set lora.rank: is '9999"),
        ("lora.alpha=" + "[" * 9999, "--set lora.alpha: '[[[["),
    ],
)
def test_a_wrong_override_is_said_as_it_was_given(override: str, said: str) -> None:
    [fault] = faults(MINIMAL, override)
    assert fault.startswith(said)
    assert len(fault) < 250


# Paths


def test_paths_start_from_the_recipes_folder_and_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "Qwen" / "here").mkdir(parents=True)
    paths = {
        "Qwen/Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B",
        "builtin:tiny-qwen": "builtin:tiny-qwen",
        "Qwen/here": f"{tmp_path}/Qwen/here",
        "./model": f"{tmp_path}/model",
        "../model": f"{tmp_path.parent}/model",
        "/models/m": "/models/m",
        "~/m": str(Path.home() / "m"),
    }
    for written, expected in paths.items():
        text = MINIMAL.replace("builtin:tiny-qwen", written)
        assert parse(text, folder=tmp_path).model.path == expected
    hub = MINIMAL.replace("rows.jsonl", "hub:owner/name/file.json")
    assert parse(hub, folder=tmp_path).data.train == "hub:owner/name/file.json"


def test_paths_of_overrides_start_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").touch()
    (tmp_path / "recipes").mkdir()
    file = tmp_path / "recipes" / "r.toml"
    file.write_text(MINIMAL)
    assert load_recipe(file, ["data.train=other.jsonl"]).data.train == f"{tmp_path}/other.jsonl"


def test_a_path_that_leads_nowhere_names_its_key_and_where_it_was_looked_for(
    tmp_path: Path,
) -> None:
    file = tmp_path / "r.toml"
    file.write_text(MINIMAL.replace("rank = 16", 'rank = 0\ninit_from = "old"'))
    assert load_faults(file, "model.path=./none")[::2] == [
        f"{file}:5: data.train: is 'rows.jsonl', but there is no {tmp_path}/rows.jsonl; "
        "correct the path",
        f"{file}:9: lora.init_from: is 'old', but there is no {tmp_path}/old; correct the path",
    ]
    record = MINIMAL.replace("[lora]", '[lora]\ninit_from = "old"')
    file.write_text(record)
    assert load_recipe(file, check_paths=False).lora.init_from == f"{tmp_path}/old"


def test_the_recipe_in_a_run_directory_has_the_name_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "recipe.toml").write_text(MINIMAL)
    assert load_recipe(tmp_path / "first" / "recipe.toml", check_paths=False).name == "first"


# Written back

_words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
_paths = _words.map(lambda word: f"/{word}")
_steps = st.integers(1, 10**9)
_recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"path": _paths | st.just("Qwen/x")}, optional={"revision": _words}
        ),
        "data": st.fixed_dictionaries(
            {"train": _paths | st.just("hub:a/b/c.json")},
            optional={
                "valid": _paths | st.floats(1e-300, 0.999),
                "limit": st.integers(1, 10**12),
                "shuffle": st.booleans(),
                "max_seq_length": st.integers(2, 10**9),
                "system_prompt": st.text(st.characters(exclude_categories=["Cs"])),
                "on_long_row": st.sampled_from(["truncate", "skip", "error"]),
            },
        ),
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 65536),
                "alpha": st.floats(1e-300, 1e6) | st.integers(1, 100),
                "dropout": st.floats(0, 1, exclude_max=True),
                "target_modules": st.lists(_words, min_size=1) | st.just("all-linear"),
                "init_from": _paths,
            },
        ),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "batch_size": st.integers(1, 10**6),
                "micro_batch_tokens": _steps | st.just("auto"),
                "learning_rate": st.floats(1e-300, 1),
                "lr_schedule": st.sampled_from(["constant", "linear", "cosine"]),
                "seed": st.integers(0, 2**32 - 1),
            },
        ).flatmap(
            lambda train: st.sampled_from(["epochs", "max_steps"]).map(
                lambda length: train | {length: 7}
            )
        ),
    }
)


@given(tables=_recipes)
@settings(max_examples=examples(150))
def test_a_recipe_written_back_parses_to_an_equal_recipe(tables: dict[str, Any]) -> None:
    recipe = parse(tomli_w.dumps(tables))
    assert parse(recipe.to_toml()) == recipe


def test_a_relative_recipe_written_back_means_the_same_elsewhere(root: Path) -> None:
    recipe = load_recipe(root / "recipes" / "improved.toml")
    again = parse_recipe(recipe.to_toml(), source="improved.toml", folder=Path("/elsewhere"))
    for table in TABLES:
        assert getattr(again, table) == getattr(recipe, table)


@pytest.mark.parametrize("written", ["inline", "as a table", "overridden"])
def test_variables_of_the_chat_template_are_plain_values_and_written_back(written: str) -> None:
    table = {
        "inline": MINIMAL.replace(
            "[data]", '[data]\nchat_template = {enable_thinking = false, style = "x"}'
        ),
        "as a table": MINIMAL + '\n[data.chat_template]\nenable_thinking = false\nstyle = "x"\n',
        "overridden": MINIMAL,
    }[written]
    override = 'data.chat_template={enable_thinking = false, style = "x"}'
    recipe = parse(table, *[override] * (written == "overridden"))
    assert recipe.data.chat_template == {"enable_thinking": False, "style": "x"}
    assert parse(recipe.to_toml()).data == recipe.data


@pytest.mark.parametrize("value", ["{tools = 1}", "{tokenize = true}", "{'a b' = 1}", "{a = [1]}"])
def test_a_variable_that_is_the_templates_own_or_no_plain_value_is_refused(value: str) -> None:
    (line,) = faults(MINIMAL, f"data.chat_template={value}")
    assert "data.chat_template: is a table; give variables" in line


def test_what_is_written_has_every_default_and_no_absent_key() -> None:
    text = parse(MINIMAL).to_toml()
    written = {key for table, *keys in key_lines(text) if table == "train" for key in keys}
    assert written == TABLES["train"].model_fields.keys() - {"max_steps", "eval_every"}
    assert "learning_rate = 0.0002\n" in text
    assert "revision" not in text


# Lines of keys


def test_lines_are_found_under_headers_dotted_inline_and_past_strings() -> None:
    text = '''\
top.a = "[x] = 1"  # lora.rank = 3
[model]
path = """
[fake]
a = \\""" 'b'
"""
[ data ] # c
"train" = ['''
    text += """[1], {a = "}"},
  2]
valid = 'x\\'
lora.rank = 4
[[many]]
x = { y = 1, z = {w = 2} }
"""
    assert key_lines(text) == {
        ("top",): 1,
        ("top", "a"): 1,
        ("model",): 2,
        ("model", "path"): 3,
        ("data",): 7,
        ("data", "train"): 8,
        ("data", "valid"): 10,
        ("data", "lora"): 11,
        ("many",): 12,
        ("many", "x"): 13,
    }
    assert key_lines("lora = {rank = 1,\n 'alpha'=2}")[("lora", "alpha")] == 2


@given(tables=_recipes)
@settings(max_examples=examples(100))
def test_every_key_of_a_valid_text_has_a_line_that_mentions_it(tables: dict[str, Any]) -> None:
    text = tomli_w.dumps(tables)
    lines = key_lines(text)
    for table, content in tables.items():
        for key in content:
            assert text.split("\n")[lines[table, key] - 1].startswith(f"{key} = ")


def test_nesting_deeper_than_sixty_four_is_said_with_its_line() -> None:
    key_lines("a = " + "[" * 64)
    with pytest.raises(NestingError) as caught:
        key_lines("\na = " + "[" * 65)
    assert caught.value.line == 2


# Imports


def test_reading_a_recipe_imports_no_heavy_module() -> None:
    heavy = {"mlx", "numpy", "transformers", "matplotlib", "huggingface_hub", "mlx_lm"}
    code = "import sys, mlx_tuner.recipe.tables, mlx_tuner.recipe.schedule; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())
