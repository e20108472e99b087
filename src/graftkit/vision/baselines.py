"""The rootstock's head on frozen features, and the networks that a rootstock is compared with.

Every baseline is a rootstock too, so all have one kind of head, one augmentation, the same epochs
and the same seed. On frozen features the head of each is a logistic regression on the same views;
fine-tuned, all but the donor learn from the labels and from the fine-tuned donor's logits.

frozen   the donor's last layer, its best single layer, the paper's scion, random features
trained  the donor, its last layer, the paper's scion, a student of random weights, the rootstock's
         own architecture with random weights, the donor with channels pruned
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
from graftkit.progress import Progress
from graftkit.vision.choose import (
    GLOBAL_AVERAGE,
    PAPER_HIDDEN,
    DonorCuts,
    assemble,
    layer_scion,
    paper_scion_of_equal_size,
    probe_columns,
)
from graftkit.vision.donor import Donor, pool
from graftkit.vision.donors.architectures import LAST, NORMALIZATION, STAGES, STEM, InvertedResidual
from graftkit.vision.evaluate import score
from graftkit.vision.images import ImageSet, LabeledImages
from graftkit.vision.probe import FeatureTable, fit_hidden, fit_probe
from graftkit.vision.rootstock import (
    BATCH,
    HeadFactory,
    Rootstock,
    Scion,
    batches,
    exported_parameters,
    fold_head,
    grow,
)
from graftkit.vision.training import SoftLabels, TrainedNetwork, Trainer, seeded

ROOTSTOCK, DONOR = "rootstock", "fine-tuned donor"
LAST_LAYER, BEST_LAYER = "donor, last layer", "best single layer"
PAPER_SCION, RANDOM_FEATURES = "paper's scion", "random features"
STUDENT, RANDOM_TRUNK, PRUNED = "distilled student", "random weights", "pruned donor"
NO_PAPER_SCION = (
    "No whole layer is as small as the rootstock: there is no scion of the paper's to compare with."
)
DRAWS = 5
"""Draws of training and validation images that the spread of a test accuracy is measured over."""
NARROWEST_STUDENT, WIDEST_STUDENT = 1 / 64, 8.0  # times the channels of the table
BISECTIONS = 10  # leave a step of 0.6 % in width at most
TOKEN_STD = 0.02  # of weights that belong to no layer, such as a class token; as in ViT


def fitted_network(name: str, cuts: DonorCuts, scion: Scion, draws: int = 0) -> TrainedNetwork:
    """A rootstock of the donor's own weights, its head fitted on all views of the training images.

    Args:
        draws: other draws of training and validation images, on each of which the head is fitted
            too, for the spread of its test accuracy.
    """
    table, classes = cuts.table, cuts.images.classes
    columns, views = table.columns_of(scion), tuple(table.views)
    probe = probe_columns(table, columns, views)
    test, labels = table.of("test", columns)
    accuracies = []
    for seed in range(1, draws + 1):
        drawn = table.redrawn(seed)
        train, val = drawn.of("train", columns, views), drawn.of("val", columns)
        fitted = fit_probe(train, val, len(classes), (probe.decay,))
        accuracies.append(score(fitted.logits(test), labels.numpy()).accuracy)
    rootstock = assemble(cuts.donor, scion, classes, probe.head())
    return TrainedNetwork(name, rootstock, draws=tuple(accuracies))


def fitted_paper_network(name: str, cuts: DonorCuts, scion: Scion, seed: int) -> TrainedNetwork:
    """A rootstock of the donor's own weights with the paper's head of 256 hidden units."""
    table, classes = cuts.table, cuts.images.classes
    columns, views = table.columns_of(scion), tuple(table.views)
    train, val = table.of("train", columns, views), table.of("val", columns)
    head = fit_hidden(train, val, len(classes), PAPER_HIDDEN, seed)
    return TrainedNetwork(name, assemble(cuts.donor, scion, classes, head))


def fitted_baselines(
    cuts: DonorCuts, rootstock: Rootstock, seed: int, progress: Progress
) -> Iterator[TrainedNetwork | str]:
    """What a frozen rootstock is compared with, one by one, or why one is left out."""
    yield fitted_network(LAST_LAYER, cuts, last_layer_scion(cuts), DRAWS)
    yield fitted_network(BEST_LAYER, cuts, layer_scion(cuts.table, [best_layer(cuts.table)]), DRAWS)
    paper = paper_scion_of_equal_size(cuts, rootstock)
    yield fitted_network(PAPER_SCION, cuts, paper, DRAWS) if paper else NO_PAPER_SCION
    network = random_features(rootstock, cuts.images, seed, progress)
    yield TrainedNetwork(RANDOM_FEATURES, network)


def last_layer_scion(cuts: DonorCuts) -> Scion:
    """The usual transfer: the global averages of the donor's last layer."""
    return layer_scion(cuts.table, [len(cuts.donor.layers) - 1])


