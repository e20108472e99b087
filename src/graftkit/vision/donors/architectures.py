"""Architectures that graftkit builds itself: MobileNetV2 1.0 and VGG16.

MobileNetV2 (arXiv 1801.04381, table 2) comes from an .npz file, its batch normalization folded.
The file holds float16 arrays in torch's shapes: `f.0` is the stem, `f.1` to `f.17` are inverted
residuals, `f.18` is the last 1x1 convolution; `fc`, the classifier, is checked and left out.

VGG16 (arXiv 1409.1556, table 1, column D) is the donor of the Knowledge Grafting paper; it comes
without weights.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.errors import DonorError
from graftkit.vision.donor import IMAGENET, Chain, Normalization, reason

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, number of blocks, stride of the first one."""
STEM, LAST = 32, 1280
"""Channels of the first convolution and of the last."""
NORMALIZATION = Normalization((127.5,) * 3, (127.5,) * 3)
"""x / 127.5 − 1."""
_OUTPUTS = 1001

_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, and add the input where the shapes allow it.

    Attributes:
        body: the convolutions with their activations. skip: applied to what is added; None adds
            nothing.
    """

    def __init__(self, body: nn.Sequential, skip: nn.Module | None):
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        """Output of the block for a map (n, C, H, W)."""
        out: Tensor = self.body(x)
        return out if self.skip is None else out + self.skip(x)


def mobilenet_chain(path: Path, size: int, pretrained: bool) -> Chain:
    """The 19 layers of the file, for images of `size` pixels a side.

    Args:
        pretrained: False leaves random values.
    Raises: DonorError for a file that is missing, damaged, or not this network.
    """
    layers = _layers(size)
    parameters = dict(_named_parameters(layers))
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    classifier = {"fc.weight": (_OUTPUTS, LAST), "fc.bias": (_OUTPUTS,)}
    try:
        _check_headers(path, shapes | classifier)
        with np.load(path, allow_pickle=False) as archive:
            values = {name: archive[name] for name in shapes}
    except _UNREADABLE as error:
        raise DonorError(
            f"{path}: cannot be read as an .npz file ({reason(error)}); fetch it again"
        ) from error
    if pretrained:
        for name, parameter in parameters.items():
            parameter.data.copy_(torch.from_numpy(values[name]))
    names = tuple(f"f.{index}" for index in range(len(layers)))
    return Chain(path.stem, NORMALIZATION, tuple(layers), names, folded=True)


def _layers(size: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Sequential(*_convolution(3, STEM, 3, 2, side=size), nn.ReLU6())]
    side, width = -(-size // 2), STEM
    for expansion, channels, blocks, first_stride in STAGES:
        for number in range(blocks):
            stride = first_stride if number == 0 else 1
            layers.append(_block(width, channels, expansion, stride, side))
            side, width = -(-side // stride), channels
    layers.append(nn.Sequential(*_convolution(width, LAST), nn.ReLU6()))
    return layers


def _block(inputs: int, outputs: int, expansion: int, stride: int, side: int) -> InvertedResidual:
    wide = inputs * expansion
    expand = [*_convolution(inputs, wide), nn.ReLU6()] if expansion > 1 else []
    depthwise = [*_convolution(wide, wide, 3, stride, wide, side), nn.ReLU6()]
    body = nn.Sequential(*expand, *depthwise, *_convolution(wide, outputs))
    return InvertedResidual(body, nn.Identity() if stride == 1 and inputs == outputs else None)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, side: int = 1
) -> list[nn.Module]:
    """A convolution padded as TensorFlow's SAME does it for a map of `side` pixels.

    An even side under stride 2 is padded on the right and at the bottom only.
    """
    lopsided = stride == 2 and side % 2 == 0
    padding = 0 if lopsided else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
    return [nn.ZeroPad2d((0, 1, 0, 1)), conv] if lopsided else [conv]


def _named_parameters(layers: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its name in the file."""
    for index, layer in enumerate(layers):
        convolutions = [part for part in layer.modules() if isinstance(part, nn.Conv2d)]
        for number, conv in enumerate(convolutions):
            unit = f"b.{number}.conv" if isinstance(layer, InvertedResidual) else "conv"
            for kind, parameter in conv.named_parameters():
                yield f"f.{index}.{unit}.{kind}", parameter


def _check_headers(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the file holds these arrays in float16, before any of their bytes is read."""
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        odd = sorted(names ^ expected.keys())
        if odd:
            state = "lacks" if odd[0] in expected else "also holds"
            raise DonorError(
                f"{path}: {state} {odd[0]} and is not the MobileNetV2 1.0 that graftkit reads; "
                f"expected {len(expected)} arrays, f.0.conv.weight to fc.bias"
            )
        for name, shape in expected.items():
            with archive.open(f"{name}.npy") as file:
                header = _header(file)
            if header != (shape, np.dtype(np.float16)):
                raise DonorError(
                    f"{path}: {name} is {header[1]} {header[0]}, expected float16 {shape}; this "
                    "is not the MobileNetV2 1.0 that graftkit reads"
                )


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of the 3x3 convolutions of each block; a max-pooling ends a block."""


def vgg16_chain(pretrained: bool) -> Chain:
    """The 13 convolution layers. A block's pooling opens the first layer of the next block.

    So the output of a layer is that of its convolution and ReLU, as the paper reads it.
    Raises: DonorError when `pretrained`: no weights come with graftkit.
    """
    if pretrained:
        raise DonorError(
            "graftkit brings no weights of VGG16; use timm:vgg16, a module of your own, or the "
            "architecture without weights (pretrained=False)"
        )
    layers: list[nn.Module] = []
    names = []
    width = 3
    for block, (channels, depth) in enumerate(BLOCKS, start=1):
        for number in range(1, depth + 1):
            opening = [nn.MaxPool2d(2)] if number == 1 and block > 1 else []
            layers.append(nn.Sequential(*opening, _vgg_convolution(width, channels), nn.ReLU()))
            names.append(f"block{block}_conv{number}")
            width = channels
    return Chain("vgg16", IMAGENET, tuple(layers), tuple(names))


def _vgg_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    # torch's default is too small for thirteen layers without normalization (arXiv 1502.01852).
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
