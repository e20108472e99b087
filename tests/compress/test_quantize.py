import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from graftkit.compress import quantize
from graftkit.compress.quantize import (
    GROUP_SIZE,
    feedback_gain,
    inverse_factor,
    pack_bits,
    pack_rows,
    packed_bytes,
    quantize_rows,
    rows_bytes,
    unpack_bits,
    unpack_rows,
)
from graftkit.errors import CorruptPackError


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, seed=0, decay=1.0):
    """E[x xᵀ] of inputs whose spectrum falls as k^-decay, in a random basis, trace n."""
    basis = torch.linalg.qr(gaussian(columns, columns, seed=seed))[0]
    energies = torch.arange(1, columns + 1, dtype=torch.float32) ** -decay
    return basis @ torch.diag(energies * columns / energies.sum()) @ basis.T


def steps(quantized):
    """Scale of the group of every weight."""
    scale = torch.from_numpy(quantized.scale.astype(np.float32))
    return scale.repeat_interleave(quantized.group_size, 1)[:, : quantized.codes.shape[1]]


CASES = st.tuples(st.integers(1, 6), st.integers(1, 300), st.integers(1, 8), st.integers(0, 99))


@given(CASES, st.sampled_from([1e-5, 1e-3, 1.0, 100.0]), st.sampled_from([7, GROUP_SIZE]))
def test_rounding_to_nearest_errs_by_half_a_step_at_most(case, size, group):
    rows, columns, bits, seed = case
    weight = gaussian(rows, columns, seed=seed) * size
    quantized = quantize_rows(weight, bits, None, group)
    error = (quantized.dequantize() - weight).abs()
    assert (error <= steps(quantized) * 0.5001).all()


@given(CASES, st.booleans())
def test_codes_and_zero_points_stay_in_range_with_and_without_feedback(case, calibrated):
    rows, columns, bits, seed = case
    feedback = inverse_factor(correlated(columns, seed)) if calibrated else None
    quantized = quantize_rows(gaussian(rows, columns, seed=seed), bits, feedback)
    assert int(quantized.codes.max()) < 2**bits
    assert int(quantized.zero_point.max()) < 2**bits
    assert np.isfinite(quantized.scale).all()


@given(CASES, st.integers(1, 200))
def test_rows_take_exactly_the_bytes_foretold_and_come_back(case, group):
    rows, columns, bits, seed = case
    quantized = quantize_rows(gaussian(rows, columns, seed=seed), bits, None, group)
    payload = pack_rows(quantized)
    assert len(payload) == rows_bytes(rows, columns, bits, group)
    again = unpack_rows(memoryview(payload), rows, columns, bits, group)
    for field in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(again, field), getattr(quantized, field))
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_zeros_stay_zero_alone_and_among_others(bits):
    weight = gaussian(3, 200)
    weight[1] = 0
    weight[0, 5] = 0
    decoded = quantize_rows(weight, bits, None).dequantize()
    assert not decoded[1].any()
    assert decoded[0, 5] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_feedback_lowers_the_error_on_correlated_inputs(bits, seed):
    weight, covariance = gaussian(24, 160, seed=seed), correlated(160, seed)

    def cost(feedback):
        error = quantize_rows(weight, bits, feedback).dequantize() - weight
        return float(((error @ covariance) * error).sum())

    assert cost(inverse_factor(covariance)) < 0.9 * cost(None)


def test_feedback_on_white_inputs_changes_nothing():
    weight = gaussian(8, 140)
    plain = quantize_rows(weight, 3, None)
    white = quantize_rows(weight, 3, inverse_factor(torch.eye(140)))
    assert (plain.codes == white.codes).mean() > 0.999


def test_the_gain_foretells_what_feedback_leaves_of_the_error():
    weight, covariance = gaussian(64, 128), correlated(128)
    error = quantize_rows(weight, 6, inverse_factor(covariance)).dequantize() - weight
    plain = quantize_rows(weight, 6, None).dequantize() - weight
    ratio = ((error @ covariance) * error).sum() / ((plain @ covariance) * plain).sum()
    assert float(ratio) == pytest.approx(feedback_gain(covariance), rel=0.15)
    assert feedback_gain(None) == 1
    assert feedback_gain(torch.eye(9)) == pytest.approx(1, rel=1e-3)


