"""Whatever is wrong with a model folder is named before anything in it is loaded."""

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import utils as mlx_lm_utils
from model_folders import BUILTIN, CONFIGS, write_model

from mlx_tuner.errors import ModelError
from mlx_tuner.models.folder import INDEX
from mlx_tuner.models.model import load, load_tokenizer
from mlx_tuner.models.model_files import check_model_folder

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", shards=2)


@pytest.fixture
def folder(good, tmp_path):
    """A good folder of two shards to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; a key set to ... is removed."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}, indent=1))


def rewrite(path: Path, change) -> None:
    """Change the tensors of a shard; `change` takes and returns their table."""
    tensors = change(dict(mx.load(str(path))))
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)


def refusal(folder: Path) -> list[str]:
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder)
    texts = [str(fault) for fault in caught.value.faults]
    assert all("\n" not in text for text in texts)
    return texts


def one(folder: Path) -> str:
    [text] = refusal(folder)
    return text.replace(str(folder), "HERE")


# ---- what is taken -----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_model_type_of_ours_is_taken_and_then_loaded_by_mlx_lm(model_type, tmp_path):
    folder = write_model(tmp_path / model_type, model_type, dtype=mx.bfloat16, shards=3)
    files = check_model_folder(folder)
    assert files.config["model_type"] == model_type
    assert [shard.name[:11] for shard in files.shards] == [
        "model-00001",
        "model-00002",
        "model-00003",
    ]
    assert {t.dtype for t in files.tensors.values()} == {"BF16"}
    assert files.notes == ()
    mlx_lm_utils.load_model(folder, lazy=True)


def test_the_built_in_model_is_taken():
    files = check_model_folder(BUILTIN)
    assert files.shards == (BUILTIN / "model.safetensors",)
    assert files.tensors["model.embed_tokens.weight"].shape == (2048, 128)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_that_mlx_lm_quantised_is_taken(bits, good, tmp_path):
    model, config = mlx_lm_utils.load_model(good)
    model, config = mlx_lm_utils.quantize_model(model, config, 32, bits)
    folder = Path(shutil.copytree(good, tmp_path / "quantised"))
    for path in folder.glob("model*"):
        path.unlink()
    mlx_lm_utils.save_model(folder, model)
    mlx_lm_utils.save_config(config, folder / "config.json")
    assert check_model_folder(folder).tensors[Q_PROJ].dtype == "U32"


def test_a_mixture_of_quantised_and_dense_layers_is_taken(tmp_path):
    """mlx-lm leaves a layer dense whose width is not divisible by the group."""
    folder = write_model(tmp_path / "odd", intermediate_size=96)
    model, config = mlx_lm_utils.load_model(folder)
    model, config = mlx_lm_utils.quantize_model(model, config, 64, 4)
    mlx_lm_utils.save_model(folder, model)
    mlx_lm_utils.save_config(config, folder / "config.json")
    assert check_model_folder(folder).tensors["model.layers.0.mlp.down_proj.weight"].dtype == "F32"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe", "qwen3"])
def test_a_folder_that_transformers_wrote_is_taken(model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    config = transformers.AutoConfig.for_model(**CONFIGS[model_type])
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder)
    check_model_folder(folder)
    mlx_lm_utils.load_model(folder, lazy=True)


def test_links_into_the_cache_of_the_hub_are_followed(good, tmp_path):
    blobs = tmp_path / "hub" / "models--qwen--tiny" / "blobs"
    snapshot = blobs.parent / "snapshots" / "c0ffee"
    shared_blobs = tmp_path / "hub" / "blobs"
    for place in (blobs, snapshot, shared_blobs):
        place.mkdir(parents=True)
    for number, path in enumerate(good.iterdir()):
        shutil.copy(path, shared_blobs / str(number))
        (blobs / str(number)).symlink_to(shared_blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert len(check_model_folder(snapshot).shards) == 2


def test_code_in_the_folder_is_noted_and_ignored(folder):
    (folder / "modeling_qwen.py").write_text("raise SystemExit('ran')")
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_qwen.Q"})
    edit(folder / "config.json", _attn_implementation_internal="evil/kernel")
    [note] = check_model_folder(folder).notes
    assert note.endswith(": auto_map, _attn_implementation_internal, modeling_qwen.py")


def test_a_missing_chat_template_is_noted(folder):
    edit(folder / "tokenizer_config.json", chat_template=...)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    [note] = check_model_folder(folder).notes
    assert "no chat template" in note


# ---- config ------------------------------------------------------------------------------------


def test_a_folder_or_config_that_is_not_there_is_named(tmp_path):
    assert one(tmp_path / "none") == "HERE: no such folder"
    assert one(tmp_path) == "HERE/config.json: missing; is this a model folder?"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n"a": 1,\n}', "config.json:3: not valid JSON"),
        (b'{"a": 1', "config.json:1: not valid JSON"),
        (b"", "config.json:1: not valid JSON"),
        (b"[]", "config.json: must hold a JSON object"),
        (b'{"a": "\xff"}', "config.json: not valid JSON: 'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "config.json: not valid JSON"),
        (b'{"a":' * 100_000, "config.json: not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json: not valid JSON"),
        (b"<!DOCTYPE html>", "config.json:1: not valid JSON"),
    ],
)
def test_a_broken_config_is_named_with_its_line(folder, content, said):
    (folder / "config.json").write_bytes(content)
    assert said in one(folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen2 ", None, 7, ["qwen2"], "../qwen2", "os"])
def test_another_kind_of_model_is_refused_with_the_list_of_ours(folder, model_type):
    edit(folder / "config.json", model_type=model_type)
    assert f"config.json: model_type: {model_type!r} is not one of qwen2, qwen2_moe" in one(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_file": "custom.py"}, "model_file: the model needs code from its own folder"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq': quantised by another tool"),
        ({"quantization": {"bits": 4}}, "quantization: must have bits and group_size"),
        ({"quantization": 4}, "quantization: must have bits and group_size"),
        ({"text_config": 1}, "text_config: must be an object"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True is not a whole number"),
        ({"hidden_size": "64"}, "hidden_size: 64 is not a whole number"),
        ({"vocab_size": -1}, "vocab_size: -1 is not a whole number"),
        ({"vocab_size": ...}, "vocab_size: missing"),
        ({"hidden_size": ...}, "no qwen2 model can be built from it"),
        ({"num_attention_heads": 0}, "no qwen2 model can be built from it"),
        ({"rope_scaling": 3}, "no qwen2 model can be built from it"),
        ({"eos_token_id": 5000}, "eos_token_id: token id 5000, but the embedding has 2048 rows"),
    ],
)
def test_a_config_that_no_model_can_be_built_from_is_named(folder, changes, said):
    edit(folder / "config.json", **changes)
    text = one(folder)
    assert text.startswith("HERE/config.json: ")
    assert said in text


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_weights_only_are_refused_with_the_reason(folder, name):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).write_bytes(b"")
    text = one(folder)
    assert f"only pickled weights here ({name}), which can run code" in text


def test_a_folder_without_weights_is_refused(folder):
    for path in folder.glob("model*"):
        path.unlink()
    assert "no model*.safetensors here" in one(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert one(folder).startswith("HERE/model-00002-of-00002.safetensors: missing, though")


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/model-1.safetensors", "", "a/b", "x.bin"]
)
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_PROJ] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert one(folder) == f"HERE/{INDEX}: weight_map: {name!r} is no name of a shard"


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_an_index_of_another_form_is_refused(folder, weight_map):
    edit(folder / INDEX, weight_map=weight_map)
    assert "weight_map: must give each tensor the name of a file" in one(folder)


def test_an_index_that_contradicts_its_shards_is_refused(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q_PROJ] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{Q_PROJ}: is in model-00001-of-00002.safetensors, not in model-00002" in one(folder)


def test_a_shard_that_the_index_does_not_name_is_refused(folder):
    mx.save_safetensors(str(folder / "model-extra.safetensors"), {"a": mx.zeros(1)})
    assert one(folder).startswith(
        "HERE/model-extra.safetensors: not in model.safetensors.index.json"
    )


def test_the_same_tensor_in_two_shards_is_refused(folder):
    rewrite(
        folder / "model-00002-of-00002.safetensors", lambda tensors: tensors | {Q_PROJ: mx.zeros(1)}
    )
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    assert one(folder) == f"HERE/{second}: {Q_PROJ}: is in {first} too"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html></html>", "HTML page"),
        (b"", "truncated"),
        (struct.pack("<Q", 2) + b"{}x", "file not fully covered"),
    ],
)
def test_a_shard_that_is_something_else_is_named(folder, content, said):
    (folder / "model-00001-of-00002.safetensors").write_bytes(content)
    text = one(folder)
    assert text.startswith("HERE/model-00001-of-00002.safetensors: ")
    assert said in text


def test_a_truncated_shard_is_named(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    assert "model-00001-of-00002.safetensors: truncated" in one(folder)


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json"]
)
def test_links_out_of_the_folder_and_pipes_are_refused(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert one(folder) == f"HERE/{name}: a link that leads out of its folder; copy the file"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert one(folder) == f"HERE/{name}: not a regular file"
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    assert f"HERE/{name}: " in refusal(folder)[0].replace(str(folder), "HERE")


# ---- weights -----------------------------------------------------------------------------------


def single(folder: Path, change) -> None:
    """Make the folder's weights one file, changed."""
    shards = sorted(folder.glob("model-*"))
    tensors = {name: value for shard in shards for name, value in mx.load(str(shard)).items()}
    mx.eval(tensors)
    for shard in shards:
        shard.unlink()
    (folder / INDEX).unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), change(tensors))


