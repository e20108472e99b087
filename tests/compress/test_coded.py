from dataclasses import replace

import numpy as np
import pytest
import torch
from compress.test_quantize import gaussian
from hypothesis import given
from hypothesis import strategies as st

from graftkit.compress.allocate import bits_per_unit, gaussian_rate_distortion
from graftkit.compress.coded import (
    decode_entries,
    decode_hybrid,
    encode_entries,
    encode_factors,
    encode_hybrid,
    load_factors,
    store_factors,
)
from graftkit.compress.entropy import LARGEST_CODE
from graftkit.compress.lowrank import eigenbasis, leading_rows
from graftkit.compress.quantize import cholesky, feedback_codes, round_codes
from graftkit.errors import CorruptPackError

SHAPE = (48, 96)


def spectrum(seed=0):
    left, right = gaussian(48, 48, seed=seed), gaussian(48, 96, seed=seed + 1)
    return left @ (right / torch.arange(1, 49)[:, None])


def covariance(columns=96):
    root = gaussian(columns, columns, seed=7) / torch.arange(1, columns + 1)
    return root @ root.T + 0.01 * torch.eye(columns)


def lost(delta, decoded, metric=None):
    error = decoded - delta
    return float(((error if metric is None else error @ metric) * error).sum())


def factored(delta, metric, level, rank=40):
    rows = leading_rows(delta, eigenbasis(delta, metric)[1], rank, metric)
    payload = store_factors(encode_factors(delta, rows, metric, level))
    left, right = load_factors(memoryview(payload), SHAPE).factors()
    return payload, left @ right


@pytest.mark.parametrize("metric", [None, covariance()], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("codec", ["factors", "entries", "hybrid"])
def test_a_lower_level_takes_more_bytes_and_leaves_less_error(codec, metric):
    delta, sizes, errors = spectrum(), [], []
    rows = leading_rows(delta, eigenbasis(delta, metric)[1], 40, metric)
    for level in (0.4, 0.1, 0.02):
        if codec == "factors":
            payload, decoded = factored(delta, metric, level)
        elif codec == "entries":
            payload = encode_entries(delta, metric, level)
            decoded = decode_entries(memoryview(payload), SHAPE)(slice(None))
        else:
            payload = encode_hybrid(delta, rows[:4], metric, level)
            decoded = decode_hybrid(memoryview(payload), SHAPE)(slice(None))
        sizes.append(len(payload))
        errors.append(lost(delta, decoded, metric))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * lost(delta, torch.zeros(SHAPE), metric)


def test_knowing_the_inputs_saves_error_in_the_outputs():
    delta, metric = spectrum(), covariance()
    blind_payload, blind = factored(delta, None, 0.5)
    tried = (factored(delta, metric, level) for level in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6))
    seen = next(actual[1] for actual in tried if len(actual[0]) <= len(blind_payload))
    assert lost(delta, seen, metric) < 0.7 * lost(delta, blind, metric)


@given(st.integers(0, 1000))
def test_feedback_never_errs_more_than_its_steps_allow(seed):
    weight, metric = gaussian(5, 96, seed=seed), covariance()
    lower = cholesky(metric)
    steps = 0.1 / lower.diagonal()
    error = feedback_codes(weight, steps, lower) * steps - weight
    # Each of the columns may be wrong by 0.6 of the level in the decorrelated space.
    assert float((error @ lower).abs().max()) <= 0.6 * 0.1 + 1e-3


def test_codes_have_a_dead_zone():
    assert round_codes(torch.tensor([0.59, -0.59, 0.61, -0.61, 1.7])).tolist() == [0, 0, 1, -1, 2]


@pytest.mark.parametrize("metric", [None, covariance()])
def test_storing_what_was_loaded_gives_the_same_bytes(metric):
    delta = spectrum()
    rows = leading_rows(delta, eigenbasis(delta, metric)[1], 40, metric)
    made = encode_factors(delta, rows, metric, 0.05)
    payload = store_factors(made)
    loaded = load_factors(memoryview(payload), SHAPE)
    assert store_factors(loaded) == payload
    kept = made.left.any(dim=0)
    assert torch.equal(loaded.left, made.left[:, kept])
    assert torch.equal(loaded.right, made.right[kept])
    assert torch.allclose(loaded.component, made.component[kept], rtol=1e-3)
    assert torch.equal(loaded.steps, made.steps)


