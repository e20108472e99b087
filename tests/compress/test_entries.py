import numpy as np
import pytest
import torch
from compress.test_quantize import correlated, gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress import entries
from graftkit.errors import CorruptPackError


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 8), st.booleans())
def test_a_payload_takes_exactly_the_bytes_foretold(rows, columns, bits, calibrated):
    covariance = correlated(columns) if calibrated else None
    payload = memoryview(entries.encode_dense(gaussian(rows, columns), covariance, bits))
    assert len(payload) == entries.dense_bytes((rows, columns), bits)
    assert entries.decode_dense(payload, (rows, columns)).shape == (rows, columns)
    assert entries.describe_dense(payload, (rows, columns)) == {"bits": bits}


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0])
def test_8_bits_bring_the_delta_back(size):
    delta = gaussian(20, 300) * size
    decoded = entries.decode_dense(memoryview(entries.encode_dense(delta, None, 8)), (20, 300))
    assert float((decoded - delta).norm() / delta.norm()) < 0.01


def test_more_bits_never_err_more():
    delta = gaussian(20, 300) * 1e-3
    errors = []
    for bits in range(1, 9):
        decoded = entries.decode_dense(
            memoryview(entries.encode_dense(delta, None, bits)), (20, 300)
        )
        errors.append(float((decoded - delta).norm()))
    assert errors == sorted(errors, reverse=True)


def test_blocks_of_rows_give_the_bytes_of_the_whole_matrix(monkeypatch):
    delta, covariance = gaussian(23, 140), correlated(140)
    whole = entries.encode_dense(delta, covariance, 3)
    monkeypatch.setattr(entries, "BLOCK_ELEMENTS", 700)
    assert entries.encode_dense(delta, covariance, 3) == whole


def test_a_row_of_the_wrong_length_is_refused():
    payload = memoryview(entries.encode_dense(gaussian(3, 5), None, 3))
    with pytest.raises(CorruptPackError, match="take"):
        entries.decode_dense(payload, (3, 4))


def test_an_all_zero_delta_decodes_to_zeros():
    assert not entries.decode_dense(
        memoryview(entries.encode_dense(torch.zeros(3, 5), None, 1)), (3, 5)
    ).any()


@st.composite
def deltas(draw):
    rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    kept = draw(st.integers(1, rows * columns))
    delta = gaussian(rows, columns, seed=draw(st.integers(0, 9)))
    # Few magnitudes, so that ties at the threshold are the rule.
    return (delta * 2).round() if draw(st.booleans()) else delta, kept


@given(deltas())
def test_exactly_the_largest_entries_are_kept_and_ties_go_to_the_first(case):
    delta, kept = case
    mask = entries.largest_entries(delta, kept)
    order = np.argsort(-delta.abs().reshape(-1).numpy(), kind="stable")
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:kept]))


@given(deltas())
def test_kept_entries_come_back_within_half_a_step_and_all_others_are_zero(case):
    delta, kept = case
    payload = memoryview(entries.encode_sparse(delta, kept))
    assert len(payload) == entries.sparse_bytes(tuple(delta.shape), kept)
    decoded = entries.decode_sparse(payload, tuple(delta.shape)).reshape(-1)
    mask = torch.from_numpy(entries.largest_entries(delta, kept))
    assert not decoded[~mask].any()
    values = delta.reshape(-1)[mask]
    span = float(values.clamp(min=0).max() - values.clamp(max=0).min())
    assert float((decoded[mask] - values).abs().max()) <= span * 1.01 / 30
    assert entries.describe_sparse(payload, tuple(delta.shape))["kept"] == kept


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 1))
def test_positions_take_the_smaller_of_the_two_layouts(rows, columns, share):
    kept = max(1, round(share * rows * columns))
    index = max(1, (columns - 1).bit_length())
    lists = -(-rows * columns.bit_length() // 8) + -(-kept * index // 8)
    groups = -(-kept // 128)
    values = 2 * groups + -(-groups * 4 // 8) + -(-kept * 4 // 8)
    expected = 12 + min(lists, -(-rows * columns // 8)) + values
    assert entries.sparse_bytes((rows, columns), kept) == expected


@pytest.mark.parametrize(("kept", "layout"), [(20, "row lists"), (2000, "bitmap")])
def test_few_entries_are_listed_and_many_are_mapped(kept, layout):
    payload = memoryview(entries.encode_sparse(gaussian(40, 100), kept))
    assert entries.describe_sparse(payload, (40, 100))["positions"] == layout


def test_encoding_leaves_the_delta_as_it_was():
    delta = gaussian(9, 9)
    copy = delta.clone()
    entries.encode_sparse(delta, 5)
    assert torch.equal(delta, copy)
