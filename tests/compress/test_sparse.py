import numpy as np
import pytest
import torch
from compress.test_quantize import gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress import sparse


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
    mask = sparse.largest_entries(delta, kept)
    order = np.argsort(-delta.abs().reshape(-1).numpy(), kind="stable")
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:kept]))


@given(deltas())
def test_kept_entries_come_back_within_half_a_step_and_all_others_are_zero(case):
    delta, kept = case
    payload = memoryview(sparse.encode(delta, kept))
    assert len(payload) == sparse.payload_bytes(tuple(delta.shape), kept)
    decoded = sparse.decode(payload, tuple(delta.shape)).reshape(-1)
    mask = torch.from_numpy(sparse.largest_entries(delta, kept))
    assert not decoded[~mask].any()
    values = delta.reshape(-1)[mask]
    span = float(values.clamp(min=0).max() - values.clamp(max=0).min())
    assert float((decoded[mask] - values).abs().max()) <= span * 1.01 / 30
    assert sparse.describe(payload, tuple(delta.shape))["kept"] == kept


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 1))
def test_positions_take_the_smaller_of_the_two_layouts(rows, columns, share):
    kept = max(1, round(share * rows * columns))
    index = max(1, (columns - 1).bit_length())
    lists = -(-rows * columns.bit_length() // 8) + -(-kept * index // 8)
    groups = -(-kept // 128)
    values = 2 * groups + -(-groups * 4 // 8) + -(-kept * 4 // 8)
    expected = 12 + min(lists, -(-rows * columns // 8)) + values
    assert sparse.payload_bytes((rows, columns), kept) == expected


@pytest.mark.parametrize(("kept", "layout"), [(20, "row lists"), (2000, "bitmap")])
def test_few_entries_are_listed_and_many_are_mapped(kept, layout):
    payload = memoryview(sparse.encode(gaussian(40, 100), kept))
    assert sparse.describe(payload, (40, 100))["positions"] == layout


def test_encoding_leaves_the_delta_as_it_was():
    delta = gaussian(9, 9)
    copy = delta.clone()
    sparse.encode(delta, 5)
    assert torch.equal(delta, copy)
