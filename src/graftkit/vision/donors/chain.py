"""A network as a chain of layers, and the normalization of the images it was trained on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.errors import DonorError


@dataclass(frozen=True)
class Normalization:
    """How a network wants its images: input = (x − mean) / std, for RGB values x of 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, image: Tensor) -> Tensor:
        """Normalize images (n, 3, size, size), float, RGB 0..255."""
        mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation of ImageNet's training images, as torchvision publishes them."""


@dataclass(frozen=True)
class Chain:
    """A donor before it is opened at a size: layer i maps the output of layer i - 1 to its own.

    normalization: None where the network does not say it.
    folded: batch normalization is folded into the convolutions.
    """

    name: str
    normalization: Normalization | None
    layers: tuple[nn.Module, ...]
    layer_names: tuple[str, ...]
    folded: bool = False


def normalization_of(
    settings: Mapping[str, Any], mean: str, std: str, rescale: float
) -> Normalization | None:
    """The normalization written in a preprocessor's settings; None where there is none.

        (rescale · x − mean) / std = (x − mean / rescale) / (std / rescale)

    Args:
        settings: what a preprocessor's file says.
        mean, std: keys of the three numbers for red, green and blue.
        rescale: what RGB values of 0..255 are multiplied with before; mostly 1/255.
    Raises: DonorError for numbers that cannot be a mean and a standard deviation.
    """
    if settings.get(mean) is None or settings.get(std) is None:
        return None
    try:
        shift, scale = (_three(settings[key], rescale) for key in (mean, std))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise DonorError(
            f"the donor's {mean} and {std} must be three numbers each, found {settings[mean]!r} "
            f"and {settings[std]!r}; correct its preprocessor settings"
        ) from error
    return Normalization(shift, scale)


def _three(values: float | Iterable[float], rescale: float) -> tuple[float, float, float]:
    listed = [values] * 3 if isinstance(values, int | float) else list(values)
    red, green, blue = (float(value) / rescale for value in listed)
    return red, green, blue


def reason(error: BaseException) -> str:
    """First line of what an error of another library says, for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@torch.no_grad()
def run_layer(layer: nn.Module, name: str, x: Tensor) -> Any:
    """Output of one layer; DonorError where it does not take what comes before it."""
    try:
        return layer(x)
    # Any network may stand here, and it may raise anything.
    except Exception as error:
        raise DonorError(
            f"layer {name} does not take an input of {tuple(x.shape)} ({reason(error)}); "
            "use the size that the donor was made for, or a larger one"
        ) from error
