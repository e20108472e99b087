"""Targets and tuned models that do not have the same tensors: resized and untied embeddings."""

import pytest
import torch
from attachment.packs import exact_pack
from attachment.test_attach import bytes_of, logits
from tiny_models import VOCABULARY, build, inputs, perturb

from graftkit.attachment import attach, attached
from graftkit.errors import AttachError
from graftkit.models import load_model

NEW_ROWS = 5


def save_pair(folder, architecture, change, dtype=torch.bfloat16):
    """Save a target and a copy of it that `change` and a little noise made of it."""
    model = build(architecture, dtype)
    model.save_pretrained(folder / "target")
    change(model)
    perturb(model, seed=1, scale=0.02)
    model.save_pretrained(folder / "tuned")
    return folder / "target", folder / "tuned"


def untie(model):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.slow
@pytest.mark.parametrize("rows", [VOCABULARY + NEW_ROWS, VOCABULARY - NEW_ROWS])
@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2"])
def test_a_resized_vocabulary_is_merged_and_taken_back(tmp_path, architecture, rows):
    target, tuned = save_pair(
        tmp_path, architecture, lambda model: model.resize_token_embeddings(rows)
    )
    model, pack = load_model(target), exact_pack(target, tuned)
    before, parameters = bytes_of(model), dict(model.named_parameters())
    batch = {name: value.clamp(max=rows - 1) for name, value in inputs().items()}
    plain = logits(model, **batch)
    with attached(model, pack):
        assert bytes_of(model) == bytes_of(load_model(tuned))
        assert model.config.vocab_size == rows
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.out_features, embedding.num_embeddings) == (rows, rows)
        assert (head.weight is embedding.weight) == (architecture != "llama")
        assert torch.equal(logits(model, **batch), logits(load_model(tuned), **batch))
        model.generate(**batch, max_new_tokens=2)
    assert bytes_of(model) == before
    assert model.config.vocab_size == VOCABULARY
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert torch.equal(logits(model, **batch), plain)


def test_a_resized_vocabulary_beside_the_model_is_refused(tmp_path):
    target, tuned = save_pair(
        tmp_path, "llama", lambda model: model.resize_token_embeddings(VOCABULARY + NEW_ROWS)
    )
    model = load_model(target)
    with pytest.raises(AttachError, match='mode="merged"'):
        attach(model, exact_pack(target, tuned), mode="side")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", ["merged", "side"])
def test_a_head_that_training_untied_becomes_a_head_of_its_own(tmp_path, mode):
    target, tuned = save_pair(tmp_path, "llama_tied", untie, torch.float32)
    model, pack = load_model(target), exact_pack(target, tuned)
    before, plain = bytes_of(model), logits(model)
    with attached(model, pack, mode):
        torch.testing.assert_close(logits(model), logits(load_model(tuned)), rtol=1e-4, atol=1e-5)
        if mode == "merged":
            assert bytes_of(model) == bytes_of(load_model(tuned))
            assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert (bytes_of(model), plain.tolist()) == (before, logits(model).tolist())


def test_a_model_without_a_head_has_no_place_for_an_untied_one(tmp_path):
    target, tuned = save_pair(tmp_path, "llama_tied", untie)
    model = load_model(target).model
    with pytest.raises(AttachError, match=r"no place for tensor lm_head\.weight"):
        attach(model, exact_pack(target, tuned))


@pytest.mark.slow
def test_a_tuned_model_in_a_wider_dtype_asks_for_a_target_as_wide(tmp_path):
    model = build("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "target")
    perturb(model.float(), seed=1, scale=0.02)
    model.save_pretrained(tmp_path / "tuned")
    pack = exact_pack(tmp_path / "target", tmp_path / "tuned")
    narrow = load_model(tmp_path / "target")
    before = bytes_of(narrow)
    with pytest.raises(AttachError, match=r"dtype=torch\.float32"):
        attach(narrow, pack)
    assert bytes_of(narrow) == before
    with attached(load_model(tmp_path / "target", torch.float32), pack) as attachment:
        assert bytes_of(attachment.model) == bytes_of(load_model(tmp_path / "tuned"))
