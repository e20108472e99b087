"""The networks of the Knowledge Grafting paper (arXiv 2507.19261), and its way to choose layers.

The paper's body was not to be had; both networks are the ones whose parameters are the paper's,
16,880,201 and 1,934,665 for 128 pixels and 9 classes.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from graftkit.errors import BudgetError, ConfigError
from graftkit.vision.costs import layer_costs
from graftkit.vision.donor import Donor, pool
from graftkit.vision.donors.vgg import vgg16_chain

_HIDDEN = 256
_READ = (4, 5, 6)  # the convolutions of VGG16's third block
_READ_AT_ONCE = 3  # layers that the paper's rootstock reads
_TRUNK_SHARE = 1 / 8  # of the donor: the paper's trunk is .118 of VGG16's convolutions


class PaperRootstock(nn.Module):
    """VGG16 up to block 3, global averages of that block's three convolutions, two dense layers."""

    def __init__(self, classes: int):
        super().__init__()
        self.trunk = nn.ModuleList(vgg16_chain(pretrained=False).layers[: max(_READ) + 1])
        self.head = nn.Sequential(
            nn.Linear(256 * len(_READ), _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of normalized images (n, 3, size, size)."""
        averages = []
        for index, layer in enumerate(self.trunk):
            x = layer(x)
            if index in _READ:
                averages.append(pool(x))
        logits: Tensor = self.head(torch.cat(averages, dim=1))
        return logits


def paper_donor(classes: int, size: int = 128) -> nn.Sequential:
    """VGG16 without its own classifier, its map flattened, two dense layers of 256 and one more.

    Args:
        classes: outputs. size: pixels of a side of the normalized images that it takes.
    Raises: ConfigError for a size below 32, of which five poolings leave nothing.
    """
    side = size // 32
    if side < 1:
        raise ConfigError(f"VGG16 halves an image five times and needs 32 pixels, found {size}")
    chain = vgg16_chain(pretrained=False)
    head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512 * side * side, _HIDDEN), nn.ReLU()]
    head += [nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, classes)]
    return nn.Sequential(*chain.layers, *head)


def paper_scion(donor: Donor, below_parameters: int | None = None) -> tuple[int, tuple[int, ...]]:
    """The layers that the paper's method would read of any donor: the last three of one stage.

    A stage is a run of layers whose outputs have one shape; tokens have one shape throughout, so
    there any three layers in a row will do. The deepest three that fit are taken, or, if none
    does, fewer layers of a stage that is too short for three. For VGG16 at the paper's own share
    of the donor this is its third block.

    Args:
        below_parameters: most parameters the kept layers may have; None: an eighth of the donor.
    Returns: layers to keep (the cut), and indices of the layers to read.
    Raises: BudgetError when no stage ends within that many parameters.
    """
    trunks = list(accumulate(cost.parameters for cost in layer_costs(donor)))
    limit = trunks[-1] * _TRUNK_SHARE if below_parameters is None else below_parameters
    choices = [read for read in reads_of_one_stage(donor) if not _goes_on(donor, read[-1])]
    fitting = [read for read in choices if trunks[read[-1]] <= limit]
    if not fitting:
        smallest = trunks[choices[0][-1]]
        raise BudgetError(
            f"no stage of {donor.name} ends within {int(limit):,} parameters; "
            f"the first one has {smallest:,}: allow that many"
        )
    read = max(fitting, key=lambda layers: (len(layers), layers[-1]))
    return read[-1] + 1, read


def reads_of_one_stage(donor: Donor) -> list[tuple[int, ...]]:
    """By the layer that the trunk ends with: up to three last layers, all of its shape."""
    reads = []
    for end, shape in enumerate(donor.shapes):
        start = end
        while start > 0 and end - start + 1 < _READ_AT_ONCE and donor.shapes[start - 1] == shape:
            start -= 1
        reads.append(tuple(range(start, end + 1)))
    return reads


def _goes_on(donor: Donor, end: int) -> bool:
    """Whether the stage has more layers behind this one; among tokens every layer may end one."""
    shape = donor.shapes[end]
    return len(shape) == 3 and donor.shapes[end : end + 2] == (shape, shape)
