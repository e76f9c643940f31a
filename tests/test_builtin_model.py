"""`builtin:tiny-qwen` loads everywhere, speaks ChatML and is as good as its record says."""

import json
import math
import sysconfig
from functools import cache
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load, stream_generate
from tokenizers import Tokenizer
from transformers import AutoTokenizer

FOLDER = Path(str(files("mlx_tuner") / "builtin" / "tiny-qwen"))
TEXT = 'def f(x):\n    """Cafés cost 12.50 €; it\'s 日本語."""\n\treturn [x ** 2]  \r\n\n# end'
SYSTEM = "You are a helpful coding assistant."
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@cache
def loaded():
    return load(str(FOLDER))


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def record():
    return json.loads((FOLDER / "training.json").read_text("utf-8"))


def test_the_folder_stays_within_five_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000


def test_transformers_gives_the_same_logits():
    torch = pytest.importorskip("torch")
    from transformers import Qwen2ForCausalLM

    ids = tokenizer().encode(TEXT)
    ours = loaded()[0](mx.array([ids]))
    with torch.no_grad():
        theirs = Qwen2ForCausalLM.from_pretrained(FOLDER)(torch.tensor([ids])).logits
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=0, atol=1e-4)


def test_every_loader_cuts_text_into_the_same_tokens_and_back():
    plain = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = TEXT + "<|im_start|>user\nhi<|im_end|><tool_call>"
    ids = plain.encode(text).ids
    assert tokenizer().encode(text) == ids
    assert loaded()[1].encode(text) == ids
    assert tokenizer().decode(ids) == text


@pytest.mark.slow
def test_text_is_cut_where_the_real_tokenizer_cuts_it(shared):
    real = AutoTokenizer.from_pretrained(shared / "qwen2.5-coder")
    ours, theirs = (
        cutter.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
        for cutter in (tokenizer(), real)
    )
    assert ours == theirs
    assert tokenizer().backend_tokenizer.normalizer.normalize_str("e\u0301") == "é"


def test_control_tokens_are_single_ids_and_only_the_chat_ones_special(real_shared):
    config = json.loads(
        (real_shared / "qwen2.5-coder" / "tokenizer_config.json").read_text("utf-8")
    )
    real = {t["content"]: t["special"] for t in config["added_tokens_decoder"].values()}
    ours = tokenizer().added_tokens_decoder
    assert {token.content: token.special for token in ours.values()}.items() <= real.items()
    contents = [ours[index].content for index in sorted(ours)]
    assert contents == [content for content in real if content in contents]
    assert {"<|endoftext|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_pad|>"} < set(contents)
    assert all(len(tokenizer().encode(content)) == 1 for content in contents)


def test_the_generation_config_ends_at_either_end_token():
    config = json.loads((FOLDER / "generation_config.json").read_text("utf-8"))
    ends = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert config["eos_token_id"] == ends
    assert tokenizer().eos_token_id == ends[0]
    assert tokenizer().pad_token_id == ends[1]


def test_the_template_renders_chatml():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer().apply_chat_template(messages[1:3], tokenize=False) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n"
    )


@pytest.mark.slow
def test_tool_turns_are_rendered_as_the_real_template_renders_them(shared):
    real = AutoTokenizer.from_pretrained(shared / "qwen2.5-coder")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1 and 2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "Two, four.", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Done."},
    ]
    ours, theirs = (
        cutter.apply_chat_template(messages, tools=[TOOL], tokenize=False)
        for cutter in (tokenizer(), real)
    )
    start = "<|im_start|>user"  # the system turns are worded differently
    assert ours[ours.index(start) :] == theirs[theirs.index(start) :]
    assert json.dumps(TOOL) in ours[: ours.index(start)]


@pytest.mark.slow
def test_an_answer_comes_to_its_end():
    model, wrapped = loaded()
    request = [{"role": "user", "content": "Write add(a, b) in Python: return the sum of a and b."}]
    prompt = wrapped.apply_chat_template(request, add_generation_prompt=True)
    last = list(stream_generate(model, wrapped, prompt, max_tokens=150))[-1]
    assert last.finish_reason == "stop"


def test_the_loss_on_unseen_library_source_is_the_recorded_one():
    library = Path(sysconfig.get_paths()["stdlib"])
    source = (library / "textwrap.py").read_text("utf-8")
    assert "textwrap.py" in record()["held_out"]
    ids = mx.array(tokenizer().encode(source)[:1025]).reshape(-1)
    blocks = mx.stack([ids[start : start + 257] for start in range(0, 1024, 256)])
    logits = loaded()[0](blocks[:, :-1])
    targets = mx.take_along_axis(logits, blocks[:, 1:, None], axis=-1).squeeze(-1)
    loss = (mx.logsumexp(logits, axis=-1) - targets).mean().item()
    # One module of several, in the version at hand: near the mean, far from knowing nothing.
    assert abs(loss - record()["held_out_code_loss"]) < 0.6
    assert loss < 0.6 * math.log(len(tokenizer()))
