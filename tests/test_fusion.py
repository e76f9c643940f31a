"""What a GPU computes in one kernel: seen in the graph that MLX would run, and computed here."""

import io
import re
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import pytest
from tiny import BASE, random_rows, tiny_model

from mlx_tuner.engine.backend import GPU
from mlx_tuner.engine.swiglu import _backward, _forward, swiglu
from mlx_tuner.engine.trainer import Trainer


def operations(*outputs):
    """How often each operation is in the graph of arrays that are not computed yet."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return Counter(re.findall(r'label ="([^"]*)"', text.getvalue()))


def gradients(gate, up, cotangent, *, fused):
    (out,), (of_gate, of_up) = mx.vjp(lambda *x: swiglu(*x, fused=fused), [gate, up], [cotangent])
    return out, of_gate, of_up


def test_swiglu_is_one_kernel_forward_and_one_backward_inside_a_gradient():
    gate, up, cotangent = (mx.random.normal((64, 128)).astype(mx.bfloat16) for _ in range(3))
    mx.eval(gate, up, cotangent)
    found = operations(*gradients(gate, up, cotangent, fused=True))
    compiled = [name for name in found if name.startswith("Compiled")]
    assert sum(found[name] for name in compiled) == 2
    # No fp32 array of all units goes through memory: casts are inside the kernels.
    assert not {"AsType", "Sigmoid", "Multiply", "Select"} & found.keys()
    assert not {"Sigmoid"} & operations(gradients(gate, up, cotangent, fused=True)[1]).keys()
    backward = next(name for name in compiled if name.endswith("Select"))
    assert backward.count("Sigmoid") == 1


def test_the_gradient_of_swiglu_waits_for_its_cotangent():
    """So that its sigmoid is computed in the backward pass, not kept from the forward pass."""
    for fused in (False, True):
        gate, up, cotangent = (mx.random.normal((8, 8)).astype(mx.bfloat16) for _ in range(3))
        _, of_gate, of_up = gradients(gate, up, cotangent, fused=fused)
        assert operations(of_gate, of_up)["Depends"] == 1


def test_a_gpus_bf16_step_has_the_kernels_that_it_should_and_no_more(monkeypatch):
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)  # which would compute it
    layers = 3
    model = tiny_model({**BASE, "num_hidden_layers": layers})
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    trainer = Trainer(model, micro_batch_tokens=1000, backend=GPU)
    step = trainer.make_micro_batches(random_rows([30, 20, 25], prefix=12))
    found = operations(*trainer.sum_of_micro_batches(step, 0))
    assert sum(count for name, count in found.items() if "Sigmoid" in name) == 2 * layers
    assert found["Sigmoid"] == 0
    plain = Trainer(model, micro_batch_tokens=1000, backend=replace(GPU, fused=False))
    more = operations(*plain.sum_of_micro_batches(step, 0))
    # Seventeen element-wise operations a block are two kernels, and those of the loss one.
    assert sum(more.values()) - sum(found.values()) >= 15 * layers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_kernels_of_swiglu_are_equal_to_its_operations_bit_by_bit(dtype):
    gate, up, cotangent = (3 * mx.random.normal((5, 70), key=mx.random.key(i)) for i in range(3))
    gate, up, cotangent = (x.astype(dtype) for x in (gate, up, cotangent))
    plain = [_forward(True, gate, up), *_backward(True, gate, up, cotangent)]
    for ours, expected in zip(gradients(gate, up, cotangent, fused=True), plain, strict=True):
        assert ours.dtype == expected.dtype == dtype
        assert mx.array_equal(ours, expected) or mx.allclose(ours, expected, rtol=1e-6)
