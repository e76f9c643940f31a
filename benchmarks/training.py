"""Our training step against mlx-lm's own, and PEFT's, on the same rows, turn by turn.

    python benchmarks/training.py                 # Qwen2.5-0.5B shape, 8 rows a step
    python benchmarks/training.py --model FOLDER --against mlx-lm peft      # real weights
    python benchmarks/training.py --scaling       # ours alone, 8 and 128 rows a step
    python benchmarks/training.py --targets       # ours alone, answers or every token learned
    python benchmarks/training.py --shape qwen3_5 --steps 1   # a small Qwen3.5
    python benchmarks/training.py --doubling      # ours alone, that one, and rows twice as long

Random weights of a real shape, or a model's; CodeAlpaca rows and the real tokenizer (`shared.py`).
Qwen3.5 is 8 blocks of 512 on random rows of 256 to 512 tokens. mlx-lm is its trainer's own loss,
batches and compiled step, whose shapes are compiled before it is timed. PEFT is on torch: the mean
over a step's targets, summed from padded passes of --peft-rows.
Each trainer runs in a process of its own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from harness import child, interleave, options, report, save, table
from shared import shared

from mlx_tuner.engine.batching import Example

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, SCALE, LEARNING_RATE = 8, 2.0, 1e-4
SMALL_PASS = 384
"""Tokens a pass of the variant that is to take less memory."""
QWEN3_5 = "qwen3_5"
SMALL = {
    "model_type": "qwen3_5_text",
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1152,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "full_attention_interval": 4,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "tie_word_embeddings": True,
}
"""25 M parameters, in the proportions of Qwen3.5-0.8B, with heads of half the size."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--one", choices=TRAINERS, help="measure one turn, here")
    parser.add_argument("--against", choices=["mlx-lm", "peft"], nargs="+", default=["mlx-lm"])
    parser.add_argument("--model", help="a model folder, in place of random weights of --shape")
    parser.add_argument("--peft-rows", type=int, default=2, help="rows of a forward pass of PEFT")
    parser.add_argument("--shape", default="0.5B", choices=["0.5B", "1.5B", QWEN3_5])
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--scaling", action="store_true", help="ours at --rows and 16 times that")
    parser.add_argument("--targets", action="store_true", help="ours, prompts masked and not")
    parser.add_argument("--doubling", action="store_true", help="ours, Qwen3.5, and longer rows")
    parser.add_argument("--longer", type=int, default=1, help="times that Qwen3.5's rows are long")
    parser.add_argument("--learn-prompts", action="store_true", help="every token is a target")
    args = parser.parse_args()
    if args.one:
        count = args.rows * args.steps
        if args.shape == QWEN3_5:
            rows = random_rows(count, args.longer)
        else:
            rows = load_rows(count, mask_prompt=not args.learn_prompts)
        report(**TRAINERS[args.one](args, rows))
        return

    keys = ("shape", "model", "layers", "dtype", "rows", "steps", "micro_batch_tokens", "peft_rows")
    settings = {key: getattr(args, key) for key in keys}

    def variant(name: str, **changes: Any) -> Any:
        flags = []
        for key, value in {**settings, **changes}.items():
            if value is True:
                flags.append(f"--{key.replace('_', '-')}")
            elif value:
                flags += [f"--{key.replace('_', '-')}", str(value)]
        return child("--one", name, *flags)

    if args.scaling:
        # The same rows at both sizes, so that only how many a step takes differs.
        rows = 16 * args.rows
        variants = {
            f"{args.rows} rows a step": variant("ours", steps=16, micro_batch_tokens=512),
            f"{rows} rows a step": variant("ours", rows=rows, steps=1, micro_batch_tokens=512),
        }
        baseline = f"{args.rows} rows a step"
    elif args.doubling:
        settings |= {"shape": QWEN3_5, "steps": 1}
        variants = {
            "256 to 512 tokens": variant("ours"),
            "512 to 1024 tokens": variant("ours", longer=2),
        }
        baseline = "256 to 512 tokens"
    elif args.targets:
        variants = {
            "every token a target": variant("ours", learn_prompts=True),
            "answers": variant("ours"),
        }
        baseline = "answers"
    else:
        variants = {"ours": variant("ours")}
        if args.shape != QWEN3_5:
            small = f"ours, {SMALL_PASS} tokens a pass"
            variants[small] = variant("ours", micro_batch_tokens=SMALL_PASS)
        variants |= {name: variant(name) for name in args.against}
        baseline = args.against[0]
    runs = interleave(variants, repeats=args.repeats, on_result=lambda *turn: print(*turn))
    print(table(runs, baseline=baseline))
    kinds = {
        "-scaling": args.scaling,
        "-doubling": args.doubling,
        "-targets": args.targets,
        "-real": args.model,
        f"-{QWEN3_5}": args.shape == QWEN3_5,
    }
    kind = next((kind for kind, asked in kinds.items() if asked), "")
    told = {**settings, "model": Path(args.model).name if args.model else None}
    told |= {"shape": None} if args.model else {}
    told |= {} if "peft" in args.against else {"peft_rows": None}
    print(save(args.name or f"training{kind}", runs, baseline=baseline, settings=told))


