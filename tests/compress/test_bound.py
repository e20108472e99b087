import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.allocate import waterfilling_bits

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
