"""What a scion is chosen from, and the choice under a budget.

Graft: donor + images + budget -> a rootstock in ONNX, what it was compared with, and a report.

Every step leaves a file in the cache and is found there again: decoded images, features of every
layer, the cost of every cut, checkpoints of every fine-tuning.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from graftkit.errors import BudgetError, ConfigError, OutputError
from graftkit.outputs import own_folder
from graftkit.parallel import bfloat16_pays, kept_memory
from graftkit.vision.baselines import (
    DRAWS,
    LAST_LAYER,
    PAPER_HIDDEN,
    PAPER_SCION,
    ROOTSTOCK,
    frozen_baselines,
    frozen_network,
    hidden_network,
    layer_scion,
    tune_baselines,
    tune_donor,
)
from graftkit.vision.budget import Budget
from graftkit.vision.choose import (
    Choice,
    Limit,
    assemble,
    choose_scion,
    paper_scion,
    probe_columns,
    probe_curve,
    rank,
    reads_of_one_stage,
)
from graftkit.vision.costs import Point, measure_points
from graftkit.vision.donor import Donor
from graftkit.vision.donors import open_donor
from graftkit.vision.evaluate import Measured, lead, measure
from graftkit.vision.features import (
    ALL_VIEWS,
    UPRIGHT_VIEWS,
    FeatureTable,
    cache_key,
    columns_of,
    read_features,
    scion_of,
)
from graftkit.vision.images import SPLITS, ImageSet, Report, open_images
from graftkit.vision.probe import Probe, fit_probe, read_probes, write_probes
from graftkit.vision.report import write_report
from graftkit.vision.results import (
    deployed,
    doubts_of_int8,
    mistakes,
    scion_rows,
    versions,
    write_json,
)
from graftkit.vision.rootstock import Rootstock, Scion, fold_rootstock, grow, hidden_head, logits_of
from graftkit.vision.thinning import Thinner, Unit
from graftkit.vision.training import Network, SoftLabels, Trainer, TrainingSettings, file_stem

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


BASELINES = "baselines"
NO_PAPER_SCION = (
    "No whole layer is as small as the rootstock: there is no scion of the paper's to compare with."
)


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


@kept_memory()
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
        output: a new or empty folder, or one that an earlier call made.
        cache: of everything that another run can use again; default `output`/cache.
    Returns: what graft.json holds.
    Raises: ImagesError, DonorError, BudgetError, OutputError.
    """
    budget = Budget.parse(settings.budget)
    inputs = [data, *([donor] if isinstance(donor, str | Path) else [])]
    with own_folder(output, "vision graft", inputs) as folder:
        return _graft(donor, data, folder, settings, budget, cache, report)


def _graft(
    donor: str | Path | nn.Module,
    data: str | Path,
    output: Path,
    settings: GraftSettings,
    budget: Budget,
    cache: str | Path | None,
    report: Report,
) -> dict[str, Any]:
    """As `graft`, into a folder that is ours."""
    started = time.monotonic()
    cache = Path(cache or output / "cache")
    _make_folders(cache, output / BASELINES)
    ground = prepare(donor, Path(data), settings, cache, report)
    # In any case, so that a budget nothing keeps is told before an hour of training.
    chosen = choose(ground, budget, settings.method, False, report)
    if settings.freeze:
        made = _frozen(ground, chosen, settings, report)
    else:
        trainer = trainer_of(ground, settings, cache, report)
        tuned = tune_donor(trainer, ground.donor, ground.images)
        last = _last_layer(ground)
        ground = tuned_ground(ground, tuned.rootstock, cache, report)
        chosen = choose(ground, budget, settings.method, True, report)
        made = chain([tuned, last], _trained(ground, chosen, settings, trainer, tuned))
    measured: dict[str, Measured] = {}
    networks: dict[str, Network] = {}
    notes: list[str] = []
    for found in made:
        if isinstance(found, str):
            notes.append(found)
        else:
            networks[found.name] = found
            measured[found.name] = _measure(found, ground, output)
    result = _asked(ground, budget, settings) | _found(ground, chosen, networks, measured, output)
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
    return lay_ground(images, donor, views, cache, report)


