"""What a scion is chosen from, and the choice under a budget."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from graftkit.errors import BudgetError
from graftkit.parallel import bfloat16_pays
from graftkit.vision.assembly import Limit
from graftkit.vision.budget import Budget
from graftkit.vision.curve import Point, measure_points
from graftkit.vision.donor import Donor
from graftkit.vision.features import FeatureTable, cache_key, read_features
from graftkit.vision.frozen import PAPER_HIDDEN, layer_scion
from graftkit.vision.heads import hidden_head
from graftkit.vision.images import ImageSet, Report
from graftkit.vision.norms import fold_rootstock
from graftkit.vision.paper import paper_scion, reads_of_one_stage
from graftkit.vision.probe import Probe, fit_probe
from graftkit.vision.probe_file import read_probes, write_probes
from graftkit.vision.rootstock import Rootstock, Scion, grow
from graftkit.vision.scoring import logits_of
from graftkit.vision.selection import (
    Choice,
    choose_scion,
    columns_of,
    probe_columns,
    probe_curve,
    rank,
    scion_of,
)
from graftkit.vision.thinning import Thinner, Unit

MEASURED_IMAGES = 512
"""Training images that the worth of hidden channels is measured on."""
THINNED = "all, thinned"
SINGLE_VIEW = (0,)


@dataclass(frozen=True)
class Ground:
    """What every choice is made from: images, donor, features, and the curve of cuts."""

    images: ImageSet
    donor: Donor
    table: FeatureTable
    probes: list[Probe]
    points: list[Point]


def lay_ground(
    images: ImageSet, donor: Donor, views: tuple[int, ...], cache: Path, report: Report
) -> Ground:
    """Features of every layer, and the curve; from the cache as far as it goes."""
    table = read_features(donor, images, cache, views, report)
    probes = _probes(donor, images, table, cache, report)
    points = measure_points(donor, table, probes, images, cache, report)
    return Ground(images, donor, table, probes, points)


def tuned_ground(ground: Ground, tuned: Rootstock, cache: Path, report: Report) -> Ground:
    """The same after the donor was fine-tuned: other features at the same cost.

    Args:
        tuned: all layers of the donor, and a head.
    """
    trunk = (fold_rootstock(tuned) if ground.donor.folded else tuned).trunk
    donor = ground.donor.with_layers(list(trunk))
    table = read_features(donor, ground.images, cache, SINGLE_VIEW, report)
    probes = _probes(donor, ground.images, table, cache, report)
    points = [
        replace(point, val_accuracy=probe.val_accuracy, val_loss=probe.val_loss)
        for point, probe in zip(ground.points, probes, strict=True)
    ]
    return Ground(ground.images, donor, table, probes, points)


def _probes(
    donor: Donor, images: ImageSet, table: FeatureTable, cache: Path, report: Report
) -> list[Probe]:
    """The probe of every cut, from the cache where it is there."""
    file = cache / f"probes-{cache_key(donor, images)}.safetensors"
    probes = read_probes(file, len(table.widths))
    if probes is None:
        probes = probe_curve(table, report)
        write_probes(probes, file)
    return probes


def choose(
    ground: Ground, budget: Budget, method: str, trained: bool, report: Report
) -> tuple[Donor, Choice]:
    """The scion within the budget, and the donor that it is cut from.

    Args:
        method: "auto" or "paper". trained: whether the trunk will be fine-tuned. Only then may its
            layers be thinned: training makes up for what they lose.
    Raises: BudgetError where nothing fits.
    """
    head = paper_head if method == "paper" else nn.Linear
    limit = Limit(budget, ground.donor, ground.images.classes, ground.points, head)
    if method == "paper":
        found = _paper(ground, limit)
    else:
        found = choose_scion(ground.table, ground.probes, limit.fits)
    choices = [(ground.donor, found)] if found else []
    if trained and method == "auto":
        choices += thinned_choices(ground, limit, report)
    if not choices:
        raise BudgetError(
            f"no rootstock of {ground.donor.name} by method {method} keeps {budget.text}; "
            f"the smallest needs {budget.show(_smallest(ground, limit, method))}: allow that much"
        )
    return max(choices, key=lambda choice: rank(choice[1]))


def paper_head(features: int, classes: int) -> nn.Module:
    """The hidden layer of the paper."""
    return hidden_head(features, PAPER_HIDDEN, classes)


def paper_of_equal_size(ground: Ground, rootstock: Rootstock) -> Scion | None:
    """What the paper would read with a trunk of at most the rootstock's parameters.

    At its best: a stage need not be whole, and validation picks the layer that the trunk ends with.
    """
    parameters = sum(weights.numel() for weights in fold_rootstock(rootstock).trunk.parameters())
    scions = [
        layer_scion(ground.table, layers)
        for layers, point in zip(reads_of_one_stage(ground.donor), ground.points, strict=True)
        if point.trunk_parameters <= parameters
    ]

    def accuracy(scion: Scion) -> float:
        return probe_columns(ground.table, columns_of(ground.table, scion)).val_accuracy

    return max(scions, key=accuracy, default=None)


def _paper(ground: Ground, limit: Limit) -> Choice | None:
    """The deepest of the paper's choices that fits."""
    for scion in reversed(_paper_scions(ground)):
        if limit.fits(scion):
            probe = probe_columns(ground.table, columns_of(ground.table, scion))
            return Choice(scion, "paper", probe)
    return None


