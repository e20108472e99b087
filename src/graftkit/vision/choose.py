"""Choose the scion: which layers and features of a donor a rootstock reads within a budget.

Every cut of the donor that fits is a candidate with all its features. A cut that does not fit is
trimmed: only the most relevant features are read, as many as fit, and channels of the last layer
that nobody reads are dropped. Where the trunk will be fine-tuned, a cut that does not fit is also
thinned: all features are read, and hidden channels of its layers go. Validation decides.

The method "paper" chooses as Knowledge Grafting (arXiv 2507.19261) does: the global averages of the
last three layers of one stage, the deepest stage that fits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graftkit.config import BYTE_UNITS, parse_amount
from graftkit.errors import BudgetError
from graftkit.parallel import bfloat16_pays
from graftkit.progress import Progress
from graftkit.vision.donor import Donor
from graftkit.vision.evaluate import CurvePoint, layer_costs, measure_curve, module_cost
from graftkit.vision.images import ImageSet
from graftkit.vision.probe import (
    FeatureTable,
    LinearProbe,
    cache_key,
    fit_probe,
    l2_relevance,
    read_features,
    read_probes,
    taylor_relevance,
    write_probes,
)
from graftkit.vision.rootstock import (
    HeadFactory,
    Rootstock,
    Scion,
    exported_parameters,
    fold_rootstock,
    grow,
    hidden_head,
    logits_of,
)
from graftkit.vision.thinning import Thinner, drop_unread_channels

VALUE_BYTES = 4
"""Of a float32."""
INDEX_BYTES, NODE_BYTES = 8, 100
"""Of the index of one feature, and of the ONNX node that picks features by their indices."""
SLACK_BYTES = 256
"""A file may need this much more for other numbers of channels than the measured one has."""
THINNING_IMAGES = 512
"""Training images that the relevance of hidden channels is measured on."""
GLOBAL_AVERAGE = ("mean",)
"""Pooling of the paper, and of the usual transfer to another task."""
PAPER_HIDDEN = 256
PAPER_LAYERS = 3  # of one stage, that the paper's rootstock reads

CostKind = Literal["bytes", "ms", "macs"]
FitsBudget = Callable[[Scion], bool]
"""Whether a rootstock with this scion is expected to keep the budget."""

_UNITS: dict[str, tuple[CostKind, int]] = {
    **{unit: ("bytes", scale) for unit, scale in BYTE_UNITS.items()},
    "MS": ("ms", 1),
    "MAC": ("macs", 1),
    "KMAC": ("macs", 10**3),
    "MMAC": ("macs", 10**6),
    "GMAC": ("macs", 10**9),
}


@dataclass(frozen=True)
class CostBudget:
    """The most that a rootstock may cost.

    Attributes:
        kind: "bytes" on disk of the float32 ONNX file, "ms" of its median latency on one image, or
            "macs", multiply-accumulates of one image.
        amount: in bytes, milliseconds or multiply-accumulates.
        text: as the user wrote it.
    """

    kind: CostKind
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `0.6MB` (600,000 bytes), `500KiB`, `2ms`, `20MMAC` or `1.5GMAC`, in any case.

        Raises: BudgetError when the text is none of these, or the amount is not above zero.
        """
        parsed = parse_amount(text, _UNITS)
        if parsed is None:
            raise BudgetError(
                f"budget {text!r} is not understood; write the bytes of the ONNX file (0.6MB, "
                "500KiB), the milliseconds of one image (2ms) or its multiply-accumulates "
                "(20MMAC, 1.5GMAC)"
            )
        kind, scale = _UNITS[parsed[1]]
        amount = parsed[0] * scale
        if not 0 < amount < math.inf:
            raise BudgetError(
                f"budget {text!r} is {'zero' if amount == 0 else 'infinite'}; "
                "write an amount above zero, such as 0.6MB, 2ms or 20MMAC"
            )
        return cls(kind, amount, text.strip())

    def format(self, amount: float) -> str:
        """An amount in a unit of this budget, rounded up, so that `parse` reads enough."""
        if self.kind == "ms":
            return f"{math.ceil(amount * 100) / 100:g}ms"
        unit, scale = ("KB", 1e3) if self.kind == "bytes" else ("MMAC", 1e6)
        return f"{math.ceil(amount / scale * 100) / 100:g}{unit}"


