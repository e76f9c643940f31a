"""PEFT's format in and out: PEFT on torch is the judge of what an adapter computes."""

import json
import math
import re
import shutil
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import examples
from mlx_lm.utils import load_adapters, load_model
from model_folders import BUILTIN, CONFIGS, TOKENIZER, equal, make_adapter, write_model

from mlx_tuner.cli import main
from mlx_tuner.conversion.fuse import fuse
from mlx_tuner.errors import ModelError
from mlx_tuner.models.adapter import Adapter, apply, write_adapter
from mlx_tuner.models.adapter_folder import import_adapter, read_adapter
from mlx_tuner.models.peft_format import write_peft
from mlx_tuner.show.progress import Display
from mlx_tuner.system.files import verify

# PEFT and transformers warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = [[5, 300, 17, 999, 2, 1024]]
TOKENS = mx.array(IDS)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peft(torch):
    return pytest.importorskip("peft")


@pytest.fixture
def torch_base(base, torch):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits_of(base, adapter):
    model = load_model(base)[0]
    apply(model, adapter)
    return np.array(model(TOKENS))


def torch_logits(torch, model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def make_peft(torch, peft, torch_base, folder, *, dtype="float32", seed=0, **config):
    """A PEFT adapter made by PEFT, with factors as after training; returns its logits."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | config
    model = peft.get_peft_model(torch_base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.data = noise.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return torch_logits(torch, model.float())


# ---- ours to PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "num_layers", "targets"),
    [(2.0, None, "all-linear"), (2.7, 2, ["q_proj", "o_proj"]), (1.0, 1, ["up_proj"])],
)
def test_peft_gives_our_adapters_logits(
    base, torch, peft, torch_base, tmp_path, scale, num_layers, targets
):
    adapter = make_adapter(
        load_model(base)[0], base, scale=scale, targets=targets, num_layers=num_layers
    )
    write_peft(tmp_path, adapter)
    loaded = peft.PeftModel.from_pretrained(torch_base, tmp_path)
    assert len(loaded.targeted_module_names) == len(adapter.modules)
    theirs = torch_logits(torch, loaded)
    assert np.abs(theirs - logits_of(base, adapter)).max() < 1e-4
    assert np.abs(theirs - np.array(load_model(base)[0](TOKENS))).max() > 0.01


@pytest.mark.parametrize(
    ("scale", "alpha", "folded"), [(2.0, 4, 2.0), (0.25, 4, 0.25), (20.0, 80, 1), (2.7, 10.8, 1)]
)
def test_alpha_is_the_rank_where_the_scale_is_folded_exactly(base, tmp_path, scale, alpha, folded):
    adapter = make_adapter(load_model(base)[0], base, scale=scale)
    write_peft(tmp_path, adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, pytest.approx(alpha, rel=1e-15))
    assert type(config["lora_alpha"]) is type(alpha)
    theirs = mx.load(str(tmp_path / "adapter_model.safetensors"))
    b = theirs["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].T
    assert mx.array_equal(b, folded * adapter.tensors["model.layers.0.self_attn.q_proj.lora_b"])
    assert config["layers_to_transform"] is None
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["base_model_name_or_path"] == str(base)


def test_the_last_blocks_are_listed_by_their_numbers(base, tmp_path):
    write_peft(tmp_path, make_adapter(load_model(base)[0], base, num_layers=2))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 2]


def test_modules_that_differ_between_blocks_are_listed_by_their_paths(
    base, torch, peft, torch_base, tmp_path
):
    adapter = make_adapter(load_model(base)[0], base, targets=["q_proj", "v_proj"])
    left_out = "model.layers.1.self_attn.v_proj"
    kept = {n: t for n, t in adapter.tensors.items() if not n.startswith(left_out)}
    adapter = replace(adapter, tensors=kept)
    write_peft(tmp_path, adapter)
    loaded = peft.PeftModel.from_pretrained(torch_base, tmp_path)
    assert sorted(loaded.targeted_module_names) == sorted(adapter.modules)
    assert np.abs(torch_logits(torch, loaded) - logits_of(base, adapter)).max() < 1e-4


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5, 20.0, 2.7, 1 / 3, 1e-3, -3.0])
def test_exporting_and_importing_gives_the_adapter_bit_for_bit(base, tmp_path, scale):
    adapter = make_adapter(load_model(base)[0], base, scale=scale, num_layers=2)
    adapter = replace(adapter, revision="abc", dropout=0.125)
    write_peft(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert equal(read.tensors, dict(adapter.tensors))
    assert replace(read, tensors={}, folder=None) == replace(adapter, tensors={})


@settings(max_examples=examples(60))
@given(
    scale=st.floats(1e-3, 1e3).filter(lambda x: x != 1),
    values=st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8),
)
def test_any_scale_and_values_survive_export_and_import(tmp_path_factory, scale, values):
    values = np.array(values, np.float32)
    values[np.abs(values) < 1e-30] = 0
    path = "model.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_a": mx.ones((3, 2)), f"{path}.lora_b": mx.array(values).reshape(2, 4)}
    folder = tmp_path_factory.mktemp("peft")
    write_peft(folder, Adapter(tensors, rank=2, scale=scale))
    read = read_adapter(folder)
    assert read.scale == scale
    assert equal(read.tensors, tensors)


@pytest.mark.parametrize(
    "note",
    [
        "[]",
        "{",
        '{"scale": 0}',
        '{"scale": [], "num_layers": 3, "fingerprint": null, "stem": ""}',
        '{"scale": 2.0, "num_layers": "3", "fingerprint": null, "stem": ""}',
        '{"scale": 2.0, "num_layers": 3, "fingerprint": 5, "stem": ""}',
        '{"scale": 2.0, "num_layers": 3, "fingerprint": null, "stem": "../"}',
        '{"scale": 1e-60, "num_layers": 3, "fingerprint": null, "stem": ""}',
        '{"scale": 8.6e-78, "num_layers": 3, "fingerprint": null, "stem": ""}',
    ],
)
def test_a_note_that_does_not_belong_to_the_tensors_changes_nothing(base, tmp_path, note):
    """Such as after training on with PEFT, or by someone who means harm."""
    write_peft(tmp_path, make_adapter(load_model(base)[0], base, scale=2.0, targets=["q_proj"]))
    path = str(tmp_path / "adapter_model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    mx.save_safetensors(path, tensors, {"format": "pt", "mlx_tuner": note})
    read = read_adapter(tmp_path)
    module = read.modules[0]
    assert read.scale == 1.0
    expected = tensors[f"base_model.model.{module}.lora_B.weight"].T
    assert mx.array_equal(read.tensors[f"{module}.lora_b"], expected)


def test_a_changed_alpha_is_obeyed_and_not_undone(base, tmp_path):
    adapter = make_adapter(load_model(base)[0], base, scale=2.5)
    write_peft(tmp_path, adapter)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 20}))
    read = read_adapter(tmp_path)
    doubled = replace(adapter, scale=5.0)
    assert np.abs(logits_of(base, read) - logits_of(base, doubled)).max() < 1e-4


# ---- PEFT to ours --------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "fractional": {"lora_alpha": 3, "r": 7},
    "patterns": {
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3, r".*\.2\..*v_proj": 5},
    },
    "rslora-patterns": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"v_proj": 7},
    },
    "some-layers": {"layers_to_transform": [0, 2]},
    "one-layer": {"layers_to_transform": 1},
    "regex-targets": {"target_modules": r".*\.[12]\.self_attn\.(q|k)_proj"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16-patterns": {"dtype": "float16", "rank_pattern": {"v_proj": 1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_peft_made_is_imported_with_its_logits(
    base, torch, peft, torch_base, tmp_path, kind
):
    theirs = make_peft(torch, peft, torch_base, tmp_path / "peft", **KINDS[kind])
    write_adapter(tmp_path / "ours", read_adapter(tmp_path / "peft"))
    imported = read_adapter(tmp_path / "ours")
    assert np.abs(logits_of(base, imported) - theirs).max() < 1e-4
    # mlx-lm reads the same folder.
    model = load_model(base)[0]
    assert (
        np.abs(np.array(load_adapters(model, str(tmp_path / "ours"))(TOKENS)) - theirs).max() < 1e-4
    )


@pytest.fixture(scope="module")
def qwen_3_5(torch, tmp_path_factory):
    """A model of transformers' own, whose blocks MLX keeps in another place."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("models") / "qwen3_5"
    text = {**CONFIGS["qwen3_5"]["text_config"], "num_hidden_layers": 4}
    del text["full_attention_interval"]  # four, as both have it without
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    eyes |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_5", text_config=text, vision_config=eyes, tie_word_embeddings=True
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(BUILTIN / name, folder / name)
    return folder


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["in_proj_qkv", "down_proj"]])
def test_peft_gives_our_logits_of_qwen_3_5(torch, peft, qwen_3_5, tmp_path, targets):
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(load_model(qwen_3_5)[0], qwen_3_5, targets=targets, scale=1.7)
    write_peft(tmp_path, adapter)
    theirs = AutoModelForCausalLM.from_pretrained(qwen_3_5, dtype=torch.float32)
    plain = torch_logits(torch, theirs)
    found = torch_logits(torch, peft.PeftModel.from_pretrained(theirs, tmp_path))
    assert np.abs(found - logits_of(qwen_3_5, adapter)).max() < 1e-4
    assert np.abs(found - plain).max() > 0.01
    read = read_adapter(tmp_path)
    assert equal(read.tensors, dict(adapter.tensors))
    assert replace(read, tensors={}, folder=None) == replace(adapter, tensors={})


