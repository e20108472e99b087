import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftkit.interop.lora_export import pad_rank, smallest_rank, truncate, truncate_factors


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def least_error(delta, rank):
    """Eckart–Young: the energy of the components that are left out."""
    return float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())


@given(
    st.integers(2, 24), st.integers(2, 24), st.integers(1, 30), st.integers(1, 30), st.integers()
)
def test_no_other_factors_of_a_rank_come_closer(rows, columns, own, rank, seed):
    left, right = gaussian(rows, own, seed % 1000), gaussian(own, columns, seed % 997)
    delta = left @ right
    for actual in (truncate(delta, rank), truncate_factors(left, right, rank)):
        assert actual.left.shape[1] == actual.right.shape[0] <= rank
        error = float((delta - actual.left @ actual.right).norm())
        assert error <= least_error(delta, rank) * 1.001 + 1e-4 * float(delta.norm())
        energy = torch.linalg.svdvals(delta).square().double()
        size = min(len(energy), len(actual.energies))
        torch.testing.assert_close(
            actual.energies[:size], energy[:size], rtol=1e-3, atol=1e-4 * float(energy[0])
        )


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_both_factors_of_a_component_are_equally_loud_and_the_loudest_comes_first(shape):
    for actual in (
        truncate(gaussian(*shape), 5),
        truncate_factors(gaussian(20, 8), gaussian(8, 6), 5),
    ):
        loudness = actual.right.norm(dim=1)
        torch.testing.assert_close(actual.left.norm(dim=0), loudness, rtol=1e-3, atol=1e-6)
        assert torch.equal(loudness, loudness.sort(descending=True).values)


def test_a_delta_of_zero_has_factors_of_zero():
    actual = truncate(torch.zeros(6, 4), 3)
    assert not (actual.left @ actual.right).any()
    actual = truncate_factors(torch.zeros(6, 2), gaussian(2, 4), 3)
    assert not (actual.left @ actual.right).any()


def test_the_smallest_rank_counts_the_energy_of_all_matrices_together():
    energies = [torch.tensor([90.0, 4.0, 3.0]), torch.tensor([2.0, 1.0])]
    assert smallest_rank(energies, (1, 2, 3), 0.92) == 1
    assert smallest_rank(energies, (1, 2, 3), 0.93) == 2
    assert smallest_rank(energies, (1, 2, 3), 1.0) == 3
    assert smallest_rank(energies, (1, 2), 1.0) == 2


def test_padding_adds_components_that_change_nothing():
    left, right = gaussian(5, 2).bfloat16(), gaussian(2, 4)
    wide, tall = pad_rank(left, right, 6)
    assert (wide.shape, tall.shape, wide.dtype) == ((5, 6), (6, 4), torch.bfloat16)
    assert torch.equal(wide.float() @ tall, left.float() @ right)


@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e18, 1e37])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (1, 5), (5, 1)])
def test_squares_that_float32_does_not_hold_take_no_component_away(scale, shape):
    delta = (gaussian(*shape).double() * scale).float()
    actual = truncate(delta, 20)
    assert actual.left.isfinite().all()
    assert actual.right.isfinite().all()
    error = (actual.left.double() @ actual.right.double() - delta.double()).norm()
    assert float(error) <= 1e-4 * float(delta.double().norm()) + 1e-43
    energy = float(delta.double().square().sum())
    assert float(actual.energies.sum()) == pytest.approx(energy, rel=1e-4)