@dataclass(frozen=True)
class DonorCuts:
    """A donor that can be cut behind any of its layers, and the accuracy and cost of every cut.

    Attributes:
        images: the classes to tell apart.
        table: pooled features of every layer, of all images.
        probes: by cut, from 1 on, a linear probe on all features up to it.
        curve: by cut, what a rootstock that reads all features up to it costs.
    """

    images: ImageSet
    donor: Donor
    table: FeatureTable
    probes: list[LinearProbe]
    curve: list[CurvePoint]

    @classmethod
    def measure(
        cls,
        images: ImageSet,
        donor: Donor,
        views: Sequence[int],
        cache: Path,
        progress: Progress,
    ) -> Self:
        """Run the donor over all images, fit the probes and measure the costs.

        Args:
            views: symmetries of the training images to read, see `features.turned`.
            cache: folder of the results, which the next run reads.
        Raises: OutputError when a cut cannot be exported, or the cache cannot be written.
        """
        table = read_features(donor, images, cache, views, progress)
        probes = _cached_probes(donor, images, table, cache, progress)
        return cls(
            images,
            donor,
            table,
            probes,
            measure_curve(donor, table, probes, images, cache, progress),
        )

    def after_fine_tuning(self, trained: Rootstock, cache: Path, progress: Progress) -> "DonorCuts":
        """The cuts of the same donor with fine-tuned layers: other features at the same cost.

        Args:
            trained: all layers of the donor with a head.
        """
        trunk = (fold_rootstock(trained) if self.donor.folded else trained).trunk
        donor = self.donor.with_layers(list(trunk))
        table = read_features(donor, self.images, cache, (0,), progress)
        probes = _cached_probes(donor, self.images, table, cache, progress)
        curve = [
            replace(point, val_accuracy=probe.val_accuracy, val_loss=probe.val_loss)
            for point, probe in zip(self.curve, probes, strict=True)
        ]
        return DonorCuts(self.images, donor, table, probes, curve)


@dataclass(frozen=True)
class ScionChoice:
    """A scion, and the donor that it is cut from, which may be thinned.

    Attributes:
        rule: "all" features up to the cut, "all, thinned", the most relevant ones by "l2" norm or
            by "taylor" expansion, or "paper".
        probe: a linear probe on the scion's features of the images as they are.
    """

    donor: Donor
    scion: Scion
    rule: str
    probe: LinearProbe

    @property
    def rank(self) -> tuple[float, int]:
        """More validation images right is better; of equals, the one that reads less."""
        return self.probe.val_accuracy, -self.scion.features


def choose_scion(
    cuts: DonorCuts, budget: CostBudget, method: str, thin: bool, progress: Progress
) -> ScionChoice:
    """The scion within the budget that names most validation images rightly.

    Args:
        method: "auto" or "paper".
        thin: whether layers may be thinned, which only fine-tuning makes up for.
    Raises: BudgetError where no rootstock fits; its message names the smallest budget that does.
    """
    head = paper_head if method == "paper" else nn.Linear
    model = CostModel(budget, cuts.donor, cuts.images.classes, cuts.curve, head)
    if method == "paper":
        candidates = _paper_candidates(cuts, model.fits)
    else:
        candidates = cut_candidates(cuts.donor, cuts.table, cuts.probes, model.fits)
    if thin and method == "auto":
        candidates += thinned_candidates(cuts, model, progress)
    if not candidates:
        raise BudgetError(
            f"no rootstock of {cuts.donor.name} by method {method} keeps {budget.text}; "
            f"the smallest needs {budget.format(_smallest(cuts, model, method))}: allow that much"
        )
    return max(candidates, key=lambda choice: choice.rank)


@dataclass(frozen=True)
class CostModel:
    """What a rootstock of this donor is expected to cost, in the unit of a budget.

    Attributes:
        curve: by cut, from 1 on, what was measured of a rootstock that reads everything.
        head: makes the head of the rootstocks.
    """

    budget: CostBudget
    donor: Donor
    classes: Sequence[str]
    curve: Sequence[CurvePoint]
    head: HeadFactory = nn.Linear

    def cost(self, scion: Scion) -> float:
        """In the unit of the budget; milliseconds are those of the cut, whatever is read."""
        point = self.curve[scion.cut - 1]
        if self.budget.kind == "ms":
            return point.p50_ms
        head = self.head(scion.features, len(self.classes))
        rootstock = assemble(self.donor, scion, self.classes, head)
        if self.budget.kind == "macs":
            return module_cost(rootstock, self.donor.size).macs
        graph = point.bytes - VALUE_BYTES * point.parameters
        return VALUE_BYTES * exported_parameters(rootstock) + graph + self._index_bytes(scion)

    def _index_bytes(self, scion: Scion) -> int:
        """Bytes that say which features are read, of layers that are not read whole; and slack."""
        pooled = [width * len(scion.poolings) for width in self.donor.channels]
        partial = [len(read) for layer, read in scion.channels.items() if len(read) < pooled[layer]]
        return sum(NODE_BYTES + INDEX_BYTES * count for count in partial) + SLACK_BYTES

    def fits(self, scion: Scion) -> bool:
        """Whether a rootstock with this scion is expected to keep the budget."""
        return self.cost(scion) <= self.budget.amount


