"""Router keys: an ellipsoid around a pack's prompts, as bytes and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.errors import CorruptPackError, RowsError
from graftkit.route.key import COMPONENTS, MIN_PROMPTS, RouterKey
from graftkit.skillpack.manifest import RouterInfo

DIGEST = "0" * 64


def cloud(count, width=24, seed=0, center_seed=None):
    """Points around a center of length 1, spread along a few directions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.Generator().manual_seed(seed if center_seed is None else center_seed)
    center = torch.nn.functional.normalize(torch.randn(width, generator=centers), dim=0)
    axes = torch.randn(5, width, generator=centers) * 0.05
    noise = torch.randn(count, width, generator=generator) * 0.01
    return center + torch.randn(count, 5, generator=generator) @ axes + noise


def fitted(count=60, width=24, seed=0):
    return RouterKey.fit(cloud(count, width, seed), 2, DIGEST)


@settings(max_examples=25)
@given(st.integers(MIN_PROMPTS, 200), st.integers(2, 40), st.integers(0, 99))
def test_a_key_comes_back_from_its_bytes_with_the_same_scores(count, width, seed):
    key = fitted(count, width, seed)
    content = key.to_bytes()
    assert len(content) == key.info.nbytes
    again = RouterKey.from_bytes(key.info, content)
    assert again.to_bytes() == content
    for state in cloud(5, width, seed + 1):
        assert again.distance(state) == key.distance(state)
        assert again.score(0.5) == key.score(0.5)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_distance_and_score_are_those_of_a_gaussian(seed):
    generator = torch.Generator().manual_seed(seed)
    width, count = 6, 3
    variances = torch.rand(count + 1, generator=generator) + 0.1
    mean = torch.randn(width, generator=generator).half()
    directions = torch.eye(width)[:count].mul(100).to(torch.int8)
    info = RouterInfo(layer=1, width=width, components=count, prompts=20, blake3=DIGEST)
    key = RouterKey(info, mean, directions, variances)
    covariance = torch.diag(torch.cat([variances[1:], variances[:1].expand(width - count)]))
    state = torch.randn(width, generator=generator)
    moved = (state - mean.float()).double()
    expected = float(moved @ torch.linalg.inv(covariance.double()) @ moved)
    assert key.distance(state) == pytest.approx(expected, rel=1e-6)
    logs = float(torch.logdet(covariance.double())) / width
    assert key.score(expected) == pytest.approx(-(expected + logs) / 2, rel=1e-6)


def accepted(key, states):
    return sum(key.distance(state) <= 1 for state in states) / len(states)


def test_a_key_accepts_prompts_like_its_own_and_no_others():
    key = fitted(60)
    assert accepted(key, cloud(300, seed=5, center_seed=0)) >= 0.95
    for center in range(1, 20):
        assert accepted(key, cloud(10, seed=5, center_seed=center)) == 0
    assert key.distance(key.mean) == 0


def test_tight_and_wide_skills_accept_as_many_of_their_prompts():
    states, others = cloud(60), cloud(200, seed=9, center_seed=0)
    center = states.mean(dim=0)
    wide = RouterKey.fit(center + 3 * (states - center), 2, DIGEST)
    tight = RouterKey.fit(states, 2, DIGEST)
    assert accepted(wide, center + 3 * (others - center)) == accepted(tight, others) >= 0.95


def test_a_narrow_skill_fits_better_inside_a_broad_one():
    states = cloud(60)
    center = states.mean(dim=0)
    wide, tight = RouterKey.fit(center + 3 * (states - center), 2, DIGEST), fitted(60)
    for state in cloud(50, seed=9, center_seed=0):
        assert wide.distance(state) < tight.distance(state)
        assert wide.score(wide.distance(state)) < tight.score(tight.distance(state))


def test_the_same_prompts_give_the_same_bytes_on_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert fitted().to_bytes() == fitted().to_bytes()
        several = fitted().to_bytes()
    finally:
        torch.set_num_threads(threads)
    assert fitted().to_bytes() == several


def test_a_key_is_small():
    sizes = {
        width: RouterInfo(
            layer=1, width=width, components=COMPONENTS, prompts=200, blake3=DIGEST
        ).nbytes
        for width in (768, 8192)
    }
    assert sizes == {768: 7_716, 8192: 81_956}
    assert fitted(width=768).info.nbytes == sizes[768]


def test_too_few_prompts_are_refused():
    RouterKey.fit(cloud(MIN_PROMPTS), 1, DIGEST)
    with pytest.raises(RowsError, match="19 different prompts"):
        RouterKey.fit(cloud(MIN_PROMPTS - 1), 1, DIGEST)


def test_prompts_that_are_all_alike_are_refused():
    with pytest.raises(RowsError, match="alike"):
        RouterKey.fit(cloud(1).expand(30, -1), 1, DIGEST)


@pytest.mark.parametrize("change", [-1, 1, -3_000])
def test_a_key_of_another_length_is_refused(change):
    key = fitted(width=400)
    content = (key.to_bytes() + b"\0")[: key.info.nbytes + change]
    with pytest.raises(CorruptPackError, match="bytes"):
        RouterKey.from_bytes(key.info, content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variances", 0.0),
        ("variances", -1.0),
        ("variances", float("nan")),
        ("variances", float("inf")),
        ("mean", float("nan")),
        ("mean", float("-inf")),
        ("directions", 0),
    ],
)
def test_a_key_with_a_number_that_is_no_scale_is_refused(field, value):
    key = fitted()
    getattr(key, field)[1] = value
    with pytest.raises(CorruptPackError, match="scale"):
        RouterKey.from_bytes(key.info, key.to_bytes())


@given(st.binary(min_size=46, max_size=46))
def test_any_bytes_are_a_key_with_finite_scores_or_are_refused(content):
    info = RouterInfo(layer=1, width=10, components=1, prompts=20, blake3=DIGEST)
    assert info.nbytes == 38
    try:
        key = RouterKey.from_bytes(info, content[:38])
    except CorruptPackError:
        return
    assert key.distance(torch.ones(10)) >= 0
    assert key.to_bytes() == content[:38]


def test_a_key_that_its_reader_would_refuse_is_not_made():
    for scale in (1e6, 1e-30):
        with pytest.raises(RowsError) as refused:
            RouterKey.fit(scale * cloud(40), 2, DIGEST)
        assert "\n" not in str(refused.value)
