import pytest
import torch
from compress.test_quantize import correlated, gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress import dense
from graftkit.errors import CorruptPackError


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 8), st.booleans())
def test_a_payload_takes_exactly_the_bytes_foretold(rows, columns, bits, calibrated):
    covariance = correlated(columns) if calibrated else None
    payload = memoryview(dense.encode(gaussian(rows, columns), covariance, bits))
    assert len(payload) == dense.payload_bytes((rows, columns), bits)
    assert dense.decode(payload, (rows, columns)).shape == (rows, columns)
    assert dense.describe(payload, (rows, columns)) == {"bits": bits}


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_8_bits_bring_the_delta_back(size):
    delta = gaussian(20, 300) * size
    decoded = dense.decode(memoryview(dense.encode(delta, None, 8)), (20, 300))
    assert float((decoded - delta).norm() / delta.norm()) < 0.01


def test_more_bits_never_err_more():
    delta = gaussian(20, 300) * 1e-3
    errors = []
    for bits in range(1, 9):
        decoded = dense.decode(memoryview(dense.encode(delta, None, bits)), (20, 300))
        errors.append(float((decoded - delta).norm()))
    assert errors == sorted(errors, reverse=True)


def test_blocks_of_rows_give_the_bytes_of_the_whole_matrix(monkeypatch):
    delta, covariance = gaussian(23, 140), correlated(140)
    whole = dense.encode(delta, covariance, 3)
    monkeypatch.setattr(dense, "BLOCK_ELEMENTS", 700)
    assert dense.encode(delta, covariance, 3) == whole


def test_a_row_of_the_wrong_length_is_refused():
    payload = memoryview(dense.encode(gaussian(3, 5), None, 3))
    with pytest.raises(CorruptPackError, match="take"):
        dense.decode(payload, (3, 4))


def test_an_all_zero_delta_decodes_to_zeros():
    assert not dense.decode(memoryview(dense.encode(torch.zeros(3, 5), None, 1)), (3, 5)).any()
