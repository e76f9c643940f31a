"""Folders that strangers made, given to the real commands: one line, and nothing is done."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from marks import some_slow
from mlx_lm.utils import load_model
from model_folders import make_adapter, write_model

from mlx_tuner.cli import main
from mlx_tuner.models import chat_template
from mlx_tuner.models.adapter import write_adapter
from mlx_tuner.models.folder import TEMPLATES

LOOPS = "{% set x = range(99999)|list %}{% for i in x %}{% for j in x %}{% endfor %}{% endfor %}"
MODEL_COMMANDS = ("run", "plan", "data", "generate", "convert", "bench", "fuse", "eval", "export")
ADAPTER_COMMANDS = ("fuse", "generate", "eval", "export", "import")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_model(folder, num_hidden_layers=1)


@pytest.fixture
def model(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture
def adapter(good, tmp_path):
    """An adapter of the good model, with what a run leaves beside it."""
    folder = tmp_path / "adapter"
    write_adapter(folder, make_adapter(load_model(good)[0], good, targets=["q_proj"]))
    return folder


@contextmanager
def at_most(seconds: int):
    """Fail, rather than hang, where a command waits for something that never comes."""

    def late(*_):
        raise TimeoutError("the command hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*")}


def invoke(words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command; `run` trains in a child, and so needs another."""
    if words[0] == "run":
        program = [sys.executable, "-m", "mlx_tuner", *words]
        done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
        code, output = done.returncode, done.stderr
    else:
        with at_most(30):
            result = CliRunner().invoke(main, words)
        assert isinstance(result.exception, SystemExit), result.exception or result.output
        code, output = result.exit_code, result.stderr
    assert "crash.log" not in output  # which holds what nobody foresaw
    return code, output


