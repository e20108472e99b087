"""Random views of images: what they change, what they leave, and that seeds decide them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.vision.training import LIGHT, augment

SIDE = 24


def split_images(count: int) -> torch.Tensor:
    """A bright upper half over a dark lower one."""
    pixels = torch.full((count, 3, SIDE, SIDE), 40, dtype=torch.uint8)
    pixels[:, :, : SIDE // 2] = 200
    return pixels


def bright_sides(views: torch.Tensor) -> set[str]:
    """The brightest side of each view, by the mean of its outermost quarter."""
    quarter = SIDE // 4
    sides = {
        "top": views[:, :, :quarter],
        "bottom": views[:, :, -quarter:],
        "left": views[:, :, :, :quarter],
        "right": views[:, :, :, -quarter:],
    }
    means = torch.stack([side.mean((1, 2, 3)) for side in sides.values()])
    return {list(sides)[index] for index in means.argmax(dim=0).tolist()}


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 99), st.integers(0, 99)))
def test_seed_epoch_and_batch_decide_a_view_and_nothing_else_does(
    numbers: tuple[int, int, int],
) -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    first = augment(pixels, *numbers)
    state = torch.get_rng_state()
    assert torch.equal(augment(pixels, *numbers), first)
    assert torch.equal(torch.get_rng_state(), state)
    for index in range(3):
        other = list(numbers)
        other[index] += 1
        assert not torch.equal(augment(pixels, *other), first)


def test_views_are_floats_of_the_same_range_and_shape() -> None:
    pixels = torch.randint(0, 2, (64, 3, SIDE, SIDE), dtype=torch.uint8) * 255
    views = augment(pixels, 0, 0, 0)
    assert views.shape == pixels.shape
    assert views.dtype == torch.float32
    assert views.min() == 0
    assert views.max() == 255


def test_an_image_of_one_grey_stays_of_one_grey_and_about_as_bright() -> None:
    views = augment(torch.full((200, 3, SIDE, SIDE), 100, dtype=torch.uint8), 0, 0, 0)
    levels = views.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(views, levels.expand_as(views), atol=1e-2, rtol=0)
    assert levels.min() >= 100 * (1 - LIGHT) - 1e-2
    assert levels.max() <= 100 * (1 + LIGHT) + 1e-2
    assert levels.max() - levels.min() > 30


def test_contrast_keeps_the_mean_grey_apart_from_brightness() -> None:
    """A view's mean over its spread tells contrast; its mean alone tells brightness."""
    views = augment(split_images(200), 0, 0, 0, upright=True)
    spread = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
    assert spread.min() < 130
    assert spread.max() > 190
    assert (views.mean((1, 2, 3)) / 120).max() < 1.5


@pytest.mark.parametrize(
    ("upright", "sides"), [(True, {"top"}), (False, {"top", "bottom", "left", "right"})]
)
def test_upright_images_are_not_turned_and_the_others_are(upright: bool, sides: set[str]) -> None:
    assert bright_sides(augment(split_images(200), 0, 0, 0, upright=upright)) == sides


def test_upright_images_are_mirrored_about_half_of_the_time() -> None:
    pixels = split_images(200).transpose(2, 3).contiguous()
    views = augment(pixels, 0, 0, 0, upright=True)
    assert bright_sides(views) == {"left", "right"}
    left = (views[..., : SIDE // 2].mean((1, 2, 3)) > views[..., SIDE // 2 :].mean((1, 2, 3))).sum()
    assert 70 < left < 130
