"""Our steps against those of transformers' Trainer with PEFT, on real weights in fp32.

    python benchmarks/truth.py --model FOLDER     # 8 steps of 4 CodeAlpaca rows
    python benchmarks/truth.py --model FOLDER --logits    # of texts, against transformers

Both begin with the adapter that PEFT initialises and see the same tokens. What is shown are the
largest relative differences of a step's loss and gradient norm; and of the first step's, which is
computed in float64 as well, those to the truth. Needs torch, transformers, peft and accelerate.
"""

from __future__ import annotations

import tempfile
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, child, options, preload_openblas, report, save, table
from training import LEARNING_RATE, RANK, SCALE, TARGETS, load_rows

STEPS, ROWS = 8, 4
TEXTS = (ROOT / "README.md", Path(textwrap.__file__))
TEXT_TOKENS = 512


def main() -> None:
    preload_openblas()
    parser = options(__doc__)
    parser.add_argument("--model", required=True, help="folder of a Qwen2 model")
    parser.add_argument("--logits", action="store_true", help="compare logits, not steps")
    parser.add_argument("--one", choices=TRAINERS, help="run one, here")
    parser.add_argument("--folder", help="where the children keep the adapter")
    args = parser.parse_args()
    if args.one:
        steps = TRAINERS[args.one](args)
        report(**{f"{key}_{i}": step[key] for i, step in enumerate(steps) for key in step})
        return

    settings: dict[str, Any] = {"model": Path(args.model).name}
    if args.logits:
        runs = of_texts(args)
        print(table(runs))
        settings |= {"texts": len(TEXTS), "tokens": TEXT_TOKENS}
        print(save(args.name or "truth-logits", runs, settings=settings))
        return

    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: child("--one", name, "--model", args.model, "--folder", folder)()
            for name in TRAINERS
        }
    runs = {
        "ours against PEFT": [differences(found["ours"], found["peft"], STEPS)],
        "ours against float64": [differences(found["ours"], found["float64"], 1)],
        "PEFT against float64": [differences(found["peft"], found["float64"], 1)],
    }
    print(table(runs))
    settings |= {"steps": STEPS, "rows": ROWS}
    print(save(args.name or "truth", runs, settings=settings))


def differences(one: Any, other: Any, steps: int) -> dict[str, float]:
    """The largest relative differences of the first steps."""
    return {
        key: max(abs(one[f"{key}_{i}"] / other[f"{key}_{i}"] - 1) for i in range(steps))
        for key in ("loss", "grad_norm")
    }


def batches() -> list[list[Any]]:
    rows = load_rows(STEPS * ROWS)
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def peft_model(args: Any, dtype: Any) -> Any:
    """The model with the adapter that is kept in the folder, which the first call makes."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    start = Path(args.folder) / "start"
    if start.exists():
        return peft.PeftModel.from_pretrained(model, start, is_trainable=True)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would leave the A matrices without a gradient
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(start)
    return model


def trainer_and_peft(args: Any) -> list[dict[str, float]]:
    """Loss and gradient norm of each step of transformers' Trainer."""
    import torch
    import transformers

    model = peft_model(args, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(Path(args.folder) / "out"),
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[padded(row, None) for batch in batches() for row in batch],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [{"loss": log["loss"], "grad_norm": log["grad_norm"]} for log in logs]


def padded(row: Any, length: int | None) -> dict[str, list[int]]:
    """A row as transformers' models take it, with labels where there is loss."""
    more = 0 if length is None else length - len(row.tokens)
    labels = [t if m else -100 for t, m in zip(row.tokens.tolist(), row.loss_mask, strict=True)]
    return {
        "input_ids": row.tokens.tolist() + [0] * more,
        "attention_mask": [1] * len(row.tokens) + [0] * more,
        "labels": labels + [-100] * more,
    }


def in_float64(args: Any) -> list[dict[str, float]]:
    """Loss and gradient norm of the first step, one row at a time."""
    import torch

    model = peft_model(args, torch.float64)
    round_nothing(model)
    batch = batches()[0]
    targets = sum(int(row.loss_mask.sum()) for row in batch)
    total = 0.0
    for row in batch:
        inputs = {key: torch.tensor([value]) for key, value in padded(row, None).items()}
        labels = inputs.pop("labels")[0, 1:]
        logits = model(**inputs).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / targets
        loss.backward()
        total += loss.item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients)).item()
    return [{"loss": total, "grad_norm": norm}]


