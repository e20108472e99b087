"""Packs that vote with their next-token distributions."""

import pytest
import torch
from attachment.packs import low_rank_pack
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import inputs, make_pair
from transformers import GenerationConfig

from graftkit.attachment import attach, attached
from graftkit.errors import AttachError, ConfigError
from graftkit.library.answers import RowCopies, generate_averaged
from graftkit.models import load_model
from graftkit.models.text import generate_greedy

LENGTH = 6
OPTIONS = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """A model with two packs beside it."""
    target, _ = make_pair(tmp_path_factory.mktemp("skills"), "llama", torch.float32)
    packs = [low_rank_pack(target, seed=seed, scale=0.3) for seed in (1, 2)]
    attachment = attach(load_model(target), packs, mode="side")
    yield attachment
    attachment.detach()


def prompts_of(ids):
    return ids.tolist()


def alone(attachment, pack, ids):
    """Greedy continuations and log-probabilities of one pack."""
    model = attachment.model
    attachment.route([pack])
    tokens = generate_greedy(model, prompts_of(ids), LENGTH, **OPTIONS)
    with torch.no_grad():
        return tokens, model(input_ids=ids).logits.log_softmax(-1)


def averaged(attachment, ids, weights):
    """log p of every next token, teacher-forced: (rows, tokens, vocabulary)."""
    copies = RowCopies.of(weights)
    attachment.route(copies.packs)
    with torch.no_grad():
        output = attachment.model(input_ids=ids[copies.rows])
    return copies.average(output.logits)


@pytest.mark.parametrize("pack", [None, 0, 1])
def test_with_weight_one_a_pack_says_what_it_says_alone(skills, pack):
    ids = inputs(rows=3)["input_ids"]
    tokens, log_p = alone(skills, pack, ids)
    weights = [{pack: 1.0, 1 if pack == 0 else 0: 0.0}] * 3
    torch.testing.assert_close(averaged(skills, ids, weights), log_p)
    generated = generate_averaged(skills, prompts_of(ids), weights, LENGTH, **OPTIONS)
    assert torch.equal(generated, tokens)


def test_the_average_is_the_weighted_sum_of_the_packs_probabilities(skills):
    ids = inputs(rows=2)["input_ids"]
    each = {pack: alone(skills, pack, ids)[1].exp() for pack in (None, 0, 1)}
    weights = [{None: 0.2, 0: 0.5, 1: 0.3}, {1: 0.9, None: 0.1}]
    average = averaged(skills, ids, weights)
    for row, shares in enumerate(weights):
        expected = sum(weight * each[pack][row] for pack, weight in shares.items())
        torch.testing.assert_close(average[row].exp(), expected)
    torch.testing.assert_close(average.exp().sum(-1), torch.ones(2, ids.shape[1]))


def test_greedy_tokens_are_the_most_likely_of_the_average_and_rows_keep_apart(skills):
    ids = inputs(rows=3)["input_ids"]
    prompts = prompts_of(ids)
    weights = [{0: 0.5, 1: 0.5}, {None: 1.0}, {1: 0.4, 0: 0.3, None: 0.3}]
    together = generate_averaged(skills, prompts, weights, LENGTH, **OPTIONS)
    for row in range(3):
        one = slice(row, row + 1)
        single = generate_averaged(skills, prompts[one], weights[one], LENGTH, **OPTIONS)
        assert torch.equal(single[0], together[row])
    log_p = averaged(skills, torch.cat([ids, together], dim=1), weights)
    length = ids.shape[1]
    assert torch.equal(log_p[:, length - 1 : -1].argmax(-1), together)


def test_padding_on_the_left_changes_no_average(skills):
    long, short = inputs(rows=1, length=10), inputs(rows=1)
    prompts = [*prompts_of(long["input_ids"]), *prompts_of(short["input_ids"])]
    weights = [{0: 0.5, 1: 0.5}] * 2
    expected = generate_averaged(skills, prompts[1:], weights[1:], LENGTH, **OPTIONS)
    padded = generate_averaged(skills, prompts, weights, LENGTH, **OPTIONS)
    assert torch.equal(padded[1:], expected)


@pytest.mark.parametrize(
    "weights",
    [[], [{}], [{0: 0.5}], [{0: 0.7, 1: 0.7}], [{0: 1.5, 1: -0.5}], [{0: float("nan"), 1: 0.5}]],
)
def test_weights_that_are_no_shares_of_one_are_refused(skills, weights):
    prompts = prompts_of(inputs(rows=1)["input_ids"])
    with pytest.raises(ConfigError, match="weights"):
        generate_averaged(skills, prompts, weights, LENGTH, **OPTIONS)


def test_a_pack_that_is_not_attached_and_beams_are_refused(skills, tmp_path):
    prompts = prompts_of(inputs(rows=1)["input_ids"])
    with pytest.raises(AttachError, match="not attached"):
        generate_averaged(skills, prompts, [{7: 1.0}], LENGTH, **OPTIONS)
    beams = GenerationConfig(num_beams=2)
    with pytest.raises(AttachError, match="beam search"):
        generate_averaged(skills, prompts, [{0: 0.5, 1: 0.5}], LENGTH, settings=beams, **OPTIONS)
    target, _ = make_pair(tmp_path, "llama", torch.float32)
    model = load_model(target)
    with (
        attached(model, low_rank_pack(target)) as merged,
        pytest.raises(AttachError, match='mode="side"'),
    ):
        generate_averaged(merged, prompts, [{0: 1.0}], LENGTH, **OPTIONS)


@settings(database=None)
@given(
    st.lists(st.floats(-80, 80), min_size=3, max_size=3),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_the_average_is_right_far_from_probable_too(shifts, shares):
    total = sum(shares)
    first = shares[0] / total if total else 1.0
    copies = RowCopies.of([{0: first, 1: 1 - first}])
    logits = torch.tensor([[0.0, *shifts], [*shifts, 0.0]])[: len(copies.rows)]
    if len(copies.rows) == 1 and first == 0:
        logits = torch.tensor([[*shifts, 0.0]])
    exact = logits.double().log_softmax(-1)
    weights = torch.tensor([w for w in (first, 1 - first) if w], dtype=torch.float64)
    expected = (exact + weights.log()[:, None]).logsumexp(0).float()
    torch.testing.assert_close(copies.average(logits)[0], expected, rtol=1e-4, atol=1e-4)