def test_missing_tensors_and_tensors_of_another_shape_are_named(folder):
    def change(tensors):
        del tensors[Q_PROJ]
        tensors["model.norm.weight"] = mx.zeros(65)
        tensors["model.layers.7.mlp.weight"] = mx.zeros(1)
        return tensors

    single(folder, change)
    assert [text.replace(str(folder), "HERE") for text in refusal(folder)] == [
        f"HERE: {Q_PROJ}: missing; config.json asks for it",
        "HERE: model.layers.7.mlp.weight: not a tensor of the model that config.json describes",
        "HERE: model.norm.weight: shape [65], where config.json asks for [64]",
    ]


def test_only_the_first_ten_wrong_tensors_are_listed(folder):
    edit(folder / "config.json", hidden_size=32)
    texts = refusal(folder)
    assert len(texts) == 11
    assert texts[-1].endswith("more tensors like these")


@pytest.mark.parametrize("dtype", [mx.int64, mx.uint8, mx.uint32, mx.complex64])
def test_weights_of_a_dtype_that_is_not_taken_are_refused(folder, dtype):
    single(folder, lambda tensors: tensors | {Q_PROJ: tensors[Q_PROJ].astype(dtype)})
    said = one(folder)  # an older safetensors does not know complex numbers
    assert "is a dtype that is not taken here" in said or "unknown variant `C64`" in said


