import json
import logging

import pytest
import torch
from tiny_models import build, inputs, make_pair
from transformers import MixtralForCausalLM

from graftkit import merge_packs, pack_delta
from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError
from graftkit.models import empty_model, load_model, load_tokenizer, loading, stream_model
from graftkit.models.loading import load_or_stream


def test_a_model_is_loaded_in_eval_mode_by_the_class_its_config_names(tmp_path):
    target, _ = make_pair(tmp_path, "bert")
    model = load_model(target)
    assert type(model).__name__ == "BertForMaskedLM"
    assert not model.training


def test_weights_keep_the_dtype_of_the_file_whatever_the_config_says(tmp_path):
    target, _ = make_pair(tmp_path, "llama", torch.float32)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_model(target).dtype == torch.float32
    assert load_model(target, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_config_without_architectures_loads_as_a_causal_model(tmp_path):
    target, _ = make_pair(tmp_path, "llama")
    config = json.loads((target / "config.json").read_text())
    del config["architectures"]
    (target / "config.json").write_text(json.dumps(config))
    assert type(load_model(target)).__name__ == "LlamaForCausalLM"
    assert type(empty_model(target)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "mixtral", "gpt_oss"])
def test_a_streamed_model_gives_the_same_logits_as_the_whole_one(tmp_path, architecture):
    target, _ = make_pair(tmp_path, architecture)
    streamed = stream_model(Checkpoint.open(target), tmp_path / "offload")
    assert all(parameter.is_meta for parameter in streamed.parameters())
    with torch.no_grad():
        assert torch.equal(streamed(**inputs()).logits, load_model(target)(**inputs()).logits)


def test_an_empty_model_holds_no_weights(tmp_path):
    target, _ = make_pair(tmp_path, "mixtral")
    assert all(parameter.is_meta for parameter in empty_model(target).parameters())


@pytest.fixture
def constructions(monkeypatch):
    """Every configuration that a MixtralForCausalLM is built from."""
    configs = []
    construct = MixtralForCausalLM.__init__

    def recorded(self, config, **options):
        configs.append(config)
        construct(self, config, **options)

    monkeypatch.setattr(MixtralForCausalLM, "__init__", recorded)
    loading._build_empty_model.cache_clear()
    return configs


@pytest.mark.slow
def test_packing_and_merging_build_one_empty_model_where_the_configurations_are_equal(
    tmp_path, constructions
):
    target, tuned = make_pair(tmp_path, "mixtral")
    constructions.clear()
    pack = pack_delta(target, tuned, budget="80%", workers=1)
    merge_packs(target, [pack], tmp_path / "merged")
    assert len(constructions) == 1


@pytest.mark.slow
def test_packing_builds_one_empty_model_for_each_of_two_configurations(tmp_path, constructions):
    target, tuned = make_pair(tmp_path, "mixtral")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "router_aux_loss_coef": 0.5}))
    constructions.clear()
    pack_delta(target, tuned, budget="80%", workers=1)
    assert len(constructions) == 2


def test_a_changed_configuration_gives_another_empty_model(tmp_path):
    target, _ = make_pair(tmp_path, "llama")
    first = empty_model(target)
    assert empty_model(target) is first
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    assert empty_model(target).get_input_embeddings().weight.shape[0] == 7


def test_loading_is_silent_and_leaves_the_verbosity_of_transformers_alone(tmp_path, capfd):
    import transformers

    target, _ = make_pair(tmp_path, "gpt2")
    before = transformers.utils.logging.get_verbosity(), logging.getLogger("accelerate").level
    capfd.readouterr()
    stream_model(target, tmp_path / "offload")
    assert capfd.readouterr() == ("", "")
    after = transformers.utils.logging.get_verbosity(), logging.getLogger("accelerate").level
    assert after == before


def test_a_checkpoint_that_lacks_a_tensor_of_its_class_is_refused_by_name(tmp_path):
    build("llama").model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"model_type": "no_such_type"}, {"model_type": "llama", "hidden_size": "wide"}]
)
def test_a_config_that_transformers_cannot_use_is_one_line(tmp_path, config):
    target, _ = make_pair(tmp_path, "llama")
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot load") as caught:
        load_model(target)
    assert "\n" not in str(caught.value)


def test_an_architecture_without_a_class_is_refused(tmp_path):
    target, _ = make_pair(tmp_path, "llama")
    (target / "config.json").write_text(
        json.dumps({"model_type": "rag", "architectures": ["Grafted"], "vocab_size": 8})
    )
    with pytest.raises(CheckpointError):
        load_model(target)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    target, _ = make_pair(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_tokenizer(target)


def test_models_that_fit_are_loaded_and_larger_ones_streamed(tmp_path, monkeypatch):
    target, _ = make_pair(tmp_path, "llama")
    checkpoint = Checkpoint.open(target)
    nbytes = load_model(target).dtype.itemsize * checkpoint.parameters
    monkeypatch.setattr(loading, "_RESIDENT_BYTES", 2 * nbytes)
    monkeypatch.setattr(loading, "_RESIDENT_BYTES_PER_WEIGHT", 0)
    for models, is_streamed in ((1, False), (2, False), (3, True)):
        model = load_or_stream(checkpoint, tmp_path / f"offload-{models}", models)
        assert any(value.is_meta for value in model.parameters()) == is_streamed
