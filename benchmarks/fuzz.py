"""Mutants of everything that a stranger may send: refused in a line or taken, and nothing else.

Each kind of file is spoiled in so many ways, one after the other, and given to the function that
the commands give it to. Wrong is an exception other than `TunerError`, more than 5 s of processors'
time (a busy machine is no fault of ours) or 30 s of the clock, more than 1 GB of memory, anything
that a library prints by itself, and any change on the disk by one that is refused. A mutant depends
on its number alone, so `--first N --count 1` shows it again.

    python benchmarks/fuzz.py [--kind KIND] [--count 20000] [--first 0]

What came of each kind is kept in `benchmarks/results/fuzz.json`, beside that of the other kinds.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import count as counting
from pathlib import Path
from typing import IO, Any

import harness
import mlx.core as mx

from mlx_tuner.errors import TunerError
from mlx_tuner.models.adapter import Adapter, write_adapter
from mlx_tuner.models.adapter_folder import import_adapter
from mlx_tuner.models.architecture import parameter_count, skeleton
from mlx_tuner.models.folder import check_folder
from mlx_tuner.models.model import load, load_tokenizer
from mlx_tuner.models.model_files import check_model_folder
from mlx_tuner.models.peft_format import write_peft
from mlx_tuner.recipe import shipped
from mlx_tuner.recipe.load import load_recipe, parse_recipe
from mlx_tuner.training.assembly import open_data

COUNT = 20_000
SECONDS = 5
MEGABYTES = 1_000
BUILTIN = Path(__file__).resolve().parent.parent / "mlx_tuner" / "builtin" / "tiny-qwen"

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**39, 10**400,
    0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"), "", "a", "\x00", "\x1b[2K", "\ud800",
    "x" * 5_000, "../../etc/passwd", "/etc/passwd", "hub:a/b", "(a+)+$", ".*.*.*x", "[", "{{ x }}",
    "{% for i in range(99999) %}{% endfor %}", "float8_e4m3fn", "lora", "qwen3_moe", [], [[]], {},
    [None], [1, 2], [2**40], ["a"], {"a": 1}, {"": None}, {"q_proj": 3}, {".*": 10**9},
    json.loads("[" * 90 + "]" * 90),
]  # fmt: skip
KEYS = [
    "rank", "r", "scale", "keys", "alpha_pattern", "rank_pattern", "use_dora", "auto_map", "model",
    "model_type", "quantization", "rope_scaling", "text_config", "vocab_size", "num_experts",
    "hidden_size", "num_hidden_layers", "head_dim", "tokenizer_class", "chat_template", "vocab",
    "tool_parser_type", "layer_types", "torch_dtype", "eos_token_id", "9" * 5_000, "", "\x00",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def mutated_json(rng: random.Random, text: str) -> bytes:
    """A JSON text with up to four changes of structure, and sometimes one of its bytes."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 4)):
        there = places(value)
        container, key = rng.choice(there) if there else (value, None)
        kind = rng.randrange(6)
        if kind == 0 and key is not None:
            del container[key]
        elif kind == 1:
            other, name = rng.choice(there) if there else (value, None)
            container[key] = copy.deepcopy(other[name]) if name is not None else 0
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice(KEYS)] = copy.deepcopy(rng.choice(NASTY))
        elif key is not None:
            container[key] = copy.deepcopy(rng.choice(NASTY))
    return (
        mutated_bytes(rng, json.dumps(value).encode())
        if rng.random() < 0.2
        else (json.dumps(value).encode())
    )


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one changed, cut off, doubled or put in."""
    changed = bytearray(data)
    at = rng.randrange(len(changed) + 1)
    match rng.randrange(5):
        case 0:
            del changed[at:]
        case 1:
            changed[at:at] = bytes([rng.randrange(256)])
        case 2:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        case 3:
            changed[at:at] = changed[: rng.randrange(len(changed) + 1)]
        case 4:
            changed[at:at] = rng.choice(
                [b"\x00", b"\xff", b"[" * 2_000, b"9" * 5_000, b"\xef\xbb\xbf"]
            )
    return bytes(changed)


# ---- what is spoiled, and who reads it -----------------------------------------------------------


def small_model(folder: Path) -> Path:
    """A model of one block and 300 tokens, quick to write again and to load."""
    folder.mkdir(parents=True)
    tokenizer = json.loads((BUILTIN / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    kept = {token: i for token, i in vocabulary.items() if i < 256}
    tokenizer["model"] |= {"vocab": kept, "merges": []}
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = 256 + i
    ends = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(BUILTIN / "tokenizer_config.json", folder)
    config = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 32, "vocab_size": 300,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "torch_dtype": "float32", "eos_token_id": ends["<|im_end|>"],
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = skeleton(config).parameters()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(flat(weights)))
    return folder


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(tree))


def small_adapter() -> Adapter:
    paths = [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    tensors = {}
    for path in paths:
        tensors[f"{path}.lora_a"] = mx.random.normal((32, 2))
        tensors[f"{path}.lora_b"] = mx.random.normal((2, 32 if "q" in path else 16))
    return Adapter(tensors, rank=2, scale=2.5, num_layers=1, base="acme/tiny")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ROWS = [
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}], "tools": [TOOL]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]},
                  {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"}]},
]  # fmt: skip


class Kind:
    """One kind of file: where it lies, what it was, how it is spoiled, and who reads it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder / name
        self.spoil: Callable[[random.Random, str], bytes] = mutated_json
        getattr(self, name)()

    def adapter(self) -> None:
        self.folder.mkdir()
        write_adapter(self.folder, small_adapter())
        self._imports("adapter_config.json")

    def peft(self) -> None:
        self.folder.mkdir()
        write_peft(self.folder, small_adapter())
        self._imports("adapter_config.json")

    def _imports(self, name: str) -> None:
        output = self.folder.with_name("imported")

        def read() -> None:
            import_adapter(self.folder, output)
            shutil.rmtree(output)

        self.files, self.read = [self.folder / name], read

    def config(self) -> None:
        small_model(self.folder)

        def read() -> None:
            parameter_count(skeleton(check_folder(self.folder)))
            check_model_folder(self.folder)
            model = load(self.folder).model
            mx.eval(model(mx.array([[1, 2, 3]])))

        self.files, self.read = [self.folder / "config.json"], read

    def tokenizer(self) -> None:
        small_model(self.folder)

        def read() -> None:
            tokenizer = load_tokenizer(self.folder)
            ids = tokenizer.encode("def f(x):\n    return 'é'")
            assert max(ids, default=0) < 300, ids

        self.files = [self.folder / "tokenizer.json", self.folder / "tokenizer_config.json"]
        self.read = read

    def recipe(self) -> None:
        self.folder.mkdir()
        path = self.folder / "fuzzed.toml"
        path.write_text(shipped.recipes()["quickstart"].read_text())
        self.spoil = mutated_toml
        self.files, self.read = [path], lambda: load_recipe(path, check_paths=False)

    def rows(self) -> None:
        from click.testing import CliRunner

        from mlx_tuner.cli import main

        small_model(self.folder / "model")
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        tokenizer = load_tokenizer(self.folder / "model")
        text = (
            f'[model]\npath = "builtin:tiny-qwen"\n[data]\ntrain = "{path}"\n[train]\nmax_steps = 1'
        )
        recipe = parse_recipe(text, source="fuzz.toml", folder=self.folder)
        turns = counting()
        words = ["data", str(path), "--model", str(self.folder / "model")]

        def read() -> None:
            open_data(recipe, tokenizer)
            if next(turns) % 20:
                return  # the command takes ten times as long
            result = CliRunner().invoke(main, words)
            if "crash.log" in result.stderr:
                raise RuntimeError(result.stderr)
            if result.exit_code:
                raise TunerError(result.stderr)

        self.spoil = mutated_rows
        self.files, self.read = [path], read