@pytest.mark.parametrize("loader", ["AutoModelForCausalLM", "AutoModelForImageTextToText"])
def test_a_pefts_adapter_of_qwen_3_5_goes_onto_mlxs_model(torch, peft, qwen_3_5, tmp_path, loader):
    import transformers

    load = getattr(transformers, loader).from_pretrained
    theirs = make_peft(
        torch, peft, load(qwen_3_5, dtype=torch.float32), tmp_path / "peft",
        target_modules=["q_proj", "o_proj", "in_proj_qkv"],
    )  # fmt: skip
    adapter = read_adapter(tmp_path / "peft")
    assert np.abs(logits_of(qwen_3_5, adapter) - theirs).max() < 1e-4
    with Display() as display:
        fuse(tmp_path / "peft", tmp_path / "fused", display, model=str(qwen_3_5))
    assert np.abs(np.array(load_model(tmp_path / "fused")[0](TOKENS)) - theirs).max() < 1e-4
    import_adapter(tmp_path / "peft", tmp_path / "ours")
    by_mlx_lm = load_adapters(load_model(qwen_3_5)[0], str(tmp_path / "ours"))
    assert np.abs(np.array(by_mlx_lm(TOKENS)) - theirs).max() < 1e-4


def test_names_that_only_qwen_3_5_has_are_mlxs_once_imported_whatever_the_base(tmp_path):
    block = "layers.3.self_attn.q_proj"
    factors = {"lora_a": mx.ones((8, 2)), "lora_b": mx.ones((2, 8))}
    for base in ("acme/not-here", ""):
        for theirs, ours in (("model.language_model", "language_model.model"), ("model", "model")):
            tensors = {f"{theirs}.{block}.{leaf}": value for leaf, value in factors.items()}
            folder = tmp_path / f"{len(base)}-{theirs}"
            write_adapter(folder, Adapter(tensors, rank=2, scale=1.0, base=base))
            import_adapter(folder, folder / "ours")
            assert read_adapter(folder / "ours").modules == [f"{ours}.{block}"]


