"""A shared part and private parts: what each skill gets back, and what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.compress.codecs import matrices
from graftkit.delta import Checkpoint
from graftkit.errors import PackMismatchError
from graftkit.fuse.families import emr, tall, twin
from graftkit.fuse.family import build_family
from graftkit.packing import pack_delta


@st.composite
def deltas(draw_from, least=1, shapes=((1,), (9,), (4, 6), (2, 3, 5))):
    shape = draw_from(st.sampled_from(list(shapes)))
    count = draw_from(st.integers(least, 4))
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 10**6)))
    return [
        torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.2)
        for _ in range(count)
    ]


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-9))


@given(deltas())
def test_a_family_of_one_is_its_pack(case):
    delta = case[0]
    assert torch.equal(emr([delta]).delta(0), delta)
    assert torch.equal(tall([delta], 1.0, [0.4]).delta(0), delta)
    assert torch.equal(twin([delta], 1.0, 0.1, "matrix").delta(0), delta)


@given(deltas(2), st.randoms())
@settings(deadline=None)
def test_the_order_of_packs_changes_no_skill(case, random):
    order = list(range(len(case)))
    random.shuffle(order)
    shuffled = [case[i] for i in order]
    thresholds = [0.2 + 0.1 * i for i in range(len(case))]
    pairs = [
        (emr(case), emr(shuffled)),
        (tall(case, 0.5, thresholds), tall(shuffled, 0.5, [thresholds[i] for i in order])),
    ]
    for before, after in pairs:
        for place, index in enumerate(order):
            torch.testing.assert_close(after.delta(place), before.delta(index))


@given(deltas(), st.sampled_from([2.0**-20, 0.25, -1.0, 4.0]))
def test_a_family_of_scaled_deltas_is_the_scaled_family(case, factor):
    scaled = [factor * delta for delta in case]
    thresholds = [0.4] * len(case)
    for index in range(len(case)):
        assert torch.equal(emr(scaled).delta(index), factor * emr(case).delta(index))
        found = tall(scaled, 0.5, thresholds).delta(index)
        assert torch.equal(found, factor * tall(case, 0.5, thresholds).delta(index))


@given(deltas(2))
def test_emr_gives_every_skill_the_size_and_only_signs_of_its_own_delta(case):
    family = emr(case)
    for index, delta in enumerate(case):
        found = family.delta(index)
        assert (found * delta >= 0).all()
        if found.any():
            torch.testing.assert_close(found.abs().sum(), delta.abs().sum())


@given(deltas(2))
def test_a_tall_mask_keeps_entries_that_are_nearer_to_the_shared_part(case):
    family = tall(case, 1.0, [1.0] * len(case))
    shared = sum(case)
    for index, delta in enumerate(case):
        kept = family.delta(index) != 0
        nearer = delta.abs() > (shared - delta).abs()
        torch.testing.assert_close(kept, nearer & (shared != 0))


@given(deltas(3))
def test_consensus_keeps_what_enough_masks_keep(case):
    thresholds = [0.4] * len(case)
    free, agreed = tall(case, 0.5, thresholds), tall(case, 0.5, thresholds, consensus=2)
    votes = torch.stack(free.masks).sum(dim=0)
    assert torch.equal(agreed.shared != 0, (free.shared != 0) & (votes >= 2))
    same = tall(case, 0.5, thresholds, consensus=1)
    assert all(torch.equal(same.delta(i), free.delta(i)) for i in range(len(case)))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("matrix", (8, 6)),
        ("transposed", (8, 6)),
        ("stack", (3, 8, 6)),
        ("stack_transposed", (3, 8, 6)),
    ],
)
def test_twin_keeps_the_best_rank_of_every_rest(layout, shape):
    torch.manual_seed(0)
    case = [torch.randn(shape) for _ in range(3)]
    family = twin(case, 0.3, 0.5, layout)
    for index, delta in enumerate(case):
        rest, found = delta - 0.3 * sum(case), family.delta(index) - family.shared
        pairs = zip(matrices(rest, layout), matrices(found, layout), strict=True)
        for before, after in pairs:
            singular = torch.linalg.svdvals(before)
            torch.testing.assert_close((before - after).norm(), singular[3:].norm())


@given(deltas(2, shapes=((9,), (4, 6))))
@settings(deadline=None)
def test_twin_of_full_rank_is_every_delta(case):
    family = twin(case, 0.3, 1.0, "matrix")
    for index, delta in enumerate(case):
        torch.testing.assert_close(family.delta(index), delta, rtol=1e-4, atol=1e-5)


SPLITS = {
    "emr": lambda deltas, layout: emr(deltas),
    "tall": lambda deltas, layout: tall(deltas, 0.4, [0.4] * len(deltas)),
    "twin": lambda deltas, layout: twin(deltas, 0.3, 0.1, layout),
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_stored_family_is_the_computed_one_up_to_the_rounding_of_bf16(split, skills):
    family = build_family(skills.target, skills.exact, SPLITS[split])
    target = Checkpoint.open(skills.target)
    assert family.skills == ("skill-0", "skill-1", "skill-2")
    for name in target.tensors:
        before = target.read(name)
        deltas = [pack.delta(name, before) for pack in skills.exact]
        computed = SPLITS[split](deltas, "matrix")
        for skill in range(3):
            assert error(family.delta(skill, name), computed.delta(skill)) < 2**-6


def test_masks_take_one_bit_an_entry_and_the_shared_part_sixteen(skills):
    target = Checkpoint.open(skills.target)
    masked = build_family(skills.target, skills.exact, SPLITS["tall"])
    bits = sum(-(-info.numel // 8) for info in target.tensors.values())
    assert masked.shared_bytes == 2 * target.parameters
    assert masked.private_bytes == [bits] * 3
    assert masked.nbytes == 2 * target.parameters + 3 * bits
    scaled = build_family(skills.target, skills.exact, SPLITS["emr"])
    assert scaled.private_bytes == [bits + 4 * len(target.tensors)] * 3


def test_the_rests_of_twin_take_their_factors(skills):
    family = build_family(skills.target, skills.exact, SPLITS["twin"])
    expected = 0
    for info in Checkpoint.open(skills.target).tensors.values():
        rank = max(1, int(0.1 * min(info.shape)))
        expected += 2 * (rank * sum(info.shape) if len(info.shape) == 2 else info.numel)
    assert family.private_bytes == [expected] * 3


def test_tensors_that_no_pack_changes_cost_nothing_and_stay(skills, tmp_path):
    pack = pack_delta(skills.target, skills.target, recipe="lossless", workers=1)
    family = build_family(skills.target, [pack, pack], SPLITS["emr"])
    assert family.nbytes == 0
    name = "lm_head.weight"
    assert torch.equal(
        family.delta(1, name), torch.zeros(Checkpoint.open(skills.target).read(name).shape)
    )


def test_a_pack_of_another_target_is_no_member(skills):
    stranger = pack_delta(skills.tuned[1], skills.tuned[0], recipe="lossless", workers=1)
    with pytest.raises(PackMismatchError, match="other values"):
        build_family(skills.target, [skills.exact[0], stranger], SPLITS["emr"])
