"""Adapter folders: what mlx-lm and we read and write, and what is refused."""

import hashlib
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from model_folders import equal, make_adapter, write_model
from safetensors.numpy import save_file

from mlx_tuner.engine import lora
from mlx_tuner.errors import ModelError
from mlx_tuner.models.adapter import apply, write_adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.base import check_base, fingerprint

TOKENS = mx.array([[5, 300, 17, 999, 2, 1024]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(base):
    return load_model(base)[0]


@pytest.fixture
def adapter(model, base):
    return make_adapter(model, base)


def faults_of(call, *arguments):
    with pytest.raises(ModelError) as raised:
        call(*arguments)
    return [str(fault) for fault in raised.value.faults]


def rewrite(folder, change):
    """Change the tensors of a written adapter."""
    path = str(folder / "adapters.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    mx.save_safetensors(path, change(tensors))


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


# ---- the round trip and mlx-lm -------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(adapter, tmp_path):
    write_adapter(tmp_path, replace(adapter, revision="abc", dropout=0.25))
    read = read_adapter(tmp_path)
    assert equal(read.tensors, adapter.tensors)
    assert (read.rank, read.scale, read.dropout, read.num_layers) == (4, 2.0, 0.25, 3)
    assert (read.base, read.revision) == (adapter.base, "abc")
    assert read.fingerprint == adapter.fingerprint
    assert read.keys == adapter.keys
    assert {"self_attn.q_proj", "mlp.down_proj"} < set(read.keys)


@pytest.mark.parametrize("num_layers", [None, 2])
def test_mlx_lm_loads_a_written_adapter_and_gives_our_logits(base, model, tmp_path, num_layers):
    adapter = make_adapter(
        model, base, scale=2.5, targets=["q_proj", "up_proj"], num_layers=num_layers
    )
    write_adapter(tmp_path, adapter)
    theirs, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path))
    plain = model(TOKENS)
    apply(model, adapter)
    ours = model(TOKENS)
    assert mx.abs(ours - theirs(TOKENS)).max() < 5e-5
    assert mx.abs(ours - plain).max() > 0.01


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "self_attn.v_proj"]])
def test_an_adapter_that_mlx_lm_made_gives_mlx_lms_logits(base, model, tmp_path, keys):
    theirs = load_model(base)[0]
    theirs.freeze()
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(theirs, 2, parameters)
    theirs.update(
        lora.tree_unflatten(
            [
                (n, mx.random.normal(v.shape, key=mx.random.key(i)) * 0.1)
                for i, (n, v) in enumerate(lora.trainable(theirs).items())
            ]
        )
    )
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), lora.trainable(theirs))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"model": "a/b", "seed": 0, **config}))
    adapter = read_adapter(tmp_path)
    assert (adapter.base, adapter.fingerprint, adapter.num_layers) == ("a/b", None, 2)
    assert len(adapter.modules) == 2 * (len(keys) if keys else 7)
    check_base(adapter, base)
    apply(model, adapter)
    assert mx.abs(model(TOKENS) - theirs(TOKENS)).max() < 5e-5


def test_an_applied_adapter_is_all_that_trains(model, adapter):
    apply(model, adapter)
    assert equal(lora.trainable(model), dict(adapter.tensors))


def test_an_adapter_goes_onto_a_quantised_base(model, adapter):
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda p, m: "self_attn.q" in p)
    apply(model, adapter)
    assert isinstance(model.layers[0].self_attn.q_proj.linear, nn.QuantizedLinear)
    assert mx.isfinite(model(TOKENS)).all()


