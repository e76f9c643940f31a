"""The seam to the Hub against a local endpoint that speaks its protocol."""

import mlx.core as mx
import mlx_lm
import pytest
from fake_hub import COMMIT, Repository
from huggingface_hub import constants

from mlx_tuner.conversion.convert import convert
from mlx_tuner.errors import DataError, ModelError
from mlx_tuner.models.model import load, resolve
from mlx_tuner.show.progress import Display
from mlx_tuner.system import hub

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def fake(hub_of_none):
    """A Hub with one model and one data set, an empty cache, and no token."""
    fake = hub_of_none
    fake.repositories["models/qwen/tiny"] = Repository(
        {
            "config.json": b'{"model_type": "qwen2"}',
            "model.safetensors": WEIGHTS,
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"{{ messages }}",
            "modeling_qwen.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "onnx/config.json": b"{}",
            "trainer_state.json": b"{}",
            "requirements.txt": b"x",
            "README.md": b"hello",
        }
    )
    fake.repositories["datasets/acme/rows"] = Repository(
        {"rows.jsonl": b'{"text": "a"}\n', "dataset_infos.json": b"{}", "README.md": b""}
    )
    return fake


def fault(kind, call, *arguments) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    [only] = caught.value.faults
    assert "\n" not in str(only)
    return str(only)


def test_a_model_arrives_with_its_known_files_and_without_its_code(fake):
    folder = hub.download_model("qwen/tiny")
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder.name == COMMIT


def test_a_second_start_downloads_nothing_and_shows_no_bar(fake, capfd):
    hub.download_model("qwen/tiny")
    capfd.readouterr()
    assert hub.download_model("qwen/tiny", "main").name == COMMIT
    assert fake.downloads("model.safetensors") == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_cache_serves_where_the_hub_is_out_of_reach(fake, monkeypatch):
    folder = hub.download_model("qwen/tiny")
    rows = hub.download_dataset_file("acme/rows")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download_model("qwen/tiny") == folder
    assert hub.download_dataset_file("acme/rows/rows.jsonl") == rows
    assert hub.download_dataset_file("acme/rows") == rows
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.download_model("qwen/tiny") == folder


@pytest.mark.slow
def test_a_model_that_came_by_its_commit_is_found_offline_once_its_branch_was_asked_for(
    fake, monkeypatch
):
    folder = hub.download_model("qwen/tiny", COMMIT)
    assert hub.download_model("qwen/tiny") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download_model("qwen/tiny") == folder


def test_offline_without_the_model_in_the_cache_is_one_line(fake, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = fault(ModelError, hub.download_model, "qwen/tiny", "main")
    assert text.startswith("qwen/tiny@main: not in the cache")
    assert "HF_HUB_OFFLINE" in text
    assert "not in the cache" in fault(DataError, hub.download_dataset_file, "acme/rows")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "", "answered 401; set HF_TOKEN"),
        (401, "RepoNotFound", "not on the Hub, or is private"),
        (401, "GatedRepo", "gated; accept its terms"),
        (403, "GatedRepo", "gated; accept its terms"),
        (403, "", "answered 403; set HF_TOKEN"),
        (404, "RepoNotFound", "not on the Hub, or is private"),
    ],
)
def test_a_refusal_names_the_model_and_no_token(fake, monkeypatch, status, code, said):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake.repositories["models/qwen/tiny"].status = status
    fake.repositories["models/qwen/tiny"].error_code = code
    text = fault(ModelError, hub.download_model, "qwen/tiny")
    assert text.startswith("qwen/tiny: ")
    assert said in text
    assert "hf_secret" not in text
    assert fake.tokens == {"Bearer hf_secret"}


def test_an_unknown_name_revision_or_form_of_name_is_one_line(fake):
    assert "not on the Hub" in fault(ModelError, hub.download_model, "qwen/none")
    assert fault(ModelError, hub.download_model, "qwen/tiny", "v9").startswith(
        "qwen/tiny@v9: has no such revision"
    )
    assert "OWNER/NAME" in fault(ModelError, hub.download_model, "qwen/ti ny")


def test_a_failing_hub_is_named_when_the_cache_cannot_help(fake):
    fake.repositories["models/qwen/tiny"].status = 500
    assert "out of reach" in fault(ModelError, hub.download_model, "qwen/tiny")


def test_a_model_with_pickled_weights_only_is_refused_before_any_download(fake):
    del fake.repositories["models/qwen/tiny"].files["model.safetensors"]
    text = fault(ModelError, hub.download_model, "qwen/tiny")
    assert "has only pytorch_model.bin, which can run code" in text
    assert fake.downloads("config.json") == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_downloaded_once_more(fake, name):
    repository = fake.repositories["models/qwen/tiny"]
    damaged = b"?" * len(repository.files[name])
    repository.served[name] = [damaged]
    folder = hub.download_model("qwen/tiny")
    assert (folder / name).read_bytes() == repository.files[name]
    assert fake.downloads(name) == 2


