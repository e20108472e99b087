"""What is read is what transformers would load; another folder says what it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, perturb

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models import load_model
from graftkit.pack import pack_delta


@pytest.fixture
def folder(tmp_path):
    model = build("llama_tied")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save_in_shards(folder, seed):
    model = build("llama_tied")
    perturb(model, seed=seed, scale=0.1)
    model.save_pretrained(folder, max_shard_size="20KB")


def assert_read_as_loaded(folder):
    checkpoint, live = Checkpoint.open(folder), load_model(folder).state_dict()
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), live[name]), name


def test_shards_and_index_of_an_earlier_save_do_not_count_beside_a_single_file(folder, tmp_path):
    save_in_shards(tmp_path / "old", seed=5)
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, folder)
    assert (folder / "model.safetensors.index.json").exists()
    assert_read_as_loaded(folder)


def test_an_index_without_its_shards_does_not_count_beside_a_single_file(folder):
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_read_as_loaded(folder)


def test_files_that_no_index_names_do_not_count_beside_shards(tmp_path):
    save_in_shards(tmp_path / "model", seed=5)
    save_file({"stray": torch.ones(2)}, tmp_path / "model/consolidated.safetensors")
    assert_read_as_loaded(tmp_path / "model")


def test_a_file_that_the_config_names_is_the_one_that_is_read(folder):
    other = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "later.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "later.safetensors"})
    )
    assert_read_as_loaded(folder)
    assert torch.equal(
        Checkpoint.open(folder).read("model.norm.weight"), other["model.norm.weight"]
    )


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors"])
def test_an_index_cannot_name_a_file_outside_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a file in this folder"):
        Checkpoint.open(folder)


FOLDERS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "graftkit import-lora"),
    "adapter as a pickle": (["adapter_model.bin"], "graftkit import-lora"),
    "gguf": (["model-Q4_K_M.gguf"], "GGUF"),
    "fsdp": (["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
    "fsdp of a trainer": (["pytorch_model_fsdp_0/__0_0.distcp"], "accelerate merge-weights"),
    "deepspeed": (["global_step12/mp_rank_00_model_states.pt", "latest"], "zero_to_fp32"),
    "run": (["checkpoint-90/model.safetensors", "checkpoint-100/config.json"], "checkpoint-100"),
    "pickle": (["pytorch_model.bin"], "a pickle checkpoint"),
    "tensorflow": (["tf_model.h5"], "TensorFlow"),
    "flax": (["flax_model.msgpack"], "Flax"),
    "diffusers": (["model_index.json", "unet/config.json"], "diffusers"),
    "variant": (["model.fp16.safetensors"], "model.fp16.safetensors, but neither"),
    "original release": (["consolidated.safetensors"], "consolidated.safetensors, but neither"),
    "output of a run": (["tuned/config.json", "tuned/model.safetensors"], "there is one in"),
    "empty": ([], "expected a Hugging Face model directory"),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("side", ["target", "tuned"])
def test_a_folder_without_a_model_says_what_it_is_in_one_line(folder, tmp_path, kind, side):
    files, words = FOLDERS[kind]
    other = tmp_path / "other"
    other.mkdir()
    for name in files:
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_text("{}")
    pair = (other, folder) if side == "target" else (folder, other)
    with pytest.raises(CheckpointError) as caught:
        pack_delta(*pair, recipe="lossless")
    assert words in str(caught.value)
    assert str(other) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_sentence_transformer_names_the_folder_of_its_transformer(folder, tmp_path):
    outer = tmp_path / "sentences"
    shutil.copytree(folder, outer / "0_Transformer")
    modules = [{"path": "0_Transformer"}, {"path": "1_Pooling"}]
    (outer / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"sentence-transformers.*0_Transformer"):
        Checkpoint.open(outer)


def test_a_model_beside_an_adapter_is_refused_since_both_would_be_loaded(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="a model and a PEFT adapter"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(("name", "words"), [("a.gguf", "GGUF"), ("a.safetensors", "name the")])
def test_a_file_in_place_of_a_folder_says_what_to_name(tmp_path, name, words):
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path / name)
