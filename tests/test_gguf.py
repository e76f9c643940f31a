"""GGUF: what gguf's own reader finds in the file, and what llama.cpp makes of it."""

import json
import shutil
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner
from marks import some_slow
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from model_folders import BUILTIN, make_adapter, write_model

from mlx_tuner.cli import main
from mlx_tuner.conversion.fuse import merge
from mlx_tuner.conversion.gguf import export_gguf
from mlx_tuner.conversion.gguf_lora import export_gguf_lora
from mlx_tuner.engine import lora
from mlx_tuner.engine.dora import DoRALinear
from mlx_tuner.errors import ModelError, RunError, UsageError
from mlx_tuner.models.adapter import Adapter, apply, write_adapter
from mlx_tuner.models.adapter_folder import read_adapter
from mlx_tuner.models.model import load_tokenizer
from mlx_tuner.show.progress import Display

gguf = pytest.importorskip("gguf")

ROUNDING = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": None}


@pytest.fixture
def display():
    with Display() as shown:
        yield shown


@pytest.fixture(scope="module", params=some_slow(["qwen2", "qwen3"], {"qwen3"}))
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    tied = request.param == "qwen3"
    return write_model(folder, request.param, tie_word_embeddings=tied, intermediate_size=64)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapted"
    write_adapter(folder, make_adapter(load_model(base)[0], base))
    return folder


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory):
    """The adapted model's file by its dtype, each made once."""

    @cache
    def of(dtype):
        with Display() as shown:
            return export_gguf(
                adapted, tmp_path_factory.mktemp("gguf") / "model.gguf", shown, dtype=dtype
            )

    return of


def fields_of(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("dtype", some_slow(ROUNDING, {"f32", "bf16", "q8_0"}))
def test_the_reader_finds_the_fused_tensors(base, adapted, exported, dtype):
    made = exported(dtype)
    reader = gguf.GGUFReader(made.path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    fused = dict(tree_flatten(merge(base, read_adapter(adapted), mx.float32).parameters()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)  # a superset of Qwen2's
    assert len(found) == len(fused)
    for name, value in fused.items():
        stored = found[names.get_name(name, (".weight", ".bias"))]
        expected = np.array(value)
        kind = "f32" if value.ndim == 1 else dtype
        assert stored.tensor_type.name == kind.upper()
        values = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(expected.shape)
        if kind == "q8_0":
            step = np.abs(expected.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
            error = np.abs(values - expected).reshape(-1, 32)
            assert (error <= step * (0.5 + 127 * 2**-11) + 1e-7).all()
        else:
            assert (np.abs(values - expected) <= ROUNDING[kind] * np.abs(expected) + 1e-7).all()
    assert made.bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert made.check.error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_file_that_does_not_hold_the_model_is_refused(
    base, adapted, tmp_path, display, dtype, monkeypatch
):
    write = gguf.GGUFWriter.write_tensor_data

    def spoilt(writer, data):
        if data.ndim == 2:
            data = data[::-1]
        write(writer, np.ascontiguousarray(data))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", spoilt)
    with pytest.raises(RunError, match=r"model.gguf: .*is not in the file as it was written"):
        export_gguf(adapted, tmp_path / "model.gguf", display, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_the_metadata_is_what_llama_cpp_asks_for(base, exported):
    fields = fields_of(exported("q8_0").path)
    architecture = json.loads((base / "config.json").read_text())["model_type"]
    expected = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": "adapted",
        "general.file_type": 7,
        f"{architecture}.block_count": 3,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": 64,
        f"{architecture}.feed_forward_length": 64,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 2039,
        "tokenizer.ggml.eot_token_id": 2039,
        "tokenizer.ggml.padding_token_id": 2037,
        "tokenizer.ggml.add_bos_token": False,
    }
    if architecture == "qwen3":
        expected |= {"qwen3.attention.key_length": 16, "qwen3.attention.value_length": 16}
    assert {name: fields.get(name) for name in expected} == expected
    template = load_tokenizer(base)._tokenizer.chat_template
    assert fields["tokenizer.chat_template"] == template


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_scaled_positions_the_base_and_the_system_prompt_are_written(tmp_path, display, kind):
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": 128}
    base = write_model(tmp_path / "base", num_hidden_layers=1, rope_scaling=scaling)
    run = tmp_path / "run"
    adapter = make_adapter(load_model(base)[0], base)
    write_adapter(run, replace(adapter, base="acme/tiny"))
    recipe = {"model": {"path": "acme/tiny"}, "train": {"max_steps": 1}}
    recipe["data"] = {"train": "rows.jsonl", "system_prompt": "/no_think Be brief."}
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
    made = export_gguf(run, tmp_path / "out" / "model.gguf", display, model=str(base))
    expected = {
        "qwen2.rope.scaling.type": kind,
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 128,
        "general.base_model.count": 1,
        "general.base_model.0.name": "tiny",
        "general.base_model.0.organization": "acme",
        "general.base_model.0.repo_url": "https://huggingface.co/acme/tiny",
    }
    fields = fields_of(made.path)
    assert {name: fields.get(name) for name in expected} == expected
    assert 'SYSTEM """/no_think Be brief."""' in made.modelfile.read_text()


def test_tokens_types_and_merges_are_the_tokenizers(base, exported):
    fields = fields_of(exported("f16").path)
    table = json.loads((base / "tokenizer.json").read_text())
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 2048
    assert all(tokens[i] == token for token, i in table["model"]["vocab"].items())
    assert tokens[2039] == "<|im_end|>"
    assert tokens[2040] == "<tool_call>"
    assert (types[0], types[2039], types[2040]) == (1, 3, 4)
    assert [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]] == table["model"][
        "merges"
    ]


@pytest.mark.slow
def test_rows_of_the_embedding_without_a_token_are_named_as_padding(tmp_path, display):
    base = write_model(tmp_path / "base", vocab_size=2080)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base))
    fields = fields_of(export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", display).path)
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD2079]"
    assert fields["tokenizer.ggml.token_type"][-1] == 5


def test_the_modelfile_writes_turns_as_the_models_template_does(exported):
    text = exported("f16").modelfile.read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{- range .Messages }}<|im_start|>')
    assert 'PARAMETER stop "<|im_end|>"' in text
    rendered = load_tokenizer(BUILTIN)._tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    has_default = rendered.startswith("<|im_start|>system\n")
    assert ('SYSTEM """' in text) == has_default


