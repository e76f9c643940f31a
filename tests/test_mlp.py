"""A mixture of experts on flat tokens is mlx-lm's, and its gradient adds in one order."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from test_fusion import operations
from tiny import FAMILIES

from mlx_tuner.engine.mlp import mlp
from mlx_tuner.models.architecture import skeleton


def mixture(family, *, bits=None):
    mx.random.seed(0)
    model = skeleton(FAMILIES[family])
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    module = model.layers[-1].mlp
    assert "switch_mlp" in module
    return module


def inputs(module):
    size = (
        module.gate.scales.shape[1] * 32 if "scales" in module.gate else module.gate.weight.shape[1]
    )
    x, cotangent = (mx.random.normal((40, size), key=mx.random.key(i)) for i in range(2))
    return x, cotangent


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_a_mixture_and_its_gradient_are_those_of_mlx_lm(family, bits):
    module = mixture(family, bits=bits)
    x, cotangent = inputs(module)
    ours, (of_x,) = mx.vjp(lambda x: mlp(module, x), [x], [cotangent])
    theirs, (expected,) = mx.vjp(module, [x], [cotangent])
    assert mx.allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert mx.allclose(of_x, expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_of_a_mixture_is_added_up_in_any_order():
    module = mixture("qwen3_moe")
    x, cotangent = inputs(module)
    mx.eval(x, cotangent)
    _, of_x = mx.vjp(lambda x: mlp(module, x), [x], [cotangent])
    assert operations(*of_x)["Scatter Sum"] == 0
    _, of_x = mx.vjp(module, [x], [cotangent])
    assert operations(*of_x)["Scatter Sum"] > 0  # so it would be seen
