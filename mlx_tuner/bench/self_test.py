"""Whether this machine's device computes what its CPU computes: `mlx-tune doctor --self-test`.

The trial is the device that MLX computes on by default, with the numbers that training takes there.
The truth is the CPU in fp32 with the CPU's numbers, or a plain formula. Without a GPU the trial is
the CPU with a GPU's numbers. What an error may be is set by mlx-lm's own forward pass, a row at a
time, on the trial's device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import repeat
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.trainer import default_loss

from mlx_tuner import assembly
from mlx_tuner.bench import model as random
from mlx_tuner.bench.work import Work, adapted, compute_dtype
from mlx_tuner.engine import lora
from mlx_tuner.engine.backend import CPU, GPU, Backend
from mlx_tuner.engine.batching import Example, Step
from mlx_tuner.engine.gather import Gather
from mlx_tuner.engine.loss import linear_cross_entropy
from mlx_tuner.engine.optimizer import State
from mlx_tuner.engine.swiglu import swiglu
from mlx_tuner.engine.trainer import Trainer, train
from mlx_tuner.models import model as models
from mlx_tuner.system import device
from mlx_tuner.system.device import Machine

MODELS = ("builtin:tiny-qwen", "qwen3", "qwen3_moe", "qwen3_5")
"""The built-in model, and families of which a tiny random one is made."""
LENGTHS = (1, 8, 9, 33)
"""Tokens of rows after their shared prefix: around the tiles of attention's kernels."""
PREFIX, STEPS, LEARNING_RATE = 10, 20, 1e-3
MOST_OF_THE_ESTIMATE = 1.15
DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}


@dataclass(frozen=True)
class Side:
    """A device, and the numbers that a training step takes there."""

    device: mx.Device
    backend: Backend

    @contextmanager
    def here(self) -> Iterator[None]:
        """Compute on this device."""
        before = mx.default_device()
        mx.set_default_device(self.device)
        try:
            yield
        finally:
            mx.set_default_device(before)


TRUTH = Side(mx.Device(mx.cpu), CPU)


def trial() -> Side:
    """What is tested: the default device; without a GPU, its numbers on the CPU.

    (The CPU backend would call a C++ compiler for fused kernels.)
    """
    if assembly.on_gpu():
        return Side(mx.default_device(), assembly.backend())
    return Side(mx.default_device(), replace(GPU, fused=False))


@dataclass(frozen=True)
class Finding:
    """What one check has found."""

    name: str
    ok: bool
    what: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{'✓' if self.ok else '✗'} {self.name:<26}  {self.what}"