def refusal(
    command: str, tmp_path: Path, *, model: Path | None, adapter: Path | None = None
) -> str:
    """What a command says of a folder; that it is one line a fault, quick, and changes nothing."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1?", "completion": "2"}\n' * 8)
    recipe = tmp_path / "recipe.toml"
    start = f'init_from = "{adapter}"\n' if adapter else ""
    recipe.write_text(
        f'[model]\npath = "{model}"\n[data]\ntrain = "{rows}"\n[lora]\nrank = 4\nalpha = 8\n'
        f"{start}[train]\nmax_steps = 1\n"
    )
    if adapter is None and command in ("fuse", "eval", "export"):
        adapter = tmp_path / "from-scratch"
        write_adapter(adapter, GOOD_ADAPTER)
    arguments = {
        "run": ["run", recipe, "--run-dir", tmp_path / "out"],
        "plan": ["plan", recipe],
        "data": ["data", rows, "--model", model],
        "generate": ["generate", adapter or model, "hello", "--max-tokens", "1"]
        + (["--model", model] if adapter else []),
        "convert": ["convert", model, "-o", tmp_path / "out"],
        "bench": ["bench", "--model", model, "--quick", "--steps", "1"],
        "fuse": ["fuse", adapter, "-o", tmp_path / "out"] + (["--model", model] if model else []),
        "eval": ["eval", adapter, "--data", rows, "--model", model],
        "export": ["export", adapter, "--to", "gguf", "-o", tmp_path / "m.gguf", "--model", model],
        "import": ["import", adapter, "-o", tmp_path / "out"],
    }[command]
    before = files_below(tmp_path)
    code, output = invoke([str(word) for word in arguments])
    lines = [line for line in output.splitlines() if line.startswith("mlx-tune: error: ")]
    assert code == 1, output
    assert lines, output
    assert "\x1b" not in "".join(lines)
    assert files_below(tmp_path) == before
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def _a_good_adapter(good):
    global GOOD_ADAPTER
    GOOD_ADAPTER = make_adapter(load_model(good)[0], good, targets=["q_proj"])


# ---- a model folder ------------------------------------------------------------------------------


def fifo_as_config(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@pytest.mark.slow
@pytest.mark.parametrize("command", some_slow(MODEL_COMMANDS, {"run"}))
def test_every_command_checks_a_model_folder_before_it_is_read(command, model, tmp_path):
    fifo_as_config(model)
    assert "config.json: not a regular file" in refusal(command, tmp_path, model=model)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def link_out(folder, name):
    (folder.parent / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret")


SPOILED = {
    "deep config": (
        lambda f: (f / "config.json").write_text('{"a":' * 100_000),
        "config.json: not valid JSON: ",
    ),
    "config nested 100 deep": (
        lambda f: edit(f / "config.json", a=json.loads("[" * 100 + "]" * 100)),
        "config.json: nested more than 64 deep",
    ),
    "deep tokenizer": (
        lambda f: edit(f / "tokenizer.json", a=json.loads("[" * 100 + "]" * 100)),
        "tokenizer.json: nested more than 64 deep",
    ),
    "400 digits": (
        lambda f: edit(f / "config.json", rope_theta=10**400),
        "config.json: not valid JSON: the number 1000",
    ),
    "5,000 digits": (
        lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5_000 + "}"),
        "has 5,000 digits",
    ),
    "10^7 layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=10**7),
        "num_hidden_layers: 10000000 is not a whole number up to 1,000",
    ),
    "list as dtype": (
        lambda f: edit(f / "config.json", torch_dtype=["float32"]),
        "torch_dtype: \"['float32']\" is not one of bfloat16, float16, float32",
    ),
    "float8": (
        lambda f: edit(f / "config.json", torch_dtype="float8_e4m3fn"),
        "torch_dtype: 'float8_e4m3fn' is not one of",
    ),
    "chat_template_type": (
        lambda f: edit(f / "tokenizer_config.json", chat_template_type="nope"),
        "chat_template_type: 'nope' is not taken here; remove it",
    ),
    "tool_parser_type": (
        lambda f: edit(f / "tokenizer_config.json", tool_parser_type="..chat_templates.x"),
        "tool_parser_type: '..chat_templates.x' is not taken here",
    ),
    "tokenizer_class": (
        lambda f: edit(f / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer"),
        "tokenizer_class: 'BertJapaneseTokenizer' is not taken here",
    ),
    "tokenizer_class of the config": (
        lambda f: edit(f / "config.json", tokenizer_class=["a"]),
        "tokenizer_class: \"['a']\" is not taken here",
    ),
    "another tokenizer file": (
        lambda f: edit(f / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.1.0.json"]),
        "fast_tokenizer_files: ",
    ),
    "a link out, of a file that only transformers reads": (
        lambda f: link_out(f, "special_tokens_map.json"),
        "special_tokens_map.json: a link that leads out of its folder",
    ),
    "a link out, of a further template": (
        lambda f: ((f / TEMPLATES).mkdir(), link_out(f, f"{TEMPLATES}/t.jinja")),
        "additional_chat_templates/t.jinja: a link that leads out of its folder",
    ),
    "a huge template": (
        lambda f: (f / "chat_template.jinja").write_text("x" * 1_000_001),
        "chat_template.jinja: 1,000,001 bytes, where at most 1,000,000 are taken",
    ),
    "a template that loops": (
        lambda f: (f / "chat_template.jinja").write_text(LOOPS),
        "chat_template: takes over 2 s or 256 MB for a few short turns",
    ),
    "an escape sequence as name": (
        lambda f: edit(f / "config.json", model_type="\x1b]0;forged\x07\n\u202eqwen2"),
        r"model_type: '\x1b]0;forged\x07\n\u202eqwen2' is not one of",
    ),
    "more of a token than it has": (
        lambda f: edit(
            f / "tokenizer_config.json",
            added_tokens_decoder={"3": {"content": "a", "\x1b]0;forged\x07": True}},
        ),
        r"tokenizer_config.json: \x1b]0;forged\x07: is not taken here of a token; remove it",
    ),
    "the same of one that is named": (
        lambda f: edit(
            f / "tokenizer_config.json", eos_token={"__type": "AddedToken", "content": "a", "x": 1}
        ),
        "tokenizer_config.json: x: is not taken here of a token; remove it",
    ),
    "the same in another file": (
        lambda f: (f / "special_tokens_map.json").write_text('{"pad_token": {"x": 1}}'),
        "special_tokens_map.json: x: is not taken here of a token; remove it",
    ),
    "an end of answers past the embedding": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[2039, 5_000]),
        "tokenizer: token id 5000, but the embedding has 2048 rows",
    ),
    "a special token past the embedding": (
        lambda f: edit(f / "tokenizer_config.json", additional_special_tokens=["<|beyond|>"]),
        "tokenizer: token id 2048, but the embedding has 2048 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", some_slow(SPOILED, {"a template that loops"}))
def test_a_hostile_model_folder_is_refused_in_a_line(what, model, tmp_path):
    spoil, said = SPOILED[what]
    spoil(model)
    for command in ("data", "plan"):
        text = refusal(command, tmp_path, model=model)
        assert said in text, text
        assert all(len(line) < 1_500 for line in text.splitlines())


@pytest.mark.slow
def test_a_template_that_loops_for_some_content_only_is_stopped(model, tmp_path, monkeypatch):
    """Which no check beforehand can find: it is as long as a row takes that ends it."""
    monkeypatch.setattr(chat_template, "ROW_SECONDS", 1.0)
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    trap = "{% for m in messages %}{% if m.content == '1 + 1?' %}"
    text = template + trap + LOOPS + "{% endif %}{% endfor %}"
    (model / "chat_template.jinja").write_text(text)
    assert "s; the model may be harmful" in refusal("data", tmp_path, model=model)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(model, tmp_path):
    """Whatever file they come from: here the vocabulary proper, whose last entry moves up."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 2_048
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for command in ("generate", "data"):
        assert "token id 2048, but the embedding has 2048 rows" in refusal(
            command, tmp_path, model=model
        )


