"""A prompt's state: that of the bare target, the same alone and among others."""

import pytest
import torch
from tiny_models import CAUSAL, architectures, build, lossless_pack, make_pair, save_tokenizer

from graftkit.attachment import attached
from graftkit.errors import AttachError, CheckpointError
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.route.centroid import MAX_TOKENS, pooled_states, state_width

PROMPTS = ("Add 1 2", "a", "", "What is the longest of these prompts?", "b", "Add 3 4")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("architecture", architectures())
def test_a_state_is_the_mean_and_the_last_of_the_tokens_directions_behind_a_layer(
    architecture, tokenizer
):
    model = build(architecture)
    ids = torch.tensor([tokenizer.encode("Add 1 2")])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    units = torch.stack([token / token.norm() for token in hidden])
    expected = torch.cat([units.mean(dim=0), units[-1]])
    actual = pooled_states(model, tokenizer, ["Add 1 2"], 1)
    assert actual.shape == (1, state_width(model)) == (1, 64)
    torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", architectures(CAUSAL))
def test_a_state_is_the_same_alone_and_in_any_batch_bit_for_bit(architecture, tokenizer):
    model = build(architecture)
    alone = torch.cat([pooled_states(model, tokenizer, [prompt], 1) for prompt in PROMPTS])
    assert torch.equal(pooled_states(model, tokenizer, PROMPTS, 1), alone)
    assert torch.equal(pooled_states(model, tokenizer, PROMPTS[::-1], 1), alone.flip(0))


@pytest.mark.parametrize("architecture", architectures(CAUSAL))
def test_prompts_that_share_a_pass_keep_their_states_but_for_rounding(architecture, tokenizer):
    model = build(architecture)
    alone = pooled_states(model, tokenizer, PROMPTS, 1)
    together = pooled_states(model, tokenizer, PROMPTS, 1, tokens_together=1000)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_no_layer_behind_the_asked_one_runs_and_no_hook_stays(tokenizer):
    model = build("llama")
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    pooled_states(model, tokenizer, ["a", "b"], 1)
    assert ran == [0, 0]
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_prompt_without_tokens_has_a_state_of_zeros(tokenizer):
    states = pooled_states(build("llama"), tokenizer, ["", "a"], 2)
    assert not states[0].any()
    assert states[1].any()
    assert pooled_states(build("llama"), tokenizer, [], 2).shape == (0, 64)


def test_of_a_prompt_beyond_the_context_the_end_is_read(tokenizer):
    model = build("gpt2")  # learned positions: a longer prompt would be an error
    long = "abcdefgh" * 40
    states = pooled_states(model, tokenizer, [long, long[-64:]], 2)
    assert len(long) > MAX_TOKENS > 64
    assert torch.equal(states[0], states[1])


@pytest.mark.slow
def test_packs_beside_the_model_do_not_change_a_state(tokenizer, tmp_path):
    target, tuned = make_pair(tmp_path, "llama")
    pack = lossless_pack(target, tuned)
    model = load_model(target, torch.float32)
    before = pooled_states(model, tokenizer, PROMPTS, 2)
    with attached(model, pack, mode="side") as attachment:
        attachment.route([0])
        assert torch.equal(pooled_states(model, tokenizer, PROMPTS, 2), before)
        hidden = model(input_ids=torch.tensor([[5, 6]])).logits
    assert not torch.equal(model(input_ids=torch.tensor([[5, 6]])).logits, hidden)
    with attached(model, pack), pytest.raises(AttachError, match="merged"):
        pooled_states(model, tokenizer, PROMPTS, 2)


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_that_the_model_lacks_is_refused(layer, tokenizer):
    with pytest.raises(CheckpointError, match="2 layers"):
        pooled_states(build("llama"), tokenizer, ["a"], layer)


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    save_tokenizer(tmp_path, size=110)
    model = build("llama")
    with pytest.raises(CheckpointError, match="LlamaForCausalLM has 96 embeddings"):
        pooled_states(model, load_tokenizer(tmp_path), ["a" + chr(32 + 100)], 1)


def test_states_that_are_not_finite_are_refused(tokenizer):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="behind layer 1 are not finite"):
        pooled_states(model, tokenizer, ["abc"], 1)