def best_layer(table: FeatureTable) -> int:
    """The layer whose global averages name most validation images rightly."""
    layers = range(len(table.widths))
    probes = [probe_columns(table, table.columns([i], GLOBAL_AVERAGE)) for i in layers]
    return max(layers, key=lambda i: (probes[i].val_accuracy, -i))


def random_features(
    rootstock: Rootstock, images: ImageSet, seed: int, progress: Progress
) -> Rootstock:
    """The rootstock's own architecture with random weights, and a head fitted on its features."""
    network = random_trunk(rootstock, seed)
    train, val = (
        (_features(network, part, progress), torch.from_numpy(part.labels))
        for part in map(images.subset, ("train", "val"))
    )
    network.head = fit_probe(train, val, len(images.classes)).head()
    return network


@torch.inference_mode()
def _features(rootstock: Rootstock, images: LabeledImages, progress: Progress) -> Tensor:
    count = len(images.pixels)
    features = []
    for done, rows in enumerate(batches(images.pixels), start=1):
        features.append(rootstock.features(rows))
        progress("random features", min(done * BATCH, count), count)
    return torch.cat(features).clone()


def trained_donor(trainer: Trainer, donor: Donor, images: ImageSet) -> TrainedNetwork:
    """All layers of the donor with a linear head on the last, fine-tuned on the labels."""
    seed = trainer.settings.seed
    return trainer.tune(DONOR, donor_classifier(donor, images.classes, seed=seed), None)


def paper_network(cuts: DonorCuts, rootstock: Rootstock) -> Rootstock | None:
    """The paper's scion of at most the rootstock's parameters, to be fine-tuned; None without."""
    scion = paper_scion_of_equal_size(cuts, rootstock)
    if scion is None:
        return None
    probe = probe_columns(cuts.table, cuts.table.columns_of(scion))
    return assemble(cuts.donor, scion, cuts.images.classes, probe.trainable_head())


def trained_baselines(
    trainer: Trainer,
    cuts: DonorCuts,
    pretrained: DonorCuts,
    rootstock: Rootstock,
    donor: Rootstock,
    soft_labels: SoftLabels,
) -> Iterator[TrainedNetwork | str]:
    """Networks of at most the parameters of `rootstock`, and the last layer of the donor.

    Args:
        cuts: of the fine-tuned donor. pretrained: of the donor before that.
        rootstock: before its own fine-tuning.
        donor: the fine-tuned donor. soft_labels: of it.
    Yields: a trained network, or a sentence that says why one is left out.
    """
    yield fitted_network(LAST_LAYER, pretrained, last_layer_scion(pretrained), DRAWS)
    paper = paper_network(cuts, rootstock)
    yield trainer.tune(PAPER_SCION, paper, soft_labels) if paper else NO_PAPER_SCION
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


def donor_classifier(
    donor: Donor, classes: Sequence[str], head: HeadFactory = nn.Linear, seed: int = 0
) -> Rootstock:
    """All layers of the donor, and a head on the pooled output of the last."""
    last = len(donor.layers) - 1
    width = donor.channels[last]
    with seeded(seed):
        made = head(width, len(classes))
    return grow(donor, Scion(last + 1, {last: tuple(range(width))}), classes, made)


def student(
    classes: Sequence[str], parameters: int, size: int, head: HeadFactory = nn.Linear, seed: int = 0
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
    network = copy.deepcopy(rootstock)
    with seeded(seed):
        for module in network.modules():
            _initialize(module)
    return network.eval()


def pruned_donor(classifier: Rootstock, parameters: int) -> Rootstock:
    """A copy of a `donor_classifier` with whole channels removed, to be fine-tuned again.

    Torch-Pruning (DepGraph, arXiv 2301.12900) removes the same share of every layer's channels,
    those of the smallest L2 norm over all weights that depend on them.

    Args:
        parameters: most that the exported network may have.
    Raises: ConfigError where the package torch-pruning is missing; DonorError where it cannot
        prune the donor; BudgetError where even one channel a layer is too many.
    """
    pruning = _torch_pruning()
    # The pruner leaves layers whole that would lose their last channel.
    narrowest = (1 + 1e-6) / min(_widths(classifier))

    def count(share: float) -> int:
        return exported_parameters(_pruned(classifier, share, pruning))

    return _pruned(classifier, _widest(count, parameters, narrowest, 1.0), pruning)


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


def _pruned(classifier: Rootstock, share: float, pruning: ModuleType) -> Rootstock:
    """A copy with this share of every layer's channels."""
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
                pruning_ratio=1 - share,
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


def _mobilenet(classes: Sequence[str], width: float, size: int, head: HeadFactory) -> Rootstock:
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
