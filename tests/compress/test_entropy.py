import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.entropy import (
    LARGEST_CODE,
    decode_codes,
    encode_codes,
    estimate_bytes,
)
from graftkit.errors import CorruptPackError

MATRICES = st.builds(
    lambda rows, columns, scale, seed: np.rint(
        np.random.default_rng(seed).laplace(size=(rows, columns)) * 2.0**scale
    ).astype(np.int32),
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(-6, 9),
    st.integers(0, 99),
)


def round_trip(codes):
    return decode_codes(memoryview(encode_codes(codes)), codes.shape)


@given(MATRICES)
def test_codes_come_back(codes):
    assert np.array_equal(round_trip(codes), codes)


@given(MATRICES)
def test_the_length_is_known_without_coding(codes):
    assert 0 <= estimate_bytes(codes) - len(encode_codes(codes)) <= 5


def test_the_length_of_many_rows_is_known_where_columns_differ():
    generator = np.random.default_rng(0)
    scale = np.outer(2.0 ** np.linspace(-3, 3, 90), 2.0 ** np.linspace(-4, 4, 3000))
    codes = np.rint(generator.laplace(size=scale.shape) * scale).astype(np.int32)
    payload = encode_codes(codes)
    assert payload[0] == 1
    assert 0 <= estimate_bytes(codes) - len(payload) <= 5


def test_the_length_of_many_rows_is_over_by_the_scales_of_columns_that_do_not_differ():
    codes = np.rint(np.random.default_rng(0).laplace(size=(90, 300))).astype(np.int32)
    payload = encode_codes(codes)
    assert payload[0] == 0
    assert 0 <= estimate_bytes(codes) - len(payload) <= 5 + 300


def test_the_largest_codes_come_back():
    codes = np.array([[LARGEST_CODE, -LARGEST_CODE, 0], [1, -1, 2]], dtype=np.int32)
    assert np.array_equal(round_trip(codes), codes)


def test_many_rows_of_every_scale_take_little_more_than_their_entropy():
    generator = np.random.default_rng(0)
    scale = 2.0 ** np.linspace(-4, 4, 64)[:, None]
    codes = np.rint(generator.laplace(size=(64, 1000)) * scale).astype(np.int32)
    bits = 0.0
    for row in codes:
        counts = np.unique(row, return_counts=True)[1]
        bits -= (counts * np.log2(counts / row.size)).sum()
    assert 8 * len(encode_codes(codes)) < 1.05 * bits


def test_columns_of_small_codes_take_fewer_bits_where_columns_differ():
    generator = np.random.default_rng(0)
    codes = np.rint(generator.laplace(size=(50, 400)) * 2).astype(np.int32)
    codes[:, ::2] = 0
    assert encode_codes(codes)[0] == 1
    assert len(encode_codes(codes)) < 0.65 * len(encode_codes(codes[:, 1::2])) * 2


@pytest.mark.parametrize("damage", ["cut", "longer", "flag", "empty", "other shape"])
def test_a_damaged_stream_is_refused(damage):
    codes = np.arange(-50, 50, dtype=np.int32).reshape(10, 10)
    payload, shape = encode_codes(codes), (10, 10)
    if damage == "other shape":
        shape = (10, 9)
    else:
        payload = {
            "cut": payload[:-5],
            "longer": payload + b"\x01\x02\x03\x04",
            "flag": b"\x07" + payload[1:],
            "empty": b"",
        }[damage]
    with pytest.raises(CorruptPackError):
        decode_codes(memoryview(payload), shape)
