import math

import numpy as np
import pytest
from compress.test_quantize import gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.allocate import (
    DENSE_BITS,
    GRID_NOISE,
    MatrixFacts,
    dense_points,
    sparse_points,
    tiers_point,
    waterfilling_bits,
    zero_point_of,
)
from graftkit.compress.codecs import Statistics, decode_matrix, encode_matrix, payload_bytes
from graftkit.compress.lowrank import Tier, eigenbasis
from graftkit.compress.quantize import quantize_rows


def facts_of(delta, kept=()):
    energies = eigenbasis(delta, None)[0].double().numpy()
    shape = (delta.shape[0], delta.shape[1])
    return MatrixFacts(
        shape, 1, energies, energies, 1.0, kept, 1 / float(energies.sum()), np.ones(1)
    )


def spectrum_facts(rows, columns, decay, kept=()):
    energies = np.arange(1, min(rows, columns) + 1, dtype=np.float64) ** -decay
    return MatrixFacts((rows, columns), 1, energies, energies, 0.7, kept, 1.0, np.ones(1))


FACTS = st.builds(
    spectrum_facts,
    st.integers(2, 400),
    st.integers(2, 400),
    st.floats(0, 4),
    st.sampled_from([(), ((0.01, 0.2), (0.1, 0.6))]),
)


@pytest.mark.parametrize("bits", sorted(GRID_NOISE))
def test_the_noise_of_a_grid_is_what_unit_gaussians_measure(bits):
    weight = gaussian(2000, 128)
    noise = (quantize_rows(weight, bits, None).dequantize() - weight).square().mean()
    assert float(noise) == pytest.approx(GRID_NOISE[bits], rel=0.15)


def test_every_width_on_the_menu_has_its_noise():
    assert set(DENSE_BITS) == set(GRID_NOISE)
    noise = [GRID_NOISE[bits] for bits in sorted(GRID_NOISE)]
    assert noise == sorted(noise, reverse=True)


@pytest.mark.parametrize("bits", DENSE_BITS)
@given(facts=FACTS)
def test_tiers_are_exact_in_bytes_and_no_worse_than_nothing(facts, bits):
    point = tiers_point(facts, (Tier(bits, min(2, *facts.shape)),))
    assert point.nbytes == facts.count * payload_bytes(facts.shape, point.precision)
    assert point.error <= zero_point_of(facts).error * (1 + 1e-9)


@given(FACTS)
def test_direct_and_pruned_points_are_exact_in_bytes(facts):
    for point in (*dense_points(facts), *sparse_points(facts)):
        assert point.nbytes == facts.count * payload_bytes(facts.shape, point.precision)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_expected_of_tiers_is_the_error_measured(bits):
    delta = gaussian(256, 12) @ gaussian(12, 384, seed=1) + gaussian(256, 384, seed=2)
    point = tiers_point(facts_of(delta), (Tier(8, 4), Tier(bits, 60)))
    statistics = Statistics(basis=eigenbasis(delta, None)[1])
    payload = memoryview(encode_matrix(delta, statistics, point.precision))
    assert len(payload) == point.nbytes
    decoded = decode_matrix("lowrank", payload, (256, 384))
    measured = float((decoded - delta).square().sum() / delta.square().sum())
    assert measured == pytest.approx(point.error, rel=0.25)


SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30).map(np.array)


@given(SPECTRA, st.floats(1, 5))
def test_losing_everything_costs_nothing(energies, distortion):
    assert waterfilling_bits(energies, len(energies), distortion) == 0


@given(st.integers(1, 200), st.floats(1e-3, 1e3), st.floats(1e-6, 1))
def test_a_flat_spectrum_costs_half_a_log_of_the_distortion(count, energy, distortion):
    bits = waterfilling_bits(np.full(count, energy), count, distortion)
    assert bits == pytest.approx(-0.5 * math.log2(distortion), abs=1e-6)


@given(SPECTRA, st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_less_distortion_never_costs_less(energies, first, second):
    low, high = sorted((first, second))
    bits = [waterfilling_bits(energies, len(energies), d) for d in (low, high)]
    assert bits[0] >= bits[1] - 1e-9


@given(SPECTRA, st.floats(1e-9, 1), st.floats(1e-3, 1e3))
def test_the_scale_of_the_energies_does_not_matter(energies, distortion, scale):
    bits = waterfilling_bits(energies, len(energies), distortion)
    assert waterfilling_bits(energies * scale, len(energies), distortion) == pytest.approx(
        bits, abs=1e-6
    )


def test_two_levels_cost_what_the_closed_form_says():
    # D = 0.2 of 10 + 90: the water stands at 10, where the small one is lost whole.
    assert waterfilling_bits(np.array([90.0, 10.0]), 2, 0.2) == pytest.approx(
        0.5 * math.log2(9) / 2, abs=1e-9
    )


@given(SPECTRA, st.floats(0.01, 1))
def test_columns_of_no_energy_cost_nothing(energies, distortion):
    bits = waterfilling_bits(energies, len(energies), distortion)
    wide = waterfilling_bits(energies, 4 * len(energies), distortion)
    assert wide == pytest.approx(bits / 4)


def test_a_delta_of_zeros_costs_nothing():
    assert waterfilling_bits(np.zeros(4), 4, 0.1) == 0


def test_no_distortion_at_all_is_a_finite_rate():
    assert 15 < waterfilling_bits(np.ones(4), 4, 0.0) < 25
