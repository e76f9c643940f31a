"""Make `builtin:tiny-qwen`: train its tokenizer, pretrain it in MLX, write its folder.

    python scripts/pretrain_tiny_qwen.py [-o DIR] [--steps N]

About twelve minutes on two cores. On Linux preload OpenBLAS (LD_PRELOAD=.../libopenblas.so.0):
MLX's own matrix products are far slower there.
"""

import argparse
import json
import math
import platform
import random
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from tiny_qwen_text import (
    HELD_OUT,
    Conversation,
    function_names,
    library_conversations,
    library_sources,
    made_up_conversations,
)
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_tuner.system import files

SEED = 42
BLOCK = 256  # tokens
BATCH = 8  # blocks
MADE_UP = 6000  # conversations
RECENT = 100  # steps that the recorded training loss is the mean of
PEAK_LEARNING_RATE = 8e-3
WARMUP_STEPS = 100
DEFAULT_FOLDER = Path(__file__).parents[1] / "mlx_tuner" / "builtin" / "tiny-qwen"

# Qwen2.5's control tokens in its order, less those for pictures; the first three are special.
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>",
    "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
SPECIAL = 3
VOCABULARY = 2048
FIRST_CONTROL = VOCABULARY - len(CONTROL_TOKENS)
END_OF_TEXT, IM_END = FIRST_CONTROL, FIRST_CONTROL + 2

# How Qwen2.5 cuts text before the merges: contractions, words, digits, signs, line ends, blanks.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": IM_END,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "max_window_layers": 4,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
GENERATION_CONFIG = {
    "bos_token_id": END_OF_TEXT,
    "do_sample": False,
    "eos_token_id": [IM_END, END_OF_TEXT],
    "pad_token_id": END_OF_TEXT,
}

# ChatML with tools in Qwen2.5's form.
CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
{%- else %}
    {%- set system = 'You are a helpful coding assistant.' %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nThese functions can be called:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nA call is a JSON object in tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content or not message.tool_calls %}
            {{- '\\n' + (message.content or '') }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE cut as Qwen2.5's is, with its control tokens after the merged ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=FIRST_CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=index < SPECIAL, normalized=False)
            for index, token in enumerate(CONTROL_TOKENS)
        ]
    )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """Write the tokenizer's files; returns it as transformers loads it from there."""
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(CONTROL_TOKENS[1:SPECIAL]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    files.write_json(folder / "tokenizer_config.json", settings)
    files.write_text(folder / "tokenizer.json", tokenizer.to_str())
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, closed by <|endoftext|>."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return [[*encoding.ids, END_OF_TEXT] for encoding in encodings]


def render(tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> list[str]:
    return [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]


def pack(texts: list[list[int]]) -> np.ndarray:
    """(blocks, BLOCK + 1) token ids: the texts end to end, each block its inputs and their next."""
    stream = np.concatenate(texts)
    blocks = (len(stream) - 1) // BLOCK
    starts = BLOCK * np.arange(blocks)[:, None]
    return stream[starts + np.arange(BLOCK + 1)].astype(np.int32)


# MLX's CPU exponential takes 19 ns an element and is used twice in each pass; its power takes 7.
# These three do the same sums as mlx-lm's and MLX's own, and stand in for them while training.


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    powers = mx.power(math.e, x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@softmax.vjp
def softmax_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    product = output * cotangent
    return product - output * product.sum(-1, keepdims=True)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * x / (1 + mx.power(math.e, -gate))


def causal_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, **_: Any) -> mx.array:
    """(batch, heads, tokens, d) of queries to the same, each key-value head serving its group."""
    batch, heads, tokens, d = q.shape
    groups = heads // k.shape[1]
    q = (scale * q).reshape(batch, -1, groups * tokens, d)
    scores = (q @ k.swapaxes(-1, -2)).reshape(batch, heads, tokens, tokens)
    weights = softmax(scores + nn.MultiHeadAttention.create_additive_causal_mask(tokens))
    return (weights.reshape(batch, -1, groups * tokens, tokens) @ v).reshape(
        q.shape[0], heads, tokens, d
    )


def loss_of(model: nn.Module, block: mx.array) -> mx.array:
    """Mean negative log likelihood (nats) of each next token of (blocks, BLOCK + 1) ids."""
    probabilities = softmax(model(block[:, :-1]))
    return -mx.log(mx.take_along_axis(probabilities, block[:, 1:, None], axis=-1)).mean()


def train(model: nn.Module, blocks: np.ndarray, steps: int) -> Iterator[float]:
    """Loss (nats a token) of each step over the blocks in a seeded order."""
    order = np.random.default_rng(SEED).permutation(len(blocks))
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, PEAK_LEARNING_RATE, WARMUP_STEPS),
            optim.cosine_decay(PEAK_LEARNING_RATE, steps - WARMUP_STEPS),
        ],
        [WARMUP_STEPS],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05, bias_correction=True)
    loss_and_gradient = nn.value_and_grad(model, loss_of)
    for step in range(steps):
        batch = mx.array(blocks[order[step * BATCH : (step + 1) * BATCH]])
        loss, gradient = loss_and_gradient(model, batch)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(loss, model.parameters(), optimizer.state)
        yield loss.item()


