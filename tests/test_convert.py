"""Conversions against mlx-lm's own, against spoiled inputs, and killed at any moment."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from fake_hub import COMMIT, FakeHub, Repository
from hypothesis import given
from hypothesis import strategies as st
from killed import kill
from marks import some_slow
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.convert import convert as mlx_lm_convert
from model_folders import BUILTIN, CONFIGS, write_model

from mlx_tuner.cli import main
from mlx_tuner.conversion import fidelity
from mlx_tuner.conversion.convert import convert
from mlx_tuner.conversion.fidelity import PROMPT, compare_logits
from mlx_tuner.conversion.logits import load_in_float32, logits_of
from mlx_tuner.conversion.work import Work
from mlx_tuner.errors import ModelError, RunError, UsageError
from mlx_tuner.models import weights
from mlx_tuner.models.model_files import check_model_folder
from mlx_tuner.show.progress import Display
from mlx_tuner.system import files

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model in float32, in two shards."""
    return write_model(tmp_path_factory.mktemp("source") / "tiny", shards=2)


def run(source, output, **options):
    with Display() as display:
        return convert(str(source), output, display, **options)


def tensors(folder: Path) -> dict[str, mx.array]:
    return {
        n: v for path in sorted(folder.glob("*.safetensors")) for n, v in mx.load(str(path)).items()
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil(source: Path, folder: Path, name: str, change) -> Path:
    """A copy of a model of which one tensor is changed."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        table = dict(mx.load(str(path)))
        if name in table:
            table[name] = change(table[name])
            mx.eval(table)
            mx.save_safetensors(str(path), table)
    return folder


# ---- what is made ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", some_slow(CONFIGS, CONFIGS.keys() - {"qwen2", "qwen3_5_moe"})
)
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"bits": 4, "group_size": 32}])
def test_tensors_and_config_are_those_of_mlx_lm(model_type, options, tmp_path):
    folder = write_model(tmp_path / "source", model_type, shards=2)
    run(folder, tmp_path / "ours", verify=False, **options)
    mlx_lm_convert(
        str(folder),
        str(tmp_path / "theirs"),
        quantize="bits" in options,
        q_bits=options.get("bits"),
        q_group_size=options.get("group_size"),
        dtype=options.get("dtype"),
    )
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert mx.array_equal(value, theirs[name]), name
    for key in ("quantization", "quantization_config", "model_type"):
        told = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs")]
        assert told[0].get(key) == told[1].get(key)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_folder_is_complete_and_loads_and_says_how_good_it_is(bits, tmp_path):
    made = run("builtin:tiny-qwen", tmp_path / "out", bits=bits, dtype="bfloat16")
    assert files.verify(tmp_path / "out") == []
    assert check_model_folder(tmp_path / "out").notes == ()
    _, tokenizer = mlx_lm_utils.load(str(tmp_path / "out"))
    assert tokenizer.chat_template is not None
    assert tokenizer.eos_token_ids == mlx_lm_utils.load(str(BUILTIN))[1].eos_token_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {made.check.lines()[0][1]} |" in card
    assert (made.check.max_error > 0) is (made.check.relative_error > 0) is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_two_conversions_are_equal_byte_for_byte(source, tmp_path):
    run(source, tmp_path / "first", bits=4)
    run(source, tmp_path / "second", bits=4)
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


def test_large_results_come_in_shards_with_an_index(source, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 100_000)
    monkeypatch.setattr(weights, "_IN_FLIGHT_BYTES", 10_000)
    run(source, tmp_path / "out", bits=8)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 2
    monkeypatch.undo()
    run(source, tmp_path / "single", bits=8)
    ours, single = tensors(tmp_path / "out"), tensors(tmp_path / "single")
    assert all(mx.array_equal(ours[n], single[n]) for n in ours.keys() | single.keys())
    check_model_folder(tmp_path / "out")  # which compares index and shards


def test_every_tensor_begins_at_a_multiple_of_its_elements_size(source, tmp_path):
    run(source, tmp_path / "out", bits=4, verify=False)
    for path in (tmp_path / "out").glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert header % 8 == 0
    sizes = {"U32": 4, "F32": 4}
    table = check_model_folder(tmp_path / "out").tensors
    assert all(tensor.start % sizes[tensor.dtype] == 0 for tensor in table.values())


def test_only_known_files_are_copied_and_nothing_that_names_code(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    for name in ("modeling.py", "pytorch_model.bin", "README.md", "notes.txt", "training.json"):
        (folder / name).write_text("x")
    for name in ("config.json", "tokenizer_config.json"):
        table = json.loads((folder / name).read_text())
        code = {"auto_map": {"AutoModel": "modeling.M"}, "_attn_implementation_internal": "a/b"}
        (folder / name).write_text(json.dumps(table | code | {"_name_or_path": "/home/me"}))
    made = run(folder, tmp_path / "out", verify=False)
    assert "modeling.py" in made.notes[0]
    written = snapshot(tmp_path / "out")
    assert sorted(written) == [
        "MANIFEST.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(b"modeling" in content or b"a/b" in content for content in written.values())
    assert b"/home/me" not in written["config.json"]


def test_the_source_is_not_touched(source, tmp_path):
    before = snapshot(source)
    run(source, tmp_path / "out", bits=4)
    assert snapshot(source) == before


# ---- comparison --------------------------------------------------------------------------------


def test_the_comparison_is_that_of_plain_forward_passes(source, tmp_path):
    check = run(source, tmp_path / "out", dtype="float16").check
    logits = []
    for folder in (source, tmp_path / "out"):
        model, tokenizer = mlx_lm_utils.load(str(folder))
        model.set_dtype(mx.float32)
        tokens = mx.array([tokenizer.encode(PROMPT)])
        logits.append(model(tokens)[0])
    error = mx.abs(logits[1] - logits[0])
    losses = [nn.losses.cross_entropy(x[:-1], tokens[0, 1:], reduction="mean") for x in logits]
    assert check.max_error == pytest.approx(error.max().item(), rel=1e-3)
    assert check.mean_error == pytest.approx(error.mean().item(), rel=1e-3)
    assert check.source_perplexity == pytest.approx(mx.exp(losses[0]).item(), rel=1e-5)
    assert check.perplexity == pytest.approx(mx.exp(losses[1]).item(), rel=1e-5)
    spread = logits[0].std(axis=-1).square().mean().sqrt()
    rms = error.square().mean().sqrt()
    assert check.relative_error == pytest.approx((rms / spread).item(), rel=1e-3)


def test_a_conversion_that_changes_no_weight_changes_no_logit(source, tmp_path):
    check = run(source, tmp_path / "out").check
    assert (check.max_error, check.mean_error, check.relative_error) == (0, 0, 0)
    assert check.perplexity == check.source_perplexity


@pytest.mark.parametrize("model_type", some_slow(CONFIGS, CONFIGS.keys() - {"qwen3_5"}))
def test_every_model_type_is_compared_and_close_to_its_source(model_type, tmp_path):
    folder = write_model(tmp_path / "source", model_type)
    check = run(folder, tmp_path / "out", bits=8, group_size=32).check
    assert 0 < check.relative_error < 0.1


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}, {"bits": 8}])
def test_a_result_beyond_its_expected_error_is_refused_and_not_kept(
    source, tmp_path, monkeypatch, options
):
    compute = Work.compute

    def swapped(work, name):
        value = compute(work, name)
        return value[::-1] if name == "model.layers.1.mlp.up_proj.weight" else value

    monkeypatch.setattr(Work, "compute", swapped)
    with pytest.raises(ModelError, match="standard deviations off, where"):
        run(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_compared_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        fidelity, "logits_of", lambda load, tokens, at: np.full((len(at), 2048), np.nan)
    )
    with pytest.raises(ModelError, match="nan standard deviations"):
        run(source, tmp_path / "out")


def test_each_block_is_let_go_of_once_it_has_computed(source):
    """So that a model of any size needs the memory of one block."""

    def load():
        model = load_in_float32(source)
        seen.extend(weakref.ref(block) for block in model.layers)
        return model

    seen: list = []
    norm = nn.RMSNorm.__call__
    freed_at_the_end = []

    def watched(self, x):
        freed_at_the_end[:] = [ref() is None for ref in seen]
        return norm(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.RMSNorm, "__call__", watched)
        logits_of(load, np.array([[5, 300, 17]]), np.arange(3))
    # The last norm comes after all blocks: none of them is there any more.
    assert freed_at_the_end == [True, True, True]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_of_another_layer_are_beyond_what_rounding_explains(
    source, tmp_path, monkeypatch, bits
):
    compute = Work.compute
    names = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(3) for kind in ("up", "gate")]

    def swapped(work, name):
        value = compute(work, name)
        return value[::-1] if name.startswith(tuple(names)) else value

    monkeypatch.setattr(Work, "compute", swapped)
    with pytest.raises(ModelError, match=f"where {bits} bits in groups of 64 explains"):
        run(source, tmp_path / "out", bits=bits)


def test_comparing_a_model_with_another_one_shows(source, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    assert compare_logits(source, other, [5, 300, 17, 999]).relative_error > 1.2


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", some_slow([math.nan, math.inf, -math.inf], {math.inf, -math.inf}))
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    source, tmp_path, value, dtype, bits
):
    def change(tensor):
        tensor = tensor.astype(dtype)
        tensor[3, 5] = value
        return tensor

    folder = spoil(source, tmp_path / "source", Q_PROJ, change)
    with pytest.raises(ModelError) as caught:
        run(folder, tmp_path / "new" / "out", bits=bits)
    assert str(caught.value) == (
        f"{folder}: {Q_PROJ}: holds NaN or infinity; the model is damaged, download it again"
    )
    assert list((tmp_path / "new").iterdir()) == []


def test_weights_too_large_for_float16_are_named(source, tmp_path):
    folder = spoil(source, tmp_path / "source", Q_PROJ, lambda value: value * 1e6)
    with pytest.raises(ModelError, match=f"{Q_PROJ}: holds numbers too large for float16"):
        run(folder, tmp_path / "out", dtype="float16")
    run(folder, tmp_path / "out", dtype="bfloat16", verify=False)


@given(
    st.sampled_from([(mx.float32, np.uint32), (mx.float16, np.uint16), (mx.bfloat16, np.uint16)]),
    st.lists(st.integers(0, 2**32 - 1), max_size=6),
    st.booleans(),
)
def test_is_finite_agrees_with_mlx_on_any_bit_pattern(kinds, patterns, exponent):
    dtype, unsigned = kinds
    ones = {mx.float32: 0x7F800000, mx.float16: 0x7C00, mx.bfloat16: 0x7F80}[dtype]
    mask = 2**32 - 1 if unsigned is np.uint32 else 2**16 - 1
    patterns = [(p | ones if exponent else p) & mask for p in patterns]
    value = mx.array(np.array(patterns, unsigned)).view(dtype)
    assert weights.is_finite(value) == mx.isfinite(value).all().item()


def test_what_is_quantised_already_is_refused(tmp_path):
    run("builtin:tiny-qwen", tmp_path / "first", bits=4, verify=False)
    with pytest.raises(ModelError, match="is quantised already; convert the model that"):
        run(tmp_path / "first", tmp_path / "second", bits=8)


def test_layers_not_divisible_by_the_group_are_named(tmp_path):
    folder = write_model(tmp_path / "source", intermediate_size=96)
    with pytest.raises(ModelError) as caught:
        run(folder, tmp_path / "out", bits=4, group_size=64)
    assert [fault.field for fault in caught.value.faults] == [
        f"model.layers.{block}.mlp.down_proj" for block in range(3)
    ]
    assert "96 columns are not divisible by the group size 64" in str(caught.value)
    run(folder, tmp_path / "out", bits=4, group_size=32, verify=False)


def test_an_output_that_is_no_new_folder_is_refused_untouched(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(folder)
    before = snapshot(tmp_path)
    for output in (folder, folder / "out", tmp_path, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(UsageError):
            run(folder, output)
    assert snapshot(tmp_path) == before


def test_a_disk_that_is_too_small_is_refused_at_once(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(RunError, match=r"only 0\.0 GB are free"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "_wait", fail)
    with pytest.raises(RunError, match="No space left on device; free some disk space"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- the command -------------------------------------------------------------------------------


def test_the_command_prints_what_it_found(tmp_path):
    arguments = ["convert", str(BUILTIN), "-o", str(tmp_path / "out"), "--quantize", "8"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert "8 bits in groups of 64" in result.stdout
    assert "largest error of a logit" in result.stdout
    assert "perplexity" in result.stdout
    assert "converting" in result.stderr


@pytest.mark.parametrize(
    ("options", "compared"), [([], True), (["--verify"], True), (["--no-verify"], False)]
)
def test_the_result_is_compared_unless_told_otherwise(tmp_path, options, compared):
    arguments = ["convert", "builtin:tiny-qwen", "-o", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert ("largest error of a logit" in result.stdout) is compared
    assert ("largest error" in (tmp_path / "out" / "README.md").read_text()) is compared


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere", "-o", "out"], 1, "nowhere: model.path: no such folder"),
        (["builtin:tiny-qwen"], 2, "Missing option '-o'"),
        (["builtin:tiny-qwen", "-o", "out", "--quantize", "5"], 2, "'5' is not one of '4', '8'"),
        (["builtin:tiny-qwen", "-o", "."], 2, "is there already"),
        (["builtin:tiny-qwen", "-o", "out", "--push", "me/mine"], 1, "set HF_TOKEN"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_changes_nothing(
    tmp_path, monkeypatch, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_tuner.system.hub.get_token", lambda: None)
    (tmp_path / "something").write_text("")
    result = CliRunner().invoke(main, ["convert", *arguments])
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


# ---- slow: other processes ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_conversion_killed_at_any_moment_leaves_all_or_nothing(source, tmp_path):
    before = snapshot(source)
    absent = kill("convert", str(source), "--dtype", "float16", output=tmp_path / "work" / "out")
    assert 3 < absent <= 25
    assert snapshot(source) == before


@pytest.mark.slow
def test_a_hub_model_is_converted_and_pushed_and_the_token_is_not_shown(source, tmp_path):
    fake = FakeHub()
    fake.repositories["models/qwen/tiny"] = Repository(snapshot(source))
    command = ["convert", "qwen/tiny", "-o", "out", "--quantize", "4", "--push", "me/mine"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_tuner", *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": fake.address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": "hf_secret",
            },
        )
    finally:
        fake.close()
    assert done.returncode == 0, done.stderr
    assert f"{fake.address}/me/mine" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    assert fake.tokens == {"Bearer hf_secret"}
    pushed = fake.repositories["models/me/mine"]
    assert pushed.private
    assert pushed.files == snapshot(tmp_path / "out")
    assert f"qwen/tiny at commit {COMMIT}, converted" in pushed.files["README.md"].decode()


@pytest.mark.slow
def test_a_model_of_real_size_converts_in_bounded_memory(root, tmp_path):
    """Two shards of the 0.5B shape, compared as well: 0.9 GB and the largest shard.

    The process tells its own peak: what its parent could read would begin at the parent's.
    """
    model, made = tmp_path / "model", tmp_path / "made"
    script = [sys.executable, str(root / "benchmarks" / "convert.py")]
    subprocess.run([*script, "--make", model, "--shape", "0.5B"], check=True)
    shards = [path.stat().st_size for path in model.glob("*.safetensors")]
    assert len(shards) == 2
    program = (
        "import atexit, harness\n"
        "from mlx_tuner.__main__ import start\n"
        "atexit.register(lambda: harness.report())\n"
        "start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "convert", model, "-o", made],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root / 'benchmarks'}:{root}"},
    )
    peak = json.loads(done.stdout.partition("measures:")[2])["peak_rss_gb"]
    assert 1e9 * peak < 0.9e9 + max(shards)
    assert files.verify(made) == []
    assert check_model_folder(made).tensors.keys() == check_model_folder(model).tensors.keys()
    for folder in (model, made):  # pytest would keep the 2 GB
        shutil.rmtree(folder)
