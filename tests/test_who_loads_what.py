"""Model folders that we write are models: to us as bases, to mlx-lm and to transformers."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from marks import some_slow
from mlx_lm.utils import load_model
from model_folders import BUILTIN, loss_by_mlx_lm, make_adapter

from mlx_tuner.cli import main
from mlx_tuner.models.adapter import write_adapter
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.training.finetune import finetune

IDS = [[5, 300, 17, 999, 2, 1024]]
ROWS = [
    {"prompt": f"Add {i} to a number.", "completion": f"def add(x):\n    return x + {i}"}
    for i in range(4)
]
MAKE = {
    "fused": ("fuse", "ADAPTED"),
    "fused, 4 bits": ("fuse", "ADAPTED", "--quantize", "4"),
    "bfloat16": ("convert", "builtin:tiny-qwen", "--dtype", "bfloat16"),
    "4 bits": ("convert", "builtin:tiny-qwen", "--quantize", "4"),
}


def done(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapted"
    write_adapter(folder, make_adapter(load_model(BUILTIN)[0], BUILTIN))
    return folder


@pytest.fixture(scope="module", params=some_slow(MAKE, {"fused", "fused, 4 bits"}))
def made(request, adapted, tmp_path_factory):
    """A folder as its command writes it."""
    folder = tmp_path_factory.mktemp("models") / "made"
    words = [str(adapted) if word == "ADAPTED" else word for word in MAKE[request.param]]
    done(*words, "-o", folder)
    return folder


@pytest.mark.slow
def test_we_train_on_a_folder_of_ours(made, tmp_path):
    """From the loss that mlx-lm finds."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "on.toml").write_text(
        f'[model]\npath = "{made}"\n[data]\ntrain = "rows.jsonl"\n'
        "[train]\nmax_steps = 1\nbatch_size = 4\nlearning_rate = 1e-4\nlog_every = 1\n"
    )
    run = tmp_path / "run"
    summary = finetune(load_recipe(tmp_path / "on.toml"), run)
    config = json.loads((made / "config.json").read_text())
    rounding = 0.02 if config["torch_dtype"] == "bfloat16" else 1e-5
    expected, _ = loss_by_mlx_lm(made, None, ROWS)
    assert summary.first_loss == pytest.approx(expected, rel=rounding)
    assert done("generate", run, "Add 3.", "--max-tokens", 3)


def test_mlx_lm_answers_as_we_do(made):
    model, tokenizer = mlx_lm.load(str(made))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add 3."}], add_generation_prompt=True
    )
    said = done("generate", made, "Add 3.", "--max-tokens", 12)
    assert said == mlx_lm.generate(model, tokenizer, chat, max_tokens=12) + "\n"


def test_transformers_reads_a_converted_folder(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done(*MAKE["bfloat16"], "-o", tmp_path / "made")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = loaded(torch.tensor(IDS)).logits.numpy()
    model, _ = mlx_lm.load(str(tmp_path / "made"))
    model.set_dtype(mx.float32)
    assert np.abs(theirs - np.array(model(mx.array(IDS)))).max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "made").chat_template


def test_peft_trains_on_a_fused_folder(adapted, tmp_path):
    """And what it makes there comes back in."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    done("fuse", adapted, "-o", tmp_path / "fused")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8))
    tokens = torch.tensor(IDS)
    before = model(tokens, labels=tokens).loss
    before.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
    model.save_pretrained(tmp_path / "peft")
    done("import", tmp_path / "peft", "-o", tmp_path / "ours")
    ours, _ = mlx_lm.load(str(tmp_path / "fused"), adapter_path=str(tmp_path / "ours"))
    assert np.abs(np.array(ours(mx.array(IDS))) - theirs).max() < 1e-4
    plain, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert np.abs(np.array(plain(mx.array(IDS))) - theirs).max() > 1e-3


@pytest.mark.slow
def test_mlx_lms_server_answers_with_a_runs_adapter(tmp_path):
    """As `mlx_lm.server --adapter-path`, in a process of its own, over HTTP."""
    tuned = tmp_path / "tuned"
    write_adapter(tuned, make_adapter(load_model(BUILTIN)[0], BUILTIN, size=0.1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--model", BUILTIN, "--adapter-path", tuned, "--port", port]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", *map(str, words)], stderr=subprocess.DEVNULL
    )
    question = {"messages": [{"role": "user", "content": "Add 3."}], "temperature": 0}
    body = json.dumps({**question, "max_tokens": 12}).encode()
    headers = {"Content-Type": "application/json"}
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    try:
        for _ in range(120):
            request = urllib.request.Request(address, body, headers)
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(request) as to:
                said = json.load(to)["choices"][0]["message"]["content"]
                break
            assert server.poll() is None
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait()
    ours = done("generate", tuned, "Add 3.", "--max-tokens", 12)
    assert said == ours.removesuffix("\n")
    assert ours != done("generate", tuned, "Add 3.", "--max-tokens", 12, "--base")
