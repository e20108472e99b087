import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.codecs import add_delta, decode_delta, describe_payload, join_payloads
from graftkit.compress.factors import MAX_RANK, Factors, describe, load, store
from graftkit.errors import CorruptPackError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 20),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.floats(-100, 100, allow_subnormal=False),
)
def test_every_word_of_both_factors_and_the_scale_come_back(rows, columns, rank, dtypes, scale):
    made = Factors(gaussian(rows, rank).to(dtypes[0]), gaussian(rank, columns).to(dtypes[1]), scale)
    payload = memoryview(store(made))
    assert len(payload) == 12 + made.left.nbytes + made.right.nbytes
    read = load(payload, (rows, columns))
    assert torch.equal(read.left, made.left)
    assert torch.equal(read.right, made.right)
    assert (read.left.dtype, read.right.dtype, read.scale) == (*dtypes, scale)
    expected = scale * made.left.double() @ made.right.double()
    decoded = decode_delta("factors", payload, (rows, columns), "matrix")
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-4, atol=1e-4)


def test_factors_that_are_views_are_stored_row_by_row():
    left, right = gaussian(3, 8).T, gaussian(5, 3).T
    read = load(memoryview(store(Factors(left, right, 1.0))), (8, 5))
    assert torch.equal(read.left, left)
    assert torch.equal(read.right, right)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("matrix", (6, 4)),
        ("transposed", (4, 6)),
        ("stack", (2, 6, 4)),
        ("stack_transposed", (2, 4, 6)),
    ],
)
def test_every_layout_is_out_by_in_and_rounded_once(layout, shape):
    count = shape[0] if layout.startswith("stack") else 1
    parts = [Factors(gaussian(6, 2, seed=i), gaussian(2, 4, seed=9 + i), 0.5) for i in range(count)]
    payload = memoryview(join_payloads([store(part) for part in parts]))
    products = [0.5 * part.left @ part.right for part in parts]
    if layout.endswith("transposed"):
        products = [product.T for product in products]
    delta = torch.stack(products) if layout.startswith("stack") else products[0]
    torch.testing.assert_close(decode_delta("factors", payload, shape, layout), delta)
    weight = gaussian(*shape, seed=7).bfloat16()
    decoded = add_delta("factors", payload, weight, layout)
    torch.testing.assert_close(decoded, (weight.float() + delta).bfloat16(), rtol=2**-7, atol=0)
    assert describe_payload("factors", payload, shape, layout)["rank"] == 2


def test_what_is_described_is_what_was_stored():
    payload = store(Factors(gaussian(4, 3).half(), gaussian(3, 5).bfloat16(), math.sqrt(2)))
    expected = {"rank": 3, "dtypes": ["BF16", "F16"], "scale": math.sqrt(2)}
    assert describe(memoryview(payload), (4, 5)) == expected


def test_what_the_header_cannot_say_is_not_stored():
    for left, right in (
        (gaussian(4, 2).double(), gaussian(2, 4)),
        (gaussian(4, 0), gaussian(0, 4)),
        (torch.zeros(1, MAX_RANK + 1), torch.zeros(MAX_RANK + 1, 1)),
    ):
        with pytest.raises(ValueError, match="rank"):
            store(Factors(left, right, 1.0))


def test_a_payload_for_another_shape_is_refused():
    payload = memoryview(store(Factors(gaussian(4, 2), gaussian(2, 6), 1.0)))
    with pytest.raises(CorruptPackError, match=r"rank 2 take 100 bytes for \[4, 7\], found 92"):
        load(payload, (4, 7))
