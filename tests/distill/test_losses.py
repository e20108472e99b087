import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graftkit.distill.transfer.losses import (
    distribution_loss,
    hidden_loss,
    layer_pairs,
    make_projections,
    pool,
)
from graftkit.errors import ConfigError

KINDS = ["cosine", "mse", "gram"]
DIRECTIONS = ["forward", "reverse"]


def listed(logits, k, temperature=1.0):
    """The k likeliest tokens of a distribution, and the rest, as a source stores them."""
    log_probs = (logits / temperature).log_softmax(dim=1)
    likely, ids = log_probs.topk(k, dim=1)
    rest = log_probs.scatter(1, ids, -math.inf).logsumexp(dim=1)
    return ids, likely, rest


def draw(n=6, vocabulary=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn((n, vocabulary), generator=generator, dtype=dtype)


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_target_that_says_the_same_has_no_loss(divergence, temperature):
    logits = draw()
    loss = distribution_loss(logits, *listed(logits, 4, temperature), divergence, temperature)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_how_the_rest_is_shared_among_its_tokens_does_not_matter(divergence):
    source = draw()
    ids, log_probs, log_rest = listed(source, 4)
    target = source.clone()
    others = torch.ones_like(source, dtype=torch.bool).scatter(1, ids, False)
    total = source[others].reshape(6, 8).logsumexp(dim=1, keepdim=True)
    target[others] = (total - math.log(8)).expand(6, 8).reshape(-1)
    loss = distribution_loss(target, ids, log_probs, log_rest, divergence)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 11),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    divergence=st.sampled_from(DIRECTIONS),
)
def test_it_is_never_below_zero_nor_above_the_divergence_of_single_tokens(
    seed, k, temperature, divergence
):
    source, target = draw(seed=seed), draw(seed=seed + 1)
    loss = distribution_loss(target, *listed(source, k, temperature), divergence, temperature)
    p, q = ((logits / temperature).log_softmax(dim=1) for logits in (source, target))
    if divergence == "reverse":
        p, q = q, p
    whole = temperature**2 * (p.exp() * (p - q)).sum(dim=1)
    assert (loss >= -1e-12).all()
    assert (loss <= whole + 1e-12).all()
    if k == 11:  # the rest is one token
        torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_gradient_is_that_of_finite_differences(divergence, temperature):
    target = draw(n=3, vocabulary=7).requires_grad_()
    source = listed(draw(n=3, vocabulary=7, seed=5), 3, temperature)
    assert torch.autograd.gradcheck(
        lambda logits: distribution_loss(logits, *source, divergence, temperature), target
    )


