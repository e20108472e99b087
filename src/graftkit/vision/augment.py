"""Random views of a batch of images: symmetries, crops, small rotations and light.

Everything geometric is one affine map and is sampled once; everything of colour is one 3 x 3
matrix and an offset. Draws depend on (seed, epoch, batch) only: training that is resumed sees what
it would have seen.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LEAST_AREA = 0.6  # share of the image that a crop shows, at least
MOST_DEGREES = 10.0  # of a rotation to either side
LIGHT = 0.2  # brightness, contrast and saturation are scaled by 1 - LIGHT to 1 + LIGHT
GREY = (0.299, 0.587, 0.114)  # luma of R, G and B, ITU-R BT.601


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, torch's random numbers follow from `numbers`; afterwards they go on as before."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    with torch.random.fork_rng():
        torch.manual_seed(int(seed[0]))
        yield


def augment(pixels: Tensor, seed: int, epoch: int, batch: int, upright: bool = False) -> Tensor:
    """A random view of every image.

    Args:
        pixels: (n, 3, size, size), uint8, RGB.
        seed, epoch, batch: decide every draw.
        upright: whether up matters; only mirrored then, otherwise also turned by 90 degrees.
    Returns: the same shape, float32, 0..255.
    """
    with seeded(seed, epoch, batch):
        maps = _geometry(len(pixels), upright).to(pixels.device)
        matrix, contrast = (part.to(pixels.device) for part in _light(len(pixels)))
    images = pixels.float()
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    images = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return _lit(images, matrix, contrast)


def _geometry(count: int, upright: bool) -> Tensor:
    """Affine maps (count, 2, 3) from the view's coordinates to the image's, both -1 to 1."""
    angle = torch.deg2rad((2 * torch.rand(count) - 1) * MOST_DEGREES)
    if not upright:
        angle = angle + torch.randint(4, (count,)) * (math.pi / 2)
    side = torch.sqrt(LEAST_AREA + (1 - LEAST_AREA) * torch.rand(count))
    mirrored = 1 - 2 * torch.randint(2, (count,)).float()
    center = (2 * torch.rand(count, 2) - 1) * (1 - side)[:, None]
    cosine, sine = side * torch.cos(angle), side * torch.sin(angle)
    rows = [cosine * mirrored, -sine, center[:, 0], sine * mirrored, cosine, center[:, 1]]
    return torch.stack(rows, dim=1).view(count, 2, 3)


def _light(count: int) -> tuple[Tensor, Tensor]:
    """Colour matrices (count, 3, 3) and the contrasts that they hold, (count, 1, 1)."""
    brightness, contrast, saturation = 1 + LIGHT * (2 * torch.rand(3, count, 1, 1) - 1)
    grey = torch.tensor(GREY).expand(3, 3)
    return brightness * contrast * (saturation * torch.eye(3) + (1 - saturation) * grey), contrast


def _lit(images: Tensor, matrix: Tensor, contrast: Tensor) -> Tensor:
    """matrix · x, with the mean grey of every image where brightness alone would put it.

    Saturation leaves grey as it is, so the mean grey of matrix · x is brightness · contrast · g.
    """
    flat = images.flatten(2)
    colored = matrix @ flat
    grey = torch.tensor(GREY, device=images.device)
    mean = torch.einsum("c,ncp->n", grey, colored)[:, None, None] / flat.shape[2]
    return (colored + (1 / contrast - 1) * mean).clamp_(0, 255).view_as(images)
