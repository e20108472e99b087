import pytest
import torch
from compress.test_quantize import correlated, gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.lowrank import (
    TIER_SHARES,
    Tier,
    decode,
    describe,
    eigenbasis,
    encode,
    left_vectors,
    payload_bytes,
    split_tiers,
)

SHAPES = [(24, 40), (40, 24), (32, 32)]
EXTENTS = st.integers(1, 40)


def truncated(delta, covariance, rank):
    """δ projected on its first directions, and the energies of all of them."""
    energies, basis = eigenbasis(delta, covariance)
    left = left_vectors(delta, basis, rank)
    return left @ (left.T @ delta), energies


def energy(delta, covariance):
    weighted = delta if covariance is None else delta @ covariance
    return float((weighted * delta).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_what_is_left_out_is_the_energy_of_the_components_left_out(shape, calibrated, rank):
    delta = gaussian(*shape)
    covariance = correlated(shape[1]) if calibrated else None
    kept, energies = truncated(delta, covariance, rank)
    lost = energy(delta - kept, covariance)
    total = energy(delta, covariance)
    assert lost == pytest.approx(float(energies[rank:].sum()), abs=2e-4 * total)
    assert float(energies.sum()) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("calibrated", [False, True])
def test_energies_are_the_squared_singular_values_in_the_metric(shape, calibrated):
    delta = gaussian(*shape)
    covariance = correlated(shape[1]) if calibrated else torch.eye(shape[1])
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    expected = torch.linalg.svdvals(delta.double() @ root).square()
    energies, _ = eigenbasis(delta, covariance if calibrated else None)
    torch.testing.assert_close(energies.double(), expected, rtol=1e-3, atol=1e-5)
    assert (energies.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_projection_of_the_rank_loses_less(shape):
    delta, covariance = gaussian(*shape), correlated(shape[1])
    kept, _ = truncated(delta, covariance, 4)
    for seed in range(5):
        other = torch.linalg.qr(gaussian(shape[0], 4, seed=seed))[0]
        rest = delta - other @ (other.T @ delta)
        assert energy(delta - kept, covariance) < energy(rest, covariance)


@given(EXTENTS, EXTENTS, st.data())
def test_a_payload_takes_exactly_the_bytes_foretold(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    bits = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=min(3, rank)))
    tiers = [Tier(width, 1) for width in bits[1:]]
    tiers = (Tier(bits[0], rank - len(tiers)), *tiers)
    covariance = correlated(columns) if data.draw(st.booleans()) else None
    delta = gaussian(rows, columns)
    left = left_vectors(delta, eigenbasis(delta, covariance)[1], rank)
    payload = memoryview(encode(delta, left, covariance, tiers))
    assert len(payload) == payload_bytes((rows, columns), tiers)
    factors = decode(payload, (rows, columns))
    assert (factors.left.shape, factors.right.shape) == ((rows, rank), (rank, columns))
    assert factors.delta().isfinite().all()
    assert describe(payload, (rows, columns))["rank"] == rank


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 50), (50, 1), (1, 1), (2, 3)])
def test_all_components_at_8_bits_give_the_delta_back(shape, calibrated):
    delta = gaussian(*shape) * 1e-3
    covariance = correlated(shape[1]) if calibrated else None
    rank = min(shape)
    left = left_vectors(delta, eigenbasis(delta, covariance)[1], rank)
    decoded = decode(memoryview(encode(delta, left, covariance, (Tier(8, rank),))), shape).delta()
    assert energy(decoded - delta, covariance) < 5e-4 * energy(delta, covariance)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exponent", [-60, -65, -70])
def test_a_delta_whose_squares_float32_does_not_hold_is_given_back(shape, calibrated, exponent):
    delta = gaussian(*shape) * 2.0**exponent
    covariance = correlated(shape[1]) if calibrated else None
    rank = min(shape)
    left = left_vectors(delta, eigenbasis(delta, covariance)[1], rank)
    decoded = decode(memoryview(encode(delta, left, covariance, (Tier(8, rank),))), shape).delta()
    scaled = delta.double() * 2.0**-exponent
    lost = decoded.double() * 2.0**-exponent - scaled
    metric = None if covariance is None else covariance.double()
    assert energy(lost, metric) < 5e-4 * energy(scaled, metric)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 10])
def test_a_delta_of_lower_rank_needs_no_more_components_and_suffers_none(shape, rank):
    delta = gaussian(shape[0], 2) @ gaussian(2, shape[1], seed=1)
    left = left_vectors(delta, eigenbasis(delta, None)[1], rank)
    decoded = decode(memoryview(encode(delta, left, None, (Tier(8, rank),))), shape).delta()
    assert energy(decoded - delta, None) < 2e-4 * energy(delta, None)


def test_an_all_zero_delta_decodes_to_zeros():
    delta = torch.zeros(6, 9)
    left = left_vectors(delta, eigenbasis(delta, None)[1], 2)
    assert not decode(memoryview(encode(delta, left, None, (Tier(4, 2),))), (6, 9)).delta().any()


@given(st.integers(0, 5000), st.sampled_from(TIER_SHARES))
def test_tiers_hold_the_whole_rank_with_falling_bits(rank, shares):
    tiers = split_tiers(rank, shares)
    assert sum(tier.rank for tier in tiers) == rank
    assert [tier.bits for tier in tiers] == sorted({tier.bits for tier in tiers}, reverse=True)
    assert rank == 0 or tiers[0].bits == 8


def test_a_thousand_components_are_split_as_in_the_paper():
    assert split_tiers(1000, TIER_SHARES[0]) == (Tier(8, 20), Tier(4, 180), Tier(2, 800))
