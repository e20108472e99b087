"""A rootstock without what nobody reads, and whether it keeps a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from graftkit.vision.budget import Budget
from graftkit.vision.costs import module_cost
from graftkit.vision.curve import Point
from graftkit.vision.donor import Donor
from graftkit.vision.heads import HeadMaker
from graftkit.vision.norms import exported_parameters
from graftkit.vision.pruning import drop_dead_channels
from graftkit.vision.rootstock import Rootstock, Scion, grow

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
