import pytest
import torch
from compress.test_quantize import gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.codecs import (
    CodedDense,
    CodedHybrid,
    CodedLowRank,
    Dense,
    LowRankTiers,
    Sparse,
    Statistics,
    Zero,
    assemble,
    decode_delta,
    decode_rows,
    describe_payload,
    encode_matrix,
    estimate_joined,
    join_payloads,
    matrices,
    matrix_shape,
    payload_bytes,
    quantize_matrix,
    row_blocks,
)
from graftkit.compress.lowrank import Tier, eigenbasis
from graftkit.errors import CorruptPackError

EXTENT = st.integers(1, 6)
STORED = st.one_of(
    st.tuples(st.just("matrix"), st.lists(EXTENT, min_size=1, max_size=4)),
    st.tuples(st.just("transposed"), st.tuples(EXTENT, EXTENT)),
    st.tuples(st.sampled_from(["stack", "stack_transposed"]), st.tuples(EXTENT, EXTENT, EXTENT)),
)
FIXED = [Zero(), Sparse(3), Dense(5), LowRankTiers((Tier(8, 1), Tier(4, 2)))]
PRECISIONS = [*FIXED, CodedLowRank(6, 0.5), CodedDense(0.5), CodedHybrid(2, 0.5)]


@given(STORED)
def test_assembling_its_matrices_gives_the_stored_tensor_back(stored):
    layout, shape = stored[0], tuple(stored[1])
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    parts = matrices(tensor, layout)
    count, matrix = matrix_shape(shape, layout)
    assert [tuple(part.shape) for part in parts] == [matrix] * count
    assert torch.equal(assemble(parts, shape, layout), tensor)


def test_transposed_layouts_put_outputs_first():
    stack = gaussian(3, 4, 5)
    assert torch.equal(matrices(stack, "stack_transposed")[1], stack[1].T)
    assert torch.equal(matrices(stack[0], "transposed")[0], stack[0].T)
    assert matrix_shape((7, 3, 2), "matrix") == (1, (7, 6))


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("matrix", (8, 10)),
        ("matrix", (8, 5, 2)),
        ("transposed", (10, 8)),
        ("stack", (3, 8, 10)),
        ("stack_transposed", (3, 10, 8)),
    ],
)
def test_every_codec_brings_every_layout_back_in_its_stored_shape(precision, layout, shape):
    delta = gaussian(*shape)
    parts = [part.contiguous() for part in matrices(delta, layout)]
    payloads = [
        encode_matrix(part, Statistics(basis=eigenbasis(part, None)[1]), precision)
        for part in parts
    ]
    if precision in FIXED:
        assert {len(payload) for payload in payloads} == {payload_bytes((8, 10), precision)}
    payload = memoryview(join_payloads(payloads))
    decoded = decode_delta(precision.codec, payload, shape, layout)
    assert decoded.shape == delta.shape
    lost = float((decoded - delta).norm() / delta.norm())
    assert lost == 1 if isinstance(precision, Zero) else lost < 1
    assert bool(describe_payload(precision.codec, payload, shape, layout)) == bool(payload)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: type(p).__name__)
def test_codes_give_the_numbers_that_a_reader_of_their_payload_gets(precision, calibrated):
    root, shape = gaussian(90, 90, seed=3), (700, 90)
    metric = root @ root.T / 90 + 0.1 * torch.eye(90) if calibrated else None
    parts, payloads = [], []
    for seed in (0, 1):
        delta = gaussian(*shape, seed=seed) * torch.arange(1, 91) ** -1.5
        statistics = Statistics(metric, eigenbasis(delta, metric)[1])
        part = quantize_matrix(delta, statistics, precision)
        payload = part.payload()
        assert payload == encode_matrix(delta, statistics, precision)
        rows, read = part.decoder(), decode_rows(precision.codec, memoryview(payload), shape)
        assert all(torch.equal(rows(block), read(block)) for block in row_blocks(shape))
        parts.append(part)
        payloads.append(payload)
    slack = 0 if precision in FIXED else 2 * (4 * 5 + 90)
    assert 0 <= estimate_joined(parts) - len(join_payloads(payloads)) <= slack


def test_factors_without_a_basis_are_refused():
    with pytest.raises(ValueError, match="basis"):
        encode_matrix(gaussian(4, 4), Statistics(), LowRankTiers((Tier(4, 1),)))


@given(st.integers(2, 9), st.integers(1, 50))
def test_a_stack_of_unequal_parts_is_refused(count, size):
    if size % count:
        with pytest.raises(CorruptPackError, match="equal parts"):
            decode_delta("dense", memoryview(bytes(size)), (count, 2, 2), "stack")
