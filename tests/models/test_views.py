import pytest
import torch
import transformers
from tiny_models import architectures, build, make_pair

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models import checkpoint_views, find_view, load_model
from graftkit.models.views import _affine, _trace_indices


def tensor_of(model, view):
    return view.tensor(model.state_dict(keep_vars=True)[view.parameter])


@pytest.mark.parametrize("architecture", architectures())
def test_every_tensor_on_disk_has_a_view_that_equals_it_bit_for_bit(tmp_path, architecture):
    target, _ = make_pair(tmp_path, architecture)
    checkpoint, model = Checkpoint.open(target), load_model(target)
    views = checkpoint_views(model)
    for name in checkpoint.tensors:
        actual = tensor_of(model, views[name])
        assert actual.dtype == checkpoint.read(name).dtype
        assert torch.equal(actual, checkpoint.read(name)), name


@pytest.mark.parametrize("architecture", architectures())
def test_copying_a_tuned_checkpoint_into_the_views_makes_the_tuned_model(tmp_path, architecture):
    target, tuned = make_pair(tmp_path, architecture)
    model, checkpoint = load_model(target), Checkpoint.open(tuned)
    views = checkpoint_views(model)
    for name in checkpoint.tensors:
        tensor_of(model, views[name]).copy_(checkpoint.read(name))
    expected = load_model(tuned).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_view_takes_any_tensor_shaped_like_the_parameter():
    model = build("mixtral")
    view = checkpoint_views(model)["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    parameter = model.get_parameter(view.parameter)
    clone = torch.zeros_like(parameter)
    view.tensor(clone).fill_(1)
    assert clone.sum() == view.tensor(parameter).numel()
    assert parameter.abs().sum() > 0
    with pytest.raises(CheckpointError, match="not contiguous"):
        view.tensor(clone.transpose(1, 2).contiguous().transpose(1, 2))


def test_a_tied_parameter_names_every_module_that_owns_it():
    views = checkpoint_views(build("llama_tied"))
    assert views["model.embed_tokens.weight"].modules == ("model.embed_tokens", "lm_head")
    assert views["lm_head.weight"].owners == views["model.embed_tokens.weight"].owners


def test_a_model_without_weights_has_the_same_views():
    with torch.device("meta"):
        empty = transformers.MixtralForCausalLM(build("mixtral").config)
    assert checkpoint_views(empty) == checkpoint_views(build("mixtral"))


@pytest.mark.parametrize(("saved", "loaded"), [("base", "whole"), ("whole", "base")])
def test_a_checkpoint_of_the_base_model_and_of_the_whole_one_fit_each_other(
    tmp_path, saved, loaded
):
    models = {"whole": build("gpt2")}
    models["base"] = models["whole"].transformer
    models[saved].save_pretrained(tmp_path)
    cls = {"base": transformers.GPT2Model, "whole": transformers.GPT2LMHeadModel}[loaded]
    checkpoint, model = Checkpoint.open(tmp_path), cls.from_pretrained(tmp_path)
    for given in (model, models[loaded]):
        views = checkpoint_views(given)
        for name in checkpoint.tensors:
            view = find_view(given, views, name)
            assert torch.equal(tensor_of(given, view), checkpoint.read(name))
        assert find_view(given, views, "stray.weight") is None


def test_names_of_the_first_bert_files_are_still_found():
    model = build("bert")
    name = "bert.embeddings.LayerNorm.gamma"
    view = find_view(model, checkpoint_views(model), name)
    assert view.parameter == "bert.embeddings.LayerNorm.weight"


def test_a_tensor_whose_alias_is_lost_is_traced_by_its_indices():
    model = build("mixtral")
    state = model.state_dict(keep_vars=True)
    views = checkpoint_views(model)
    stacks = {name for name in state if "experts" in name}
    names = {name for name, view in views.items() if view.parameter in stacks}
    for name, (parameter, place) in _trace_indices(model, state, stacks, names).items():
        expected = views[name]
        actual = (parameter, tuple(place.shape), place.stride(), place.storage_offset())
        assert actual == (
            expected.parameter,
            expected.shape,
            expected.stride,
            expected.offset,
        )


def test_places_that_no_strides_describe_have_no_view():
    blank = torch.empty(8, device="meta")
    assert _affine(torch.tensor([0, 2, 4, 6]), blank).stride() == (2,)
    assert _affine(torch.tensor([0, 2, 3, 6]), blank) is None
    assert _affine(torch.tensor([6, 4, 2, 0]), blank) is None
