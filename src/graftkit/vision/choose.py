"""A rootstock without what nobody reads, and whether it keeps a budget.

The networks of the Knowledge Grafting paper (arXiv 2507.19261), and its way to choose layers.

The paper's body was not to be had; both networks are the ones whose parameters are the paper's,
16,880,201 and 1,934,665 for 128 pixels and 9 classes.

Which layers and channels a rootstock takes of its donor under a budget: the scion.

Every cut of the donor that fits is a candidate with all its features, as in "all depths up to a
cut". A cut that does not fit is one with the features that matter most, as far as they fit: what
nobody reads in the last layer is dropped, and the head shrinks. Validation decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graftkit.errors import BudgetError, ConfigError
from graftkit.vision.budget import Budget
from graftkit.vision.costs import Point, layer_costs, module_cost
from graftkit.vision.donor import Donor, pool
from graftkit.vision.donors.architectures import vgg16_chain
from graftkit.vision.features import FeatureTable, scion_of
from graftkit.vision.probe import Probe, fit_probe, l2_relevance, taylor_relevance
from graftkit.vision.rootstock import HeadMaker, Rootstock, Scion, exported_parameters, grow
from graftkit.vision.thinning import drop_dead_channels

VALUE_BYTES = 4
"""Of a float32."""
INDEX_BYTES = 8
"""Of a feature's number, where the head reads some of a layer's features and not all."""
NODE_BYTES = 100
"""Of the node that picks them."""
SLACK_BYTES = 256
"""A file may need so many more for other numbers of channels than the measured one has."""


def assemble(donor: Donor, scion: Scion, classes: Sequence[str], head: nn.Module) -> Rootstock:
    """Grow a rootstock, and drop the channels of its last layer that the head does not read.

    Raises: DonorError for a scion that the donor cannot give.
    """
    rootstock = grow(donor, scion, classes, head)
    last, width = scion.cut - 1, donor.channels[scion.cut - 1]
    read = scion.channels.get(last, ())
    kept = sorted({index % width for index in read})
    pruned = drop_dead_channels(list(rootstock.trunk), kept)
    if pruned.dropped:
        place = {channel: number for number, channel in enumerate(kept)}
        counted = tuple(index // width * len(kept) + place[index % width] for index in read)
        rootstock.trunk = nn.ModuleList(pruned.layers)
        rootstock.scion = replace(scion, channels={**scion.channels, last: counted})
    return rootstock


@dataclass(frozen=True)
class Limit:
    """A budget, and what a rootstock of this donor is expected to cost against it.

    Attributes:
        points: by cut, from 1 on, what was measured of a rootstock that reads everything.
        head: of the rootstocks that are asked about.
    """

    budget: Budget
    donor: Donor
    classes: Sequence[str]
    points: Sequence[Point]
    head: HeadMaker = nn.Linear

    def cost(self, scion: Scion) -> float:
        """In the unit of the budget; milliseconds are those of the cut, whatever is read."""
        point = self.points[scion.cut - 1]
        if self.budget.kind == "ms":
            return point.p50_ms
        head = self.head(scion.features, len(self.classes))
        rootstock = assemble(self.donor, scion, self.classes, head)
        if self.budget.kind == "macs":
            return module_cost(rootstock, self.donor.size).macs
        graph = point.bytes - VALUE_BYTES * point.parameters
        return VALUE_BYTES * exported_parameters(rootstock) + graph + self._picking(scion)

    def _picking(self, scion: Scion) -> int:
        """Bytes that say which features are read, of layers that are not read whole; and slack."""
        pooled = [width * len(scion.poolings) for width in self.donor.channels]
        partly = [len(kept) for layer, kept in scion.channels.items() if len(kept) < pooled[layer]]
        return sum(NODE_BYTES + INDEX_BYTES * kept for kept in partly) + SLACK_BYTES

    def fits(self, scion: Scion) -> bool:
        """Whether a rootstock with this scion is expected to keep the budget."""
        return self.cost(scion) <= self.budget.amount


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


Fits = Callable[[Scion], bool]
"""Whether a rootstock with this scion keeps the budget."""


@dataclass(frozen=True)
class Choice:
    """A scion, how it was chosen ("all", "l2" or "taylor") and its probe on single views."""

    scion: Scion
    rule: str
    probe: Probe


def choose_scion(table: FeatureTable, curve: Sequence[Probe], fits: Fits) -> Choice | None:
    """The scion within the budget whose probe names most validation images rightly.

    Args:
        curve: by cut, from 1 on, the probe on all features up to it.
        fits: must not turn true again when features are added.
    Returns: None where no rootstock of one feature fits.
    """
    choices = [
        choice
        for cut, probe in enumerate(curve, start=1)
        for choice in _candidates(table, cut, probe, fits)
    ]
    return max(choices, key=rank, default=None)


def rank(choice: Choice) -> tuple[float, int]:
    """Of choices: more validation images right; of equals, the one that reads less."""
    return choice.probe.val_accuracy, -choice.scion.features


def _candidates(table: FeatureTable, cut: int, probe: Probe, fits: Fits) -> list[Choice]:
    columns = table.columns(range(cut))
    everything = scion_of(table, columns)
    if fits(everything):
        return [Choice(everything, "all", probe)]
    if not fits(scion_of(table, columns[-1:])):
        return []  # the trunk alone is too dear
    train = table.of("train", columns)
    rules = {"l2": l2_relevance(probe), "taylor": taylor_relevance(probe, train)}
    return [_trimmed(table, columns, rule, score, fits) for rule, score in rules.items()]


def _trimmed(
    table: FeatureTable, columns: NDArray[Any], rule: str, relevance: Tensor, fits: Fits
) -> Choice:
    """As many of the most relevant features as fit, by bisection."""
    order = columns[torch.argsort(relevance, descending=True, stable=True).numpy()]
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(scion_of(table, np.sort(order[:middle]))):
            low = middle
        else:
            high = middle
    # The last layer's cheapest feature fits; the most relevant one may lie deeper in a wider map.
    kept = np.sort(order[: max(low, 1)])
    return Choice(scion_of(table, kept), rule, probe_columns(table, kept))


def probe_columns(table: FeatureTable, columns: NDArray[Any], views: Sequence[int] = (0,)) -> Probe:
    """The probe of some columns; trained on these views of the training images."""
    classes = int(table.labels.max()) + 1
    return fit_probe(table.of("train", columns, views), table.of("val", columns), classes)


def probe_curve(table: FeatureTable, report: Callable[[str, int, int], None]) -> list[Probe]:
    """By cut, from 1 on, the probe of all features up to it."""
    layers = len(table.widths)
    curve = []
    for cut in range(1, layers + 1):
        report("probes, layers", cut - 1, layers)
        curve.append(probe_columns(table, table.columns(range(cut))))
    report("probes, layers", layers, layers)
    return curve
