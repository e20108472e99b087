"""What every merge rule promises, on any deltas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils as peft

from graftkit.fuse import methods
from graftkit.fuse.methods import METHODS, find_method

SHAPES = [(1,), (3,), (16,), (5, 7), (2, 3, 4)]


def draw(shape, count, seed, scale=1.0):
    """Seeded deltas of a few sizes, some entries zero."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for index in range(count):
        delta = torch.randn(shape, generator=generator) * scale * (1 + index)
        deltas.append(delta * (torch.rand(shape, generator=generator) > 0.2))
    return deltas


@st.composite
def families(draw_from, least=1):
    """Deltas, weights and keys."""
    shape = draw_from(st.sampled_from(SHAPES))
    count = draw_from(st.integers(least, 4))
    deltas = draw(shape, count, draw_from(st.integers(0, 10**6)))
    weights = draw_from(st.lists(st.floats(0.1, 2), min_size=count, max_size=count))
    return deltas, weights, [f"pack {index}/w" for index in range(count)]


def merged(method, case, **values):
    return find_method(method, values).merge(*case)


every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@given(families(2), st.randoms())
@settings(max_examples=25)
def test_the_order_of_packs_does_not_matter(method, case, random):
    order = list(range(len(case[0])))
    random.shuffle(order)
    shuffled = tuple([part[i] for i in order] for part in case)
    torch.testing.assert_close(merged(method, case), merged(method, shuffled), rtol=1e-4, atol=1e-5)


KEEPING = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 1},
    "dare": {"density": 1},
    "dare_ties": {"density": 1},
    "sce": {"select": 1},
}


@pytest.mark.parametrize("method", KEEPING)
@given(families())
@settings(max_examples=25)
def test_one_delta_of_weight_1_stays_what_it_is(method, case):
    deltas, _, keys = case
    result = merged(method, (deltas[:1], [1.0], keys[:1]), **KEEPING[method])
    assert torch.equal(result, deltas[0])
    assert find_method(method, KEEPING[method]).keeps(1.0)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pcb"])
@pytest.mark.parametrize("factor", [2.0**-20, 0.5, -1.0, 8.0])
@given(families())
@settings(max_examples=15)
def test_merging_scaled_deltas_gives_the_scaled_merge(method, factor, case):
    deltas, weights, keys = case
    scaled = merged(method, ([factor * delta for delta in deltas], weights, keys))
    assert torch.equal(scaled, factor * merged(method, case))


@given(families(), st.floats(0.05, 1))
def test_equal_packs_average_to_themselves(case, share):
    [delta, *_], keys = case[0], case[2]
    twice = ([delta] * 2, [1.0, 1.0], keys[:1] * 2)
    assert torch.equal(merged("linear", twice), delta)
    assert torch.equal(merged("sce", twice, select=share), delta)
    assert torch.equal(merged("ties", twice, density=share), methods.trim(delta, share))


def test_equal_packs_do_not_make_sce_forget_everything_with_a_third_one():
    one, other = draw((40,), 2, 0)
    result = methods.sce([one, one, other], [1.0] * 3, 0.1)
    assert float(result.norm()) > 0.5 * float(one.norm())


@given(families())
def test_a_delta_of_zeros_merges_to_zeros(case):
    zeros = [torch.zeros_like(delta) for delta in case[0]]
    for method in METHODS:
        assert not merged(method, (zeros, *case[1:])).any()


@every_method
@given(families())
@settings(max_examples=15)
def test_merging_leaves_its_inputs_alone_and_gives_finite_entries(method, case):
    before = [delta.clone() for delta in case[0]]
    assert merged(method, case).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(case[0], before, strict=True))


@given(families(), st.floats(0.01, 1))
def test_trimming_keeps_the_share_asked_of_the_largest_entries(case, density):
    delta = case[0][0]
    trimmed = methods.trim(delta, density)
    count = max(1, int(density * delta.numel()))
    assert int(trimmed.count_nonzero()) == min(count, int(delta.count_nonzero()))
    dropped = delta[trimmed == 0].abs()
    if trimmed.any() and dropped.numel():
        assert float(dropped.max()) <= float(trimmed[trimmed != 0].abs().min())


def test_of_equal_entries_trimming_keeps_the_first():
    assert methods.trim(torch.ones(4), 0.5).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("shape", [(4,), (30, 10)])
