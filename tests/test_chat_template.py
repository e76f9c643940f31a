import os
import sys
import time
from pathlib import Path

import pytest
from model_folders import write_model

from mlx_tuner.errors import ModelError
from mlx_tuner.models import chat_template
from mlx_tuner.models.model import load_tokenizer

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SAID = "takes over 1 s or 256 MB"
LISTS = "{% set x = range(99999)|list %}{% for i in x %}{% for j in x %}{% endfor %}{% endfor %}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    chat_template._excess.cache_clear()
    return write_model(tmp_path / "model", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        *(
            pytest.param(endless, SAID, marks=pytest.mark.slow)  # a second each
            for endless in (
                LOOPS,
                LISTS,
                "{% if messages|length > 2 %}" + LOOPS + "{% endif %}",
                "{% if tools %}" + LOOPS + "{% endif %}",
            )
        ),
        ("{{ 'x' * 2000000 }}", "makes 2,000,000 characters"),
        ("{{ 'x' * 20000000000 }}", SAID),
        ("{{ 'x'|center(20000000000) }}", SAID),
    ],
)
def test_a_template_without_measure_is_refused(folder, template, said):
    (folder / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: chat_template: {said}")
    assert time.monotonic() - start < 25


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_child_that_its_kernel_does_not_limit_is_ended_from_outside(
    folder, tmp_path, monkeypatch
):
    """It fills memory in one step of Python, as a filter may, and would then sleep."""
    child = tmp_path / "child.py"
    child.write_text("import sys, time\nsys.stdin.read()\nx = b'x' * 400_000_000\ntime.sleep(60)")
    monkeypatch.setattr(chat_template, "_CHILD", child)
    if sys.platform != "darwin":
        monkeypatch.setattr(chat_template, "_footprint", resident)
    start = time.monotonic()
    with pytest.raises(ModelError, match=SAID):
        load_tokenizer(folder)
    assert time.monotonic() - start < 10


def test_a_template_that_no_pipe_holds_is_tried_whole(folder):
    (folder / "chat_template.jinja").write_text("{#" + "x" * 300_000 + "#}{{ 'x' * 2000000 }}")
    with pytest.raises(ModelError, match="makes 2,000,000 characters"):
        load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% break %}", "{% if %}"])
def test_a_template_that_fails_is_left_to_whoever_renders_rows(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(folder).has_chat_template


@pytest.mark.slow
def test_every_template_of_a_folder_is_tried(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(LOOPS)
    with pytest.raises(ModelError, match="chat_template: takes over"):
        load_tokenizer(folder)


def test_what_the_child_renders_is_what_transformers_renders(folder):
    """So that a template which does no harm there does none here."""
    from mlx_tuner.models.render_child import CHATS, compiled

    tokenizer = load_tokenizer(folder)
    template = compiled(tokenizer.chat_template)
    for chat in CHATS[:2]:
        ours = template.render(messages=chat, tools=None, add_generation_prompt=True)
        theirs = tokenizer._tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        assert ours == theirs
