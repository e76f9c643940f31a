"""Fusing: transformers and mlx-lm are the judges of the result, and nothing is half done."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from killed import kill
from marks import some_slow
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from model_folders import CONFIGS, equal, make_adapter, write_model
from run_records import evaluation, summary_of, train_record

from mlx_tuner.cli import main
from mlx_tuner.conversion.convert import convert
from mlx_tuner.conversion.fidelity import Fidelity, require_kept
from mlx_tuner.conversion.fuse import fuse
from mlx_tuner.errors import ModelError, UsageError
from mlx_tuner.models.adapter import apply, write_adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.models.model_files import check_model_folder
from mlx_tuner.recipe.load import load_recipe
from mlx_tuner.runs import own
from mlx_tuner.show.progress import Display
from mlx_tuner.system.files import verify
from mlx_tuner.training.assembly import open_data

IDS = [[5, 300, 17, 999, 2, 1024]]
TOKENS = mx.array(IDS)
PLOT = b"\x89PNG\r\n\x1a\na plot"
QUANTISABLE = {"hidden_size": 64, "intermediate_size": 64}


@pytest.fixture
def display():
    with Display() as shown:
        yield shown


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    return write_model(folder, **QUANTISABLE)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A folder with an adapter that changes the base a lot."""
    folder = tmp_path_factory.mktemp("adapters") / "adapted"
    write_adapter(folder, make_adapter(load_model(base)[0], base))
    return folder


def weights_of(folder):
    loaded = mx.load(str(folder / "model.safetensors"))
    mx.eval(loaded)
    return loaded


def tuned_logits(base, adapter):
    model = load_model(base)[0]
    apply(model, read_adapter(adapter))
    return np.array(model(TOKENS).astype(mx.float32))


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_logits_of_the_adapter_on_its_base(
    tmp_path, display, model_type, tied
):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = write_model(tmp_path / "base", model_type, tie_word_embeddings=tied)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base))
    made = fuse(tmp_path / "adapter", tmp_path / "fused", display)
    assert made.form == "float32"
    assert made.check.error < 1e-4
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fused", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = loaded(torch.tensor(IDS)).logits.numpy()
    assert np.abs(theirs - tuned_logits(base, tmp_path / "adapter")).max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fused")
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )


def test_mlx_lm_gives_the_same_logits(base, adapted, tmp_path, display):
    fuse(adapted, tmp_path / "fused", display)
    loaded, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert np.abs(np.array(loaded(TOKENS)) - tuned_logits(base, adapted)).max() < 1e-4


@pytest.mark.parametrize("model_type", some_slow(CONFIGS, CONFIGS.keys() - {"qwen3_5"}))
def test_every_type_of_model_is_fused_under_the_names_it_was_published_with(
    tmp_path, display, model_type
):
    base = write_model(tmp_path / "base", model_type, shards=2)
    adapter = make_adapter(load_model(base)[0], base, targets=["q_proj", "o_proj"])
    write_adapter(tmp_path / "adapter", adapter)
    made = fuse(tmp_path / "adapter", tmp_path / "fused", display)
    assert made.check.error < 1e-3
    before, after = check_model_folder(base), check_model_folder(tmp_path / "fused")
    assert after.tensors.keys() == before.tensors.keys()
    loaded, _ = mlx_lm.load(str(tmp_path / "fused"))
    expected = tuned_logits(base, tmp_path / "adapter")
    assert np.abs(np.array(loaded(TOKENS)) - expected).max() < 1e-3


def test_names_and_untouched_weights_are_the_bases_own(base, tmp_path, display):
    adapter = make_adapter(load_model(base)[0], base, targets=["q_proj"], num_layers=1)
    write_adapter(tmp_path / "adapter", adapter)
    fuse(tmp_path / "adapter", tmp_path / "fused", display)
    before, after = weights_of(base), weights_of(tmp_path / "fused")
    changed = "model.layers.2.self_attn.q_proj.weight"
    delta = adapter.scale * (
        adapter.tensors[changed.replace("weight", "lora_a")]
        @ adapter.tensors[changed.replace("weight", "lora_b")]
    )
    assert mx.array_equal(after.pop(changed), before.pop(changed) + delta.T)
    assert equal(after, before)


