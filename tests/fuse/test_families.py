"""Maths of families: what is shared, and what a skill gets back of it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from graftkit.fuse.families import emr_private, emr_shared, tall_private
from graftkit.fuse.rules import task_arithmetic

FACTORS = st.sampled_from([2.0**-20, 0.25, -1.0, 4.0])


@st.composite
def deltas(draw_from, least=1, shapes=((1,), (9,), (4, 6), (2, 3, 5))):
    shape = draw_from(st.sampled_from(list(shapes)))
    count = draw_from(st.integers(least, 4))
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 10**6)))
    return [
        torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.2)
        for _ in range(count)
    ]


def emr(case, shared=None):
    """Every skill's delta out of an EMR family."""
    shared = emr_shared(case) if shared is None else shared
    pairs = [emr_private(delta, shared) for delta in case]
    return [scale * mask * shared for mask, scale in pairs]


def tall(case, scaling, threshold):
    """Every skill's delta out of a TALL family."""
    shared = task_arithmetic(case, [scaling] * len(case))
    return [tall_private(delta, shared, threshold) * shared for delta in case]


@given(deltas())
def test_a_family_of_one_is_its_delta(case):
    assert torch.equal(emr(case[:1])[0], case[0])
    assert torch.equal(tall(case[:1], 1.0, 0.4)[0], case[0])


@given(deltas(2), st.randoms())
def test_the_order_of_packs_changes_no_skill(case, random):
    order = list(range(len(case)))
    random.shuffle(order)
    shuffled = [case[i] for i in order]
    for family in (emr, lambda some: tall(some, 0.5, 0.4)):
        before, after = family(case), family(shuffled)
        for place, index in enumerate(order):
            torch.testing.assert_close(after[place], before[index])


@given(deltas(), FACTORS)
def test_a_family_of_scaled_deltas_is_the_scaled_family(case, factor):
    scaled = [factor * delta for delta in case]
    for family in (emr, lambda some: tall(some, 0.5, 0.4)):
        for found, expected in zip(family(scaled), family(case), strict=True):
            assert torch.equal(found, factor * expected)


@given(deltas(2))
def test_emr_gives_every_skill_the_size_and_only_signs_of_its_own_delta(case):
    for found, delta in zip(emr(case), case, strict=True):
        assert (found * delta >= 0).all()
        if found.any():
            torch.testing.assert_close(found.abs().sum(), delta.abs().sum())


@given(deltas(2), st.integers(0, 10**6))
def test_emr_keeps_that_size_whatever_coding_made_of_the_shared_part(case, seed):
    shared = emr_shared(case)
    noise = torch.randn(shared.shape, generator=torch.Generator().manual_seed(seed))
    for found, delta in zip(emr(case, shared + 0.3 * noise), case, strict=True):
        assert (found * delta >= 0).all()
        if found.any():
            torch.testing.assert_close(found.abs().sum(), delta.abs().sum())


def test_emr_masks_numbers_whose_product_vanishes():
    tiny = torch.tensor([1e-30, -1e-30])
    mask, scale = emr_private(tiny, tiny)
    assert mask.all()
    assert scale == 1


@given(deltas(2))
def test_a_tall_mask_of_threshold_one_keeps_what_is_nearer_to_the_shared_part(case):
    shared = sum(case)
    for delta in case:
        kept = tall_private(delta, shared, 1.0)
        assert torch.equal(kept, delta.abs() > (shared - delta).abs())


@given(deltas(2), st.floats(0.1, 0.9))
def test_a_larger_threshold_keeps_no_entry_that_a_smaller_one_drops(case, threshold):
    shared = sum(case)
    for delta in case:
        assert (tall_private(delta, shared, threshold) >= tall_private(delta, shared, 1.0)).all()