@pytest.mark.slow
def test_weights_of_a_shape_that_q8_0_has_no_blocks_for_are_halves(tmp_path, display):
    base = write_model(tmp_path / "base", intermediate_size=48)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base))
    made = export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", display, dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made.path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


# ---- other programs ------------------------------------------------------------------------------

TEXTS = [
    "def f(x):\n    return x ** 2  # Cafés cost 12.50 €; 日本語\n\n\tif x:\r\n  pass",
    "<|im_start|>user\nHi, it's 12345 o'clock<|im_end|>\n<|im_start|>assistant\n",
    "  leading   spaces\n\n\nand 'quotes' don't <tool_call> x",
]


def test_transformers_reads_the_same_model_out_of_it(tmp_path, display):
    """Of Qwen3, transformers takes no head size from GGUF."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    base, adapted = write_model(tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapted, make_adapter(load_model(base)[0], base))
    export_gguf(adapted, tmp_path / "model.gguf", display, dtype="f32")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    tokens = [[5, 300, 17, 999, 2, 1024]]
    with torch.no_grad():
        theirs = loaded(torch.tensor(tokens)).logits.numpy()
    ours = np.array(merge(base, read_adapter(adapted))(mx.array(tokens)))
    assert np.abs(theirs - ours).max() < 1e-4


QUESTIONS = ("Write a function that reverses a string.", "What is 2 + 2?")


def llama_cpp(*paths):
    pytest.importorskip("xllamacpp")
    from llama_cpp import LlamaCpp

    return LlamaCpp(*paths)


def base_of(tmp_path, name, size=0.03):
    """A base, and an adapter for it."""
    base = BUILTIN if name == "builtin" else write_model(tmp_path / "base", name, head_dim=32)
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base, size=size))
    return base


def prompts(tokenizer):
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        yield list(tokenizer.apply_chat_template(message, add_generation_prompt=True))


def ours(base, adapter, prompt, length=24):
    """Our likeliest tokens after the prompt, with the one that ends the answer."""
    model = load_model(base)[0]
    apply(model, read_adapter(adapter))
    model.eval()
    answer = []
    while len(answer) < length and answer[-1:] not in ([2037], [2039]):
        answer.append(int(model(mx.array([prompt + answer]))[0, -1].argmax()))
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(["builtin", "qwen3", "qwen3_5"], {"qwen3", "qwen3_5"}))
def test_llama_cpp_answers_with_our_tokens(tmp_path, display, name):
    base = base_of(tmp_path, name)
    path = export_gguf(tmp_path / "adapter", tmp_path / "model.gguf", display, dtype="f32").path
    tokenizer = load_tokenizer(base)
    with llama_cpp(path) as theirs:
        for text in TEXTS:
            assert theirs.tokens(text) == list(tokenizer.encode(text, add_special_tokens=False))
        for prompt in prompts(tokenizer):
            assert theirs.answer(prompt, 24) == ours(base, tmp_path / "adapter", prompt)


@pytest.mark.slow
def test_llama_cpp_answers_with_our_tokens_of_dora(tmp_path, display):
    model = load_model(BUILTIN)[0]
    lora.attach(model, rank=4, scale=2.0, target_modules="all-linear", layer=DoRALinear)
    mx.random.seed(0)
    tensors = {
        name: value * mx.random.uniform(0.9, 1.1, value.shape)
        if name.endswith(".m")
        else 0.05 * mx.random.normal(value.shape)
        for name, value in lora.trainable(model).items()
    }
    write_adapter(tmp_path / "adapter", Adapter(tensors, rank=4, scale=2.0, base=str(BUILTIN)))
    path = export_gguf(tmp_path / "adapter", tmp_path / "model.gguf", display, dtype="f32").path
    with llama_cpp(path) as theirs:
        for prompt in prompts(load_tokenizer(BUILTIN)):
            assert theirs.answer(prompt, 24) == ours(BUILTIN, tmp_path / "adapter", prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["builtin", "qwen3", "qwen3_5"])
def test_llama_cpp_answers_with_our_tokens_from_the_adapter_alone(
    tmp_path, display, name, monkeypatch
):
    base = base_of(tmp_path, name, size=0.1)
    # The file of the base, as an adapter that changes nothing gives it; only its check minds.
    write_adapter(tmp_path / "nothing", make_adapter(load_model(base)[0], base, size=0.0))
    monkeypatch.setattr("mlx_tuner.conversion.gguf.require_kept", lambda *_, **__: None)
    path = export_gguf(tmp_path / "nothing", tmp_path / "base.gguf", display, dtype="f32").path
    size = export_gguf_lora(tmp_path / "adapter", tmp_path / "lora.gguf")
    factors = read_adapter(tmp_path / "adapter").tensors.values()
    assert size == sum(value.nbytes for value in factors)
    asked = list(prompts(load_tokenizer(base)))
    with llama_cpp(path) as plain, llama_cpp(path, tmp_path / "lora.gguf") as tuned:
        before = [plain.answer(prompt, 24) for prompt in asked]
        after = [tuned.answer(prompt, 24) for prompt in asked]
    assert after == [ours(base, tmp_path / "adapter", prompt) for prompt in asked]
    assert after != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("builtin", "q8_0"), ("qwen3", "f16"), ("qwen3_5", "bf16")]
)
def test_llama_cpp_answers_from_rounded_weights_nearly_as_we_do(tmp_path, display, name, dtype):
    base = base_of(tmp_path, name)
    path = export_gguf(tmp_path / "adapter", tmp_path / "model.gguf", display, dtype=dtype).path
    model = load_model(base)[0]
    apply(model, read_adapter(tmp_path / "adapter"))
    model.eval()
    asked = list(prompts(load_tokenizer(base)))
    with llama_cpp(path) as theirs:
        answers = [theirs.answer(prompt, 24) for prompt in asked]
    for prompt, answer in zip(asked, answers, strict=True):
        logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        short = logits.max(axis=-1) - logits[mx.arange(len(answer)), mx.array(answer)]
        # Where rounding decides between two tokens of almost one logit, either is right.
        assert short.max() < (0.05 if dtype == "q8_0" else 0.01)


@pytest.mark.slow
def test_a_tokenizer_without_an_end_has_that_of_the_models_config(tmp_path, display):
    base = write_model(tmp_path / "base", eos_token_id=[2039])
    (base / "generation_config.json").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base))
    made = export_gguf(tmp_path / "adapter", tmp_path / "out" / "m.gguf", display)
    assert fields_of(made.path)["tokenizer.ggml.eos_token_id"] == 2039
    assert made.modelfile.read_text() == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\n'


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ['a"""\nFROM evil', 'says "yes"'])
def test_a_system_prompt_cannot_end_its_quotes_in_the_modelfile(adapted, tmp_path, display, prompt):
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    recipe = {"model": {"path": "builtin:tiny-qwen"}, "train": {"max_steps": 1}}
    recipe["data"] = {"train": "rows.jsonl", "system_prompt": prompt}
    (run / "recipe.toml").write_text(tomli_w.dumps(recipe))
    with pytest.raises(ModelError, match=r"system prompt: holds .* or ends in a quote"):
        export_gguf(run, tmp_path / "out" / "model.gguf", display)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.gguf", "Modelfile"])