def round_nothing(model: Any) -> None:
    """Norms and rotary angles in the model's dtype: transformers has them in fp32 in any."""
    import torch
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    def turns(config: Any, x: Any, position_ids: Any) -> tuple[Any, Any]:
        size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, size, 2, dtype=x.dtype).repeat(2) / size
        angles = position_ids[..., None] * config.rope_parameters["rope_theta"] ** -exponents
        return angles.cos(), angles.sin()

    for module in model.modules():
        if isinstance(module, qwen2.Qwen2RMSNorm):
            norm = {"weight": module.weight, "eps": module.variance_epsilon}
            shape = module.weight.shape
            module.forward = partial(torch.nn.functional.rms_norm, normalized_shape=shape, **norm)
        elif isinstance(module, qwen2.Qwen2RotaryEmbedding):
            module.forward = partial(turns, module.config)


def ours(args: Any) -> list[dict[str, float]]:
    """Loss and gradient norm of each of our steps."""
    import mlx.core as mx

    from mlx_tuner.engine.trainer import Trainer, train
    from mlx_tuner.models import adapter, model, peft_format

    loaded = model.load(Path(args.model)).model
    loaded.set_dtype(mx.float32)
    adapter.apply(loaded, peft_format.read_peft(Path(args.folder) / "start"))
    trainer = Trainer(loaded, micro_batch_tokens=2048)
    results = train(trainer, batches(), [LEARNING_RATE] * STEPS)
    return [{"loss": result.loss, "grad_norm": result.grad_norm} for result in results]


def of_texts(args: Any) -> dict[str, list[dict[str, float]]]:
    """Log probabilities after each token of the texts, compared."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    texts = [tokenizer(path.read_text("utf-8")).input_ids[:TEXT_TOKENS] for path in TEXTS]

    def by_transformers(dtype: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        return torch.cat([model(input_ids=torch.tensor([tokens])).logits[0] for tokens in texts])

    with torch.no_grad():
        ours, theirs, exact = (
            logits.double().log_softmax(-1)
            for logits in (
                torch.from_numpy(our_logits(args, texts)),
                by_transformers(torch.float32),
                by_transformers(torch.float64),
            )
        )

    def apart(one: Any, other: Any) -> list[dict[str, float]]:
        same = (one.argmax(-1) == other.argmax(-1)).double().mean()
        return [{"log_probability": (one - other).abs().max().item(), "same_token": same.item()}]

    return {
        "ours against transformers": apart(ours, theirs),
        "ours against float64": apart(ours, exact),
        "transformers against float64": apart(theirs, exact),
    }


def our_logits(args: Any, texts: list[list[int]]) -> np.ndarray:
    """Logits (tokens, V) by the forward pass that trains, all texts in one micro-batch."""
    import mlx.core as mx

    from mlx_tuner.engine import batching
    from mlx_tuner.engine.batching import Example
    from mlx_tuner.engine.forward import Layout, head_of, hidden_at_targets
    from mlx_tuner.models import model

    loaded = model.load(Path(args.model)).model
    loaded.set_dtype(mx.float32)
    # A last token more, so that each one of the text has a target.
    rows = [
        Example(np.array([*tokens, 0], np.int32), np.arange(len(tokens) + 1) > 0, i)
        for i, tokens in enumerate(texts)
    ]
    (batch,) = batching.make_micro_batches(rows, 2048, share_prefix=False).micro_batches
    hidden, _ = hidden_at_targets(loaded, Layout.of(batch))
    order = np.lexsort((batch.positions[batch.sources], batch.rows[batch.sources]))
    return np.array(head_of(loaded).as_linear(hidden))[order]


TRAINERS = {"peft": trainer_and_peft, "float64": in_float64, "ours": ours}

if __name__ == "__main__":
    main()