def test_every_kind_of_tokenizer_is_held_to_the_embeddings_rows(model, tmp_path):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pieces = [[f"piece-{i}", -1.0] for i in range(3_000)]
    tokenizer["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    said = refusal("data", tmp_path, model=model)
    assert "but the embedding has 2048 rows" in said


@pytest.mark.slow
def test_one_ctrl_c_ends_a_command_whose_template_does_not_end(model, tmp_path):
    """Here the limit on rendering a row is ten minutes."""
    template = json.loads((model / "tokenizer_config.json").read_text())["chat_template"]
    trap = (
        "{% for m in messages %}{% if m.content == '1 + 1?' %}" + LOOPS + "{% endif %}{% endfor %}"
    )
    (model / "chat_template.jinja").write_text(template + trap)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1?", "completion": "2"}\n' * 8)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mlx_tuner.cli import main\n"
        "from mlx_tuner.models import chat_template\n"
        "render, chat_template.ROW_SECONDS = chat_template.Bounded.__call__, 600\n"
        "def watched(self, conversation, *more, **options):\n"
        "    Path('rendering').touch()\n"
        "    return render(self, conversation, *more, **options)\n"
        "chat_template.Bounded.__call__ = watched\n"
        "main(['data', 'rows.jsonl', '--model', 'model'])\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (tmp_path / "rendering").exists():
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, output = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert output.endswith("Aborted!\n")


@pytest.mark.slow
def test_a_header_of_58_megabytes_is_refused_before_it_is_read(model, tmp_path):
    header = json.dumps({"x" * 58_000_000: 1}).encode()
    path = model / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "begins with a header of 58,000," in refusal("generate", tmp_path, model=model)


def test_links_go_into_the_hubs_own_cache_and_into_no_other_place(good, tmp_path):
    def laid_out(repository: Path, blobs: Path) -> Path:
        snapshot = repository / "snapshots" / "c0ffee"
        for place in (snapshot, blobs):
            place.mkdir(parents=True)
        for path in good.iterdir():
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(blobs / path.name)
        return snapshot

    ours = tmp_path / "hub" / "models--qwen--tiny"
    assert (
        "mlx-tune: error"
        not in CliRunner()
        .invoke(main, ["generate", str(laid_out(ours, ours / "blobs")), "hi", "--max-tokens", "1"])
        .stderr
    )
    elsewhere = [
        laid_out(tmp_path / "hub" / "models--a--b", tmp_path / "hub" / "models--c--d" / "blobs"),
        laid_out(tmp_path / "x" / "unpacked", tmp_path / "x" / "blobs"),
        laid_out(tmp_path / "y" / "models--a--b", tmp_path / "y" / "blobs-of-mine"),
    ]
    for folder in elsewhere:
        assert "a link that leads out of its folder" in refusal("generate", tmp_path, model=folder)


# ---- an adapter folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ADAPTER_COMMANDS)
@pytest.mark.parametrize(
    "name", ["loss.png", "summary.json", "recipe.toml", "adapters.safetensors"]
)
def test_every_command_checks_an_adapter_folder_before_it_is_read(
    command, name, good, adapter, tmp_path
):
    check_refusals_of(command, name, good, adapter, tmp_path)


@pytest.mark.slow
def test_a_run_checks_the_adapter_that_it_starts_from(good, adapter, tmp_path):
    check_refusals_of("run", "summary.json", good, adapter, tmp_path)


def check_refusals_of(command, name, good, adapter, tmp_path):
    (adapter / name).unlink(missing_ok=True)
    os.mkfifo(adapter / name)
    said = refusal(command, tmp_path, model=good, adapter=adapter)
    assert f"{name}: not a regular file" in said
    (adapter / name).unlink()
    (tmp_path / "secret").write_text("private")
    (adapter / name).symlink_to(tmp_path / "secret")
    said = refusal(command, tmp_path, model=good, adapter=adapter)
    assert f"{name}: a link that leads out of its folder" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_parameters": {"rank": 10**30, "scale": 1.0}}, "lora_parameters.rank"),
        ({"lora_parameters": {"rank": 4, "scale": 10**39}}, "lora_parameters.scale"),
        ({"num_layers": 10**39}, "num_layers"),
        ({"model": "./\x1b[2K\x1b[1Aforged"}, "model: must be at most 500 characters, and none"),
    ],
)
def test_a_hostile_adapter_config_is_refused_in_a_line(adapter, tmp_path, changes, said):
    edit(adapter / "adapter_config.json", **changes)
    assert said in refusal("fuse", tmp_path, model=None, adapter=adapter)