def test_components_without_a_code_are_not_stored():
    delta = spectrum()
    rows = leading_rows(delta, eigenbasis(delta, None)[1], 6, None)
    made = encode_factors(delta, rows, None, 0.05)
    left, right = made.left.clone(), made.right.clone()
    left[:, 1], right[4] = 0, 0
    kept = load_factors(memoryview(store_factors(replace(made, left=left, right=right))), SHAPE)
    assert kept.right.shape[0] == made.right.shape[0] - 2
    lost = made.left[:, [1, 4]].float() * made.component[[1, 4]] @ (made.right[[1, 4]] * made.steps)
    whole, rest = (torch.mm(*factors.factors()) for factors in (made, kept))
    assert torch.allclose(rest, whole - lost, atol=1e-5)


def test_a_delta_below_the_level_is_a_rank_of_zero():
    payload, decoded = factored(spectrum() * 1e-6, None, 1.0)
    assert load_factors(memoryview(payload), SHAPE).right.shape == (0, 96)
    assert not decoded.any()


@pytest.mark.parametrize("decode", [load_factors, decode_entries, decode_hybrid])
@pytest.mark.parametrize("cut", [0, 1, 5, 20, -1])
def test_a_cut_payload_is_refused(decode, cut):
    delta = spectrum()
    rows = leading_rows(delta, eigenbasis(delta, None)[1], 4, None)
    encode = {
        load_factors: lambda: store_factors(encode_factors(delta, rows, covariance(), 0.1)),
        decode_entries: lambda: encode_entries(delta, covariance(), 0.1),
        decode_hybrid: lambda: encode_hybrid(delta, rows, covariance(), 0.1),
    }[decode]
    with pytest.raises(CorruptPackError):
        decode(memoryview(encode()[:cut]), SHAPE)


@pytest.mark.parametrize("ratio", [0.2, 1.0, 5.0])
def test_rates_are_those_of_a_gaussian(ratio):
    values = gaussian(400, 1000).double() * ratio
    codes = round_codes(values)
    counts = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    bits, expected_error = gaussian_rate_distortion(np.array(ratio))
    assert float(bits) == pytest.approx(-(counts * np.log2(counts)).sum(), rel=0.02, abs=0.002)
    error = float((values - codes).square().mean())
    assert float(expected_error) == pytest.approx(error, rel=0.02)


def test_a_unit_costs_what_a_geometric_code_pays_for_it():
    ratio = 0.3
    generator = np.random.default_rng(0)
    size = generator.geometric(1 - ratio, (2000, 500)) - 1
    # Two-sided: P(k) is in proportion to t^|k|, so that 0 is half as likely beside |k| > 0.
    kept = (size > 0) | (generator.random(size.shape) < 0.5)
    codes = torch.from_numpy(np.where(kept, size, 0)).float()
    mean = 2 * ratio / (1 - ratio**2)
    codes *= mean / codes.mean()
    bits = bits_per_unit(codes)
    assert float(bits.mean()) == pytest.approx(-np.log2(ratio), rel=0.01)


def test_a_unit_takes_more_bits_where_the_codes_of_its_row_and_column_are_small():
    codes = torch.zeros(4, 8)
    codes[0], codes[1, 0] = 5.0, 1.0
    bits = bits_per_unit(codes)
    assert bits[0].max() < bits[1].min()
    assert bits[1, 0] < bits[1, 1]
    assert bits.min() > 0
    assert torch.isfinite(bits_per_unit(torch.zeros(2, 3))).all()


def test_a_component_too_large_for_codes_leaves_the_steps_of_the_others_as_they_were():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 4, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(40, 4, generator=generator))[0].T
    large, small = 1e3 * left[:, :1] @ right[:1], left[:, 1:] @ right[1:]
    delta = (large + small).float()
    rows = (left.T.double() @ (large + small).double()).float()
    coded = encode_factors(delta, rows, None, 1e-3)
    assert max(int(coded.left.abs().max()), int(coded.right.abs().max())) <= LARGEST_CODE
    decoded, expected = (part.double() for part in (coded.factors()[0] @ coded.factors()[1], delta))
    beside = torch.eye(60).double() - left[:, :1].double() @ left[:, :1].T.double()
    error = (beside @ (decoded - expected)).norm() / small.norm()
    assert (decoded - expected).norm() < 1e-3 * expected.norm()
    assert error < 0.3  # clamped, the large one alone would leave a hundred times the small ones
