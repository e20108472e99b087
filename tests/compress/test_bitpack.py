import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from graftkit.compress import quantize
from graftkit.compress.quantize import pack_bits, packed_bytes, unpack_bits
from graftkit.errors import CorruptPackError


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
