"""VGG16 (arXiv 1409.1556, table 1, column D): the donor of the Knowledge Grafting paper."""

from torch import nn

from graftkit.errors import DonorError
from graftkit.vision.donors.chain import IMAGENET, Chain

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and number of the 3x3 convolutions of each block; a max-pooling ends a block."""


def vgg16_chain(pretrained: bool) -> Chain:
    """The 13 convolution layers. A block's pooling opens the first layer of the next block.

    So the output of a layer is what its convolution and ReLU give, as the paper reads it.
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
            layers.append(nn.Sequential(*opening, _convolution(width, channels), nn.ReLU()))
            names.append(f"block{block}_conv{number}")
            width = channels
    return Chain("vgg16", IMAGENET, tuple(layers), tuple(names))


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    # torch's own start is too small for thirteen layers without normalization (arXiv 1502.01852).
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
