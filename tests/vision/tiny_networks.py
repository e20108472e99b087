"""Donors of a few layers and images of three colours, made here."""

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.vision.donor import Chain, Donor, Normalization
from graftkit.vision.donors.architectures import _block
from graftkit.vision.images import LabeledImages
from graftkit.vision.rootstock import Rootstock, Scion, grow, hidden_head

SIZE = 16
CLASSES = ("blue", "green", "red")


class Residual(nn.Module):
    """A depthwise and a pointwise convolution, added to their input."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU6(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.body(x)
        return x + changed


def tiny_donor(seed: int = 0, channels: tuple[int, int, int] = (8, 8, 12)) -> Donor:
    """Four layers without batch normalization, as in a donor that has it folded."""
    first, second, last = channels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (
            nn.Sequential(nn.Conv2d(3, first, 3, stride=2, padding=1), nn.ReLU6()),
            Residual(first),
            nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU6()),
            nn.Sequential(nn.Conv2d(second, last, 1), nn.ReLU6()),
        )
    names = tuple(f"f.{index}" for index in range(len(layers)))
    grey = Normalization((127.5,) * 3, (127.5,) * 3)
    return Donor(Chain("tiny", grey, layers, names, folded=True), SIZE)


def inverted_residual(seed: int = 0) -> nn.Module:
    """A block of MobileNetV2 with 8 channels, and 24 inside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _block(8, 8, 3, 1, SIZE).eval()


def wide_donor() -> Donor:
    """A stem, and two blocks of which the first hardly uses half of its hidden channels."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6())
    blocks = [inverted_residual(seed) for seed in (0, 1)]
    consumer = blocks[0].get_submodule("body.4")
    assert isinstance(consumer, nn.Conv2d)
    with torch.no_grad():
        consumer.weight[:, ::2] *= 1e-3
    grey = Normalization((127.5,) * 3, (127.5,) * 3)
    return Donor(Chain("wide", grey, (stem, *blocks), ("a", "b", "c"), folded=True), SIZE)


def tiny_rootstock(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Rootstock:
    """Three layers of the tiny donor, features of two, one hidden layer."""
    scion = Scion(3, {1: (0, 2, 5), 2: tuple(range(8))})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = hidden_head(scion.features, 8, len(classes))
    return grow(tiny_donor(seed), scion, classes, head)


def colored(count: int, seed: int = 0) -> LabeledImages:
    """Noisy images whose strongest colour is their class."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    pixels = draws.integers(0, 120, (count, 3, SIZE, SIZE), dtype=np.uint8)
    pixels[np.arange(count), 2 - labels] += 120
    return LabeledImages(tuple(f"{index}.png" for index in range(count)), labels, pixels)


def as_images(pixels: np.ndarray) -> Tensor:
    """What a network takes: float, RGB 0..255."""
    return torch.from_numpy(np.array(pixels)).float()