def test_what_is_there_already_is_never_written_to(adapted, tmp_path, display, name):
    (tmp_path / name).write_text("kept")
    with pytest.raises(UsageError, match=f"{name}: is there already"):
        export_gguf(adapted, tmp_path / "model.gguf", display)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "kept"


def test_a_fine_tune_that_rounding_erases_is_refused(tmp_path, display):
    base = write_model(tmp_path / "base")
    write_adapter(tmp_path / "adapter", make_adapter(load_model(base)[0], base, scale=1e-3))
    with pytest.raises(ModelError, match="of what the fine-tune changes"):
        export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", display, dtype="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def write_split(base, ours, theirs):
    """Let a model's tokenizer cut text in another way."""
    text = (base / "tokenizer.json").read_text()
    assert ours in text
    (base / "tokenizer.json").write_text(text.replace(ours, theirs))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # which takes the file at its word
    (base / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_llama_cpp_keeps_marks_with_their_letters_as_qwen_3_5_does(tmp_path, display):
    base = base_of(tmp_path, "qwen3")
    write_split(base, r"\\p{L}+|", r"[\\p{L}\\p{M}]+|")
    write_split(base, r"[^\\s\\p{L}\\p{N}]+", r"[^\\s\\p{L}\\p{M}\\p{N}]+")
    made = export_gguf(tmp_path / "adapter", tmp_path / "model.gguf", display)
    assert fields_of(made.path)["tokenizer.ggml.pre"] == "qwen35"
    tokenizer = load_tokenizer(base)
    with llama_cpp(made.path) as theirs:
        for text in (*TEXTS, "नमस्ते दुनिया"):
            assert theirs.tokens(text) == list(tokenizer.encode(text, add_special_tokens=False))


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path, display):
    base = base_of(tmp_path, "qwen3")
    write_split(base, r"|\\p{N}|", r"|\\p{N}{1,3}|")
    with pytest.raises(ModelError, match="cuts text in another way than Qwen's"):
        export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", display)