@pytest.mark.slow
def test_a_rank_or_patterns_that_would_take_memory_or_time_are_refused_unbuilt(adapter, tmp_path):
    shutil.rmtree(adapter)
    adapter.mkdir()
    modules = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2_000)]
    tensors = {f"{module}.lora_A.weight": mx.zeros((1, 64)) for module in modules}
    tensors |= {f"{module}.lora_B.weight": mx.zeros((64, 1)) for module in modules}
    tensors[f"{modules[0]}.lora_A.weight"] = mx.zeros((20_000, 64))
    tensors[f"{modules[0]}.lora_B.weight"] = mx.zeros((64, 20_000))
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), tensors)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    for changes, said in (
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 20_000}}, "the largest rank, 20,000"),
        ({"alpha_pattern": {f".*{i}.*x": 2 for i in range(100)}}, "too many patterns"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "the pattern '(a+)+$' is too complicated"),
        ({"rank_pattern": {"9" * 5_000: 2}}, "is too complicated; write the modules' names"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        assert said in refusal("import", tmp_path, model=None, adapter=adapter)


@pytest.mark.parametrize("steps", ["[]", "9" * 400, "{}"])
def test_a_summary_that_is_none_is_a_line_to_compare_and_nothing_to_fuse(adapter, tmp_path, steps):
    (adapter / "recipe.toml").write_text(STRANGERS.format(rows=tmp_path / "no.jsonl", prompt='"x"'))
    (adapter / "summary.json").write_text(f'{{"steps": {steps}}}')
    code, output = invoke(["compare", str(adapter)])
    assert (code, output.count("\n")) == (1, 1)
    assert "summary.json: is not the summary of a run" in output
    result = CliRunner().invoke(main, ["fuse", str(adapter), "-o", str(tmp_path / "fused")])
    assert result.exit_code == 0, result.output
    assert "loss |" not in (tmp_path / "fused" / "README.md").read_text().partition("Compared")[0]


STRANGERS = """
[model]
path = "builtin:tiny-qwen"
[data]
train = "{rows}"
system_prompt = {prompt}
[train]
max_steps = 1
"""


def test_the_rows_of_a_strangers_run_are_not_opened_and_its_prompt_stays_as_it_is(
    adapter, tmp_path
):
    """Here they are a pipe, on which whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "rows.jsonl")
    recipe = STRANGERS.format(rows=tmp_path / "rows.jsonl", prompt='"/no_think Be brief."')
    (adapter / "recipe.toml").write_text(recipe)
    with at_most(60):
        result = CliRunner().invoke(main, ["fuse", str(adapter), "-o", str(tmp_path / "fused")])
    assert result.exit_code == 0, result.output
    assert "fixed prompts" in result.output
    assert 'system_prompt = "/no_think Be brief."' in (tmp_path / "fused" / "README.md").read_text()


def test_a_system_prompt_cannot_write_lines_of_a_modelfile(good, adapter, tmp_path):
    prompt = json.dumps('a"""\nFROM evil')
    (adapter / "recipe.toml").write_text(STRANGERS.format(rows="rows.jsonl", prompt=prompt))
    said = refusal("export", tmp_path, model=good, adapter=adapter)
    assert 'system prompt: holds """ or ends in a quote' in said


def test_a_plot_that_is_no_png_is_not_published(good, adapter, tmp_path):
    (adapter / "loss.png").write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    result = CliRunner().invoke(main, ["fuse", str(adapter), "-o", str(tmp_path / "fused")])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "fused" / "loss.png").exists()


