"""Graft: donor + images + budget -> a rootstock in ONNX, what it was compared with, and a report.

Every step leaves a file in the cache and is found there again: decoded images, features of every
layer, the cost of every cut, checkpoints of every fine-tuning.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from graftkit.errors import BudgetError, ConfigError, OutputError
from graftkit.vision.assembly import Limit, assemble
from graftkit.vision.budget import Budget
from graftkit.vision.curve import Point, measure_points
from graftkit.vision.donor import Donor, open_donor
from graftkit.vision.features import ALL_VIEWS, UPRIGHT_VIEWS, FeatureTable, read_features
from graftkit.vision.frozen import (
    DRAWS,
    LAST_LAYER,
    PAPER_HIDDEN,
    PAPER_SCION,
    frozen_baselines,
    frozen_network,
    hidden_network,
    layer_scion,
)
from graftkit.vision.heads import hidden_head
from graftkit.vision.images import SPLITS, ImageSet, Report, open_images
from graftkit.vision.measuring import Measured, Network, file_stem, measure
from graftkit.vision.norms import fold_rootstock
from graftkit.vision.paper import paper_scion
from graftkit.vision.probe import Probe
from graftkit.vision.report import write_report
from graftkit.vision.results import (
    deployed,
    doubts_of_int8,
    mistakes,
    scion_rows,
    versions,
    write_json,
)
from graftkit.vision.rootstock import Rootstock, Scion
from graftkit.vision.selection import (
    Choice,
    choose_scion,
    columns_of,
    probe_columns,
    probe_curve,
    scion_of,
)
from graftkit.vision.trained import ROOTSTOCK, Trainer, tune_baselines, tune_donor
from graftkit.vision.training import TrainingSettings

BASELINES = "baselines"
NO_PAPER_SCION = "No three layers of one stage are as small as the rootstock: no paper's scion."


class GraftSettings(BaseModel):
    """What `graft` was asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    budget: str
    """Most that the rootstock may cost: 0.6MB (its float32 file), 2ms or 20MMAC."""
    method: Literal["auto", "paper"] = "auto"
    """auto (all depths up to the best cut) or paper (three layers of one stage, 256 hidden)."""
    freeze: bool = False
    """Whether the donor's layers stay as they are: minutes in place of an hour."""
    size: int = Field(default=128, ge=16, le=1024)
    """Pixels of a side that images are scaled to."""
    upright: bool = False
    """Whether up matters in the images: mirrored only, not turned by 90 degrees."""
    epochs: int = Field(default=12, ge=1)
    """Passes over the training images, of the rootstock and of every baseline."""
    baselines: bool = True
    """Whether to train what the rootstock is compared with; the fine-tuned donor always is."""
    seed: int = Field(default=0, ge=0)
    """Draws splits where there are none, views, and random weights."""

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Validate what a user typed. Raises: ConfigError."""
        try:
            return cls(**values)
        except ValidationError as error:
            wrong = error.errors()[0]
            reason = wrong["msg"][0].lower() + wrong["msg"][1:]
            raise ConfigError(f"{wrong['loc'][0]} is {wrong['input']!r}: {reason}") from error


@dataclass(frozen=True)
class Ground:
    """What every choice is made from: images, donor, features, and the curve of cuts."""

    images: ImageSet
    donor: Donor
    table: FeatureTable
    probes: list[Probe]
    points: list[Point]


def graft(
    donor: str | Path | nn.Module,
    data: str | Path,
    output: str | Path,
    settings: GraftSettings,
    cache: str | Path | None = None,
    report: Report = lambda *_: None,
) -> dict[str, Any]:
    """Graft features of a donor into a rootstock that keeps a budget, and compare it.

    Writes rootstock.onnx, rootstock.int8.onnx, baselines/*.onnx, graft.json and report.html.

    Args:
        donor: as `open_donor` takes it. data: as `open_images` takes it.
        cache: of everything that another run can use again; default `output`/cache.
    Returns: what graft.json holds.
    Raises: ImagesError, DonorError, BudgetError, OutputError.
    """
    started = time.monotonic()
    budget = Budget.parse(settings.budget)
    output = Path(output)
    cache = Path(cache or output / "cache")
    _make_folders(cache, output / BASELINES)
    ground = prepare(donor, Path(data), settings, cache, report)
    choice = choose(ground, budget, settings)
    measured: dict[str, Measured] = {}
    networks: dict[str, Network] = {}
    notes: list[str] = []
    make = _frozen if settings.freeze else _trained
    for found in make(ground, choice, settings, cache, report):
        if isinstance(found, str):
            notes.append(found)
        else:
            networks[found.name] = found
            measured[found.name] = _measure(found, ground, output)
    result = _asked(ground, budget, settings) | _found(ground, choice, networks, measured, output)
    result["warnings"] = [
        *ground.images.warnings,
        *ground.donor.notes,
        *notes,
        *_doubts_of_budget(budget, measured[ROOTSTOCK]),
        *doubts_of_int8(result),
    ]
    result["seconds"] = round(time.monotonic() - started, 1)
    write_json(result, output / "graft.json")
    write_report(result, output / "report.html")
    return result


def prepare(
    reference: str | Path | nn.Module,
    data: Path,
    settings: GraftSettings,
    cache: Path,
    report: Report,
) -> Ground:
    """Images, donor, features of every layer, and the curve; from the cache as far as it goes."""
    images = open_images(data, settings.size, cache, settings.seed, report)
    donor = open_donor(reference, settings.size)
    views = UPRIGHT_VIEWS if settings.upright else ALL_VIEWS
    table = read_features(donor, images, cache, views, report)
    probes = probe_curve(table, report)
    points = measure_points(donor, table, probes, images, cache, report)
    return Ground(images, donor, table, probes, points)


def choose(ground: Ground, budget: Budget, settings: GraftSettings) -> Choice:
    """The scion within the budget. Raises: BudgetError when none is."""
    if settings.method == "paper":
        limit = Limit(budget, ground.donor, ground.images.classes, ground.points, _paper_head)
        chosen = paper_choice(ground, limit)
    else:
        limit = Limit(budget, ground.donor, ground.images.classes, ground.points)
        chosen = choose_scion(ground.table, ground.probes, limit.fits, not settings.freeze)
    if chosen is None:
        raise BudgetError(
            f"no rootstock of {ground.donor.name} by method {settings.method} keeps {budget.text}; "
            f"the smallest needs {budget.show(_smallest(ground, limit))}: allow that much"
        )
    return chosen


def paper_choice(ground: Ground, limit: Limit) -> Choice | None:
    """The deepest three layers of one stage that fit, read by their global averages."""
    for point in reversed(ground.points):
        with suppress(BudgetError):
            _, layers = paper_scion(ground.donor, point.trunk_parameters)
            scion = layer_scion(ground.table, layers)
            if limit.fits(scion):
                probe = probe_columns(ground.table, columns_of(ground.table, scion))
                return Choice(scion, "paper", probe)
    return None


def _smallest(ground: Ground, limit: Limit) -> float:
    """What the cheapest rootstock costs that reads one feature."""
    table = ground.table
    cuts = range(1, len(table.widths) + 1)
    return min(limit.cost(scion_of(table, table.columns(range(cut))[-1:])) for cut in cuts)


def _paper_head(features: int, classes: int) -> nn.Module:
    return hidden_head(features, PAPER_HIDDEN, classes)


def _paper_of_equal_size(ground: Ground, rootstock: Rootstock) -> Scion | None:
    """The paper's choice whose trunk has at most the rootstock's parameters."""
    parameters = sum(weights.numel() for weights in fold_rootstock(rootstock).trunk.parameters())
    with suppress(BudgetError):
        _, layers = paper_scion(ground.donor, parameters)
        return layer_scion(ground.table, layers)
    return None


def _frozen(
    ground: Ground, choice: Choice, settings: GraftSettings, cache: Path, report: Report
) -> Iterator[Network | str]:
    """The rootstock first, then what it is compared with."""
    donor, table, classes = ground.donor, ground.table, ground.images.classes
    if settings.method == "paper":
        made = hidden_network(ROOTSTOCK, donor, table, choice.scion, classes, settings.seed)
    else:
        made = frozen_network(ROOTSTOCK, donor, table, choice.scion, classes, DRAWS)
    yield made
    if settings.baselines:
        paper = _paper_of_equal_size(ground, made.rootstock)
        if paper is None:
            yield NO_PAPER_SCION
        yield from frozen_baselines(
            donor, table, made.rootstock, paper, ground.images, settings.seed, report
        )


def _trained(
    ground: Ground, choice: Choice, settings: GraftSettings, cache: Path, report: Report
) -> Iterator[Network | str]:
    """The fine-tuned donor first, which all others learn from."""
    donor, classes, images = ground.donor, ground.images.classes, ground.images
    training = TrainingSettings(
        epochs=settings.epochs, upright=settings.upright, seed=settings.seed
    )
    trainer = Trainer(images, donor.folded, training, cache / "training", report)
    tuned = tune_donor(trainer, donor, images)
    yield tuned
    if settings.method == "paper":
        head = _paper_head(choice.scion.features, len(classes))
    else:
        head = choice.probe.trainable_head()
    rootstock = assemble(donor, choice.scion, classes, head)
    untrained = copy.deepcopy(rootstock)
    yield trainer.tune(ROOTSTOCK, rootstock, tuned.rootstock)
    last = layer_scion(ground.table, [len(donor.layers) - 1])
    yield frozen_network(LAST_LAYER, donor, ground.table, last, classes, DRAWS)
    if settings.baselines:
        paper = _paper_of_equal_size(ground, untrained)
        if paper is None:
            yield NO_PAPER_SCION
        else:
            probe = probe_columns(ground.table, columns_of(ground.table, paper))
            stock = assemble(donor, paper, classes, probe.trainable_head())
            yield trainer.tune(PAPER_SCION, stock, tuned.rootstock)
        yield from tune_baselines(trainer, tuned.rootstock, untrained)


def _measure(network: Network, ground: Ground, output: Path) -> Measured:
    if network.name == ROOTSTOCK:
        file = output / "rootstock.onnx"
    else:
        file = output / BASELINES / f"{file_stem(network.name)}.onnx"
    return measure(network.rootstock, ground.images, file, ground.donor.name)


def _asked(ground: Ground, budget: Budget, settings: GraftSettings) -> dict[str, Any]:
    images = ground.images
    return {
        "donor": ground.donor.name,
        "method": settings.method,
        "frozen": settings.freeze,
        "classes": list(images.classes),
        "images": dict(
            zip(SPLITS, np.bincount(images.splits, minlength=len(SPLITS)).tolist(), strict=True)
        ),
        "size": settings.size,
        "budget": asdict(budget),
        "epochs": 0 if settings.freeze else settings.epochs,
        "seed": settings.seed,
        "versions": versions(),
        "skipped": [asdict(skipped) for skipped in images.skipped],
    }


def _found(
    ground: Ground,
    choice: Choice,
    networks: dict[str, Network],
    measured: dict[str, Measured],
    output: Path,
) -> dict[str, Any]:
    images, donor, main = ground.images, ground.donor, measured[ROOTSTOCK]
    numbers = {
        name: one.numbers(images.classes) | {"draws": list(networks[name].draws)}
        for name, one in measured.items()
    }
    own = numbers.pop(ROOTSTOCK)
    return {
        **own,
        **deployed(main, images, output / "rootstock.int8.onnx"),
        "confusion": [list(row) for row in main.test.confusion],
        "rule": choice.rule,
        "scion": scion_rows(choice.scion, donor.layer_names, ground.table.widths),
        "curve": [asdict(point) for point in ground.points],
        "baselines": numbers,
        "mistakes": mistakes(main, images),
        "history": [asdict(epoch) for epoch in networks[ROOTSTOCK].history],
    }


def _doubts_of_budget(budget: Budget, main: Measured) -> list[str]:
    """Milliseconds are measured once for the choice and once in the end."""
    cost = {"bytes": main.bytes, "ms": main.p50_ms, "macs": main.macs}[budget.kind]
    if cost <= budget.amount:
        return []
    return [f"The rootstock came out at {budget.show(cost)}, over the budget of {budget.text}."]


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made ({error}); choose another place"
            ) from error