def test_the_bases_dtype_is_kept_and_rounding_costs_little(tmp_path, display):
    base = write_model(tmp_path / "base", dtype=mx.bfloat16)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base))
    made = fuse(tmp_path / "adapter", tmp_path / "fused", display)
    assert {value.dtype for value in weights_of(tmp_path / "fused").values()} == {mx.bfloat16}
    assert made.form == "bfloat16"
    assert made.check.error < 0.1
    assert made.check.kept == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_quantised_base_is_dequantised(base, tmp_path, display):
    quantised = tmp_path / "quantised"
    convert(str(base), quantised, display, bits=8, verify=False)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(quantised)[0], quantised))
    made = fuse(tmp_path / "adapter", tmp_path / "fused", display)
    assert weights_of(tmp_path / "fused").keys() == weights_of(base).keys()
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert not any("quantization" in key for key in config)
    assert made.check.error < 0.01
    loaded, _ = mlx_lm.load(str(tmp_path / "fused"))
    expected = tuned_logits(quantised, tmp_path / "adapter")
    assert np.abs(np.array(loaded(TOKENS)) - expected).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("bits", some_slow([8, 4], {8}))
def test_a_quantised_result_says_what_it_lost(base, adapted, tmp_path, display, bits):
    made = fuse(adapted, tmp_path / "fused", display, bits=bits)
    loaded, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert loaded.model.layers[0].self_attn.q_proj.bits == bits
    exact = fuse(adapted, tmp_path / "exact", display).check
    assert exact.error < 1e-4 < made.check.error < (0.2 if bits == 8 else 1.5)
    shown = dict(made.check.lines())
    assert shown["kept of the fine-tune"].endswith(" %")
    assert shown["loss of the fused model"] != shown["loss with the adapter"]


