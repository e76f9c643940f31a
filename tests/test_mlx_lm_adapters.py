"""What mlx-lm's own trainer leaves, through every command of ours that takes an adapter."""

import json
import shutil
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm import lora
from model_folders import BUILTIN, loss_by_mlx_lm

from mlx_tuner.cli import main

IDS = [[5, 300, 17, 999, 2, 1024]]
PROMPT = "Write a function that doubles a number."
ROWS = [
    {"prompt": f"Add {i} to a number.", "completion": f"def add(x):\n    return x + {i}"}
    for i in range(4)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two iterations of mlx-lm's trainer with its defaults, on the last two of four blocks."""
    folder = tmp_path_factory.mktemp("mlx-lm")
    for name in ("train.jsonl", "valid.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        **lora.CONFIG_DEFAULTS,
        "train": True,
        "model": str(BUILTIN),
        "data": str(folder),
        "adapter_path": str(folder / "adapters"),
        "num_layers": 2,
        "iters": 2,
        "batch_size": 2,
        "val_batches": 1,
        "learning_rate": 1e-3,
    }
    mx.disable_compile()  # which takes longer than the iterations
    try:
        lora.run(SimpleNamespace(**settings))
    finally:
        mx.enable_compile()
    config = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {"rank": 8, "dropout": 0.0, "scale": 20.0}  # and no keys
    return folder / "adapters"


@pytest.fixture(scope="module")
def theirs(made):
    """mlx-lm's model with its adapter, and the tokenizer."""
    return mlx_lm.load(str(BUILTIN), adapter_path=str(made))


@pytest.fixture(scope="module")
def logits(theirs):
    """What the fine-tuned model says, which is far from what the base does."""
    found = np.array(theirs[0](mx.array(IDS)))
    assert np.abs(found - np.array(mlx_lm.load(str(BUILTIN))[0](mx.array(IDS)))).max() > 0.1
    return found


def done(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_mlx_lms_adapter_answers_with_generate(made, theirs):
    said = done("generate", made, PROMPT, "--max-tokens", 20)
    model, tokenizer = theirs
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    assert said == mlx_lm.generate(model, tokenizer, chat, max_tokens=20) + "\n"


@pytest.mark.slow
def test_mlx_lms_adapter_is_fused(made, logits, tmp_path):
    assert "kept of the fine-tune  100.0 %" in done("fuse", made, "-o", tmp_path / "fused")
    fused, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert np.abs(np.array(fused(mx.array(IDS))) - logits).max() < 1e-4


@pytest.mark.slow
def test_mlx_lms_adapter_is_evaluated(made):
    rows = made.parent / "valid.jsonl"
    found = json.loads(done("eval", made, "--data", rows, "--samples", 1, "--json"))
    for side, adapter in (("base", None), ("tuned", made)):
        expected, _ = loss_by_mlx_lm(BUILTIN, adapter, ROWS)
        assert found[side]["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_mlx_lms_adapter_is_exported_to_peft(made, logits, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    done("export", made, "--to", "peft", "-o", tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(BUILTIN, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "peft")(torch.tensor(IDS)).logits
    assert np.abs(found.numpy() - logits).max() < 1e-4


@pytest.mark.slow
def test_mlx_lms_adapter_is_exported_to_gguf(made, tmp_path):
    gguf = pytest.importorskip("gguf")
    done("export", made, "--to", "gguf", "-o", tmp_path / "model.gguf", "--dtype", "f32")
    stored = {
        tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    weights = mx.load(str(BUILTIN / "model.safetensors"))
    factors = mx.load(str(made / "adapters.safetensors"))
    for block, changed in ((1, False), (3, True)):
        path = f"model.layers.{block}.mlp.down_proj"
        before = np.array(weights[f"{path}.weight"].astype(mx.float32))
        assert (f"{path}.lora_a" in factors) is changed
        if changed:
            a, b = (np.array(factors[f"{path}.lora_{x}"]) for x in "ab")
            before = before + 20.0 * (a @ b).T
        assert np.allclose(stored[f"blk.{block}.ffn_down.weight"], before, atol=1e-6)


@pytest.mark.slow
def test_a_recipe_starts_from_mlx_lms_adapter(made, logits, tmp_path):
    (tmp_path / "on.toml").write_text(
        f'[model]\npath = "builtin:tiny-qwen"\n[data]\ntrain = "{made.parent}/train.jsonl"\n'
        f'[lora]\nrank = 8\nalpha = 160\ninit_from = "{made}"\n'
        "[train]\nmax_steps = 1\nbatch_size = 4\nlearning_rate = 1e-12\nlog_every = 1\n"
    )
    run = tmp_path / "run"
    done("run", tmp_path / "on.toml", "--run-dir", run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["first_loss"] == pytest.approx(loss_by_mlx_lm(BUILTIN, made, ROWS)[0], rel=1e-5)
    # A step that changes next to nothing leaves an adapter that mlx-lm loads as its own.
    again, _ = mlx_lm.load(str(BUILTIN), adapter_path=str(run))
    assert np.abs(np.array(again(mx.array(IDS))) - logits).max() < 1e-4


# ---- an adapter that does not say of which model it is -------------------------------------------


@pytest.fixture
def nameless(made, tmp_path):
    folder = tmp_path / "nameless"
    shutil.copytree(made, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["model"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", ["generate", "fuse", "eval", "export"])
def test_an_adapter_without_a_base_asks_for_one_in_one_line(nameless, made, tmp_path, command):
    more = {
        "generate": [PROMPT],
        "fuse": ["-o", tmp_path / "out"],
        "eval": ["--data", made.parent / "valid.jsonl"],
        "export": ["--to", "gguf", "-o", tmp_path / "out" / "m.gguf"],
    }
    words = [command, nameless, *more[command]]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = [line for line in result.stderr.splitlines() if "…" not in line]
    assert line == (
        f"mlx-tune: error: {nameless}: does not say which model it was trained on; "
        "name it with --model"
    )


@pytest.mark.slow
def test_the_base_of_an_adapter_can_be_named(nameless, made):
    words = [PROMPT, "--max-tokens", 8]
    named = done("generate", nameless, "--model", "builtin:tiny-qwen", *words)
    assert named == done("generate", made, *words)
    result = CliRunner().invoke(
        main, ["generate", "builtin:tiny-qwen", "hi", "--model", "builtin:tiny-qwen"]
    )
    assert result.exit_code == 2
    assert "is no run or adapter, so --model has no meaning" in result.stderr
