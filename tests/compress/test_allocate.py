import itertools

import numpy as np
import pytest
import torch
from compress.test_quantize import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.compress.allocate import (
    DENSE_BITS,
    FACTOR_BITS,
    GRID_NOISE,
    MatrixFacts,
    Point,
    allocate,
    candidate_points,
    lower_hull,
    waterfilled_tiers,
    zero_point_of,
)
from graftkit.compress.codecs import (
    LowRankTiers,
    Statistics,
    Zero,
    decode_matrix,
    encode_matrix,
    payload_bytes,
)
from graftkit.compress.lowrank import eigenbasis
from graftkit.compress.quantize import quantize_rows


def facts_of(delta, kept=()):
    energies = eigenbasis(delta, None)[0].double().numpy()
    shape = (delta.shape[0], delta.shape[1])
    return MatrixFacts(shape, 1, energies, energies, 1.0, kept, 1 / float(energies.sum()))


def spectrum_facts(rows, columns, decay, kept=()):
    energies = np.arange(1, min(rows, columns) + 1, dtype=np.float64) ** -decay
    return MatrixFacts((rows, columns), 1, energies, energies, 0.7, kept, 1.0)


FACTS = st.builds(
    spectrum_facts,
    st.integers(2, 400),
    st.integers(2, 400),
    st.floats(0, 4),
    st.sampled_from([(), ((0.01, 0.2), (0.1, 0.6))]),
)
POINTS = st.lists(
    st.builds(
        Point, st.integers(0, 1000), st.integers(0, 10**6).map(lambda n: n / 1e5), st.just(Zero())
    ),
    max_size=12,
).map(lambda points: [Point(0, 10.0, Zero()), *points])


def error_of(points):
    return sum(point.error for point in points)


@pytest.mark.parametrize("bits", sorted(GRID_NOISE))
def test_the_noise_of_a_grid_is_what_unit_gaussians_measure(bits):
    weight = gaussian(2000, 128)
    noise = (quantize_rows(weight, bits, None).dequantize() - weight).square().mean()
    assert float(noise) == pytest.approx(GRID_NOISE[bits], rel=0.15)


def test_every_width_on_the_menu_has_its_noise():
    assert set(DENSE_BITS) | set(FACTOR_BITS) == set(GRID_NOISE)
    noise = [GRID_NOISE[bits] for bits in sorted(GRID_NOISE)]
    assert noise == sorted(noise, reverse=True)


@given(POINTS)
def test_a_hull_is_convex_and_lies_below_every_point(points):
    hull = lower_hull(points)
    sizes = [point.nbytes for point in hull]
    assert sizes == sorted(set(sizes))
    assert hull[0].nbytes == 0
    slopes = [(a.error - b.error) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(hull)]
    assert all(slope > 0 for slope in slopes)
    assert all(a >= b for a, b in itertools.pairwise(slopes))
    errors = np.interp([p.nbytes for p in points], sizes, [p.error for p in hull])
    assert all(p.error >= e - 1e-9 for p, e in zip(points, errors, strict=True))


@given(st.lists(POINTS.map(lower_hull), max_size=6), st.integers(0, 4000), st.integers(0, 500))
def test_a_plan_keeps_its_budget_and_more_budget_never_errs_more(hulls, budget, more):
    plans = [allocate(hulls, room) for room in (budget, budget + more)]
    for plan, room in zip(plans, (budget, budget + more), strict=True):
        assert sum(point.nbytes for point in plan) <= room
        assert all(point in hull for point, hull in zip(plan, hulls, strict=True))
    assert error_of(plans[1]) <= error_of(plans[0]) + 1e-9


def test_no_budget_stores_nothing_and_a_large_one_the_best_of_each():
    hulls = [lower_hull(candidate_points(spectrum_facts(60, 80, d))) for d in (0.5, 2)]
    assert [point.precision for point in allocate(hulls, 0)] == [Zero(), Zero()]
    assert allocate(hulls, 10**9) == [hull[-1] for hull in hulls]


@settings(max_examples=40, deadline=None)
@given(FACTS)
def test_candidates_are_exact_in_bytes_and_no_worse_than_nothing_where_factored(facts):
    points = candidate_points(facts)
    nothing = zero_point_of(facts)
    for point in points:
        assert point.nbytes == facts.count * payload_bytes(facts.shape, point.precision)
        if isinstance(point.precision, LowRankTiers):
            assert point.error <= nothing.error * (1 + 1e-9)
            assert point.precision.rank <= min(facts.shape)


@settings(max_examples=100, deadline=None)
@given(FACTS, st.floats(-12, 2))
def test_waterfilled_tiers_have_falling_bits_and_fit_the_matrix(facts, exponent):
    tiers = waterfilled_tiers(facts, 10.0**exponent)
    bits = [tier.bits for tier in tiers]
    assert bits == sorted(set(bits), reverse=True)
    assert all(tier.rank > 0 for tier in tiers)
    assert sum(tier.rank for tier in tiers) <= min(facts.shape)


def test_cheaper_bytes_never_lower_the_rank():
    facts = spectrum_facts(100, 120, 1.0)
    ranks = [
        sum(tier.rank for tier in waterfilled_tiers(facts, slope))
        for slope in np.geomspace(1, 1e-8, 30)
    ]
    assert ranks == sorted(ranks)
    assert ranks[-1] == 100


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_the_error_expected_is_the_error_measured(share):
    delta = gaussian(256, 12) @ gaussian(12, 384, seed=1) + gaussian(256, 384, seed=2)
    facts = facts_of(delta)
    budget = round(share * delta.numel())
    [point] = allocate([lower_hull(candidate_points(facts))], budget)
    statistics = Statistics(basis=eigenbasis(delta, None)[1])
    payload = memoryview(encode_matrix(delta, statistics, point.precision))
    assert len(payload) == point.nbytes
    decoded = decode_matrix(point.precision.codec, payload, facts.shape)
    measured = float((decoded - delta).square().sum() / delta.square().sum())
    assert measured == pytest.approx(point.error, rel=0.25)
    assert not torch.equal(decoded, torch.zeros_like(decoded))
