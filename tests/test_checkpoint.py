import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import architectures, make_pair

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models import load_model
from graftkit.models.views import CheckpointWriter


def tensors(folder):
    actual = {}
    for file in sorted(folder.glob("*.safetensors")):
        actual |= load_file(file)
    return actual


@pytest.mark.parametrize("architecture", architectures())
def test_an_untouched_model_is_written_as_it_was_read(tmp_path, architecture):
    folder, _ = make_pair(tmp_path, architecture)
    origin = Checkpoint.open(folder)
    model = load_model(origin, torch.float32)
    CheckpointWriter(model, origin).write(dict(model.state_dict()), tmp_path / "written")
    before, after = tensors(origin.path), tensors(tmp_path / "written")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    assert Checkpoint.open(tmp_path / "written").side_files() == origin.side_files()


def test_what_was_learned_is_in_the_file_and_an_older_folder_is_replaced(tmp_path):
    folder, _ = make_pair(tmp_path, "llama")
    origin = Checkpoint.open(folder)
    model = load_model(origin, torch.float32)
    writer = CheckpointWriter(model, origin)
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "old").touch()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    writer.write(dict(model.state_dict()), tmp_path / "written")
    before, after = tensors(origin.path), tensors(tmp_path / "written")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    assert not (tmp_path / "written" / "old").exists()


def test_a_tensor_that_the_model_lacks_is_refused_and_nothing_is_written(tmp_path):
    folder, _ = make_pair(tmp_path, "llama")
    model = load_model(folder, torch.float32)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    actual = tensors(other)
    from safetensors.torch import save_file

    for file in other.glob("*.safetensors*"):
        file.unlink()
    save_file({**actual, "strange.weight": torch.zeros(2)}, other / "model.safetensors")
    origin = Checkpoint.open(other)
    with pytest.raises(CheckpointError, match=r"strange\.weight is no part of one parameter"):
        CheckpointWriter(model, origin).write(dict(model.state_dict()), tmp_path / "written")
    assert not (tmp_path / "written").exists()