def load_rows(count: int, *, mask_prompt: bool = True) -> list[Example]:
    """The first CodeAlpaca rows, tokenised and masked as a recipe would have them."""
    import shutil
    import tempfile

    from mlx_tuner.data.encode import Encoder
    from mlx_tuner.data.rows import parse_row
    from mlx_tuner.models.model import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        for file in (shared() / "qwen2.5-coder").iterdir():
            name = "config.json" if file.name == "config-0.5B.json" else file.name
            shutil.copyfile(file, Path(folder) / name)
        tokenizer = load_tokenizer(Path(folder))
    encoder = Encoder(
        tokenizer,
        mask_prompt=mask_prompt,
        max_seq_length=2048,
        system_prompt=None,
        on_long_row="truncate",
    )
    with (shared() / "codealpaca" / "train.jsonl").open("rb") as file:
        raw = [line for line, _ in zip(file, range(count), strict=False)]
    rows = [parse_row(line, where=f"train.jsonl:{i}") for i, line in enumerate(raw, 1)]
    return [Example(encoded.tokens, encoded.loss_mask) for encoded in encoder.encode(rows)]


def random_rows(count: int, longer: int) -> list[Example]:
    """Rows of 256 to 512 tokens, times ``longer``, whose second half carries the loss."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        length = longer * (256 + 256 * (i % 8) // 7)
        tokens = rng.integers(0, SMALL["vocab_size"], length, np.int32)
        rows.append(Example(tokens, np.arange(length) >= length // 2, i))
    return rows


def model_of(args: Any) -> Any:
    """The model, or one of the real shape with random weights; evaluated."""
    import mlx.core as mx

    from mlx_tuner.models.architecture import skeleton
    from mlx_tuner.models.model import load

    if args.model:
        model = load(Path(args.model)).model
        model.set_dtype(getattr(mx, args.dtype))
        mx.eval(model.parameters())
        return model
    if args.shape == QWEN3_5:
        config = {"model_type": "qwen3_5", "text_config": SMALL}
    else:
        config = json.loads((shared() / "qwen2.5-coder" / f"config-{args.shape}.json").read_text())
        config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    mx.random.seed(0)
    model = skeleton(config)
    model.set_dtype(getattr(mx, args.dtype))
    mx.eval(model.parameters())
    return model


def ours(args: Any, rows: list[Example]) -> dict[str, float]:
    """One turn of our trainer."""
    import mlx.core as mx

    from mlx_tuner.engine import lora
    from mlx_tuner.engine.trainer import Trainer, train

    model = model_of(args)
    lora.attach(model, rank=RANK, scale=SCALE, target_modules=TARGETS)
    mx.eval(model.parameters())
    trainer = Trainer(model, micro_batch_tokens=args.micro_batch_tokens)
    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    rates = [LEARNING_RATE] * len(batches)
    first_loss = next(train(trainer, batches[:1], rates)).loss
    mx.reset_peak_memory()
    start, cpu = time.perf_counter(), time.process_time()
    results = list(train(trainer, batches, rates))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu

    steps = [trainer.make_micro_batches(batch) for batch in batches]
    micro_batches = [m for step in steps for m in step.micro_batches]
    processed = sum(len(m.tokens) for m in micro_batches) + sum(len(s.prefix) for s in steps)
    tokens, targets = sum(s.tokens for s in steps), sum(s.target_tokens for s in steps)
    saved = sum((step.rows - 1) * step.micro_batches[-1].prefix for step in steps)
    updating = sum(result.seconds - result.waited for result in results)
    return {
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds,
        "samples_per_cpu_second": len(rows) / cpu,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "processed_per_token": processed / tokens,
        "processed_per_token_unshared": (processed + saved) / tokens,
        "head_positions_per_target": sum(len(m.sources) for m in micro_batches) / targets,
        "outside_the_step": 1 - (updating - cutting(trainer, batches)) / seconds,
        "first_loss": first_loss,
    }


def cutting(trainer: Any, batches: list[list[Example]]) -> float:
    """Seconds that cutting the batches takes."""
    start = time.perf_counter()
    for batch in batches:
        trainer.make_micro_batches(batch)
    return time.perf_counter() - start


def mlx_lm(args: Any, rows: list[Example]) -> dict[str, float]:
    """One turn of mlx-lm's trainer."""
    import mlx.core as mx

    from mlx_tuner.bench.peer import MlxLmTrainer

    trainer = MlxLmTrainer(
        model_of(args),
        rank=RANK,
        scale=SCALE,
        target_modules=TARGETS,
        learning_rate=LEARNING_RATE,
    )
    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    losses = [trainer.step(batch)[0] for batch in batches]  # each of its shapes is compiled
    mx.reset_peak_memory()
    start, cpu = time.perf_counter(), time.process_time()
    processed = sum(trainer.step(batch)[1] for batch in batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = sum(len(row.tokens) for row in rows)
    targets = sum(int(row.loss_mask.sum()) for row in rows)
    return {
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds,
        "samples_per_cpu_second": len(rows) / cpu,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "processed_per_token": processed / tokens,
        "head_positions_per_target": processed / targets,
        "first_loss": losses[0],
    }


def peft(args: Any, rows: list[Example]) -> dict[str, float]:
    """One turn of PEFT on torch: padded passes, clipping and AdamW as the Trainer has them."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    dtype = getattr(torch, args.dtype)
    auto = transformers.AutoModelForCausalLM
    if args.model:
        base = auto.from_pretrained(args.model, dtype=dtype)
    else:
        config = json.loads((shared() / "qwen2.5-coder" / f"config-{args.shape}.json").read_text())
        config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
        base = auto.from_config(transformers.AutoConfig.for_model(**config), dtype=dtype)
    settings = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=TARGETS)
    model = get_peft_model(base, settings).train()
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)

    def step(batch: list[Example]) -> tuple[float, int]:
        targets, total, computed = sum(int(row.loss_mask.sum()) for row in batch), 0.0, 0
        for first in range(0, len(batch), args.peft_rows):
            part = batch[first : first + args.peft_rows]
            shape = (len(part), max(len(row.tokens) for row in part))
            tokens, attention = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
            labels = torch.full(shape, -100)
            for i, row in enumerate(part):
                length = len(row.tokens)
                tokens[i, :length] = torch.from_numpy(row.tokens)
                attention[i, :length] = 1
                mask = torch.from_numpy(row.loss_mask)
                labels[i, :length][mask] = tokens[i, :length][mask]
            loss = model(
                input_ids=tokens,
                attention_mask=attention,
                labels=labels,
                num_items_in_batch=torch.tensor(targets),
            ).loss
            loss.backward()
            total, computed = total + loss.item(), computed + tokens.numel()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, computed

    batches = [rows[i : i + args.rows] for i in range(0, len(rows), args.rows)]
    first_loss, _ = step(batches[0])
    start = time.perf_counter()
    processed = sum(step(batch)[1] for batch in batches)
    seconds = time.perf_counter() - start
    tokens = sum(len(row.tokens) for row in rows)
    return {
        "samples_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds,
        "processed_per_token": processed / tokens,
        "first_loss": first_loss,
    }


TRAINERS = {"ours": ours, "mlx-lm": mlx_lm, "peft": peft}

if __name__ == "__main__":
    main()
