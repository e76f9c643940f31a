"""A run is the run of transformers' Trainer with PEFT, step by step."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_tuner.models.model import resolve
from mlx_tuner.recipe.load import parse_recipe
from mlx_tuner.runs.metrics import TrainRecord
from mlx_tuner.runs.run import read_records
from mlx_tuner.show.progress import Display
from mlx_tuner.training.finetune import finetune

ROWS, BATCH, EPOCHS = 20, 8, 7  # 8 + 8 + 4 rows an epoch, 21 steps
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]

RECIPE = f"""
[model]
path = "builtin:tiny-qwen"
[data]
train = "python_100.jsonl"
limit = {ROWS}
shuffle = false
[lora]
rank = 8
alpha = 16
target_modules = {TARGETS}
init_from = "INIT"
[train]
epochs = {EPOCHS}
batch_size = {BATCH}
learning_rate = 2e-3
lr_schedule = "linear"
warmup_steps = 3
weight_decay = 0.0
max_grad_norm = 1.0
micro_batch_tokens = MICRO
log_every = 1
"""


@pytest.fixture(scope="module")
def truth(root, tmp_path_factory):
    """Logs of the peer's run, the adapter it began with and the one it ended with."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    import transformers

    folder = tmp_path_factory.mktemp("peft")
    base = resolve("builtin:tiny-qwen")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder / "start")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=BATCH // 4,
        num_train_epochs=EPOCHS,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=peer_rows(tokenizer, root / "data" / "python_100.jsonl"),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    end = {
        name.removeprefix("base_model.model."): weight.detach().numpy()
        for name, weight in peft.get_peft_model_state_dict(model).items()
    }
    return logs, folder / "start", end


def peer_rows(tokenizer, path: Path) -> list[dict[str, list[int]]]:
    """The rows as transformers' own chat template gives them, with labels on the answer."""
    rows = []
    for line in path.read_text().splitlines()[:ROWS]:
        row = json.loads(line)
        question = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        chat = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            chat[:1], add_generation_prompt=True, return_dict=False
        )
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + ids[len(prompt) : end] + [-100] * (len(ids) - end)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 150])
def test_every_step_is_that_of_trainer_and_peft(truth, root, tmp_path, micro_batch_tokens):
    logs, start, end = truth
    recipe = parse_recipe(
        RECIPE.replace("INIT", str(start)).replace("MICRO", str(micro_batch_tokens)),
        source="truth.toml",
        folder=root / "data",
    )
    with Display() as display:
        finetune(recipe, tmp_path / "run", display)
    records = [r for r in read_records(tmp_path / "run") if isinstance(r, TrainRecord)]
    assert len(records) == len(logs) == 21
    for ours, theirs in zip(records, logs, strict=True):
        assert ours.loss == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours.learning_rate == theirs["learning_rate"]
        assert ours.epoch == pytest.approx(theirs["epoch"])

    from safetensors.numpy import load_file

    adapter = load_file(tmp_path / "run" / "adapters.safetensors")
    assert len(adapter) == len(end)
    for name, weight in adapter.items():
        peer = name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")
        np.testing.assert_allclose(weight.T, end[peer], atol=1e-4)
