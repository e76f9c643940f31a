import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import BASE, FAMILIES, set_adapter, tiny_model

from mlx_tuner.engine import lora
from mlx_tuner.engine.dora import DoRALinear
from mlx_tuner.errors import ModelError
from mlx_tuner.models.architecture import parameter_count, skeleton

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]

QWEN_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(("rank", "trainable"), [(8, 2_179_072), (16, 4_358_144)])
def test_the_1_5b_model_has_the_parameters_that_peft_counts(rank, trainable):
    model = skeleton(QWEN_1_5B)
    lora.attach(model, rank=rank, scale=2.0, target_modules=QKVO)
    assert sum(v.size for v in lora.trainable(model).values()) == trainable
    assert parameter_count(model) == 1_543_714_304 + trainable


def test_a_quantised_model_counts_as_many_parameters_as_before():
    config = {**BASE, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    quantised = {**config, "quantization": {"group_size": 32, "bits": 4}}
    counts = []
    for each in (config, quantised):
        model = skeleton(each)
        lora.attach(model, rank=2, scale=1.0, target_modules="all-linear")
        counts.append(parameter_count(model))
    assert counts[0] == counts[1]


def test_the_layer_computes_its_formula():
    linear = nn.Linear(6, 5)
    layer = lora.LoRALinear(linear, rank=3, scale=1.5)
    layer.lora_b = mx.random.normal((3, 5))
    x = mx.random.normal((4, 6))
    w, b, a, d = (np.array(v) for v in (linear.weight, linear.bias, layer.lora_a, layer.lora_b))
    expected = np.array(x) @ w.T + b + 1.5 * (np.array(x) @ a @ d)
    np.testing.assert_allclose(np.array(layer(x)), expected, atol=1e-5)


def test_a_new_adapter_leaves_the_model_as_it_was():
    model = skeleton(BASE)
    tokens = mx.array([[1, 2, 3, 4]])
    before = model(tokens)
    lora.attach(model, rank=4, scale=2.0, target_modules="all-linear")
    assert mx.array_equal(model(tokens), before)


@pytest.mark.parametrize("layer", [lora.LoRALinear, DoRALinear])
def test_neutral_values_make_the_base_of_any_adapter(layer):
    model, tokens = skeleton(BASE), mx.array([[1, 2, 3, 4]])
    base = model(tokens)
    lora.attach(model, rank=4, scale=2.0, target_modules="all-linear", layer=layer)
    factors = lora.trainable(model)
    set_adapter(model, {name: mx.random.normal(v.shape) for name, v in factors.items()})
    assert not mx.allclose(model(tokens), base, rtol=0.1)
    neutral = lora.neutral(model)
    assert neutral.keys() == factors.keys()
    set_adapter(model, neutral)
    np.testing.assert_allclose(model(tokens), base, rtol=1e-5, atol=1e-6)


def test_lora_a_starts_as_peft_starts_it():
    layer = lora.LoRALinear(nn.Linear(10_000, 2), rank=8, scale=1.0, key=mx.random.key(0))
    a = np.array(layer.lora_a)
    bound = 1 / np.sqrt(10_000)  # kaiming_uniform_(a=√5): √(6 / ((1 + 5) · fan_in))
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    assert not np.array(layer.lora_b).any()


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another():
    adapters = []
    for seed in (1, 1, 2):
        model = skeleton(BASE)
        lora.attach(model, rank=4, scale=2.0, target_modules=QKVO, seed=seed)
        adapters.append(np.array(lora.trainable(model)["model.layers.0.self_attn.q_proj.lora_a"]))
    assert np.array_equal(adapters[0], adapters[1])
    assert not np.array_equal(adapters[0], adapters[2])


def test_only_the_factors_train():
    names = {name.rsplit(".", 1)[1] for name in lora.trainable(tiny_model())}
    assert names == {"lora_a", "lora_b"}


def test_factors_stay_fp32_and_products_take_the_inputs_dtype():
    layer = lora.LoRALinear(nn.Linear(8, 8), rank=2, scale=1.0)
    layer.linear.set_dtype(mx.bfloat16)
    assert layer(mx.ones((3, 8), mx.bfloat16)).dtype == mx.bfloat16
    assert layer.lora_a.dtype == layer.lora_b.dtype == mx.float32


def test_num_layers_counts_from_the_last_block():
    model = skeleton(BASE)
    lora.attach(model, rank=2, scale=1.0, target_modules=["q_proj"], num_layers=2)
    paths = list(lora.adapted_modules(model))
    assert paths == ["model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]


def test_a_name_that_only_other_blocks_have_is_an_error():
    model = skeleton(FAMILIES["qwen3_next"])  # every second block has softmax attention
    assert lora.find_targets(model, ["q_proj", "in_proj_qkvz"], num_layers=2)
    with pytest.raises(ModelError, match="in_proj_qkvz matches no linear layer"):
        lora.find_targets(model, ["q_proj", "in_proj_qkvz"], num_layers=1)


def test_all_linear_leaves_routers_and_the_head_out():
    for family in ("qwen2 untied", "qwen2_moe", "qwen3_moe", "qwen3_next"):
        paths = lora.find_targets(skeleton(FAMILIES[family]), "all-linear")
        assert paths
        assert not any(path.endswith((".gate", "expert_gate", "lm_head")) for path in paths)


def test_a_name_that_matches_nothing_is_an_error_that_lists_what_there_is():
    with pytest.raises(ModelError) as error:
        lora.attach(skeleton(BASE), rank=2, scale=1.0, target_modules=["q_proj", "qkv"])
    message = str(error.value)
    assert "lora.target_modules: qkv matches no linear layer" in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


def test_more_layers_than_the_model_has_is_an_error_with_both_numbers():
    with pytest.raises(ModelError, match="9 layers, but the model has 3"):
        lora.attach(skeleton(BASE), rank=2, scale=1.0, target_modules=QKVO, num_layers=9)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_fused_layer_computes_what_the_adapted_one_did(bits):
    linear = nn.Linear(64, 32)
    if bits:
        linear = nn.QuantizedLinear.from_linear(linear, group_size=32, bits=bits)
    layer = lora.LoRALinear(linear, rank=4, scale=2.0)
    layer.lora_b = 0.1 * mx.random.normal((4, 32))
    x = mx.random.normal((5, 64))
    assert mx.allclose(layer.fuse()(x), layer(x), atol=1e-4)


def test_dropout_keeps_the_mean_and_needs_training_mode():
    layer = lora.LoRALinear(nn.Linear(4, 4), rank=2, scale=1.0, dropout=0.25)
    lora.number_layers(layer)
    keys = lora.token_keys(0, 0, np.zeros(20_000, int), np.arange(20_000))
    lora.set_dropout_keys(layer, mx.array(keys))
    ones = mx.ones((20_000, 4))
    dropped = np.array(layer.drop(ones))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    layer.eval()
    assert mx.array_equal(layer.drop(ones), ones)