@dataclass(frozen=True)
class SelfTest:
    """All findings."""

    machine: Machine
    device: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all are well."""
        return all(finding.ok for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        bad = sum(not finding.ok for finding in self.findings)
        if bad:
            return f"{bad} of {len(self.findings)} checks failed on {self.device}"
        return f"all {len(self.findings)} checks passed on {self.device}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"ok": self.ok, **asdict(self)}

    def to_markdown(self) -> str:
        """A report to paste into an issue."""
        facts = [f"- {key}: {value}" for key, value in self.machine.to_json().items() if value]
        rows = [
            f"| {'ok' if f.ok else '**not ok**'} | {f.name} | {f.what} | {f.seconds:.1f} |"
            for f in self.findings
        ]
        header = ["| | check | found | seconds |", "| --- | --- | --- | --- |"]
        title = ["# mlx-tune doctor --self-test", "", self.verdict, ""]
        return "\n".join((*title, *header, *rows, "", *facts, ""))


def run(on_finding: Callable[[Finding], None] = lambda finding: None) -> SelfTest:
    """Make all checks, and tell of each as it is done; an exception of MLX is a finding, too."""
    side, findings = trial(), []
    for name, check in checks(side).items():
        start = time.perf_counter()
        try:
            ok, what = check(side)
        except (RuntimeError, ValueError) as error:
            ok, what = False, f"{type(error).__name__}: {error}"
        findings.append(Finding(name, ok, what, time.perf_counter() - start))
        on_finding(findings[-1])
    told = "a GPU's numbers on the CPU" if side.device.type == mx.cpu else "the GPU"
    return SelfTest(device.facts(), told, tuple(findings))


Outcome = tuple[bool, str]
"""Whether it is well, and the figures."""


# ---- operations --------------------------------------------------------------------------------


def check_swiglu(side: Side) -> Outcome:
    """The MLP's gate and its gradient, against float64."""
    inputs = [_noise(97, 129, seed=i) for i in range(3)]

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        gate, up, cotangent = (mx.array(x).astype(dtype) for x in inputs)
        function = partial(swiglu, fused=side.backend.fused)
        values, gradients = mx.vjp(function, [gate, up], [cotangent])
        return [*values, *gradients]

    def truth(gate: np.ndarray, up: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
        sigmoid = 1 / (1 + np.exp(-gate))
        silu = gate * sigmoid
        return [silu * up, cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu]

    return _operation(side, compute, truth, inputs, {"fp32": 2e-6, "bf16": 4e-3})


def check_loss(side: Side) -> Outcome:
    """Cross-entropy over 151,936 tokens and its gradient, in chunks, against float64."""
    hidden, weight = _noise(9, 32, seed=0), _noise(151_936, 32, seed=1)
    targets = np.arange(9) * 16_881

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        head = nn.Linear(32, len(weight), bias=False)
        head.weight = mx.array(weight).astype(dtype)
        loss = partial(
            linear_cross_entropy,
            head=head,
            targets=mx.array(targets),
            weights=mx.ones(9),
            backend=side.backend,
        )
        return list(mx.value_and_grad(lambda x: loss(x))(mx.array(hidden).astype(dtype)))

    def truth(hidden: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
        logits = hidden @ weight.T
        logsumexp = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        error = np.exp(logits - logsumexp[:, None])
        error[np.arange(9), targets] -= 1
        return [(logsumexp - logits[np.arange(9), targets]).sum(), error @ weight]

    return _operation(side, compute, truth, [hidden, weight], {"fp32": 2e-6, "bf16": 2e-2})


def check_gathers(side: Side) -> Outcome:
    """Moving tokens to slots and back, forward and backward: bit for bit."""
    there = np.array([2, 0, 1, 5, 4])
    back = np.array([1, 2, 0, 5, 4, 3])
    x, cotangent = _noise(6, 64, seed=0), _noise(5, 64, seed=1)
    with side.here():
        gather = Gather(mx.array(there), mx.array(back))
        (value,), (gradient,) = mx.vjp(gather, [mx.array(x)], [mx.array(cotangent)])
        found = np.array(value), np.array(gradient)
    expected = np.zeros_like(x)
    expected[there] = cotangent
    ok = np.array_equal(found[0], x[there]) and np.array_equal(found[1], expected)
    return ok, "bit for bit" if ok else "differs"


def check_attention(side: Side, head_size: int) -> Outcome:
    """Attention after a shared prefix and its gradient, for rows of every length of `LENGTHS`."""
    worst = {"fp32": 0.0, "bf16": 0.0}
    ok = True
    for length in LENGTHS:
        shapes = [(4, length), (2, PREFIX + length), (2, PREFIX + length), (4, length)]
        inputs = [_noise(2, *shape, head_size, seed=i) for i, shape in enumerate(shapes)]

        def compute(dtype: mx.Dtype, inputs: list[np.ndarray] = inputs) -> list[mx.array]:
            *qkv, cotangent = (mx.array(x).astype(dtype) for x in inputs)
            attend = partial(
                mx.fast.scaled_dot_product_attention, scale=head_size**-0.5, mask="causal"
            )
            values, gradients = mx.vjp(lambda q, k, v: attend(q, k, v), qkv, [cotangent])
            return [*values, *gradients]

        fine, errors = _errors(side, compute, _attention, inputs, {"fp32": 1e-5, "bf16": 2e-2})
        ok = ok and fine
        worst = {name: max(worst[name], error) for name, error in errors.items()}
    return ok, _told(worst)


def _attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cotangent: np.ndarray
) -> list[np.ndarray]:
    """Causal attention (R, heads, T, size) and its gradients by their formulas, in float64."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (np.repeat(x, groups, axis=1) for x in (k, v))
    scale, (length, keys) = q.shape[-1] ** -0.5, (q.shape[2], k.shape[2])
    scores = scale * q @ wide_k.swapaxes(2, 3)
    seen = np.tril(np.ones((length, keys), bool), keys - length)
    exponentials = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    p = exponentials / exponentials.sum(-1, keepdims=True)
    of_p = cotangent @ wide_v.swapaxes(2, 3)
    of_scores = scale * p * (of_p - (of_p * p).sum(-1, keepdims=True))

    def by_kv_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], -1, groups, *x.shape[2:]).sum(2)

    return [
        p @ wide_v,
        of_scores @ wide_k,
        by_kv_head(of_scores.swapaxes(2, 3) @ q),
        by_kv_head(p.swapaxes(2, 3) @ cotangent),
    ]


def check_products(side: Side) -> Outcome:
    """Plain products, against float64; whether fp32 ones are rounded to TF32 is said."""
    inputs = [_noise(256, 320, seed=0), _noise(320, 256, seed=1)]

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        a, b = (mx.array(x).astype(dtype) for x in inputs)
        return [a @ b]

    bounds = {"fp32": 2e-3, "bf16": 4e-3}
    ok, errors = _errors(side, compute, lambda a, b: [a @ b], inputs, bounds)
    tf32 = "on: fp32 keeps 10 bits; off by MLX_ENABLE_TF32=0" if errors["fp32"] > 1e-5 else "off"
    return ok, f"{_told(errors)}; TF32 {tf32}"


def check_quantised_products(side: Side) -> Outcome:
    """Products with 4-bit weights, against the weights that they stand for."""
    x, weight = _noise(70, 128, seed=0), _noise(192, 128, seed=1)
    with TRUTH.here():
        packed = mx.quantize(mx.array(weight), bits=4)
        dense = np.array(mx.dequantize(*packed, bits=4)).astype(np.float64)

    def compute(dtype: mx.Dtype) -> list[mx.array]:
        weights, *rest = packed
        options = [part.astype(dtype) for part in rest]
        return [mx.quantized_matmul(mx.array(x).astype(dtype), weights, *options, bits=4)]

    bounds = {"fp32": 2e-3, "bf16": 2e-2}
    return _operation(side, compute, lambda x: [x @ dense.T], [x], bounds)


def _operation(
    side: Side,
    compute: Callable[[mx.Dtype], list[mx.array]],
    truth: Callable[..., Sequence[np.ndarray]],
    inputs: Sequence[np.ndarray],
    bounds: dict[str, float],
) -> Outcome:
    ok, errors = _errors(side, compute, truth, inputs, bounds)
    return ok, _told(errors)


def _errors(
    side: Side,
    compute: Callable[[mx.Dtype], list[mx.array]],
    truth: Callable[..., Sequence[np.ndarray]],
    inputs: Sequence[np.ndarray],
    bounds: dict[str, float],
) -> tuple[bool, dict[str, float]]:
    """Relative errors in L2 norm by dtype, the largest of all results, and whether they are small.

    Args:
        truth: of the inputs, which are rounded to bf16 already, in float64.
    """
    wanted = truth(*(x.astype(np.float64) for x in inputs))
    errors = {}
    for name in bounds:
        with side.here():
            found = [np.array(x.astype(mx.float32)) for x in compute(DTYPES[name])]
        errors[name] = max(map(_relative, found, wanted))
    return all(errors[name] <= bound for name, bound in bounds.items()), errors


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) + 1e-30))


def _told(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _noise(*shape: int, seed: int) -> np.ndarray:
    """Numbers that bf16 has exactly, so that both dtypes start from the same ones."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (drawn.view(np.uint32) & 0xFFFF0000).view(np.float32)


def check_memory(side: Side) -> Outcome:
    """A step's peak memory, against the estimate that a run is planned with."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64, "vocab_size": 8192}
    config = random.tiny_config("qwen3", **sizes, num_hidden_layers=3)
    tokens = 1024
    work = Work("", config, None, [random.rows(8, 8192, length=tokens // 8)])
    with side.here():
        before = mx.get_active_memory()
        model = adapted(random.random_model(config, compute_dtype()))
        trainer = Trainer(model, micro_batch_tokens=tokens, backend=side.backend)
        mx.reset_peak_memory()
        list(train(trainer, work.batches, [LEARNING_RATE]))
        measured = (mx.get_peak_memory() - before) / 1e9
        estimate = work.step_bytes(model, tokens) / 1e9
    told = f"{measured:.2f} GB of {estimate:.2f} GB estimated"
    return measured <= MOST_OF_THE_ESTIMATE * estimate, told


# ---- training ----------------------------------------------------------------------------------


class RowByRow(Trainer):
    """Takes mlx-lm's own loss, a row at a time, in place of our passes."""

    def make_micro_batches(self, rows: Sequence[Example]) -> Step:
        self._waiting = [*getattr(self, "_waiting", ()), rows]
        return super().make_micro_batches(rows)

    def sum_of_micro_batches(self, step: Step, number: int) -> tuple[mx.array, mx.array]:
        self.model.train()
        loss_and_gradient = nn.value_and_grad(self.model, default_loss)
        losses, total = [], mx.zeros_like(self.state.parameters)
        self._set(self.adapter)
        for row in self._waiting.pop(0):
            batch = mx.array(row.tokens)[None]
            lengths = mx.array([[int(row.loss_mask.argmax()), len(row.tokens)]])
            (loss, targets), gradient = loss_and_gradient(self.model, batch, lengths)
            total = total + targets * self.shapes.flatten(dict(tree_flatten(gradient)))
            losses.append(targets * loss)
            mx.async_eval(total, losses[-1])
        return mx.stack(losses).sum(), total


def check_training(side: Side, name: str, dtype: str) -> Outcome:
    """Twenty steps: every loss and the first gradient, against the CPU in fp32.

    Well where the errors are at most twice those of mlx-lm's forward pass, or very small.
    """
    truth = _trajectory(TRUTH, name, "fp32")
    ours, theirs = (_trajectory(side, name, dtype, kind) for kind in (Trainer, RowByRow))

    def errors(found: Trajectory) -> tuple[float, float]:
        losses = max(abs(a / b - 1) for a, b in zip(found.losses, truth.losses, strict=True))
        return losses, _relative(found.gradient, truth.gradient)

    (loss, gradient), (their_loss, their_gradient) = errors(ours), errors(theirs)
    floor = {"fp32": (1e-4, 1e-4), "bf16": (2e-3, 2e-2)}[dtype]
    falls = ours.losses[-1] < ours.losses[0]
    ok = loss <= max(2 * their_loss, floor[0]) and gradient <= max(2 * their_gradient, floor[1])
    told = (
        f"loss {loss:.1e} (mlx-lm {their_loss:.1e}), gradient {gradient:.1e} "
        f"(mlx-lm {their_gradient:.1e}), {ours.losses[0]:.3f} → {ours.losses[-1]:.3f}"
    )
    return ok and falls, told


@dataclass(frozen=True)
class Trajectory:
    """Losses of `STEPS` steps, and the first one's gradient."""

    losses: list[float]
    gradient: np.ndarray


@cache
def _trajectory(side: Side, name: str, dtype: str, kind: type[Trainer] = Trainer) -> Trajectory:
    with side.here():
        trainer = _trainer(side, name, dtype, kind=kind)
        rows = _rows(trainer.model)
        _, gradient = trainer.sum_of_micro_batches(trainer.make_micro_batches(rows), 0)
        first = np.array(gradient)
        results = list(train(trainer, repeat(rows, STEPS), repeat(LEARNING_RATE)))
    return Trajectory([result.loss for result in results], first)


def _trainer(
    side: Side, name: str, dtype: str, *, dropout: float = 0.0, kind: type[Trainer] = Trainer
) -> Trainer:
    """A trainer on an adapter that is not zero; micro-batches so small that there are several."""
    config, weights, factors = _weights(name)
    model = models.skeleton(config)
    model.update(tree_map(lambda x: x.astype(DTYPES[dtype]), weights))
    lora.attach(model, rank=4, scale=2.0, dropout=dropout, target_modules="all-linear")
    model.update(tree_unflatten(list(factors.items())))
    mx.eval(model.parameters())
    return kind(model, micro_batch_tokens=40, backend=side.backend)


@cache
def _weights(name: str) -> tuple[dict[str, Any], Any, dict[str, mx.array]]:
    """Config, weights rounded to bf16, an adapter's factors: made on the CPU for both sides."""
    with TRUTH.here():
        if name.startswith(models.BUILTIN):
            folder = models.resolve(name)
            config, model = models.read_config(folder), models.load(folder).model
        else:
            config = random.tiny_config(name, vocab_size=256)
            model = random.random_model(config, mx.float32)
        rounded = tree_map(lambda x: x.astype(mx.bfloat16).astype(mx.float32), model.parameters())
        lora.attach(model, rank=4, scale=2.0, target_modules="all-linear")
        factors = {
            key: 0.02 * mx.random.normal(value.shape, key=mx.random.key(i))
            for i, (key, value) in enumerate(lora.trainable(model).items())
        }
        mx.eval(rounded, factors)
    return config, rounded, factors


def _rows(model: nn.Module) -> list[Example]:
    """Rows of every length of `LENGTHS` after a shared prefix; the second half is learned."""
    drawn = np.random.default_rng(0)
    shared = drawn.integers(0, 256, PREFIX)
    rows = []
    for i, length in enumerate((*LENGTHS, 17)):
        tokens = np.concatenate([shared, drawn.integers(0, 256, length)]).astype(np.int32)
        mask = np.arange(len(tokens)) >= PREFIX + length // 2
        rows.append(Example(tokens, mask, i))
    return rows


def check_repeatability(side: Side, name: str, dtype: str) -> Outcome:
    """The same three steps, twice: bit for bit."""
    with side.here():
        first, second = (_states(side, name, dtype, (3,)) for _ in range(2))
    return _same(first, second)


def check_resume(side: Side, name: str, dtype: str) -> Outcome:
    """Six steps with dropout, and three, saved and gone on from: bit for bit."""
    with side.here():
        whole, resumed = (_states(side, name, dtype, parts) for parts in ((6,), (3, 3)))
    return _same(whole, resumed)


def _states(side: Side, name: str, dtype: str, parts: Sequence[int]) -> list[np.ndarray]:
    """The state after so many steps in parts, each with a trainer of its own."""
    state, done = None, 0
    for steps in parts:
        trainer = _trainer(side, name, dtype, dropout=0.1)
        if state is not None:
            trainer.state = State(*map(mx.array, state))
        rows = _rows(trainer.model)
        list(train(trainer, repeat(rows, steps), repeat(LEARNING_RATE), first_step=done))
        state, done = [np.array(part) for part in trainer.state], done + steps
    assert state is not None
    return state


def _same(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> Outcome:
    different = sum(int((a != b).sum()) for a, b in zip(left, right, strict=True))
    return not different, "bit for bit" if not different else f"{different:,} numbers differ"


def checks(side: Side) -> dict[str, Callable[[Side], Outcome]]:
    """Every check by its name; tests make the same ones.

    The CPU backend has no bf16 for experts and is slow in it, so there one model is enough.
    """
    on_gpu = side.device.type == mx.gpu
    halves = MODELS if on_gpu else ("qwen3",)
    found: dict[str, Callable[[Side], Outcome]] = {
        "swiglu and its gradient": check_swiglu,
        "loss and its gradient": check_loss,
        "gathers": check_gathers,
        "attention, heads of 64": partial(check_attention, head_size=64),
        "attention, heads of 128": partial(check_attention, head_size=128),
        "products": check_products,
        "4-bit products": check_quantised_products,
        "memory": check_memory,
    }
    for dtype, names in (("fp32", MODELS), ("bf16", halves)):
        for name in names:
            model = f"{name.removeprefix(models.BUILTIN)}, {dtype}"
            found[f"{STEPS} steps, {model}"] = partial(check_training, name=name, dtype=dtype)
    for name in MODELS:
        dtype = "bf16" if name in halves else "fp32"
        model = f"{name.removeprefix(models.BUILTIN)}, {dtype}"
        found[f"repeated, {model}"] = partial(check_repeatability, name=name, dtype=dtype)
        found[f"resumed, {model}"] = partial(check_resume, name=name, dtype=dtype)
    return found