def test_an_adapter_is_rewritten_over_the_files_it_was_read_from(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    write_adapter(tmp_path, read_adapter(tmp_path))
    assert equal(read_adapter(tmp_path).tensors, adapter.tensors)


def test_half_precision_tensors_are_read_as_single(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    rewrite(tmp_path, lambda t: {k: v.astype(mx.bfloat16) for k, v in t.items()})
    read = read_adapter(tmp_path).tensors
    assert equal(
        read, {k: v.astype(mx.bfloat16).astype(mx.float32) for k, v in adapter.tensors.items()}
    )


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fine_tune_type": "full"}, "Input should be 'lora' or 'dora', not 'full'"),
        ({"lora_parameters": "absent"}, "lora_parameters: Field required"),
        ({"lora_parameters": {"scale": 1.0}}, "lora_parameters.rank: Field required"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "lora_parameters.scale: Field required"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "the number NaN is not finite"),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, "lora_parameters.rank"),
        ({"lora_parameters": {"rank": 8, "scale": 1.0}}, "rank 4, but lora_parameters.rank is 8"),
        (
            {"lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["self_attn.q_proj"]}},
            "keys: mlp.down_proj has tensors, but is not listed",
        ),
        ({"num_layers": "absent"}, "num_layers: Field required"),
        ({"num_layers": "3"}, "num_layers"),
        ({"model": 3}, "model: Input should be a valid string, not 3"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_followed_is_refused(adapter, tmp_path, changes, said):
    write_adapter(tmp_path, adapter)
    reconfigure(tmp_path, **changes)
    assert said in faults_of(read_adapter, tmp_path)[0]


def test_a_listed_key_without_tensors_is_named(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    keys = [*adapter.keys, "self_attn.z_proj"]
    reconfigure(tmp_path, lora_parameters={"rank": 4, "scale": 1.0, "keys": keys})
    (fault,) = faults_of(read_adapter, tmp_path)
    assert "lora_parameters.keys: self_attn.z_proj is listed, but has no tensors" in fault


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_broken_config_is_one_line(adapter, tmp_path, content):
    write_adapter(tmp_path, adapter)
    (tmp_path / "adapter_config.json").write_text(content)
    (fault,) = faults_of(read_adapter, tmp_path)
    assert "adapter_config.json:" in fault
    assert "\n" not in fault


def test_a_missing_config_is_named(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    (tmp_path / "adapter_config.json").unlink()
    (fault,) = faults_of(read_adapter, tmp_path)
    assert fault.startswith(f"{tmp_path}/adapter_config.json: missing")


def test_every_unusable_tensor_is_named_at_once(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    path = "model.layers.0.self_attn"

    def spoil(tensors):
        del tensors[f"{path}.q_proj.lora_b"]
        tensors[f"{path}.k_proj.lora_a"] = mx.zeros((64, 5))
        tensors[f"{path}.v_proj.lora_a"] = mx.zeros((2, 64, 4))
        tensors[f"{path}.o_proj.m"] = mx.zeros((64,))
        tensors[f"{path}.o_proj.weight"] = mx.zeros((64, 64))
        tensors["model.embed_tokens.lora_a"] = mx.zeros((2048, 4))
        tensors["model.layers.1.mlp.up_proj.lora_a"] = mx.zeros((64, 4), mx.int32)
        return tensors

    rewrite(tmp_path, spoil)
    faults = "\n".join(faults_of(read_adapter, tmp_path))
    for said in (
        "q_proj.lora_a: there is no model.layers.0.self_attn.q_proj.lora_b",
        "k_proj.lora_a: shape (64, 5) does not go with (4, 32)",
        "v_proj.lora_a: adapts stacked experts",
        "o_proj.m: the magnitude of a DoRA adapter",
        "o_proj.weight: not a factor",
        "embed_tokens.lora_a: adapts a module outside the blocks",
        "up_proj.lora_a: dtype I32",
    ):
        assert said in faults


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_named(adapter, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.lora_b"
    tensors = dict(adapter.tensors)
    tensors[name] = mx.where(mx.arange(128) == 127, value, tensors[name])
    write_adapter(tmp_path, replace(adapter, tensors=tensors))
    (fault,) = faults_of(read_adapter, tmp_path)
    assert f"{name}: holds NaN or infinity" in fault


def test_a_file_that_lies_about_itself_never_reaches_mlx(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    weights = tmp_path / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (fault,) = faults_of(read_adapter, tmp_path)
    assert "truncated" in fault


def test_an_empty_file_of_tensors_is_refused(adapter, tmp_path):
    write_adapter(tmp_path, adapter)
    rewrite(tmp_path, lambda tensors: {})
    assert "holds no tensors" in faults_of(read_adapter, tmp_path)[0]


def test_a_folder_without_an_adapter_says_what_was_looked_for(tmp_path):
    (fault,) = faults_of(read_adapter, tmp_path)
    assert "neither adapters.safetensors nor adapter_model.safetensors" in fault


def test_an_adapter_for_other_modules_is_refused_with_all_that_differs(adapter, tmp_path):
    narrow = load_model(
        write_model(tmp_path / "narrow", num_hidden_layers=2, intermediate_size=40)
    )[0]
    before = narrow(TOKENS)
    faults = faults_of(apply, narrow, adapter)
    assert len(faults) == 7 + 2 * 3
    assert any("layers.2.mlp.up_proj: the model has no such linear layer" in f for f in faults)
    assert any("up_proj: from 64 to 128, but the model's is 64 to 40" in f for f in faults)
    assert mx.array_equal(narrow(TOKENS), before)


# ---- the base ----------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_and_not_of_their_files(base, tmp_path):
    weights = mx.load(str(base / "model.safetensors"))
    mx.eval(weights)
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        shard = {name: weights[name] for name in reversed(part)}
        mx.save_safetensors(str(tmp_path / f"model-0000{i}-of-00002.safetensors"), shard)
    assert fingerprint(tmp_path) == fingerprint(base)


def test_the_fingerprint_stays_what_adapters_have_on_record(tmp_path):
    """Of bytes that are written by hand here: a change of the formula orphans every adapter."""
    values = np.arange(300, dtype=np.float32)
    tensors = {"b.weight": values.reshape(20, 15), "a.weight": values[:3]}
    save_file(tensors, tmp_path / "model.safetensors")
    digest = hashlib.sha256(b"a.weight F32 (3,)\n" + values[:3].tobytes())
    digest.update(b"b.weight F32 (20, 15)\n")
    for start in (0, 162, 324, 486, 649, 811, 973, 1136):  # 1200 bytes: 0 to 1136 in 7 steps
        digest.update(values.tobytes()[start : start + 64])
    assert fingerprint(tmp_path) == digest.hexdigest()


def test_another_base_is_refused_naming_both(adapter, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    (fault,) = faults_of(check_base, adapter, other)
    assert adapter.base in fault
    assert str(other) in fault
    assert fingerprint(other)[:12] in fault


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    assert "no model*.safetensors there" in faults_of(fingerprint, tmp_path)[0]