def test_a_missing_expert_is_named(tmp_path):
    folder = write_model(tmp_path / "moe", "qwen3_moe")
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(folder / "model.safetensors", lambda t: {n: v for n, v in t.items() if n != expert})
    assert one(folder) == f"HERE: {expert}: missing"


# ---- tokenizer ---------------------------------------------------------------------------------


def test_a_model_without_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert "the model has no tokenizer" in refusal(folder)[0]


def test_a_broken_tokenizer_is_named_with_its_line(folder):
    (folder / "tokenizer.json").write_text("{\n\n!")
    with pytest.raises(ModelError, match=r"tokenizer.json:3: not valid JSON"):
        load(folder)


@pytest.mark.parametrize("where", ["vocabulary", "added", "special"])
def test_token_ids_past_the_embedding_are_refused(folder, where):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if where == "vocabulary":
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = 2048
    elif where == "added":
        tokenizer["added_tokens"].append({"id": 2048, "content": "<|x|>", "special": True} | FLAGS)
    else:
        edit(folder / "tokenizer_config.json", additional_special_tokens=["<|x|>"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder}: tokenizer: token id 2048, but the embedding has 2048 rows"
    )


def test_the_ids_of_a_decoder_are_held_to_the_embedding(folder):
    """Without a tokenizer.json it is what says which tokens were added."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, tokenizer["model"]["merges"])))
    added = {str(token.pop("id")): token for token in tokenizer["added_tokens"]}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    load_tokenizer(folder)
    added["2048"] = {"content": "<|x|>", "special": True} | FLAGS
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(ModelError, match="token id 2048, but the embedding has 2048 rows"):
        load_tokenizer(folder)


def test_token_ids_are_held_to_the_embedding_that_a_text_config_describes(tmp_path):
    folder = write_model(tmp_path / "model", "qwen3_5")
    edit(folder / "tokenizer_config.json", additional_special_tokens=["<|x|>"])
    with pytest.raises(ModelError, match="token id 2048, but the embedding has 2048 rows"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_ids_that_a_config_names_past_the_embedding_are_refused(folder, name, field):
    edit(folder / name, **{field: [5, 2048, 7]})
    where = f"{folder / name}: {field}"
    assert f"{where}: token id 2048, but the embedding has 2048 rows" in refusal(folder)


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def test_a_model_that_cannot_stop_is_refused(folder):
    edit(folder / "config.json", eos_token_id=...)
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", eos_token=...)
    assert "eos_token_id: no end-of-sequence token" in one(folder)


def test_odd_values_in_tokenizer_files_do_no_harm(folder):
    edit(folder / "tokenizer_config.json", added_tokens_decoder=[1])
    edit(folder / "generation_config.json", eos_token_id=[None, "x"], pad_token_id=True)
    check_model_folder(folder)