def evaluate(model: nn.Module, blocks: np.ndarray) -> float:
    """Mean loss (nats a token) over all blocks."""
    return float(np.mean([loss_of(model, mx.array(block[None])).item() for block in blocks]))


def with_progress(losses: Iterator[float], steps: int) -> Iterator[float]:
    started = time.perf_counter()
    recent: deque[float] = deque(maxlen=50)
    for step, loss in enumerate(losses, 1):
        recent.append(loss)
        yield loss
        if step % 50 == 0 or step == steps:
            pace = (time.perf_counter() - started) / step
            print(
                f"step {step}/{steps}  loss {np.mean(recent):.3f}  "
                f"{BATCH * BLOCK / pace:,.0f} tokens/s  {pace * (steps - step):.0f} s left",
                flush=True,
            )


def model_card(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"""\
---
license: apache-2.0
library_name: mlx
tags: [mlx, qwen2, code]
---

# tiny-qwen

A Qwen2-architecture language model of {record["parameters"]:,} parameters (fp32) with its own
byte-level BPE of {VOCABULARY} tokens and a ChatML template. It ships with mlx-lora-tuner as
`builtin:tiny-qwen`, so that a fine-tune can be tried, tested and watched with no network and no
GPU. It writes what looks like small Python functions and ends its turns; it knows nothing worth
asking for.

Made by `scripts/pretrain_tiny_qwen.py` in MLX in {record["seconds"] / 60:.0f} minutes, seed {SEED},
with {versions}.

| loss | nats a token | bits a byte |
| --- | --- | --- |
| training text, mean of the last {RECENT} steps | {record["train_loss"]} | |
| held-out modules | {record["held_out_code_loss"]} | {record["held_out_bits_per_byte"]} |
| held-out conversations | {record["held_out_chat_loss"]} | |

A model that knew nothing would score {math.log(VOCABULARY):.4f}. It saw {record["tokens"]:,} tokens
in {record["steps"]} steps of {BATCH} blocks of {BLOCK} tokens; it is weaker on longer contexts.
`training.json` holds the same figures.

## Training text

- The source of Python's standard library (Python Software Foundation, PSF License Version 2):
  its top-level modules.
- Requests and answers made from its short, documented functions, packages included.
- Requests for small functions put together from parts by `scripts/tiny_qwen_text.py`.

Held out: {", ".join(HELD_OUT)}. No other model's text or weights were used.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain builtin:tiny-qwen.")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_FOLDER, metavar="DIR")
    parser.add_argument("--steps", type=int, help="stop early, for a quick try")
    options = parser.parse_args()
    with files.filling(options.output) as folder:
        make(folder, options.steps)


def make(folder: Path, max_steps: int | None) -> None:
    """Fill `folder` with the model's files."""
    started = time.perf_counter()
    mx.set_default_device(mx.cpu)
    mx.random.seed(SEED)
    rng = random.Random(SEED)

    library = library_sources()
    held_out = [library.pop(path) for path in HELD_OUT]
    # The packages' modules are only talked about: with their source it would take twice as long.
    sources = [source for path, source in library.items() if "/" not in path]
    names = function_names(library.values())
    conversations = [c for text in library.values() for c in library_conversations(text, rng)]
    conversations += made_up_conversations(MADE_UP, names, rng)
    unseen_conversations = [c for text in held_out for c in library_conversations(text, rng)]

    turns = [turn["content"] for conversation in conversations for turn in conversation]
    tokenizer = write_tokenizer(folder, train_tokenizer(sources + turns))
    texts = encode(tokenizer, sources + render(tokenizer, conversations))
    rng.shuffle(texts)
    blocks = pack(texts)
    steps = min(len(blocks) // BATCH, max_steps or len(blocks))
    print(f"{blocks.size:,} tokens in {len(blocks)} blocks", flush=True)

    qwen2.swiglu, qwen2.scaled_dot_product_attention = swiglu, causal_attention
    model = qwen2.Model(qwen2.ModelArgs.from_dict(CONFIG))
    losses = list(with_progress(train(model, blocks, steps), steps))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})

    code = encode(tokenizer, held_out)
    code_loss = evaluate(model, pack(code))
    tokens_a_byte = sum(map(len, code)) / sum(len(source.encode()) for source in held_out)
    chat_loss = evaluate(model, pack(encode(tokenizer, render(tokenizer, unseen_conversations))))
    record = {
        "seed": SEED,
        "parameters": sum(weight.size for weight in weights.values()),
        "steps": steps,
        "tokens": steps * BATCH * BLOCK,
        "seconds": round(time.perf_counter() - started),
        "train_loss": round(float(np.mean(losses[-RECENT:])), 4),
        "held_out": list(HELD_OUT),
        "held_out_code_loss": round(code_loss, 4),
        "held_out_bits_per_byte": round(code_loss / math.log(2) * tokens_a_byte, 4),
        "held_out_chat_loss": round(chat_loss, 4),
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("mlx", "mlx-lm", "tokenizers", "transformers")},
        },
    }
    files.write_json(folder / "config.json", CONFIG)
    files.write_json(folder / "generation_config.json", GENERATION_CONFIG)
    files.write_json(folder / "training.json", record)
    files.write_text(folder / "README.md", model_card(record))
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
