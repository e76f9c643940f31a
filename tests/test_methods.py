"""rsLoRA, DoRA, LoRA+ and NEFTune: each step is PEFT's on torch, and others load what comes out."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_map
from mlx_lm.utils import load_adapters, load_model
from model_folders import BUILTIN, write_model
from tiny import random_rows

from mlx_tuner.cli import main
from mlx_tuner.commands.evaluate import evaluate
from mlx_tuner.conversion.fuse import merge
from mlx_tuner.engine import lora
from mlx_tuner.engine.dora import DoRALinear
from mlx_tuner.engine.noise import Noise
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.errors import RecipeError
from mlx_tuner.models.adapter import Adapter, apply, write_adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.peft_format import write_peft
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.show.progress import Display
from mlx_tuner.training.finetune import finetune

STEPS, RATE, DECAY, SEED = 8, 5e-3, 0.1, 7
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
TOKENS = [[5, 300, 17, 999, 2, 1024]]
METHODS = {
    "rslora": ({"use_rslora": True}, {}),
    "dora": ({"use_dora": True}, {}),
    "lora+": ({}, {"lora_plus_ratio": 4.0}),
    "neftune": ({}, {"neftune_noise": 5.0}),
    "dora, lora+ and neftune": (
        {"use_dora": True},
        {"lora_plus_ratio": 4.0, "neftune_noise": 5.0},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """With biases on q, k and v, as Qwen2 has them."""
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def batches():
    """Rows of several lengths with a common prefix, numbered as in a file."""
    rows = random_rows([9, 23, 5, 14] * STEPS, prefix=10)
    rows = [row._replace(row=i) for i, row in enumerate(rows)]
    return [rows[4 * i : 4 * i + 4] for i in range(STEPS)]


def peft_model(peft, torch, base, **config):
    """The base on torch with a new adapter whose B is not zero, nor its magnitudes the base's."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(plain, peft.LoraConfig(**settings, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
    return model


