"""What a rootstock is compared with. Every baseline is a rootstock too: `fine_tune` trains all of
them with one kind of head, one augmentation, the same epochs and the same seed.

donor_classifier   the whole donor and a head on its last layer; fully fine-tuned
student            a narrow MobileNetV2 of random weights; the distilled student of equal size
random_trunk       the rootstock's own architecture without what the donor had learned
pruned_donor       the fine-tuned donor with channels pruned down to a number of parameters

Rootstocks and baselines whose trunk stays as the donor has it: logistic regressions on features.

All of them have the same head, the same views of the same training images, and a penalty chosen on
the same validation images.

Rootstocks and baselines that are fine-tuned: one recipe, the same epochs, views and seed.

The fully fine-tuned donor comes first. All others learn from the labels and from its answers.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

from graftkit.errors import BudgetError, ConfigError, DonorError
from graftkit.vision.choose import assemble, probe_columns
from graftkit.vision.donor import Donor, pool
from graftkit.vision.donors.architectures import LAST, NORMALIZATION, STAGES, STEM, InvertedResidual
from graftkit.vision.evaluate import score
from graftkit.vision.features import FeatureTable, columns_of, scion_of
from graftkit.vision.images import ImageSet, Part, Report
from graftkit.vision.probe import fit_hidden, fit_probe
from graftkit.vision.rootstock import (
    BATCH,
    HeadMaker,
    Rootstock,
    Scion,
    batches,
    exported_parameters,
    fold_head,
    grow,
)
from graftkit.vision.training import Network, SoftLabels, Trainer, seeded

NARROWEST_STUDENT, WIDEST_STUDENT = 1 / 64, 8.0  # times the channels of the table
BISECTIONS = 10  # leave a step of 0.6 % in width at most
TOKEN_STD = 0.02  # of weights that belong to no layer, such as a class token; as in ViT


def donor_classifier(
    donor: Donor, classes: Sequence[str], head: HeadMaker = nn.Linear, seed: int = 0
) -> Rootstock:
    """All layers of the donor, and a head on the pooled output of the last."""
    last = len(donor.layers) - 1
    width = donor.channels[last]
    with seeded(seed):
        made = head(width, len(classes))
    return grow(donor, Scion(last + 1, {last: tuple(range(width))}), classes, made)


def student(
    classes: Sequence[str], parameters: int, size: int, head: HeadMaker = nn.Linear, seed: int = 0
) -> Rootstock:
    """A MobileNetV2 of random weights, as wide as `parameters` allow once it is exported.

    Raises: BudgetError where even the narrowest has more parameters.
    """

    def count(width: float) -> int:
        with torch.device("meta"):  # shapes without values
            network = _mobilenet(classes, width, size, head)
        # A normalization's two values a channel become the bias of its convolution.
        scales = [part.weight for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        exported = [*network.trunk.parameters(), *fold_head(network.head).parameters()]
        return sum(map(torch.numel, exported)) - sum(map(torch.numel, scales))

    width = _widest(count, parameters, NARROWEST_STUDENT, WIDEST_STUDENT)
    with seeded(seed):
        return _mobilenet(classes, width, size, head).eval()


def random_trunk(rootstock: Rootstock, seed: int = 0) -> Rootstock:
    """A copy of the same architecture with new random weights, trunk and head (He et al. 2015)."""
    fresh = copy.deepcopy(rootstock)
    with seeded(seed):
        for module in fresh.modules():
            _initialize(module)
    return fresh.eval()


def pruned_donor(classifier: Rootstock, parameters: int) -> Rootstock:
    """A copy of a `donor_classifier` with whole channels removed, to be fine-tuned again.

    Torch-Pruning (DepGraph, arXiv 2301.12900): the same share of every layer's channels, those of
    the smallest L2 norm over all weights that go with them.

    Args:
        parameters: most that are left once it is exported.
    Raises: ConfigError where the package torch-pruning is missing; DonorError where the donor
        cannot be pruned so; BudgetError where one channel a layer is too many.
    """
    pruning = _torch_pruning()
    # The pruner leaves layers whole that would lose their last channel.
    narrowest = (1 + 1e-6) / min(_widths(classifier))
    kept = _widest(
        lambda kept: exported_parameters(_pruned(classifier, kept, pruning)),
        parameters,
        narrowest,
        1.0,
    )
    return _pruned(classifier, kept, pruning)


def _widest(count: Callable[[float], int], parameters: int, low: float, high: float) -> float:
    """The largest width whose network has at most `parameters`, by bisection of its logarithm."""
    least = count(low)
    if least > parameters:
        raise BudgetError(
            f"a network of at most {parameters:,} parameters is asked for, but the narrowest has "
            f"{least:,}; allow more"
        )
    for _ in range(BISECTIONS):
        width = math.sqrt(low * high)
        if count(width) <= parameters:
            low = width
        else:
            high = width
    return low


def _widths(classifier: Rootstock) -> list[int]:
    """Channels of every layer that can be pruned: all with weights but the last."""
    parts = [part for part in classifier.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    return [part.weight.shape[0] for part in parts[:-1]]


def _pruned(classifier: Rootstock, kept: float, pruning: ModuleType) -> Rootstock:
    pruned = copy.deepcopy(classifier).eval().requires_grad_()
    image = torch.zeros(1, 3, pruned.size, pruned.size)
    last_layer = [part for part in pruned.head.modules() if isinstance(part, nn.Linear)][-1]
    # The pruner follows gradients and slices modules it may not understand: it can raise anything.
    try:
        with torch.enable_grad():
            pruning.pruner.BasePruner(
                pruned,
                image,
                pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=1 - kept,
                ignored_layers=[last_layer],
            ).step()
        with torch.no_grad():
            last = _last_width(pruned, image)
            pruned.scion = replace(pruned.scion, channels={pruned.scion.cut - 1: last})
            pruned(image)
    except Exception as error:
        raise DonorError(
            f"the donor's channels cannot be pruned ({type(error).__name__}: {error}); leave this "
            "baseline out"
        ) from error
    return pruned.eval()


def _last_width(rootstock: Rootstock, image: Tensor) -> tuple[int, ...]:
    x = rootstock.normalization.apply(image)
    for layer in rootstock.trunk:
        x = layer(x)
    return tuple(range(pool(x, rootstock.scion.poolings).shape[1]))


def _torch_pruning() -> ModuleType:
    try:
        return import_module("torch_pruning")
    except ImportError as error:
        raise ConfigError(
            "the pruned donor needs the package torch-pruning; pip install torch-pruning, or leave "
            "this baseline out"
        ) from error


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    """New values for the parameters that belong to this module itself."""
    own = list(module.parameters(recurse=False))
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif own and callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    else:
        for weights in own:
            nn.init.trunc_normal_(weights, std=TOKEN_STD)


def _mobilenet(classes: Sequence[str], width: float, size: int, head: HeadMaker) -> Rootstock:
    def scaled(channels: int) -> int:
        return max(1, round(width * channels))

    entering = scaled(STEM)
    layers: list[nn.Module] = [_convolution(3, entering, kernel=3, stride=2)]
    for expansion, channels, blocks, stride in STAGES:
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers.append(_block(entering, scaled(channels), expansion, step))
            entering = scaled(channels)
    features = scaled(LAST)
    layers.append(_convolution(entering, features))
    scion = Scion(len(layers), {len(layers) - 1: tuple(range(features))})
    made = head(features, len(classes))
    return Rootstock(scion, NORMALIZATION, size, classes, nn.ModuleList(layers), made)


def _block(entering: int, leaving: int, expansion: int, stride: int) -> InvertedResidual:
    inside = entering * expansion
    body = nn.Sequential(
        *([_convolution(entering, inside)] if expansion > 1 else []),
        _convolution(inside, inside, kernel=3, stride=stride, groups=inside),
        nn.Conv2d(inside, leaving, 1, bias=False),
        nn.BatchNorm2d(leaving),
    )
    return InvertedResidual(body, nn.Identity() if stride == 1 and entering == leaving else None)


def _convolution(
    entering: int, leaving: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(entering, leaving, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(leaving),
        nn.ReLU6(),
    )


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


DONOR, ROOTSTOCK = "fine-tuned donor", "rootstock"
STUDENT = "distilled student"
RANDOM_TRUNK, PRUNED = "random weights", "pruned donor"


def tune_donor(trainer: Trainer, donor: Donor, images: ImageSet) -> Network:
    """All layers of the donor with a linear head on the last: what a rootstock is held against."""
    seed = trainer.settings.seed
    return trainer.tune(DONOR, donor_classifier(donor, images.classes, seed=seed), None)


def tune_baselines(
    trainer: Trainer, donor: Rootstock, rootstock: Rootstock, soft_labels: SoftLabels
) -> Iterator[Network | str]:
    """Networks of at most the parameters of `rootstock`, one by one.

    Args:
        donor: fine-tuned. rootstock: before its own fine-tuning. soft_labels: of the donor.
    Yields: what was trained, or a sentence that says why one could not be.
    """
    seed, parameters = trainer.settings.seed, exported_parameters(rootstock)
    classes, size = rootstock.classes, rootstock.size
    makers: tuple[tuple[str, Callable[[], Rootstock], bool], ...] = (
        (STUDENT, lambda: student(classes, parameters, size, seed=seed), True),
        (RANDOM_TRUNK, lambda: random_trunk(rootstock, seed), True),
        (PRUNED, lambda: pruned_donor(donor, parameters), False),
    )
    for name, make, random in makers:
        try:
            network = make()
        except (BudgetError, ConfigError, DonorError) as error:
            yield f"Left out, {name}: {error}"
        else:
            yield trainer.tune(name, network, soft_labels, random)