def _paper_scions(ground: Ground) -> list[Scion]:
    """Three layers of one stage, read by their global averages; by the trunk that is allowed."""
    found = []
    for point in ground.points:
        with suppress(BudgetError):
            _, layers = paper_scion(ground.donor, point.trunk_parameters)
            found.append(layer_scion(ground.table, layers))
    return found


def _smallest(ground: Ground, limit: Limit, method: str) -> float:
    """What the cheapest rootstock costs: by method auto, one that reads one feature."""
    table = ground.table
    if method == "paper":
        return min(map(limit.cost, _paper_scions(ground)))
    cuts = range(1, len(table.widths) + 1)
    return min(limit.cost(scion_of(table, table.columns(range(cut))[-1:])) for cut in cuts)


def thinned_choices(ground: Ground, limit: Limit, report: Report) -> list[tuple[Donor, Choice]]:
    """Every cut that does not fit whole, with layers so thin that it does; all depths are read."""
    train = ground.images.part("train").pixels
    rows = np.linspace(0, len(train) - 1, min(MEASURED_IMAGES, len(train))).astype(int)
    unit: Unit = "macs" if limit.budget.kind == "macs" else "parameters"
    thinner = Thinner(ground.donor, train[rows], unit)
    layers, found = len(ground.table.widths), []
    for cut in range(1, layers + 1):
        report("thinned layers", cut - 1, layers)
        scion = scion_of(ground.table, ground.table.columns(range(cut)))
        if limit.fits(scion):
            continue
        donor = thinner.thinned(cut, partial(_fits, limit, scion))
        if donor is None:
            break  # deeper cuts only cost more
        found.append((donor, Choice(scion, THINNED, _probe(donor, scion, ground.images))))
    report("thinned layers", layers, layers)
    return found


def _fits(limit: Limit, scion: Scion, donor: Donor) -> bool:
    return replace(limit, donor=donor).fits(scion)


def _probe(donor: Donor, scion: Scion, images: ImageSet) -> Probe:
    """The probe of a scion on images as they are."""
    reader = grow(donor, scion, images.classes, nn.Identity())
    train, val = (
        (logits_of(reader, part.pixels, bfloat16=bfloat16_pays()), torch.from_numpy(part.labels))
        for part in map(images.part, ("train", "val"))
    )
    return fit_probe(train, val, len(images.classes))