def test_an_imported_adapter_is_exported_with_one_rank_and_alpha(
    torch, peft, torch_base, base, tmp_path
):
    make_peft(torch, peft, torch_base, tmp_path / "peft", **KINDS["patterns"])
    imported = read_adapter(tmp_path / "peft")
    write_peft(tmp_path / "again", imported)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (6, {}, {})
    assert np.array_equal(
        logits_of(base, read_adapter(tmp_path / "again")), logits_of(base, imported)
    )


def test_ranks_that_differ_are_padded_with_zeros(torch, peft, torch_base, tmp_path):
    make_peft(torch, peft, torch_base, tmp_path, rank_pattern={"down_proj": 2})
    read = read_adapter(tmp_path)
    assert read.rank == 4
    # down_proj's own scale is 8 / 2, the others' 8 / 4.
    assert read.scale == 2.0
    assert not mx.any(read.tensors["model.layers.0.mlp.down_proj.lora_a"][:, 2:])
    assert not mx.any(read.tensors["model.layers.0.mlp.down_proj.lora_b"][2:])
    theirs = mx.load(str(tmp_path / "adapter_model.safetensors"))
    b = theirs["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    assert mx.array_equal(read.tensors["model.layers.0.mlp.down_proj.lora_b"][:2], 2 * b.T)


def test_rank_stabilised_scaling_is_over_the_square_root(torch, peft, torch_base, tmp_path):
    make_peft(torch, peft, torch_base, tmp_path, use_rslora=True, r=8, lora_alpha=16)
    assert read_adapter(tmp_path).scale == 16 / math.sqrt(8)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def folder(base, tmp_path):
    write_peft(tmp_path, make_adapter(load_model(base)[0], base, targets=["q_proj"]))
    return tmp_path


def faults_of(folder):
    with pytest.raises(ModelError) as raised:
        read_adapter(folder)
    return "\n".join(map(str, raised.value.faults))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type: Input should be 'LORA', not 'IA3'"),
        ({"use_rslora": "yes"}, "use_rslora: Input should be a valid boolean, not 'yes'"),
        ({"lora_alpha": 0}, "lora_alpha: gives no scale to work with"),
        ({"bias": "all"}, "bias: Input should be 'none', not 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base's weights"),
        ({"r": 8}, "q_proj.lora_A.weight: rank 4, but adapter_config.json says 8"),
        ({"r": None}, "r: Input should be a valid integer, not None"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number, not None"),
        ({"lora_alpha": "16"}, "lora_alpha: Input should be a valid number, not '16'"),
        ({"target_modules": ["v_proj"]}, "adapts a module that target_modules"),
        ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj.lora_A.weight: adapts a module"),
        ({"layers_to_transform": "all"}, "layers_to_transform.list[int]: Input should be"),
        ({"rank_pattern": [1]}, "rank_pattern: Input should be a valid dictionary"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj: Input should be greater than"),
        ({"rank_pattern": {"(": 4}}, "the pattern '(' is too complicated"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "too complicated"),
        ({"alpha_pattern": {".*.*.*.*.*x": 4}}, "too complicated"),
        ({"alpha_pattern": {"[z-a]": 4}}, "'[z-a]': bad character range"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_followed_is_refused(folder, changes, said):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert said in faults_of(folder)


@pytest.mark.parametrize(
    "field",
    [
        "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save",
        "trainable_token_indices", "layer_replication", "target_parameters",
        "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
    ],
)  # fmt: skip
def test_each_field_that_changes_what_an_adapter_computes_must_be_off(folder, field):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: {"x": 1}}))
    assert f"{field}: is set, which is not supported" in faults_of(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))
    read_adapter(folder)


