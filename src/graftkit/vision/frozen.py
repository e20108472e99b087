"""Rootstocks and baselines whose trunk stays as the donor has it: logistic regressions on features.

All of them have the same head, the same views of the same training images, and a penalty chosen on
the same validation images.
"""

from collections.abc import Iterator, Sequence

import torch

from graftkit.vision.assembly import assemble
from graftkit.vision.baselines import random_trunk
from graftkit.vision.donor import Donor
from graftkit.vision.features import FeatureTable
from graftkit.vision.images import ImageSet, Part, Report
from graftkit.vision.measuring import Network
from graftkit.vision.probe import fit_hidden, fit_probe
from graftkit.vision.rootstock import Rootstock, Scion
from graftkit.vision.scoring import BATCH, batches, score
from graftkit.vision.selection import columns_of, probe_columns, scion_of

GLOBAL_AVERAGE = ("mean",)
"""Pooling of the paper, and of the usual transfer to another task."""
PAPER_HIDDEN = 256
DRAWS = 5
"""Draws of training and validation images that the spread is measured over."""
LAST_LAYER, BEST_LAYER = "donor, last layer", "best single layer"
PAPER_SCION, RANDOM = "paper's scion", "random features"


def frozen_network(
    name: str, donor: Donor, table: FeatureTable, scion: Scion, classes: Sequence[str], draws: int
) -> Network:
    """A rootstock whose head is fitted on all views of the training images.

    Args:
        draws: of training and validation images, on which the head is fitted as well, for the
            spread of its test accuracy.
    """
    columns, views = columns_of(table, scion), tuple(table.views)
    probe = probe_columns(table, columns, views)
    test, labels = table.of("test", columns)
    found = []
    for seed in range(1, draws + 1):
        drawn = table.redrawn(seed)
        train, val = drawn.of("train", columns, views), drawn.of("val", columns)
        fitted = fit_probe(train, val, len(classes), (probe.decay,))
        found.append(score(fitted.logits(test), labels.numpy()).accuracy)
    rootstock = assemble(donor, scion, classes, probe.head())
    return Network(name, rootstock, draws=tuple(found))


def layer_scion(table: FeatureTable, layers: Sequence[int]) -> Scion:
    """The global averages of some layers."""
    return scion_of(table, table.columns(layers, GLOBAL_AVERAGE), GLOBAL_AVERAGE)


def best_layer(table: FeatureTable) -> int:
    """The layer whose global averages name most validation images rightly."""
    layers = range(len(table.widths))
    probes = [probe_columns(table, table.columns([i], GLOBAL_AVERAGE)) for i in layers]
    return max(layers, key=lambda i: (probes[i].val_accuracy, -i))


def random_features(rootstock: Rootstock, images: ImageSet, seed: int, report: Report) -> Rootstock:
    """The rootstock's own architecture with random weights, and a head fitted on its features."""
    fresh = random_trunk(rootstock, seed)
    train, val = (
        (_features(fresh, part, report), torch.from_numpy(part.labels))
        for part in map(images.part, ("train", "val"))
    )
    fresh.head = fit_probe(train, val, len(images.classes)).head()
    return fresh


@torch.inference_mode()
def _features(rootstock: Rootstock, part: Part, report: Report) -> torch.Tensor:
    pixels = part.pixels
    found = []
    for done, rows in enumerate(batches(pixels), start=1):
        found.append(rootstock.features(rows))
        report("random features", min(done * BATCH, len(pixels)), len(pixels))
    return torch.cat(found).clone()


def hidden_network(
    name: str, donor: Donor, table: FeatureTable, scion: Scion, classes: Sequence[str], seed: int
) -> Network:
    """A rootstock with the paper's head, 256 hidden units, fitted on frozen features."""
    columns, views = columns_of(table, scion), tuple(table.views)
    train, val = table.of("train", columns, views), table.of("val", columns)
    head = fit_hidden(train, val, len(classes), PAPER_HIDDEN, seed)
    return Network(name, assemble(donor, scion, classes, head))


def frozen_baselines(
    donor: Donor,
    table: FeatureTable,
    rootstock: Rootstock,
    paper: Scion | None,
    images: ImageSet,
    seed: int,
    report: Report,
) -> Iterator[Network]:
    """What a frozen rootstock is compared with, one by one.

    Args:
        paper: the scion of the paper's method within the same budget, where there is one.
    """
    last = layer_scion(table, [len(donor.layers) - 1])
    yield frozen_network(LAST_LAYER, donor, table, last, images.classes, DRAWS)
    best = layer_scion(table, [best_layer(table)])
    yield frozen_network(BEST_LAYER, donor, table, best, images.classes, DRAWS)
    if paper is not None:
        yield frozen_network(PAPER_SCION, donor, table, paper, images.classes, DRAWS)
    yield Network(RANDOM, random_features(rootstock, images, seed, report))
