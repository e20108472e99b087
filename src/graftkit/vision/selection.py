"""Which layers and channels a rootstock takes of its donor under a budget: the scion.

Every cut of the donor that fits is a candidate with all its features, as in "all depths up to a
cut". A cut that does not fit is one with the features that matter most, as far as they fit: what
nobody reads in the last layer is dropped, and the head shrinks. Validation decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftkit.vision.features import POOLINGS, FeatureTable
from graftkit.vision.probe import Probe, fit_probe, l2_relevance, taylor_relevance
from graftkit.vision.rootstock import Scion

Fits = Callable[[Scion], bool]
"""Whether a rootstock with this scion keeps the budget."""


@dataclass(frozen=True)
class Choice:
    """A scion, how it was chosen ("all", "l2" or "taylor") and its probe on single views."""

    scion: Scion
    rule: str
    probe: Probe


def scion_of(
    table: FeatureTable, columns: NDArray[Any], poolings: Sequence[str] = POOLINGS
) -> Scion:
    """The scion that reads these columns of a table."""
    starts = [0, *accumulate(table.widths)]
    layers = np.searchsorted(starts, columns, side="right") - 1
    channels = {
        int(layer): tuple(int(column - starts[layer]) for _, column in members)
        for layer, members in groupby(zip(layers, np.sort(columns), strict=True), lambda m: m[0])
    }
    return Scion(max(channels) + 1, channels, tuple(poolings))


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


def columns_of(table: FeatureTable, scion: Scion) -> NDArray[Any]:
    """The columns of a table that a scion reads, in its order."""
    starts = [0, *accumulate(table.widths)]
    return np.concatenate(
        [starts[layer] + np.array(kept) for layer, kept in scion.channels.items()]
    )