@pytest.mark.slow
def test_a_file_that_arrives_damaged_twice_is_refused_and_not_taken_from_the_cache_later(fake):
    damaged = b"?" * len(WEIGHTS)
    repository = fake.repositories["models/qwen/tiny"]
    repository.served["model.safetensors"] = [damaged, damaged]
    assert "arrived damaged twice" in fault(ModelError, hub.download_model, "qwen/tiny")
    folder = hub.download_model("qwen/tiny")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.slow
def test_a_file_of_another_size_than_announced_is_downloaded_once_more(fake):
    served = fake.repositories["models/qwen/tiny"].served
    served["model.safetensors"] = [b"short"] * 2
    assert "download failed" in fault(ModelError, hub.download_model, "qwen/tiny")
    served["model.safetensors"] = [b"short"]
    folder = hub.download_model("qwen/tiny")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_the_only_file_of_rows_is_found(fake):
    assert hub.download_dataset_file("acme/rows").read_bytes() == b'{"text": "a"}\n'


def test_a_file_of_rows_is_taken_by_name_from_a_folder_and_checked(fake):
    files = fake.repositories["datasets/acme/rows"].files
    files["data/train.jsonl.gz"] = b"gz"
    fake.repositories["datasets/acme/rows"].served["data/train.jsonl.gz"] = [b"??"]
    path = hub.download_dataset_file("acme/rows/data/train.jsonl.gz")
    assert path.read_bytes() == b"gz"


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], 0),
        (["valid.jsonl", "train.jsonl", "README.md"], 1),
        (["alpaca_data.json", "alpaca_eval.json"], 0),
        (["en/training.json.gz", "en/dev.json.gz"], 0),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], None),
        (["constrained.jsonl", "retrained.jsonl"], None),
    ],
)
def test_of_several_files_the_training_split_is_taken(fake, names, taken):
    repository = fake.repositories["datasets/acme/rows"]
    repository.files = {name: name.encode() for name in names}
    if taken is None:
        text = fault(DataError, hub.download_dataset_file, "acme/rows")
        assert f"several files to train on; name one as hub:acme/rows/FILE: {names[0]}" in text
    else:
        path = hub.download_dataset_file("acme/rows")
        assert path.read_bytes() == names[taken].encode()


def test_several_files_of_rows_are_listed(fake):
    fake.repositories["datasets/acme/rows"].files["more.json"] = b"[]"
    text = fault(DataError, hub.download_dataset_file, "acme/rows")
    assert text == (
        "acme/rows: has several files to train on; "
        "name one as hub:acme/rows/FILE: more.json, rows.jsonl"
    )
    text = fault(DataError, hub.download_dataset_file, "acme/rows/train.json")
    assert "has no file train.json; choose from more.json, rows.jsonl" in text
    fake.repositories["datasets/acme/rows"].files = {"README.md": b""}
    assert "no .json" in fault(DataError, hub.download_dataset_file, "acme/rows")


def test_a_folder_is_pushed_as_a_private_model(fake, monkeypatch, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.check_token("me/mine")
    assert hub.push(folder, "me/mine") == f"{fake.address}/me/mine"
    pushed = fake.repositories["models/me/mine"]
    assert pushed.private
    assert pushed.files == {"config.json": b"{}", "model.safetensors": WEIGHTS}
    # A second push replaces the files.
    (folder / "config.json").write_bytes(b'{"a": 1}')
    hub.push(folder, "me/mine")
    assert pushed.files["config.json"] == b'{"a": 1}'


def test_a_push_without_a_token_is_refused(fake, tmp_path):
    assert "set HF_TOKEN" in fault(ModelError, hub.check_token, "me/mine")
    assert "me/mine: " in fault(ModelError, hub.push, tmp_path, "me/mine")


@pytest.mark.slow
def test_a_pushed_folder_is_a_model_by_name(fake, monkeypatch, tmp_path):
    """To us and to mlx-lm."""
    with Display() as display:
        convert("builtin:tiny-qwen", tmp_path / "made", display, bits=8)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.push(tmp_path / "made", "me/mine")
    folder = resolve("me/mine")
    assert folder.is_relative_to(tmp_path / "cache")
    ours, theirs = load(folder).model, mlx_lm.load("me/mine")[0]
    kept = mlx_lm.load(str(tmp_path / "made"))[0]
    tokens = mx.array([[5, 300, 17, 999, 2, 1024]])
    assert mx.array_equal(ours(tokens), kept(tokens))
    assert mx.array_equal(theirs(tokens), kept(tokens))