def mutated_toml(rng: random.Random, text: str) -> bytes:
    """A recipe with keys added, taken away, moved or given another value."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        value = json.dumps(rng.choice(NASTY))
        match rng.randrange(5):
            case 0:
                del lines[at]
            case 1 if equals:
                lines[at] = f"{key}= {value}"
            case 2:
                lines.insert(at, f'"{rng.choice(KEYS)}" = {value}')
            case 3:
                lines.insert(at, rng.choice(lines))
            case _:
                lines[at] = mutated_bytes(rng, lines[at].encode()).decode("latin-1")
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def mutated_rows(rng: random.Random, text: str) -> bytes:
    """Rows of which one or two are spoiled."""
    lines: list[bytes] = text.encode().splitlines()
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        spoil = mutated_json if rng.random() < 0.7 else None
        try:
            lines[at] = spoil(rng, lines[at].decode()) if spoil else mutated_bytes(rng, lines[at])
        except (ValueError, RecursionError):  # spoiled before
            lines[at] = mutated_bytes(rng, lines[at])
    return b"\n".join(lines) + b"\n"


KINDS = ("adapter", "peft", "config", "tokenizer", "recipe", "rows")


# ---- the loop ------------------------------------------------------------------------------------


def snapshot(folder: Path, without: list[Path]) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path not in without:
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def silenced(output: IO[bytes]) -> Iterator[None]:
    """Send what is printed to `output`, where it does not go through Python's own streams."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def processor_seconds() -> float:
    """Of this process, and of children that have ended."""
    return sum(os.times()[:4])


def peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fuzz(kind: str, count: int, first: int = 0) -> dict[str, Any]:
    """Read so many mutants of a kind; what came of them, with every one that went wrong."""
    wrong: list[str] = []
    results: Counter[str] = Counter()
    slowest, start = 0.0, time.monotonic()
    alarm = os.dup(2)
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as output:
        subject = Kind(kind, Path(place).resolve())
        texts = {path: path.read_text() for path in subject.files}
        subject.read()  # it is good before it is spoiled
        there, most = snapshot(Path(place), subject.files), peak_bytes()
        for number in range(first, first + count):
            rng = random.Random(f"{kind} {number}")
            path = rng.choice(subject.files)
            path.write_bytes(subject.spoil(rng, texts[path]))
            # Code that Python cannot interrupt ends the process, with a traceback that says where.
            faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=alarm)
            began = processor_seconds()
            try:
                with silenced(output):
                    subject.read()
                results["taken"] += 1
            except TunerError as error:
                results["refused"] += 1
                if any("\n" in str(fault) or len(str(fault)) > 5_000 for fault in error.faults):
                    wrong.append(f"{number}: more than a line: {str(error)[:200]!r}")
            except BaseException:
                wrong.append(f"{number}: {traceback.format_exc()[-1500:]}")
            finally:
                faulthandler.cancel_dump_traceback_later()
            seconds = processor_seconds() - began
            slowest = max(slowest, seconds)
            if seconds > SECONDS:
                wrong.append(f"{number}: took {seconds:.1f} s")
            if peak_bytes() > most + MEGABYTES * 1_000_000:
                wrong.append(f"{number}: took {(peak_bytes() - most) / 1e9:.2f} GB")
                most = peak_bytes()
            if output.tell():
                output.seek(0)
                wrong.append(f"{number}: printed {output.read()[:200]!r}")
                output.seek(0)
                output.truncate()
            now = there if number % 50 else snapshot(Path(place), subject.files)
            if now != there:
                changed = sorted(dict(now.items() ^ there.items()))
                wrong.append(f"{number} or just before: wrote {changed[:5]}")
                there = now
            path.write_text(texts[path])
    return {
        "kind": kind,
        "count": count,
        **results,
        "wrong": wrong,
        "slowest_seconds": round(slowest, 2),
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """Fuzz the kinds that were asked for, print a line each, and exit 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    failed = False
    os.environ["HF_HUB_OFFLINE"] = "1"
    for kind in chosen.kind or KINDS:
        found = fuzz(kind, chosen.count, chosen.first)
        wrong = found.pop("wrong")
        found = {**found, "wrong": len(wrong)}
        print(json.dumps(found), flush=True)
        for each in wrong[:10]:
            print(each, flush=True)
        failed |= bool(wrong)
        if (chosen.count, chosen.first) == (COUNT, 0):
            harness.save("fuzz", {found.pop("kind"): [found]}, added=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