@pytest.mark.slow
def test_every_token_that_ends_an_answer_is_listed(base, adapted, tmp_path, display):
    fuse(adapted, tmp_path / "fused", display)
    path = tmp_path / "fused" / "generation_config.json"
    assert json.loads(path.read_text())["eos_token_id"] == [2039, 2037]
    # A base model that lists the end of a text only.
    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    (plain / "generation_config.json").write_text('{"eos_token_id": 2037, "top_p": 0.8}')
    config = json.loads((plain / "config.json").read_text()) | {"eos_token_id": 2037}
    (plain / "config.json").write_text(json.dumps(config))
    fuse(adapted, tmp_path / "fused2", display, model=str(plain))
    settings = json.loads((tmp_path / "fused2" / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [2037, 2039], "top_p": 0.8}


def test_tokenizer_and_template_are_the_bases_and_code_stays_behind(
    base, adapted, tmp_path, display
):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    (source / "modeling_evil.py").write_text("raise SystemExit('executed')")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    fuse(adapted, tmp_path / "fused", display, model=str(source))
    names = {path.name for path in (tmp_path / "fused").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors", "model.safetensors.index.json", "README.md", "MANIFEST.json",
    }  # fmt: skip
    assert verify(tmp_path / "fused") == []
    assert (tmp_path / "fused" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    assert "auto_map" not in (tmp_path / "fused" / "config.json").read_text()


def test_an_adapter_that_mlx_lm_made_is_fused_as_mlx_lm_applies_it(base, tmp_path, display):
    theirs = load_model(base)[0]
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0}  # and no keys: every linear layer
    linear_to_lora_layers(theirs, 2, parameters)
    factors = {
        name: 0.05 * mx.random.normal(value.shape, key=mx.random.key(i))
        for i, (name, value) in enumerate(tree_flatten(theirs.parameters()))
        if name.endswith((".lora_a", ".lora_b"))
    }
    theirs.update(tree_unflatten(list(factors.items())))
    folder = tmp_path / "adapter"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), factors)
    config = {"model": str(base), "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    fuse(folder, tmp_path / "fused", display)
    loaded, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert mx.abs(loaded(TOKENS) - theirs(TOKENS)).max() < 1e-4


def test_an_untrained_adapter_gives_the_base(base, tmp_path, display):
    adapter = make_adapter(load_model(base)[0], base)
    zeros = {n: mx.zeros(t.shape) if "lora_b" in n else t for n, t in adapter.tensors.items()}
    write_adapter(tmp_path / "adapter", replace(adapter, tensors=zeros))
    made = fuse(tmp_path / "adapter", tmp_path / "fused", display)
    assert (made.check.kept, made.check.error) == (1.0, 0.0)
    assert equal(weights_of(tmp_path / "fused"), weights_of(base))


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """A run's folder, as training leaves it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tuned"
    write_adapter(folder, make_adapter(load_model(base)[0], base))
    rows = [
        {"prompt": f"What is {i} and {i}?", "completion": f"That is {2 * i}, of course."}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(
        f'[model]\npath = "{base}"\n[data]\ntrain = "{tmp_path}/rows.jsonl"\nvalid = 0.25\n'
        "[lora]\nrank = 4\nalpha = 8\n[train]\nepochs = 1\nlearning_rate = 1e-3\n"
    )
    own.remember((folder / "recipe.toml").read_text())
    (folder / "loss.png").write_bytes(PLOT)
    (folder / "summary.json").write_text(json.dumps(SUMMARY.to_json()))
    return folder


SUMMARY = summary_of(
    [train_record(1, 2.25), evaluation(2, 1.0625), train_record(3, 1.125)], recipe="tuned", rank=4
)


def test_a_run_is_compared_on_its_held_out_rows(run, tmp_path, display):
    made = fuse(run, tmp_path / "fused", display)
    assert made.check.rows == "held-out rows of the run"
    assert made.check.fused_loss == pytest.approx(made.check.tuned_loss, abs=1e-4)
    assert abs(made.check.base_loss - made.check.tuned_loss) > 0.01


def test_the_losses_are_those_of_the_held_out_answers(base, run, tmp_path, display):
    check = fuse(run, tmp_path / "fused", display).check
    recipe = load_recipe(run / "recipe.toml")
    valid = open_data(recipe, load_tokenizer(base)).valid
    model, total, count = load_model(base)[0], 0.0, 0
    for example in valid.examples(range(min(4, len(valid)))):
        tokens = mx.array(example.tokens)[None]
        losses = nn.losses.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
        total += (losses * mx.array(example.loss_mask[1:])).sum().item()
        count += example.loss_mask[1:].sum()
    assert check.base_loss == pytest.approx(total / count, rel=1e-5)


def test_rows_that_are_gone_are_replaced_by_fixed_prompts(run, tmp_path, display):
    (tmp_path / "rows.jsonl").unlink()
    assert fuse(run, tmp_path / "fused", display).check.rows == "fixed prompts"


def test_the_rows_of_a_strangers_recipe_are_not_read(run, tmp_path, display, monkeypatch):
    shutil.rmtree(tmp_path / "cache")  # so that nobody here ran it

    def opened(*_):
        raise AssertionError("the rows of a stranger's recipe were opened")

    monkeypatch.setattr("mlx_tuner.training.assembly.open_data", opened)
    assert fuse(run, tmp_path / "fused", display).check.rows == "fixed prompts"


def test_the_card_keeps_prompts_as_they_are(run, tmp_path, display):
    recipe = (run / "recipe.toml").read_text()
    prompt = '[data]\nsystem_prompt = "/no_think Answer with C:/x and ~/y."'
    (run / "recipe.toml").write_text(recipe.replace("[data]", prompt))
    fuse(run, tmp_path / "fused", display)
    card = (tmp_path / "fused" / "README.md").read_text()
    assert 'system_prompt = "/no_think Answer with C:/x and ~/y."' in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_the_card_has_recipe_losses_and_plot_and_no_private_path(run, tmp_path, display):
    fuse(run, tmp_path / "fused", display)
    card = (tmp_path / "fused" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for said in (
        "# tuned", "| first loss | 2.2500 |", "| final loss | 1.1250 |",
        "| best validation loss | 1.0625 at step 2 |", "![Training and validation loss](loss.png)",
        "learning_rate = 0.001", 'train = "rows.jsonl"', "| kept of the fine-tune | 100.0 % |",
    ):  # fmt: skip
        assert said in card
    assert str(tmp_path) not in card
    assert (tmp_path / "fused" / "loss.png").read_bytes() == PLOT
    # A second fusion gives the same bytes.
    fuse(run, tmp_path / "again", display)
    same = [(tmp_path / name / "MANIFEST.json").read_bytes() for name in ("fused", "again")]
    assert same[0] == same[1]


# ---- what is refused -----------------------------------------------------------------------------


def refusal(kind, *arguments, **options):
    with pytest.raises(kind) as raised:
        fuse(*arguments, **options)
    return str(raised.value)


@pytest.mark.parametrize("quantised", [False, True])
def test_half_of_a_fine_tune_is_the_limit(tmp_path, quantised):
    """Of a quantised result half must be kept; any other may be off by half."""
    for amount, lost in ((0.45, quantised), (0.55, not quantised)):
        check = Fidelity("", kept=amount, error=amount, base_loss=1, tuned_loss=1, fused_loss=1)
        if lost:
            with pytest.raises(ModelError, match="nothing was written"):
                require_kept(check, tmp_path, quantised=quantised)
        else:
            require_kept(check, tmp_path, quantised=quantised)


@pytest.mark.slow
def test_a_fine_tune_that_rounding_erases_is_refused(tmp_path, display):
    base = write_model(tmp_path / "base", dtype=mx.bfloat16)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base, scale=1e-3))
    said = refusal(ModelError, tmp_path / "adapter", tmp_path / "fused", display)
    assert "of what the fine-tune changes; nothing was written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_a_fine_tune_that_quantising_erases_is_refused(base, tmp_path, display):
    adapter = make_adapter(load_model(base)[0], base, targets=["q_proj"], scale=1e-5)
    write_adapter(tmp_path / "adapter", adapter)
    said = refusal(ModelError, tmp_path / "adapter", tmp_path / "fused", display, bits=4)
    assert "% of the fine-tune outlives the rounding; nothing was written" in said
    fuse(tmp_path / "adapter", tmp_path / "fused", display)


def test_an_adapter_with_nan_is_refused(base, tmp_path, display):
    adapter = make_adapter(load_model(base)[0], base)
    name = "model.layers.0.mlp.up_proj.lora_b"
    tensors = dict(adapter.tensors) | {name: adapter.tensors[name] * float("nan")}
    write_adapter(tmp_path / "adapter", replace(adapter, tensors=tensors))
    said = refusal(ModelError, tmp_path / "adapter", tmp_path / "fused", display)
    assert f"{name}: holds NaN or infinity" in said


def test_weights_that_overflow_the_bases_dtype_are_refused(tmp_path, display):
    base = write_model(tmp_path / "base", dtype=mx.float16)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base, scale=1e8))
    said = refusal(ModelError, tmp_path / "adapter", tmp_path / "fused", display)
    assert "is not finite in mlx.core.float16 once the adapter is in it" in said


def test_another_base_than_the_adapters_is_refused(base, adapted, tmp_path, display):
    other = write_model(tmp_path / "other", **QUANTISABLE, seed=1)
    said = refusal(ModelError, adapted, tmp_path / "fused", display, model=str(other))
    assert str(base) in said
    assert str(other) in said


def test_an_adapter_that_names_no_base_asks_for_one(adapted, tmp_path, display):
    nameless = replace(read_adapter(adapted), base="")
    write_adapter(tmp_path / "adapter", nameless)
    said = refusal(ModelError, tmp_path / "adapter", tmp_path / "fused", display)
    assert "name it with --model" in said


@pytest.mark.parametrize("place", ["input", "base", "full"])
def test_what_is_there_already_is_never_written_to(base, adapted, tmp_path, display, place):
    (tmp_path / "file").write_text("kept")
    output = {"input": adapted, "base": base, "full": tmp_path}[place]
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert "is there already" in refusal(UsageError, adapted, output, display)
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_a_folder_within_the_base_is_refused(base, adapted, display):
    said = refusal(UsageError, adapted, base / "fused", display)
    assert "lies in the base's own folder" in said
    assert not (base / "fused").exists()


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_what_was_kept(adapted, tmp_path):
    result = CliRunner().invoke(main, ["fuse", str(adapted), "-o", str(tmp_path / "fused")])
    assert result.exit_code == 0, result.output
    assert "in float32" in result.stdout
    assert "kept of the fine-tune  100.0 %" in result.stdout
    mlx_lm.load(str(tmp_path / "fused"))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing", "-o", "fused"], 1, "nothing: no adapter"),
        (["ADAPTED", "-o", "."], 2, "is there already"),
        (["ADAPTED", "-o", "fused", "--model", "./nothing"], 1, "no such folder"),
        (["ADAPTED", "-o", "fused", "--quantize", "3"], 2, "'3' is not one of '4', '8'"),
        (["ADAPTED", "-o", "fused", "--push", "me/mine"], 1, "uploading needs a token"),
    ],
)
def test_a_wrong_command_is_one_line(adapted, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_tuner.system.hub.get_token", lambda: None)
    (tmp_path / "something").write_text("")
    arguments = [str(adapted) if word == "ADAPTED" else word for word in arguments]
    result = CliRunner().invoke(main, ["fuse", *arguments])
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.slow
def test_a_push_uploads_the_folder_once_it_is_complete(adapted, tmp_path, monkeypatch, hub_of_none):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = ["fuse", str(adapted), "-o", str(tmp_path / "fused"), "--push", "me/mine"]
    result = CliRunner().invoke(main, arguments)
    assert result.stdout.endswith(f"{hub_of_none.address}/me/mine\n")
    pushed = hub_of_none.repositories["models/me/mine"].files
    made = {path.name: path.read_bytes() for path in (tmp_path / "fused").iterdir()}
    assert pushed == made
    assert verify(tmp_path / "fused") == []


# ---- slow: killed --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fusion_killed_at_any_moment_leaves_all_or_nothing(base, adapted, tmp_path):
    def snapshot(folder):
        return {
            path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()
        }

    before = snapshot(base), snapshot(adapted)
    assert 3 < kill("fuse", str(adapted), output=tmp_path / "work" / "fused") <= 25
    assert (snapshot(base), snapshot(adapted)) == before