def _frozen(
    ground: Ground, chosen: tuple[Donor, Choice], settings: GraftSettings, report: Report
) -> Iterator[Network | str]:
    """The rootstock first, then what it is compared with."""
    table, classes = ground.table, ground.images.classes
    donor, choice = chosen
    if settings.method == "paper":
        made = hidden_network(ROOTSTOCK, donor, table, choice.scion, classes, settings.seed)
    else:
        made = frozen_network(ROOTSTOCK, donor, table, choice.scion, classes, DRAWS)
    yield made
    if settings.baselines:
        paper = paper_of_equal_size(ground, made.rootstock)
        if paper is None:
            yield NO_PAPER_SCION
        yield from frozen_baselines(
            donor, table, made.rootstock, paper, ground.images, settings.seed, report
        )


def trainer_of(ground: Ground, settings: GraftSettings, cache: Path, report: Report) -> Trainer:
    """What fine-tunes all networks of a run alike."""
    training = TrainingSettings(
        epochs=settings.epochs, upright=settings.upright, seed=settings.seed
    )
    return Trainer(ground.images, ground.donor.folded, training, cache / "training", report)


def _last_layer(ground: Ground) -> Network:
    """The usual transfer: a head on what the donor's last layer says, which stays as it is."""
    scion = layer_scion(ground.table, [len(ground.donor.layers) - 1])
    return frozen_network(
        LAST_LAYER, ground.donor, ground.table, scion, ground.images.classes, DRAWS
    )


def untrained(
    ground: Ground, chosen: tuple[Donor, Choice], method: str
) -> tuple[Rootstock, Rootstock | None]:
    """The rootstock, and the paper's scion of equal size where there is one; both to be trained.

    Args:
        ground: of the fine-tuned donor. method: "auto" or "paper", which says what head it gets.
    """
    classes, (donor, choice) = ground.images.classes, chosen
    if method == "paper":
        head = paper_head(choice.scion.features, len(classes))
    else:
        head = choice.probe.trainable_head()
    rootstock = assemble(donor, choice.scion, classes, head)
    scion = paper_of_equal_size(ground, rootstock)
    if scion is None:
        return rootstock, None
    probe = probe_columns(ground.table, columns_of(ground.table, scion))
    return rootstock, assemble(ground.donor, scion, classes, probe.trainable_head())


def _trained(
    ground: Ground,
    chosen: tuple[Donor, Choice],
    settings: GraftSettings,
    trainer: Trainer,
    tuned: Network,
) -> Iterator[Network | str]:
    """The rootstock, then networks of its size; all learn from the fine-tuned donor.

    Args:
        ground: of the fine-tuned donor.
    """
    rootstock, paper = untrained(ground, chosen, settings.method)
    before = copy.deepcopy(rootstock)
    soft_labels = SoftLabels(tuned.rootstock)
    yield trainer.tune(ROOTSTOCK, rootstock, soft_labels)
    if settings.baselines:
        yield trainer.tune(PAPER_SCION, paper, soft_labels) if paper else NO_PAPER_SCION
        yield from tune_baselines(trainer, tuned.rootstock, before, soft_labels)


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
    chosen: tuple[Donor, Choice],
    networks: dict[str, Network],
    measured: dict[str, Measured],
    output: Path,
) -> dict[str, Any]:
    images, main, (donor, choice) = ground.images, measured[ROOTSTOCK], chosen
    numbers = {
        name: one.numbers(images.classes) | {"draws": list(networks[name].draws)}
        for name, one in measured.items()
    }
    own = numbers.pop(ROOTSTOCK)
    for name, found in numbers.items():
        ahead, interval = lead(main.test.right, measured[name].test.right)
        found |= {"lead": ahead, "lead_interval": list(interval)}
    return {
        **own,
        **deployed(main, images, output / "rootstock.int8.onnx"),
        "confusion": [list(row) for row in main.test.confusion],
        "rule": choice.rule,
        "scion": scion_rows(choice.scion, donor, ground.donor),
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
