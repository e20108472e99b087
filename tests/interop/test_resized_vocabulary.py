"""Adapters of a model whose vocabulary was resized before training."""

import json
import warnings

import peft
import pytest
import torch
from interop.adapters import logits
from tiny_models import build

from graftkit.errors import CheckpointMismatchError
from graftkit.fuse import merge_packs
from graftkit.interop import import_lora
from graftkit.models import load_model


def make(folder, architecture, tokens, **options):
    """Target, adapter and the model that merge_and_unload gives."""
    target, adapter = folder / "target", folder / "adapter"
    build(architecture).save_pretrained(target)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(target)
        model.resize_token_embeddings(tokens, mean_resizing=False)
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(adapter, save_embedding_layers=True)
        return target, adapter, model.merge_and_unload().eval()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [101, 90])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama_tied", {}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"]}),
    ],
)
def test_it_is_imported_as_peft_merges_it(tmp_path, architecture, tokens, options):
    target, adapter, merged = make(tmp_path, architecture, tokens, **options)
    pack = import_lora(target, adapter, tmp_path / "x.skillpack")
    merge_packs(target, pack, tmp_path / "merged")
    actual = load_model(tmp_path / "merged")
    assert actual.config.vocab_size == tokens
    if tokens > 90:
        assert torch.allclose(logits(actual), logits(merged), atol=1e-5)
    for name, value in merged.state_dict().items():
        assert torch.allclose(actual.state_dict()[name], value, atol=1e-6), name


def test_factors_of_a_resized_embedding_are_refused_by_the_vocabulary(tmp_path):
    target, adapter, _ = make(tmp_path, "llama", 101, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        CheckpointMismatchError, match=r"vocabulary of 101 tokens.*has 96"
    ) as caught:
        import_lora(target, adapter, tmp_path / "x.skillpack")
    assert "trained on" not in str(caught.value)
    assert not (tmp_path / "x.skillpack").exists()


def test_an_embedding_without_its_head_is_refused_by_the_vocabulary(tmp_path):
    from safetensors.torch import load_file, save_file

    target, adapter, _ = make(tmp_path, "llama", 101)
    file = adapter / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointMismatchError, match=r"vocabulary was resized.*lm_head\.weight"):
        import_lora(target, adapter, tmp_path / "x.skillpack")


def test_another_width_is_another_model(tmp_path):
    target, adapter, _ = make(tmp_path, "llama", 101)
    config = json.loads((target / "config.json").read_text()) | {"hidden_size": 16}
    (target / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig, LlamaForCausalLM

    LlamaForCausalLM(AutoConfig.from_pretrained(target)).save_pretrained(target)
    with pytest.raises(CheckpointMismatchError, match="use the model that the adapter was trained"):
        import_lora(target, adapter, tmp_path / "x.skillpack")
