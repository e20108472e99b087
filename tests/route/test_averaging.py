"""Packs that vote with their next-token distributions."""

import math

import pytest
import torch
from attachment.packs import low_rank_pack
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import inputs, make_pair

from graftkit.attachment import attach, attached
from graftkit.errors import AttachError, ConfigError
from graftkit.models import load_model
from graftkit.route.averaging import Copies, generate_averaged

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    """A model with two packs beside it."""
    target, _ = make_pair(tmp_path_factory.mktemp("skills"), "llama", torch.float32)
    packs = [low_rank_pack(target, seed=seed, scale=0.3) for seed in (1, 2)]
    attachment = attach(load_model(target), packs, mode="side")
    yield attachment
    attachment.detach()


def alone(attachment, pack, ids, mask):
    """Greedy continuations and log-probabilities of one pack."""
    model = attachment.model
    attachment.route([pack])
    tokens = model.generate(input_ids=ids, attention_mask=mask, **OPTIONS)
    with torch.no_grad():
        return tokens, model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)


def averaged(attachment, ids, mask, weights):
    """log p of every next token, teacher-forced: (rows, tokens, vocabulary)."""
    copies = Copies.of(weights)
    attachment.route(copies.packs)
    with torch.no_grad():
        output = attachment.model(input_ids=ids[copies.rows], attention_mask=mask[copies.rows])
    return copies.mix(output.logits)


@pytest.mark.parametrize("pack", [None, 0, 1])
def test_with_weight_one_a_pack_says_what_it_says_alone(skills, pack):
    ids, mask = inputs(rows=3).values()
    tokens, log_p = alone(skills, pack, ids, mask)
    weights = [{pack: 1.0, 1 if pack == 0 else 0: 0.0}] * 3
    found = averaged(skills, ids, mask, weights)
    torch.testing.assert_close(found, log_p)
    assert torch.equal(
        generate_averaged(skills.model, skills, ids, mask, weights, **OPTIONS), tokens
    )


def test_the_average_is_the_weighted_sum_of_the_packs_probabilities(skills):
    ids, mask = inputs(rows=2).values()
    each = {pack: alone(skills, pack, ids, mask)[1].exp() for pack in (None, 0, 1)}
    weights = [{None: 0.2, 0: 0.5, 1: 0.3}, {1: 0.9, None: 0.1}]
    found = averaged(skills, ids, mask, weights)
    for row, shares in enumerate(weights):
        expected = sum(weight * each[pack][row] for pack, weight in shares.items())
        torch.testing.assert_close(found[row].exp(), expected)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, ids.shape[1]))


def test_greedy_tokens_are_the_most_likely_of_the_average_and_rows_keep_apart(skills):
    ids, mask = inputs(rows=3).values()
    weights = [{0: 0.5, 1: 0.5}, {None: 1.0}, {1: 0.4, 0: 0.3, None: 0.3}]
    together = generate_averaged(skills.model, skills, ids, mask, weights, **OPTIONS)
    for row in range(3):
        one = slice(row, row + 1)
        single = generate_averaged(
            skills.model, skills, ids[one], mask[one], weights[one], **OPTIONS
        )
        assert torch.equal(single[0], together[row])
    full = torch.ones_like(together)
    log_p = averaged(skills, together, full, weights)
    length = ids.shape[1]
    assert torch.equal(log_p[:, length - 1 : -1].argmax(-1), together[:, length:])


def test_padding_on_the_left_changes_no_average(skills):
    ids, mask = inputs(rows=1).values()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    padded_mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), mask], 1)
    weights = [{0: 0.5, 1: 0.5}]
    expected = generate_averaged(skills.model, skills, ids, mask, weights, **OPTIONS)
    found = generate_averaged(skills.model, skills, padded, padded_mask, weights, **OPTIONS)
    assert torch.equal(found[:, 3:], expected)


def test_a_drawn_token_is_shared_by_the_copies_and_seeded(skills):
    ids, mask = inputs(rows=2).values()
    weights = [{0: 0.5, 1: 0.3, None: 0.2}, {1: 0.5, None: 0.5}]
    model = skills.model

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate_averaged(model, skills, ids, mask, weights, generator, **OPTIONS)

    assert torch.equal(draw(1), draw(1))
    assert len({tuple(draw(seed).flatten().tolist()) for seed in range(4)}) == 4
    # The first token of many draws is spread as the average says.
    generator = torch.Generator().manual_seed(0)
    log_p = averaged(skills, ids[:1], mask[:1], weights[:1])[0, -1]
    counts = torch.zeros(len(log_p))
    many = 400
    drawn = generate_averaged(
        model,
        skills,
        ids[:1].expand(many, -1),
        mask[:1].expand(many, -1),
        weights[:1] * many,
        generator,
        **{**OPTIONS, "max_new_tokens": 1},
    )
    counts.index_add_(0, drawn[:, -1], torch.ones(many))
    assert (counts / many - log_p.exp()).abs().max() < 4 * math.sqrt(0.25 / many)


@pytest.mark.parametrize(
    "weights",
    [[], [{}], [{0: 0.5}], [{0: 0.7, 1: 0.7}], [{0: 1.5, 1: -0.5}], [{0: float("nan"), 1: 0.5}]],
)
def test_weights_that_are_no_shares_of_one_are_refused(skills, weights):
    ids, mask = inputs(rows=1).values()
    with pytest.raises(ConfigError, match="weights"):
        generate_averaged(skills.model, skills, ids, mask, weights, **OPTIONS)


def test_a_pack_that_is_not_attached_and_beams_are_refused(skills, tmp_path):
    ids, mask = inputs(rows=1).values()
    with pytest.raises(AttachError, match="not attached"):
        generate_averaged(skills.model, skills, ids, mask, [{7: 1.0}], **OPTIONS)
    with pytest.raises(AttachError, match="beam search"):
        generate_averaged(
            skills.model, skills, ids, mask, [{0: 0.5, 1: 0.5}], num_beams=2, **OPTIONS
        )
    target, _ = make_pair(tmp_path, "llama", torch.float32)
    model = load_model(target)
    with (
        attached(model, low_rank_pack(target)) as merged,
        pytest.raises(AttachError, match='mode="side"'),
    ):
        generate_averaged(model, merged, ids, mask, [{0: 1.0}], **OPTIONS)


@settings(database=None)
@given(
    st.lists(st.floats(-80, 80), min_size=3, max_size=3),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_the_average_is_right_far_from_probable_too(shifts, shares):
    total = sum(shares)
    first = shares[0] / total if total else 1.0
    copies = Copies.of([{0: first, 1: 1 - first}])
    logits = torch.tensor([[0.0, *shifts], [*shifts, 0.0]])[: len(copies.rows)]
    if len(copies.rows) == 1 and first == 0:
        logits = torch.tensor([[*shifts, 0.0]])
    exact = logits.double().log_softmax(-1)
    weights = torch.tensor([w for w in (first, 1 - first) if w], dtype=torch.float64)
    expected = (exact + weights.log()[:, None]).logsumexp(0).float()
    torch.testing.assert_close(copies.mix(logits)[0], expected, rtol=1e-4, atol=1e-4)
