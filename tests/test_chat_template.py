import pytest
from model_folders import write_model

from mlx_tuner.errors import ModelError
from mlx_tuner.models import chat_template
from mlx_tuner.models.model import load_tokenizer

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "chat_template: takes over 0.3 s for two short turns"),
        ("{{ 'x' * 2000000 }}", "chat_template: makes 2,000,000 characters"),
    ],
)
def test_a_template_without_measure_is_refused(folder, monkeypatch, template, said):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: {said}")


def test_a_template_that_fails_is_left_to_whoever_renders_rows(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    assert load_tokenizer(folder).has_chat_template