def assemble(donor: Donor, scion: Scion, classes: Sequence[str], head: nn.Module) -> Rootstock:
    """Grow a rootstock, and drop the channels of its last layer that the head does not read.

    Raises: DonorError for a scion that the donor cannot give.
    """
    rootstock = grow(donor, scion, classes, head)
    last, width = scion.cut - 1, donor.channels[scion.cut - 1]
    read = scion.channels.get(last, ())
    keep = sorted({index % width for index in read})
    pruning = drop_unread_channels(list(rootstock.trunk), keep)
    if pruning.dropped:
        position = {channel: number for number, channel in enumerate(keep)}
        renumbered = tuple(index // width * len(keep) + position[index % width] for index in read)
        rootstock.trunk = nn.ModuleList(pruning.layers)
        rootstock.scion = replace(scion, channels={**scion.channels, last: renumbered})
    return rootstock


def cut_candidates(
    donor: Donor, table: FeatureTable, probes: Sequence[LinearProbe], fits: FitsBudget
) -> list[ScionChoice]:
    """Every cut that fits, whole; and of the others the most relevant features, as many as fit.

    Args:
        probes: by cut, from 1 on, on all features up to it.
        fits: must not turn true again when features are added.
    """
    candidates = []
    for cut, probe in enumerate(probes, start=1):
        columns = table.columns(range(cut))
        whole = table.scion(columns)
        if fits(whole):
            candidates.append(ScionChoice(donor, whole, "all", probe))
        elif fits(table.scion(columns[-1:])):  # otherwise the trunk alone is too large
            train = table.of("train", columns)
            rules = {"l2": l2_relevance(probe), "taylor": taylor_relevance(probe, train)}
            for rule, relevance in rules.items():
                read = _most_relevant(table, columns, relevance, fits)
                scion, trimmed = table.scion(read), probe_columns(table, read)
                candidates.append(ScionChoice(donor, scion, rule, trimmed))
    return candidates


def _most_relevant(
    table: FeatureTable, columns: NDArray[Any], relevance: Tensor, fits: FitsBudget
) -> NDArray[Any]:
    """As many of the most relevant columns as fit, by bisection; ascending."""
    order = columns[torch.argsort(relevance, descending=True, stable=True).numpy()]
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(table.scion(np.sort(order[:middle]))):
            low = middle
        else:
            high = middle
    # The last layer's cheapest feature fits; the most relevant one may lie deeper in a wider map.
    return np.sort(order[: max(low, 1)])


def thinned_candidates(cuts: DonorCuts, model: CostModel, progress: Progress) -> list[ScionChoice]:
    """Every cut that does not fit whole, with layers so thin that it does; all depths are read."""
    train = cuts.images.subset("train").pixels
    rows = np.linspace(0, len(train) - 1, min(THINNING_IMAGES, len(train))).astype(int)
    scarce: Literal["macs", "parameters"] = "macs" if model.budget.kind == "macs" else "parameters"
    thinner = Thinner(cuts.donor, train[rows], scarce)
    layers, candidates = len(cuts.table.widths), []
    for cut in range(1, layers + 1):
        progress("thinned layers", cut - 1, layers)
        scion = cuts.table.scion(cuts.table.columns(range(cut)))
        if model.fits(scion):
            continue
        donor = thinner.thin(cut, lambda thin, scion=scion: replace(model, donor=thin).fits(scion))  # type: ignore[misc]
        if donor is None:
            break  # deeper cuts only cost more
        probe = _probe_images(donor, scion, cuts.images)
        candidates.append(ScionChoice(donor, scion, "all, thinned", probe))
    progress("thinned layers", layers, layers)
    return candidates


def _probe_images(donor: Donor, scion: Scion, images: ImageSet) -> LinearProbe:
    """The probe of a scion whose features are in no table, on images as they are."""
    reader = grow(donor, scion, images.classes, nn.Identity())
    train, val = (
        (logits_of(reader, part.pixels, bfloat16=bfloat16_pays()), torch.from_numpy(part.labels))
        for part in map(images.subset, ("train", "val"))
    )
    return fit_probe(train, val, len(images.classes))


def _smallest(cuts: DonorCuts, model: CostModel, method: str) -> float:
    """What the cheapest rootstock costs: by method auto, one that reads one feature."""
    table = cuts.table
    if method == "paper":
        return min(map(model.cost, _paper_scions(cuts)))
    depths = range(1, len(table.widths) + 1)
    return min(model.cost(table.scion(table.columns(range(cut))[-1:])) for cut in depths)


def probe_columns(
    table: FeatureTable, columns: NDArray[Any], views: Sequence[int] = (0,)
) -> LinearProbe:
    """The probe of some columns; trained on these views of the training images."""
    classes = int(table.labels.max()) + 1
    return fit_probe(table.of("train", columns, views), table.of("val", columns), classes)


def probe_cuts(table: FeatureTable, progress: Progress) -> list[LinearProbe]:
    """By cut, from 1 on, the probe of all features up to it."""
    layers = len(table.widths)
    probes = []
    for cut in range(1, layers + 1):
        progress("probes, layers", cut - 1, layers)
        probes.append(probe_columns(table, table.columns(range(cut))))
    progress("probes, layers", layers, layers)
    return probes


def _cached_probes(
    donor: Donor, images: ImageSet, table: FeatureTable, cache: Path, progress: Progress
) -> list[LinearProbe]:
    file = cache / f"probes-{cache_key(donor, images)}.safetensors"
    probes = read_probes(file, len(table.widths))
    if probes is None:
        probes = probe_cuts(table, progress)
        write_probes(probes, file)
    return probes


def paper_head(features: int, classes: int) -> nn.Module:
    """The head of the paper: one hidden layer of 256 units."""
    return hidden_head(features, PAPER_HIDDEN, classes)


def layer_scion(table: FeatureTable, layers: Sequence[int]) -> Scion:
    """The global averages of some layers."""
    return table.scion(table.columns(layers, GLOBAL_AVERAGE), GLOBAL_AVERAGE)


def paper_layers(donor: Donor, limits: Sequence[float]) -> list[tuple[int, ...] | None]:
    """The layers that the paper's method reads of any donor: the last three of one stage.

    A stage is a run of layers whose outputs have one shape. Tokens have one shape throughout, so
    among them any three layers in a row will do. The deepest three that fit are taken; if none
    fits, fewer layers of a stage that is too short for three. For VGG16 at the paper's own share
    of the donor's parameters, 0.118, this is its third block.

    Args:
        limits: most parameters that the trunk may have, which ends with the last layer read.
    Returns: by limit, indices of the layers; None where no stage ends within the limit.
    """
    trunks = list(accumulate(cost.parameters for cost in layer_costs(donor)))
    stages = [run for run in layers_of_one_stage(donor) if not _goes_on(donor, run[-1])]

    def deepest(limit: float) -> tuple[int, ...] | None:
        fitting = [run for run in stages if trunks[run[-1]] <= limit]
        return max(fitting, key=lambda run: (len(run), run[-1]), default=None)

    return [deepest(limit) for limit in limits]


def paper_scion_of_equal_size(cuts: DonorCuts, rootstock: Rootstock) -> Scion | None:
    """What the paper would read with a trunk of at most the rootstock's parameters.

    The comparison favours the paper: a stage need not be whole, and validation picks the layer
    that the trunk ends with. None where no layer is that small.
    """
    parameters = sum(weights.numel() for weights in fold_rootstock(rootstock).trunk.parameters())
    scions = [
        layer_scion(cuts.table, layers)
        for layers, point in zip(layers_of_one_stage(cuts.donor), cuts.curve, strict=True)
        if point.trunk_parameters <= parameters
    ]

    def accuracy(scion: Scion) -> float:
        return probe_columns(cuts.table, cuts.table.columns_of(scion)).val_accuracy

    return max(scions, key=accuracy, default=None)


def layers_of_one_stage(donor: Donor) -> list[tuple[int, ...]]:
    """By the layer that the trunk ends with: up to three last layers, all of its shape."""
    runs = []
    for end, shape in enumerate(donor.shapes):
        start = end
        while start > 0 and end - start + 1 < PAPER_LAYERS and donor.shapes[start - 1] == shape:
            start -= 1
        runs.append(tuple(range(start, end + 1)))
    return runs


def _goes_on(donor: Donor, end: int) -> bool:
    """Whether the stage has more layers behind this one; among tokens every layer may end one."""
    shape = donor.shapes[end]
    return len(shape) == 3 and donor.shapes[end : end + 2] == (shape, shape)


def _paper_scions(cuts: DonorCuts) -> list[Scion]:
    """What the paper's method reads, by the number of parameters that the trunk may have."""
    reads = paper_layers(cuts.donor, [point.trunk_parameters for point in cuts.curve])
    return [layer_scion(cuts.table, layers) for layers in reads if layers is not None]


def _paper_candidates(cuts: DonorCuts, fits: FitsBudget) -> list[ScionChoice]:
    """The deepest of the paper's choices that fits, or none."""
    for scion in reversed(_paper_scions(cuts)):
        if fits(scion):
            probe = probe_columns(cuts.table, cuts.table.columns_of(scion))
            return [ScionChoice(cuts.donor, scion, "paper", probe)]
    return []
