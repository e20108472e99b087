"""Greedy generation: what decides the tokens, and what is left of it on the model."""

import pytest
import torch
from tiny_models import build, inputs
from transformers import GenerationConfig

from graftkit.models.text import generate_greedy

LENGTH = 8


@pytest.fixture(scope="module")
def model():
    return build("llama", seed=1, scale=0.3)


def argmax_tokens(model, prompt):
    """Continuation by the most likely token of a whole pass at each step."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(LENGTH):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_every_token_is_the_most_likely_one_whatever_the_batch(model):
    long, short = inputs(rows=1, length=9)["input_ids"][0], inputs(rows=1, seed=1)["input_ids"][0]
    prompts = [long.tolist(), short.tolist()]
    output = generate_greedy(model, prompts, LENGTH, eos_token_id=None, pad_token_id=0)
    assert output.tolist() == [argmax_tokens(model, prompt) for prompt in prompts]


def test_an_answer_ends_at_its_end_token_and_is_padded(model):
    prompt = inputs(rows=1)["input_ids"][0].tolist()
    tokens = argmax_tokens(model, prompt)
    end = tokens[3]
    first = tokens.index(end)
    one = generate_greedy(model, [prompt], LENGTH, eos_token_id=end, pad_token_id=0)
    assert one[0].tolist() == tokens[: first + 1]


def test_settings_replace_those_of_the_model_for_one_call(model):
    prompt = inputs(rows=1)["input_ids"][0].tolist()
    options = {"eos_token_id": None, "pad_token_id": 0}
    plain = generate_greedy(model, [prompt], LENGTH, **options)
    own = model.generation_config
    first = int(plain[0, 0])
    model.generation_config = other = GenerationConfig(suppress_tokens=[first])
    try:
        assert int(generate_greedy(model, [prompt], LENGTH, **options)[0, 0]) != first
        replaced = generate_greedy(model, [prompt], LENGTH, settings=own, **options)
        assert torch.equal(replaced, plain)
        assert model.generation_config is other
        assert other.max_new_tokens is None
    finally:
        model.generation_config = own