@pytest.mark.parametrize(
    ("to", "dtype", "what"),
    [
        ("gguf", "q4_k_m", "llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M"),
        ("gguf-lora", "q8_0", "give f32, f16 or bf16"),
    ],
)
def test_a_dtype_that_is_not_written_comes_with_what_to_do(adapted, tmp_path, to, dtype, what):
    arguments = ["export", str(adapted), "--to", to, "--dtype", dtype]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "m.gguf")])
    assert done.exit_code == 2
    assert what in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_dense_qwen_is_refused(adapted, base, tmp_path, display, monkeypatch):
    monkeypatch.setattr("mlx_tuner.conversion.gguf_names.ARCHITECTURES", {"qwen2_moe": "x"})
    with pytest.raises(ModelError, match="cannot be written as GGUF"):
        export_gguf(adapted, tmp_path / "m.gguf", display)


@pytest.mark.slow
def test_the_command_writes_both_files_and_pushes_only_them(
    adapted, tmp_path, monkeypatch, hub_of_none
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = ["export", str(adapted), "--to", "gguf", "--dtype", "q8_0", "--push", "me/mine"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "new" / "model.gguf")])
    assert result.exit_code == 0, result.output
    assert "kept of the fine-tune" in result.stdout
    pushed = hub_of_none.repositories["models/me/mine"]
    assert sorted(pushed.files) == ["Modelfile", "model.gguf"]
    assert pushed.files["model.gguf"] == (tmp_path / "new" / "model.gguf").read_bytes()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "private").write_text("")
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "used" / "model.gguf")])
    assert result.exit_code == 2
    assert "has other files in it" in result.stderr