def test_a_covariance_of_lower_rank_is_damped_until_it_can_be_factored():
    inputs = gaussian(3, 40)
    factor, order = inverse_factor(inputs.T @ inputs)
    assert factor.isfinite().all()
    assert sorted(order.tolist()) == list(range(40))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_a_scale_that_is_not_finite_or_negative_is_refused(value):
    payload = bytearray(pack_rows(quantize_rows(gaussian(2, 10), 4, None)))
    payload[2:4] = np.float16(value).tobytes()
    with pytest.raises(CorruptPackError, match="scale"):
        unpack_rows(memoryview(payload), 2, 10, 4, GROUP_SIZE)


@given(CASES, st.integers(-3, 3).filter(bool))
def test_rows_of_another_length_are_refused(case, more):
    rows, columns, bits, _ = case
    payload = bytes(max(0, rows_bytes(rows, columns, bits, 16) + more))
    with pytest.raises(CorruptPackError, match="take"):
        unpack_rows(memoryview(payload), rows, columns, bits, 16)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    values = draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    return np.array(values, dtype=np.uint8), bits


def random_codes(count, bits):
    return np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint8)


@given(codes_and_bits())
def test_unpacking_returns_the_packed_codes(case):
    codes, bits = case
    unpacked = unpack_bits(pack_bits(codes, bits), bits, codes.size)
    assert unpacked.dtype == np.uint8
    assert_array_equal(unpacked, codes)


@given(codes_and_bits())
def test_packed_codes_take_exactly_the_bytes_their_bits_fill(case):
    codes, bits = case
    assert pack_bits(codes, bits).nbytes == -(-codes.size * bits // 8)
    assert packed_bytes(codes.size, bits) == -(-codes.size * bits // 8)


@given(codes_and_bits())
def test_code_i_lies_at_bit_i_times_bits_least_significant_bit_first(case):
    codes, bits = case
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    expected = stream.to_bytes(packed_bytes(codes.size, bits), "little")
    assert pack_bits(codes, bits).tobytes() == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("extra", [-1, 0, 1, 13])
def test_codes_beyond_one_block_come_back(bits, extra):
    codes = random_codes(2 * quantize.LANES_PER_BLOCK * quantize.CODES_PER_LANE + extra, bits)
    assert_array_equal(unpack_bits(pack_bits(codes, bits), bits, codes.size), codes)


def test_a_matrix_that_is_not_contiguous_is_read_in_row_order():
    codes = random_codes(60, 3).reshape(6, 10)[:, ::2]
    assert_array_equal(unpack_bits(pack_bits(codes, 3), 3, 30), codes.ravel())


def test_packing_does_not_change_the_codes_nor_unpacking_the_bytes():
    codes = random_codes(21, 5)
    before = codes.copy()
    packed = pack_bits(codes, 5)
    packed.flags.writeable = False
    unpack_bits(packed, 5, 21)
    assert_array_equal(codes, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_missing_or_extra_byte_is_reported_as_corrupt(bits):
    packed = pack_bits(random_codes(21, bits), bits)
    for damaged in (packed[:-1], np.append(packed, np.uint8(0))):
        with pytest.raises(CorruptPackError, match="21 codes"):
            unpack_bits(damaged, bits, 21)


@given(codes_and_bits(), st.integers(0, 7))
def test_a_set_padding_bit_is_reported_as_corrupt(case, bit):
    codes, bits = case
    used = codes.size * bits % 8
    packed = pack_bits(codes, bits)
    if used == 0 or bit < used:
        return
    packed[-1] |= np.uint8(1 << bit)
    with pytest.raises(CorruptPackError, match="padding"):
        unpack_bits(packed, bits, codes.size)


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="8 does not fit into 3 bits"):
        pack_bits(np.array([1, 8], dtype=np.uint8), 3)


@pytest.mark.parametrize(("count", "bits"), [(4, 0), (4, 9), (-1, 4)])
def test_impossible_widths_and_counts_are_refused(count, bits):
    with pytest.raises(ValueError, match="is"):
        packed_bytes(count, bits)