def steps_of_peft(peft, torch, model, batches, *, lora_plus_ratio=1.0, neftune_noise=0.0):
    """Loss and gradient norm of each step, by torch's own AdamW."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=lora_plus_ratio,
        loraplus_weight_decay=DECAY,
        weight_decay=DECAY,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logs = []
    for step, rows in enumerate(batches):
        count = sum(int(row.loss_mask.sum()) for row in rows)
        total = 0.0
        for row in rows:
            embeddings = model.get_input_embeddings()(torch.tensor(row.tokens[None]).long())
            if neftune_noise:
                at = np.arange(row.inputs)
                noise = Noise.of(
                    neftune_noise, SEED, step, np.full(row.inputs, row.row), at, [row.inputs]
                ).on(mx.zeros((row.inputs, embeddings.shape[-1])))
                embeddings[:, : row.inputs] += torch.tensor(np.array(noise))
            logits = model(inputs_embeds=embeddings).logits[0, :-1]
            wanted = torch.tensor(np.where(row.loss_mask, row.tokens, -100)[1:]).long()
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / count
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logs.append((total, norm.item()))
    return logs


@pytest.mark.parametrize(
    ("method", "micro_batch_tokens"), [*((m, 10_000) for m in METHODS), ([*METHODS][-1], 40)]
)
def test_every_step_of_a_method_is_pefts(base, batches, tmp_path, method, micro_batch_tokens):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config, settings = METHODS[method]
    theirs = peft_model(peft, torch, base, **config)
    theirs.save_pretrained(tmp_path / "start")
    logs = steps_of_peft(peft, torch, theirs, batches, **settings)
    theirs.save_pretrained(tmp_path / "end")

    model = load_model(base)[0]
    apply(model, read_adapter(tmp_path / "start"))
    trainer = Trainer(
        model,
        micro_batch_tokens=micro_batch_tokens,
        weight_decay=DECAY,
        seed=SEED,
        **settings,
    )
    for result, (loss, norm) in zip(train(trainer, batches, [RATE] * STEPS), logs, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-4)
        assert result.grad_norm == pytest.approx(norm, rel=1e-3)
    end = read_adapter(tmp_path / "end").tensors
    assert trainer.adapter.keys() == end.keys()
    for name, value in trainer.adapter.items():
        np.testing.assert_allclose(np.array(value), np.array(end[name]), atol=2e-4)


# ---- rsLoRA --------------------------------------------------------------------------------------


def test_rank_stabilised_scaling_is_the_recipes_word():
    recipe = load_recipe("first", ["lora.rank=16", "lora.alpha=8", "lora.variant=rslora"])
    assert recipe.lora.scale == 2.0
    assert load_recipe("first", ["lora.rank=16", "lora.alpha=8"]).lora.scale == 0.5


# ---- DoRA ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dora(base):
    """An adapter with magnitudes, as after training."""
    model = load_model(base)[0]
    lora.attach(model, rank=4, scale=2.0, target_modules="all-linear", layer=DoRALinear)
    mx.random.seed(1)
    tensors = tree_map(
        lambda v: (
            v * mx.random.uniform(0.8, 1.2, v.shape)
            if v.ndim == 1
            else 0.1 * mx.random.normal(v.shape)
        ),
        lora.trainable(model),
    )
    return Adapter(tensors, rank=4, scale=2.0, base=str(base))


def logits_of(base, adapter):
    model = load_model(base)[0]
    apply(model, adapter)
    return np.array(model.eval()(mx.array(TOKENS)))


def test_dora_starts_as_the_base(base):
    model = load_model(base)[0]
    before = np.array(model(mx.array(TOKENS)))
    lora.attach(model, rank=4, scale=2.0, target_modules="all-linear", layer=DoRALinear)
    assert np.abs(np.array(model(mx.array(TOKENS))) - before).max() < 1e-4
    magnitudes = [v for n, v in lora.trainable(model).items() if n.endswith(".m")]
    assert len(magnitudes) == 3 * 7


@pytest.mark.parametrize("bits", [4, 8])
def test_dora_on_a_quantised_base_is_dora_on_what_it_stands_for(bits):
    mx.random.seed(2)
    plain = nn.Linear(64, 32)
    quantised = plain.to_quantized(group_size=32, bits=bits)
    dense = nn.Linear(64, 32)
    dense.weight, dense.bias = lora.dense_weight(quantised), quantised.bias
    layers = [DoRALinear(linear, rank=4, scale=2.0) for linear in (quantised, dense)]
    for layer in layers:
        layer.lora_a, layer.lora_b = layers[0].lora_a, mx.ones((4, 32)) / 8
    x = mx.random.normal((5, 64))
    ours, theirs = (layer(x) for layer in layers)
    assert mx.allclose(ours, theirs, atol=1e-4)
    assert mx.allclose(layers[0].fuse()(x), ours, atol=1e-4)


def test_peft_and_mlx_lm_give_the_logits_of_our_dora(base, dora, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ours = logits_of(base, dora)
    write_adapter(tmp_path / "ours", dora)
    model = load_adapters(load_model(base)[0], str(tmp_path / "ours"))
    assert np.abs(np.array(model.eval()(mx.array(TOKENS))) - ours).max() < 1e-4
    write_peft(tmp_path / "peft", dora)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    with torch.no_grad():
        theirs = loaded(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(theirs - ours).max() < 1e-4
    back = read_adapter(tmp_path / "peft")
    assert all(mx.array_equal(back.tensors[name], dora.tensors[name]) for name in dora.tensors)


def test_fused_dora_answers_as_the_adapter_does(base, dora):
    fused = np.array(merge(base, dora)(mx.array(TOKENS)))
    assert np.abs(fused - logits_of(base, dora)).max() < 1e-4


def test_llama_cpps_adapters_cannot_hold_dora(base, dora, tmp_path):
    pytest.importorskip("gguf")
    write_adapter(tmp_path / "dora", dora)
    words = ["export", tmp_path / "dora", "--to", "gguf-lora", "-o", tmp_path / "lora.gguf"]
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 1
    assert done.stderr.endswith("as DoRA does; export it with --to gguf\n")
    assert not (tmp_path / "lora.gguf").exists()


def test_dropout_beside_dora_is_refused():
    with pytest.raises(RecipeError, match=r"lora.dropout: is given beside lora.variant = \"dora\""):
        load_recipe("first", ["lora.variant=dora", "lora.dropout=0.1"])


@pytest.mark.slow
def test_a_run_with_every_method_resumes_and_is_fused(tmp_path):
    few = ["data.limit=8", "train.max_steps=4", "train.save_every=2", "train.warmup_steps=0"]
    methods = ["lora.variant=dora", "train.lora_plus_ratio=8", "train.neftune_noise=5"]
    recipe, run = load_recipe("quickstart", [*few, *methods]), tmp_path / "run"
    summary = finetune(recipe, run)
    with Display(quiet=True) as display:
        found = evaluate(run, display, samples=0)
    assert found.base.loss.value == pytest.approx(summary.base_val_loss, rel=1e-5)
    assert found.tuned.loss.value == pytest.approx(summary.best_val_loss, rel=1e-5)
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora"
    end = dict(mx.load(f"{run}/adapters.safetensors"))
    mx.eval(end)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    finetune(recipe, run, resume=True)
    again = mx.load(f"{run}/adapters.safetensors")
    assert all(mx.array_equal(again[name], end[name]) for name in end)
    done = CliRunner().invoke(main, ["fuse", str(run), "-o", str(tmp_path / "fused")])
    assert done.exit_code == 0, done.output
    # What starts from it must be of its variant.
    start = load_recipe("quickstart", [f"lora.init_from={run}", *few])
    with pytest.raises(RecipeError, match=r'set lora\.variant = "dora"'):
        finetune(start, tmp_path / "next")
    # ... and adapt the modules that the recipe names, or what is written would not be true.
    start = load_recipe("quickstart", [f"lora.init_from={run}", *few, *methods])
    narrower = replace(start, lora=start.lora.model_copy(update={"num_layers": 1}))
    with pytest.raises(RecipeError, match=r"of 4 blocks, the recipe .* of 1 block; set lora\."):
        finetune(narrower, tmp_path / "next")


# ---- NEFTune -------------------------------------------------------------------------------------


def test_noise_is_uniform_within_alpha_over_the_root_of_the_rows_numbers():
    rows = np.repeat([3, 8], [100, 400])
    positions = np.concatenate([np.arange(100), np.arange(400)])
    noise = np.array(Noise.of(5.0, 0, 0, rows, positions, [100, 400]).on(mx.zeros((500, 64))))
    for part, length in ((noise[:100], 100), (noise[100:], 400)):
        bound = 5 / np.sqrt(length * 64)
        assert np.abs(part).max() <= bound
        assert np.abs(part).max() > 0.99 * bound
        assert np.abs(part).mean() == pytest.approx(bound / 2, rel=0.03)
        assert abs(part.mean()) < 0.03 * bound
    assert len(np.unique(noise.round(7), axis=0)) == 500  # no two tokens have the same


@pytest.mark.slow
def test_evaluations_and_answers_have_no_noise(batches):
    model = load_model(BUILTIN)[0]
    lora.attach(model, rank=2, scale=1.0, target_modules=["q_proj"])
    losses = [
        Trainer(model, micro_batch_tokens=500, neftune_noise=alpha).evaluate(batches)
        for alpha in (0.0, 50.0)
    ]
    assert losses[0] == losses[1]