def test_the_temperature_leaves_the_size_of_small_gradients():
    target = draw().mul(0.01).requires_grad_()
    sizes = []
    for temperature in (1.0, 4.0):
        source = listed(draw(seed=3) * 0.01, 11, temperature)
        loss = distribution_loss(target, *source, "forward", temperature).sum()
        sizes.append(float(torch.autograd.grad(loss, target)[0].norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_a_certain_token_counts_with_its_cross_entropy(divergence):
    logits, ids = draw().requires_grad_(), torch.tensor([[3], [0], [1], [2], [11], [5]])
    loss = distribution_loss(
        logits, ids, torch.zeros(6, 1), torch.full((6,), -math.inf), divergence
    )
    expected = nn.functional.cross_entropy(logits, ids[:, 0], reduction="none")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each.sum(), logits)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_repeated_ids_of_a_short_list_count_once(divergence):
    logits, (ids, log_probs, log_rest) = draw(), listed(draw(seed=1), 2)
    padded = torch.cat([ids, ids[:, :1], ids[:, :1]], dim=1)
    nothing = torch.full((6, 2), -math.inf, dtype=log_probs.dtype)
    loss = distribution_loss(
        logits, padded, torch.cat([log_probs, nothing], dim=1), log_rest, divergence
    )
    torch.testing.assert_close(
        loss, distribution_loss(logits, ids, log_probs, log_rest, divergence)
    )


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_half_precision_logits_of_any_size_give_finite_losses_and_gradients(divergence, scale):
    logits = (draw(dtype=torch.float32) * scale).bfloat16().requires_grad_()
    source = listed(draw(seed=1, dtype=torch.float32) * scale, 4)
    loss = distribution_loss(logits, *source, divergence)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_a_list_of_the_whole_vocabulary_leaves_a_finite_gradient():
    logits = draw(vocabulary=4).requires_grad_()
    loss = distribution_loss(logits, *listed(draw(vocabulary=4, seed=2), 4))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_no_tokens_give_no_losses():
    empty = distribution_loss(
        torch.zeros(0, 9), torch.zeros(0, 3).long(), torch.zeros(0, 3), torch.zeros(0)
    )
    assert empty.shape == (0,)


def test_pooled_states_are_means_over_spans_and_zero_where_there_is_none():
    states = torch.arange(12.0).reshape(1, 6, 2)
    index = torch.tensor([[-1, 0, 0, 2, 2, -1]])
    assert pool(states, index, 4).tolist() == [[[3.0, 4.0], [0.0, 0.0], [7.0, 8.0], [0.0, 0.0]]]


def pair(seed=0, widths=(5, 5), spans=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    target, source = (torch.randn((3, spans, w), generator=generator).to(dtype) for w in widths)
    mask = torch.arange(spans) < torch.tensor([[spans], [2], [0]])
    return target, source, mask


@pytest.mark.parametrize("kind", KINDS)
def test_equal_states_have_no_distance(kind):
    target, _, mask = pair()
    loss = hidden_loss(target, target, mask, kind)
    torch.testing.assert_close(loss, torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_spans_has_no_distance_and_padding_changes_nothing(kind):
    target, source, mask = pair()
    loss = hidden_loss(target, source, mask, kind)
    assert (loss > 0).tolist() == [True, True, False]
    short = hidden_loss(target[1:2, :2], source[1:2, :2], mask[1:2, :2], kind)
    torch.testing.assert_close(loss[1:2], short)
    target[~mask], source[~mask] = 1e3, -1e3
    torch.testing.assert_close(hidden_loss(target, source, mask, kind), loss)


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_that_of_finite_differences_too(kind):
    target, source, mask = pair()
    target = target.requires_grad_()
    loss = hidden_loss(target, source, mask, kind).sum()
    (gradient,) = torch.autograd.grad(loss, target)
    with torch.no_grad():
        step = 1e-2 * gradient / gradient.norm()
        up, down = (hidden_loss(target + s, source, mask, kind).sum() for s in (step, -step))
    assert float(up - down) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_how_large_states_are_does_not_matter(kind):
    target, source, mask = pair()
    loss = hidden_loss(target, source, mask, kind)
    torch.testing.assert_close(hidden_loss(target * 50, source / 7, mask, kind), loss)


def test_gram_compares_states_of_any_two_widths_and_nothing_else_does():
    target, source, mask = pair(widths=(5, 9))
    assert hidden_loss(target, source, mask, "gram")[0] > 0
    with pytest.raises(ConfigError, match="5 wide and the source's 9"):
        hidden_loss(target, source, mask, "cosine")


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_a_projection_learns_what_maps_one_width_to_the_other(kind):
    target, source, mask = pair(widths=(9, 5))
    (projection,) = make_projections(1, 9, 5, seed=0)
    optimizer = torch.optim.Adam(projection.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = hidden_loss(target, source, mask, kind, projection).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_projections_follow_the_seed_and_are_left_out_for_equal_widths():
    first, same, other = (make_projections(2, 6, 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[1].weight, same[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)
    assert make_projections(2, 6, 6, seed=1) is None


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_states_give_finite_distances_in_single_precision(kind):
    target, source, mask = pair(dtype=torch.bfloat16)
    target[0, 0] = 0.0
    target = (target * 100).requires_grad_()
    loss = hidden_loss(target, source, mask, kind)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert target.grad.isfinite().all()


@given(source=st.integers(1, 100), target=st.integers(1, 100))
def test_layers_are_paired_by_depth_and_the_last_with_the_last(source, target):
    pairs = layer_pairs(source, target)
    assert [layer for _, layer in pairs] == list(range(1, target + 1))
    assert pairs[-1] == (source, target)
    assert all(1 <= before[0] <= after[0] for before, after in pairwise(pairs))
    if source >= target:
        assert all(abs(s - t * source / target) <= 0.5 + 1e-9 for s, t in pairs)