def test_ranks_that_would_fill_memory_once_padded_are_refused(folder):
    """Rank 20,000 beside rank 1: 6 MB that would become gigabytes."""
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(150)]
    tensors = {}
    for i, module in enumerate(modules):
        rank = 20_000 if i == 0 else 1
        tensors[f"base_model.model.{module}.lora_A.weight"] = mx.zeros((rank, 64))
        tensors[f"base_model.model.{module}.lora_B.weight"] = mx.zeros((64, rank))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    path = folder / "adapter_config.json"
    changes = {"r": 1, "rank_pattern": {"layers.0.self_attn.q_proj": 20_000}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert "all modules of the largest rank, 20,000, would take" in faults_of(folder)


def test_patterns_that_take_long_on_many_modules_are_refused(folder):
    module = "model.layers.{}.self_attn.q_proj"
    tensors = {}
    for i in range(2_000):
        tensors[f"base_model.model.{module.format(i)}.lora_A.weight"] = mx.zeros((1, 1))
        tensors[f"base_model.model.{module.format(i)}.lora_B.weight"] = mx.zeros((1, 1))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    path = folder / "adapter_config.json"
    changes = {"r": 1, "alpha_pattern": {f".*{i}.*x": 2 for i in range(100)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    start = time.monotonic()
    assert "too many patterns for so many modules" in faults_of(folder)
    assert time.monotonic() - start < 5


def test_a_name_of_a_tensor_that_is_far_too_long_is_refused(folder):
    name = "base_model.model.model.layers.0." + "x" * 5_000
    pair = {f"{name}.lora_A.weight": mx.zeros((4, 8)), f"{name}.lora_B.weight": mx.zeros((8, 4))}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), pair)
    assert "a name of 5,015 characters" in faults_of(folder)


def test_every_unusable_tensor_is_named_at_once(folder):
    path = str(folder / "adapter_model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    del tensors[f"{prefix}.lora_B.weight"]
    tensors[f"{prefix}.lora_magnitude_vector"] = mx.zeros((32,))
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = mx.zeros((4, 32))
    tensors["base_model.model.lm_head.lora_A.weight"] = mx.zeros((4, 32))
    tensors["base_model.model.model.layers.0.q.lora_A.weight"] = mx.zeros((4, 32, 2))
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = mx.zeros((32,))
    mx.save_safetensors(path, tensors)
    faults = faults_of(folder)
    for said in (
        f"{prefix}.lora_A.weight: there is no {prefix}.lora_B.weight",
        "lora_magnitude_vector: the magnitude of a DoRA adapter",
        "embed_tokens.lora_embedding_A: adapts an embedding",
        "lm_head.lora_A.weight: adapts a module outside the blocks",
        "layers.0.q.lora_A.weight: adapts stacked experts",
        "q_proj.bias: not named base_model.model.",
    ):
        assert said in faults


def test_a_pickled_adapter_is_refused_unread(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert re.search(
        r"adapter_model.bin may run code when it is read; save .* again", faults_of(folder)
    )


# ---- the commands --------------------------------------------------------------------------------


def test_the_commands_export_and_import_an_adapter(base, tmp_path):
    adapter = make_adapter(load_model(base)[0], base, scale=2.7)
    write_adapter(tmp_path / "ours", adapter)
    names = [str(tmp_path / name) for name in ("ours", "peft", "again")]
    out = CliRunner().invoke(main, ["export", names[0], "--to", "peft", "-o", names[1]])
    back = CliRunner().invoke(main, ["import", names[1], "-o", names[2]])
    assert (out.exit_code, back.exit_code) == (0, 0), out.output + back.output
    assert f"PEFT adapter of rank 4 for {base}" in out.stdout
    assert "rank 4, scale 2.7, 21 modules" in back.stdout
    assert equal(read_adapter(tmp_path / "again").tensors, dict(adapter.tensors))
    assert verify(tmp_path / "peft") == verify(tmp_path / "again") == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export", "OURS", "--to", "peft", "-o", "OURS"], 2, "is there already"),
        (["import", "OURS", "-o", "."], 2, "is there already"),
        (["export", "nothing", "--to", "peft", "-o", "out"], 1, "nothing: no adapter"),
        (["import", "nothing", "-o", "out"], 1, "nothing: no adapter"),
        (["export", "OURS", "--to", "peft", "-o", "out", "--dtype", "f16"], 2, "for --to gguf"),
        (["export", "OURS", "--to", "onnx", "-o", "out"], 2, "'onnx' is not one of"),
    ],
)
def test_a_wrong_command_is_one_line(base, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "ours", make_adapter(load_model(base)[0], base))
    result = CliRunner().invoke(main, [word.replace("OURS", "ours") for word in arguments])
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