def test_tensors_that_are_not_finite_are_refused(good, adapter, tmp_path):
    path = str(adapter / "adapters.safetensors")
    tensors = {name: value * float("nan") for name, value in mx.load(path).items()}
    mx.eval(tensors)
    mx.save_safetensors(path, tensors)
    assert "holds NaN or infinity" in refusal("import", tmp_path, model=good, adapter=adapter)


# ---- nothing of a folder is run ------------------------------------------------------------------

CANARY = """
import json, sys
folder, commands = sys.argv[1], json.loads(sys.argv[2])
seen = []

def hook(event, arguments):
    if event in ("os.system", "os.exec", "os.fork", "pickle.find_class", "socket.connect",
                 "socket.getaddrinfo", "shutil.unpack_archive"):
        seen.append((event, str(arguments)[:200]))
    elif event in ("subprocess.Popen", "os.posix_spawn") and arguments[0] != sys.executable:
        seen.append((event, str(arguments)[:200]))
    elif event in ("exec", "compile", "import") and folder in str(arguments[:3]):
        seen.append((event, str(arguments)[:200]))
    elif event == "open" and str(arguments[0]).startswith(folder):
        if str(arguments[0]).endswith((".py", ".bin", ".pkl", ".pt")):
            seen.append((event, str(arguments)[:200]))

from click.testing import CliRunner
from mlx_tuner.cli import main
sys.addaudithook(hook)
results = [CliRunner().invoke(main, command) for command in commands]
codes = [result.exit_code for result in results]
print(json.dumps([codes, seen, [result.output for result in results if result.exit_code]]))
"""


class Evil:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.slow
def test_no_code_of_a_folder_is_run_nothing_is_unpickled_and_no_socket_opened(
    model, adapter, tmp_path
):
    """Every command, on a model and an adapter that are full of code."""
    with pytest.MonkeyPatch.context() as patch:  # the pickle is one, and does what it says
        patch.chdir(tmp_path)
        pickle.loads(pickle.dumps(Evil())).close()
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
    for folder in (model, adapter):
        for name in (
            "modeling.py",
            "tokenization.py",
            "configuration.py",
            "__init__.py",
            "custom.py",
            "jinja2.py",
            "mlx_lm.py",
            "sitecustomize.py",
        ):
            (folder / name).write_text("open('ran', 'w').close()")
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt"):
            (folder / name).write_bytes(pickle.dumps(Evil()))
    code = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
    edit(model / "config.json", auto_map=code, _attn_implementation_internal="evil/kernel")
    tokenizers = ["tokenization.T", "tokenization.T"]
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": tokenizers})
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    guarded = "{% if messages[0].content == 'x' %}" + escape + "{% endif %}"
    (model / "chat_template.jinja").write_text(guarded + settings["chat_template"])
    edit(adapter / "adapter_config.json", auto_mapping={"base_model_class": "modeling.M"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1?", "completion": "2"}\n' * 8)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\npath = "{model}"\n[data]\ntrain = "{rows}"\n[lora]\nrank = 4\nalpha = 8\n'
        f'init_from = "{adapter}"\n[train]\nmax_steps = 1\nlearning_rate = 1e-4\n'
    )
    base = ["--model", model]
    commands = [
        ["convert", model, "-o", tmp_path / "converted"],
        ["data", rows, *base],
        ["plan", recipe],
        ["run", recipe, "--run-dir", tmp_path / "run"],
        ["generate", model, "hello", "--max-tokens", "2"],
        ["generate", adapter, "hello", "--max-tokens", "2", *base],
        ["eval", adapter, "--data", rows, "--samples", "1", "--max-tokens", "2", *base],
        ["fuse", adapter, "-o", tmp_path / "fused", *base],
        ["export", adapter, "--to", "peft", "-o", tmp_path / "peft"],
        ["import", tmp_path / "peft", "-o", tmp_path / "imported"],
    ]
    texts = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", CANARY, str(tmp_path), texts],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    codes, seen, output = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(commands), output
    assert seen == []
    assert not list(tmp_path.rglob("ran"))