def test_dropping_keeps_the_mean_over_seeds_also_of_a_few_entries(shape):
    [delta] = draw(shape, 1, 1)
    draws = 2000
    total = sum(methods.drop(delta, 0.3, f"{seed}/pack/w") for seed in range(draws))
    deviation = delta.abs() * math.sqrt((1 / 0.3 - 1) / draws)
    assert ((total / draws - delta).abs() <= 5 * deviation).all()


def test_a_draw_depends_on_seed_pack_and_tensor_alone():
    deltas = draw((50, 4), 2, 3)
    case = (deltas, [1.0, 1.0], ["a/w", "b/w"])
    alone = merged("dare", (deltas[:1], [1.0], ["a/w"]))
    other = merged("dare", (deltas[1:], [1.0], ["b/w"]))
    torch.testing.assert_close(merged("dare", case), alone + other)
    again = merged("dare", (deltas[:1], [1.0], ["a/v"]))
    assert not torch.equal(again, alone)
    assert not torch.equal(merged("dare", (deltas[:1], [1.0], ["a/w"]), seed=1), alone)


def test_opposite_entries_of_equal_weight_agree_with_nobody():
    delta = torch.tensor([1.0, -2.0])
    assert methods.agreeing_mean([delta, -delta], [1.0, 1.0]).tolist() == [0, 0]


def test_the_elected_sign_is_that_of_the_weighted_sum():
    a, b = torch.tensor([1.0, 1.0]), torch.tensor([-3.0, -0.5])
    assert methods.agreeing_mean([a, b], [1.0, 1.0]).tolist() == [-3.0, 1.0]
    assert methods.agreeing_mean([a, b], [4.0, 1.0]).tolist() == [1.0, 1.0]


def test_sce_weighs_packs_by_their_energy_where_they_differ_most():
    # Two entries vary; at one half the one that varies most sets the weights, 1 : 9.
    a, b = torch.tensor([5.0, 1.0, 1.0]), torch.tensor([5.0, 2.0, 3.0])
    result = methods.sce([a, b], [1.0, 1.0], 0.5)
    torch.testing.assert_close(result, 0.1 * a + 0.9 * b)


def test_weights_of_sce_multiply_those_it_computes():
    a, b = torch.tensor([5.0, 1.0, 1.0]), torch.tensor([5.0, 2.0, 3.0])
    result = methods.sce([a, b], [9.0, 1.0], 0.5)
    torch.testing.assert_close(result, 0.5 * a + 0.5 * b)


def test_pcb_keeps_entries_that_are_large_and_agreed_on():
    torch.manual_seed(0)
    a = 0.01 * torch.randn(100)
    b = 0.01 * torch.randn(100)
    a[0], b[0] = 1.0, 0.9  # both
    a[1], b[1] = 1.0, -1.0  # opposed
    result = methods.pcb([a, b], [1.0, 1.0], 0.05)
    assert float(result[0]) > 0.8
    assert float(result[1]) == 0
    assert int(result.count_nonzero()) <= 10


def test_weights_of_pcb_multiply_the_deltas():
    deltas = draw((20, 5), 2, 5)
    once, twice = (methods.pcb(deltas, [w, w], 0.1) for w in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)


def test_halving_all_weights_halves_peft_s_ties_and_leaves_ours():
    """PEFT divides by the count of agreeing entries, we by the sum of their weights."""
    deltas = draw((20, 5), 3, 2)
    theirs, ours = (
        [rule(deltas, torch.tensor([w] * 3), 0.4) for w in (1.0, 0.5)]
        for rule in (peft.ties, lambda d, w, s: methods.ties(d, w.tolist(), s))
    )
    torch.testing.assert_close(theirs[1], theirs[0] / 2)
    torch.testing.assert_close(ours[1], ours[0])
    torch.testing.assert_close(ours[0], theirs[0])


def test_peft_elects_signs_without_weights_and_we_with():
    deltas = [torch.tensor([1.0]), torch.tensor([-3.0])]
    weights = [4.0, 1.0]
    with pytest.warns(UserWarning, match="no pruning"):
        assert peft.ties(deltas, torch.tensor(weights), 1.0).tolist() == [-3.0]
    assert methods.ties(deltas, weights, 1.0).tolist() == [1.0]


def test_the_weighted_sum_is_peft_s():
    deltas, weights = draw((20, 5), 3, 4), [1.0, -0.5, 0.25]
    theirs = peft.task_arithmetic(deltas, torch.tensor(weights))
    torch.testing.assert_close(methods.task_arithmetic(deltas, weights), theirs)
