"""Our conversion against mlx-lm's, on a random model of a real shape in two shards, turn by turn.

    python benchmarks/convert.py                    # Qwen2.5-0.5B shape, bfloat16 and 4 bits
    python benchmarks/convert.py --shape 1.5B --repeats 5

Each conversion runs in a process of its own. Ours checks the input, looks for NaN, hashes and
flushes what it writes to the disk; mlx-lm does none of that. `seconds` is without imports.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from harness import child, interleave, options, report, save, table
from shared import shared

FORMS = {"bfloat16": None, "4 bits": 4}
TOKENIZER = ("generation_config.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shape", default="0.5B", choices=["0.5B", "1.5B"])
    parser.add_argument("--form", choices=FORMS, help="only this form of the result")
    parser.add_argument("--make", type=Path, help="only write the model to this folder")
    parser.add_argument(
        "--one", choices=["ours", "ours, verified", "mlx-lm"], help="one turn, here"
    )
    parser.add_argument("--model", type=Path, help="the folder to convert in one turn")
    args = parser.parse_args()
    if args.make:
        make_model(args.make, args.shape)
    elif args.one:
        report(**measure(args.one, args.model, FORMS[args.form]))
    else:
        forms = [args.form] if args.form else list(FORMS)
        compare(args.shape, forms, args.repeats, args.name or f"convert-{args.shape}")


def compare(shape: str, forms: list[str], repeats: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        make_model(model, shape)
        for form in forms:
            variants = {
                variant: child("--one", variant, "--model", str(model), "--form", form)
                for variant in ("ours", "ours, verified", "mlx-lm")
            }
            runs = interleave(
                variants, repeats=repeats, warmups=1, on_result=lambda *turn: print(*turn)
            )
            print(form, table(runs, baseline="mlx-lm"), sep="\n\n")
            file = f"{name}-{form.replace(' ', '-')}"
            print(save(file, runs, baseline="mlx-lm", settings={"shape": shape, "form": form}))


def measure(variant: str, model: Path, bits: int | None) -> dict[str, float]:
    """Seconds that one conversion takes, of which the files are thrown away."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        output = Path(scratch) / "converted"
        os.sync()  # what an earlier turn wrote is not this one's burden
        if variant == "mlx-lm":
            from mlx_lm.convert import convert as convert_with_mlx_lm

            start = time.perf_counter()
            convert_with_mlx_lm(str(model), str(output), quantize=bits is not None, q_bits=bits)
        else:
            from mlx_tuner.conversion.convert import convert
            from mlx_tuner.show.progress import Display

            start = time.perf_counter()
            with Display() as display:
                verify = variant == "ours, verified"
                convert(str(model), output, display, bits=bits, verify=verify)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return {"seconds": seconds, "gb_per_second": size / seconds / 1e9}


def make_model(folder: Path, shape: str) -> None:
    """Write a bfloat16 model of a real shape in two shards, with the real tokenizer.

    Its weights are pieces of one pool of noise: drawing 1.5 billion numbers takes a minute.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_tuner.models.architecture import skeleton

    config = json.loads((shared() / "qwen2.5-coder" / f"config-{shape}.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(shared() / "qwen2.5-coder" / name, folder / name)
    pool = (0.02 * mx.random.normal((1 << 23,), key=mx.random.key(0))).astype(mx.bfloat16)
    mx.eval(pool)
    shapes = {n: v.shape for n, v in tree_flatten(skeleton(config).parameters())}
    half = len(shapes) // 2
    weight_map = {}
    for shard, names in enumerate((list(shapes)[:half], list(shapes)[half:]), 1):
        tensors = {}
        for number, name in enumerate(names):
            size = mx.zeros(shapes[name]).size
            noise = mx.tile(mx.roll(pool, 1009 * number), -(-size // pool.size))[:size]
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            tensors[name] = noise.reshape(shapes[name]) + mx.array(offset, mx.bfloat16)
            mx.eval(tensors[name])
        file = f"model-{shard:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    main()
