"""Weights at the ends of their dtypes: a pack that its reader takes, or one line that refuses."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import one_layer_llama

from graftkit.compress.allocate import output_energy
from graftkit.compress.codecs import (
    CodedDense,
    CodedHybrid,
    CodedLowRank,
    LowRankTiers,
    Statistics,
    decode_matrix,
    encode_matrix,
)
from graftkit.compress.lowrank import eigenbasis, split_tiers
from graftkit.errors import BudgetError, CheckpointError, GraftError
from graftkit.fuse import merge_packs
from graftkit.pack import pack_delta
from graftkit.packing import encode
from graftkit.packing.measure import LARGEST_DELTA, SMALLEST_DELTA, is_extreme
from graftkit.skillpack import SkillPack

CONFIG, SHAPES = one_layer_llama(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=80,
)
RECIPES = [("lossless", None), ("graftllm", "60%"), ("auto", "10%"), ("auto", "60%")]
TWO, OTHER = RECIPES[1:3], [RECIPES[0], RECIPES[3]]
"""Recipes of the default run, and those that the slow run adds to them."""
UP = "model.layers.0.mlp.up_proj.weight"
CHANGED = (UP, "model.layers.0.self_attn.q_proj.weight", "lm_head.weight")


def gaussian(shape, generator):
    return torch.randn(shape, generator=generator)


def rank_one(shape, generator):
    return gaussian((shape[0], 1), generator) @ gaussian((1, shape[1]), generator)


def one_entry(shape, generator):
    matrix = torch.zeros(shape)
    matrix[1, 2] = 1
    return matrix


def one_huge(shape, generator):
    return 1e-4 * gaussian(shape, generator) + one_entry(shape, generator)


def same_rows(shape, generator):
    return gaussian((1, shape[1]), generator).expand(shape).contiguous()


def all_equal(shape, generator):
    return torch.ones(shape)


def rows_apart(shape, generator):
    return gaussian(shape, generator) * torch.logspace(-12, 0, shape[0])[:, None]


def identity(shape, generator):
    return torch.eye(*shape)


def nothing(shape, generator):
    return torch.zeros(shape)


FORMS = (
    *(gaussian, rank_one, one_entry, one_huge, same_rows, all_equal, rows_apart, identity, nothing),
)


def write(folder, tensors):
    CONFIG.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def states(folder, dtype, form, scale, weight=0.05):
    """Target and tuned that differ in the matrices of CHANGED."""
    generator, most = torch.Generator().manual_seed(0), torch.finfo(dtype).max
    target, tuned = {}, {}
    for name, shape in SHAPES.items():
        target[name] = (weight * gaussian(shape, generator)).to(dtype)
        delta = form(shape, generator).double() * scale if name in CHANGED else 0.0
        tuned[name] = (target[name].double() + delta).clamp(-most, most).to(dtype)
    write(folder / "target", target)
    write(folder / "tuned", tuned)
    return target, tuned


def relative(decoded, expected):
    size = expected.square().sum().sqrt()
    return float((decoded - expected).square().sum().sqrt() / size) if size else 0.0


def pack_or_least(folder, recipe, budget):
    """A pack; where the budget is too small, one of the size that the refusal names."""
    arguments = {"recipe": recipe, "workers": 1}
    try:
        return pack_delta(folder / "target", folder / "tuned", budget=budget, **arguments)
    except BudgetError as error:
        least = re.search(r"at least (\d+)B", str(error))[1]
        return pack_delta(folder / "target", folder / "tuned", budget=f"{least}B", **arguments)


def check_sound(folder, pack, target, tuned):
    """The file opens, decodes, merges, keeps its budget, and is as wrong as it says."""
    file, merged = folder / "x.skillpack", folder / "merged"
    pack.save(file)
    json.loads(pack.manifest.to_json(), parse_constant=pytest.fail)
    assert file.stat().st_size <= (pack.manifest.budget_bytes or 2**40)
    pack = SkillPack.load(file)
    merge_packs(folder / "target", pack, merged)
    written = load_file(merged / "model.safetensors")
    (merged / "model.safetensors").unlink()
    (merged / "config.json").unlink()
    for record in pack.manifest.tensors:
        before = target[record.name]
        assert written[record.name].isfinite().all()
        if record.codec in ("exact", "zero"):
            decoded = written[record.name].double() - before.double()
        else:
            decoded = pack.delta(record.name, before).double()
        error = relative(decoded, tuned[record.name].double() - before.double())
        assert record.error == pytest.approx(error, rel=2e-3, abs=1e-6)


SIZES = (1e-45, 1e-20, 1e-9, 1e3, 3e4, 6e4, 1e18, 3e38)
ENDS = {torch.float32: (1e-45, 3e38), torch.bfloat16: (1e18,), torch.float16: (1e-9, 6e4)}
"""Sizes of the default run, by dtype."""


@pytest.mark.parametrize(
    ("scale", "dtype", "recipes"),
    [
        *(pytest.param(size, dtype, TWO) for dtype, sizes in ENDS.items() for size in sizes),
        *(
            pytest.param(
                size, dtype, OTHER if size in ENDS[dtype] else RECIPES, marks=pytest.mark.slow
            )
            for dtype in ENDS
            for size in SIZES
        ),
    ],
)
def test_every_size_of_delta_is_packed_soundly(dtype, scale, recipes, tmp_path):
    target, tuned = states(tmp_path, dtype, gaussian, min(scale, torch.finfo(dtype).max))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recipe, budget in recipes:
            check_sound(tmp_path, pack_or_least(tmp_path, recipe, budget), target, tuned)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize(
    ("weight", "recipes"),
    [
        (0.05, TWO),
        pytest.param(0.05, OTHER, marks=pytest.mark.slow),
        pytest.param(0.0, RECIPES, marks=pytest.mark.slow),
    ],
)
def test_every_form_of_delta_is_packed_soundly(form, weight, recipes, tmp_path):
    target, tuned = states(tmp_path, torch.float32, form, 0.01, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recipe, budget in recipes:
            check_sound(tmp_path, pack_or_least(tmp_path, recipe, budget), target, tuned)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    form=st.sampled_from(FORMS),
    exponent=st.floats(-46, 38),
    weight=st.sampled_from([0.0, 0.05, 1e4]),
    recipe=st.sampled_from(RECIPES),
)
def test_any_delta_is_packed_soundly(tmp_path_factory, dtype, form, exponent, weight, recipe):
    folder = tmp_path_factory.mktemp("any")
    scale = min(10.0**exponent, torch.finfo(dtype).max)
    target, tuned = states(folder, dtype, form, scale, weight)
    check_sound(folder, pack_or_least(folder, *recipe), target, tuned)


def test_a_weight_of_the_largest_number_stays_finite_beside_small_deltas(tmp_path):
    target, tuned = states(tmp_path, torch.float16, gaussian, 1.0)
    for tensors in (target, tuned):
        tensors[UP][0, 0] = torch.finfo(torch.float16).max
    write(tmp_path / "target", target)
    write(tmp_path / "tuned", tuned)
    pack = pack_delta(tmp_path / "target", tmp_path / "tuned", budget="90%", workers=1)
    assert pack.record(UP).codec == "exact"
    check_sound(tmp_path, pack, target, tuned)


@pytest.mark.slow
def test_one_large_entry_is_coded_no_worse_with_more_budget(tmp_path):
    states(tmp_path, torch.float32, one_entry, 1.0, weight=0.0)
    errors = []
    for budget in ("6%", "10%", "100%"):
        pack = pack_delta(tmp_path / "target", tmp_path / "tuned", budget=budget, workers=1)
        errors.append(pack.record(UP).error)
    assert errors[-1] < 1e-3
    assert errors == sorted(errors, reverse=True)


def test_what_decodes_beyond_the_dtype_is_left_out_and_said_so(tmp_path, monkeypatch):
    target, tuned = states(tmp_path, torch.float16, gaussian, 1.0)
    honest = encode.quantize_matrix

    def overshooting(delta, statistics, precision):
        coded = honest(delta, statistics, precision)
        if delta.shape != (96, 64):
            return coded
        rows = coded.decoder()
        return SimpleNamespace(
            decoder=lambda: lambda block: rows(block) * 1e6,
            payload=coded.payload,
            estimate=coded.estimate,
        )

    monkeypatch.setattr(encode, "quantize_matrix", overshooting)
    pack = pack_delta(tmp_path / "target", tmp_path / "tuned", budget="40%", workers=1)
    assert (pack.record(UP).codec, pack.record(UP).error) == ("zero", 1.0)
    check_sound(tmp_path, pack, target, tuned)


@pytest.mark.parametrize(
    ("before", "after", "extreme"),
    [
        (0.0, LARGEST_DELTA, False),
        (0.0, 2 * LARGEST_DELTA, True),
        (0.0, SMALLEST_DELTA, False),
        (0.0, SMALLEST_DELTA / 2, True),
        (3e38, -3e38, True),
        (2e38, 2e38, True),
        (float("nan"), 1.0, True),
        (1.0, 1.0, False),
    ],
)
def test_lossy_codecs_take_what_float32_can_square_and_add(before, after, extreme):
    states = (torch.full((4, 4), value) for value in (before, after))
    assert is_extreme(*states) is extreme


def test_a_target_whose_tensors_are_all_empty_is_refused(tmp_path):
    empty = {"model.norm.weight": torch.zeros(0), "model.embed_tokens.weight": torch.zeros(0, 64)}
    write(tmp_path / "target", empty)
    write(tmp_path / "tuned", empty)
    for recipe in ("auto", "graftllm", "lossless"):
        with pytest.raises(CheckpointError, match="2 tensors without a single weight"):
            pack_delta(tmp_path / "target", tmp_path / "tuned", recipe=recipe, workers=1)


def test_float64_weights_that_changed_are_refused_by_name(tmp_path):
    target, tuned = states(tmp_path, torch.bfloat16, gaussian, 0.01)
    for folder, tensors in (("target", target), ("tuned", tuned)):
        write(tmp_path / folder, tensors | {UP: tensors[UP].double()})
    with pytest.raises(CheckpointError, match=rf"{UP} is F64 and differs.*expected BF16"):
        pack_delta(tmp_path / "target", tmp_path / "tuned", workers=1)


def test_energies_hold_where_float32_squares_vanish_or_overflow():
    for scale in (1e-42, 1e-25, 1e25, 1e37):
        matrix = torch.full((3, 5), scale)
        size = float(matrix[0, 0])
        assert output_energy(matrix, None) == pytest.approx(15 * size**2, rel=1e-5)
        assert output_energy(matrix, torch.eye(5)) == pytest.approx(15 * size**2, rel=1e-5)


SIDES = st.sampled_from([(1, 1), (1, 7), (7, 1), (2, 2), (40, 3), (3, 40), (33, 33)])


@pytest.mark.slow
@given(
    shape=SIDES,
    form=st.sampled_from([gaussian, rank_one, all_equal, identity, rows_apart, same_rows]),
    exponent=st.integers(-39, 15),
    calibrated=st.sampled_from(["no", "identity", "singular", "dead"]),
    share=st.sampled_from([1e-4, 1e-2, 1.0, 1e3]),
)
@example((1, 1), rows_apart, -36, "no", 1e-4)  # squares below what float32 holds
def test_any_matrix_in_range_decodes_to_finite_numbers(shape, form, exponent, calibrated, share):
    generator = torch.Generator().manual_seed(0)
    delta = form(shape, generator) * 2.0**exponent
    columns = shape[1]
    covariance = None
    if calibrated != "no":
        covariance = torch.eye(columns)
        if calibrated == "singular":
            covariance = 0.99 * torch.ones(columns, columns) + 0.01 * covariance
        if calibrated == "dead":
            covariance = torch.diag(torch.full((columns,), 0.01))
            covariance[0, 0] = 0.99 * columns
    _, basis = eigenbasis(delta, covariance)
    level, rank = share * float(delta.abs().max()), min(shape)
    statistics = Statistics(covariance, basis)
    precisions = {
        "dense": CodedDense(level),
        "lowrank": CodedLowRank(rank, level),
        "hybrid": CodedHybrid(rank, level),
        "tiers": LowRankTiers(split_tiers(rank, (0.1, 0.9, 0.0))),
    }
    for name, precision in precisions.items():
        payload = memoryview(encode_matrix(delta, statistics, precision))
        decoded = decode_matrix("lowrank" if name == "tiers" else name, payload, shape)
        assert decoded.isfinite().all()
        is_fine = level <= 1e-2 * float(delta.double().square().mean().sqrt())
        if is_fine and name == "dense" and calibrated in ("no", "identity"):
            assert relative(decoded.double(), delta.double()) < 0.1


def test_what_a_reader_would_refuse_is_not_written(tmp_path):
    states(tmp_path, torch.bfloat16, gaussian, 0.01)
    pack = pack_delta(tmp_path / "target", tmp_path / "tuned", recipe="lossless", workers=1)
    for change in (
        {"provenance": {"note": "\ud800"}},
        {"tensors": pack.manifest.tensors[::-1]},
        {"evaluation": {"score": float("inf")}},
    ):
        changed = pack.manifest.model_copy(update=change)
        broken = SkillPack(changed, {n: pack.payload(n) for n in pack.manifest.payload_order})
        with pytest.raises(GraftError, match="not written, because a reader would refuse it") as no:
            broken.save(tmp_path / "x.skillpack")
        assert "\n" not in str(no.value)
        assert not Path(tmp_path / "x.skillpack").exists()
