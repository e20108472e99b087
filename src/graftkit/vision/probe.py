"""A donor's features, and linear probes on them: logistic regression, with the relevance of each.

The donor runs over all images once; the pooled features of every layer are cached on disk, and so
are the probes, so that a run with another budget fits nothing again.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from graftkit.files import replaced_file
from graftkit.progress import Progress, silent
from graftkit.vision.donor import Donor, pool
from graftkit.vision.images import SPLITS, ImageSet
from graftkit.vision.rootstock import Scion, linear_head, standardized_head

POOLINGS = ("mean", "std")
"""Of every layer. The standard deviation keeps what the mean discards (docs/adr/0015-vision.md)."""
TEST = SPLITS.index("test")
BATCH = 32
UPRIGHT_VIEWS = (0, 4)
ALL_VIEWS = (0, 1, 2, 3, 4, 5, 6, 7)


@dataclass(frozen=True)
class FeatureTable:
    """Pooled features of all images, and of turned and mirrored ones.

    Attributes:
        widths: pooled features of each layer; a layer's features lie together, layer by layer.
        views: by view, float16 (images, features); view 0 has all images, the others all but the
            test images, in the same order.
        splits: of every image, index into SPLITS. labels: of every image.
    """

    widths: tuple[int, ...]
    views: Mapping[int, NDArray[np.float16]]
    splits: NDArray[np.int8]
    labels: NDArray[np.int64]

    def columns(self, layers: Sequence[int], poolings: Sequence[str] = POOLINGS) -> NDArray[Any]:
        """The columns of the views that hold these poolings of these layers."""
        starts = np.cumsum((0, *self.widths))
        columns = []
        for layer in layers:
            channels = self.widths[layer] // len(POOLINGS)
            for pooling in poolings:
                first = starts[layer] + POOLINGS.index(pooling) * channels
                columns.append(np.arange(first, first + channels))
        return np.concatenate(columns)

    def scion(self, columns: NDArray[Any], poolings: Sequence[str] = POOLINGS) -> Scion:
        """The scion that reads these columns."""
        starts = [0, *accumulate(self.widths)]
        ascending = np.sort(columns)
        layers = np.searchsorted(starts, ascending, side="right") - 1
        channels = {
            int(layer): tuple(int(column - starts[layer]) for column in ascending[layers == layer])
            for layer in np.unique(layers)
        }
        return Scion(max(channels) + 1, channels, tuple(poolings))

    def columns_of(self, scion: Scion) -> NDArray[Any]:
        """The columns that a scion reads, in its order."""
        starts = [0, *accumulate(self.widths)]
        return np.concatenate(
            [starts[layer] + np.array(channels) for layer, channels in scion.channels.items()]
        )

    def of(
        self, split: str, columns: NDArray[Any], views: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor]:
        """Features (n, f) float32 and labels (n,) of a split, for each of these views in turn."""
        parts = [self._rows(split, view, columns) for view in views]
        labels = np.tile(self.labels[self.splits == SPLITS.index(split)], len(views))
        return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(labels)

    def _rows(self, split: str, view: int, columns: NDArray[Any]) -> NDArray[np.float32]:
        splits = self.splits if view == 0 else self.splits[self.splits != TEST]
        rows = np.flatnonzero(splits == SPLITS.index(split))
        return self.views[view][rows][:, columns].astype(np.float32)

    def redrawn(self, seed: int) -> "FeatureTable":
        """The same table with another draw of training and validation images within every class.

        Test images stay test images, and every class keeps its counts.
        """
        splits = self.splits.copy()
        draws = np.random.default_rng(seed)
        for label in np.unique(self.labels):
            members = np.flatnonzero((self.labels == label) & (splits != TEST))
            splits[members] = draws.permutation(splits[members])
        return replace(self, splits=splits)


def turned(images: Tensor, view: int) -> Tensor:
    """One of the eight symmetries of a square (n, c, s, s); view 0 leaves it, 4 mirrors it."""
    mirrored = images.flip(-1) if view & 4 else images
    return torch.rot90(mirrored, view & 3, (-2, -1))


def read_features(
    donor: Donor,
    images: ImageSet,
    cache: Path,
    views: Sequence[int],
    progress: Progress = silent,
) -> FeatureTable:
    """Pooled features of every layer of `donor`, read from the cache where they exist.

    An interrupted pass continues with the view at which it stopped.

    Args:
        views: symmetries of the images, see `turned`.
    Raises: OutputError when the cache cannot be written.
    """
    name = cache_key(donor, images)
    widths = _widths(donor)
    untested = images.splits != TEST
    values = {}
    for done, view in enumerate(views):
        progress("features of every layer, views", done, len(views))
        file = cache / f"features-{name}-{view}.npy"
        rows = images.pixels if view == 0 else images.pixels[untested]
        shape = (len(rows), sum(widths))
        if not _is_whole(file, shape):
            _write(donor, rows, view, shape, file, progress)
        values[view] = np.load(file, mmap_mode="r", allow_pickle=False)
    progress("features of every layer, views", len(views), len(views))
    return FeatureTable(widths, values, images.splits, images.labels)


def cache_key(donor: Donor, images: ImageSet) -> str:
    """The name in the cache of whatever depends on this donor and these images."""
    inputs = f"{donor.digest} {donor.normalization} {images.digest} {POOLINGS}"
    return blake3(inputs.encode()).hexdigest()[:16]


@torch.inference_mode()
def _widths(donor: Donor) -> tuple[int, ...]:
    outputs = donor.eval()(torch.zeros(1, 3, donor.size, donor.size))
    return tuple(pool(output, POOLINGS).shape[1] for output in outputs)


def _is_whole(file: Path, shape: tuple[int, int]) -> bool:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return bool(values.shape == shape and values.dtype == np.float16)


def _write(
    donor: Donor,
    rows: NDArray[np.uint8],
    view: int,
    shape: tuple[int, int],
    file: Path,
    progress: Progress,
) -> None:
    with replaced_file(file) as partial:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, len(rows), BATCH):
            values[start : start + BATCH] = pooled_outputs(donor, rows[start : start + BATCH], view)
            progress(f"view {view}: images", min(start + BATCH, len(rows)), len(rows))
        values.flush()


@torch.inference_mode()
def pooled_outputs(donor: Donor, rows: NDArray[np.uint8], view: int = 0) -> NDArray[np.float16]:
    """Pooled features of every layer, side by side: (n, sum of widths)."""
    images = turned(torch.from_numpy(np.array(rows)).float(), view)
    # Convolutions of small images take half the time with channels last (docs/benchmarks.md).
    outputs = donor.eval()(images.contiguous(memory_format=torch.channels_last))
    pooled = torch.cat([pool(output, POOLINGS) for output in outputs], dim=1)
    # Activations of a network without batch normalization can pass what float16 holds.
    limit = torch.finfo(torch.float16).max
    return pooled.clamp(-limit, limit).half().numpy()


DECAYS = (0.01, 0.003, 0.001, 0.0003)
"""λ of the penalty λ/2 ‖W‖² beside the mean cross-entropy, strongest first."""
ITERATIONS = 100
PENALTIES, EPOCHS = (1e-3, 1e-1, 1.0), 60
"""Of the hidden head: alpha of scikit-learn, and passes over the training images."""
LEAST_STD = 1e-3
"""A feature that varies less counts as constant."""
UNSEEN_LOGIT = -30.0
"""Of a class without training images."""


@dataclass(frozen=True)
class LinearProbe:
    """A logistic regression on standardised features.

    Attributes:
        weight (classes, features), bias (classes,): on standardised features.
        mean, std (features,): of the training images; std is 1 for a feature that hardly varies.
        val_accuracy, val_loss: share of validation images named rightly, and mean cross-entropy.
        decay: λ, chosen on the validation images.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    val_accuracy: float
    val_loss: float
    decay: float

    def standardized(self, features: Tensor) -> Tensor:
        """(n, features), each with mean 0 and variance 1 over the training images."""
        return (features - self.mean) / self.std

    def logits(self, features: Tensor) -> Tensor:
        """(n, features) to (n, classes)."""
        return self.standardized(features) @ self.weight.T + self.bias

    def head(self) -> nn.Linear:
        """The same function as one linear layer on the features themselves."""
        return linear_head(self.weight, self.bias, self.mean, self.std)

    def trainable_head(self) -> nn.Sequential:
        """The same function, in a form that trains well."""
        return standardized_head(self.weight, self.bias, self.mean, self.std)


def fit_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    decays: Sequence[float] = DECAYS,
) -> LinearProbe:
    """The probe whose λ names most validation images rightly; of equals, the stronger λ.

        min over W, b of mean cross-entropy + λ/2 ‖W‖²

    Args:
        train, val: features (n, f) float32 and labels (n,). A class without training images is
            never predicted.
        classes: how many there are.
    """
    features, labels = train
    mean, std = _moments(features)
    scaled = ((features - mean) / std).numpy()
    best: LinearProbe | None = None
    solver = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    for decay in decays:
        # scikit-learn weighs the sum of the losses by C and has 1/2 ‖W‖² beside it.
        solver.C = 1 / (decay * len(labels))
        weight, bias = _fitted(solver, scaled, labels.numpy(), classes)
        probe = LinearProbe(weight, bias, mean, std, 0.0, 0.0, decay)
        accuracy, loss = _scores(probe.logits(val[0]), val[1])
        if best is None or accuracy > best.val_accuracy:
            best = replace(probe, val_accuracy=accuracy, val_loss=loss)
    assert best is not None
    return best


def fit_hidden(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, hidden: int, seed: int
) -> nn.Sequential:
    """A head with one hidden layer on the features themselves, its penalty chosen on validation.

    Args:
        train, val: as for `fit_probe`. hidden: units with ReLU. seed: of the first weights.
    """
    features, labels = train
    mean, std = _moments(features)
    scaled = ((features - mean) / std).numpy()
    best, best_loss = None, math.inf
    for penalty in PENALTIES:
        solver = MLPClassifier((hidden,), alpha=penalty, max_iter=EPOCHS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.fit(scaled, labels.numpy())
        head = _hidden_layers(solver, mean, std, classes)
        with torch.no_grad():
            loss = float(nn.functional.cross_entropy(head(val[0]), val[1]))
        if loss < best_loss:
            best, best_loss = head, loss
    assert best is not None
    return best


@torch.no_grad()
def _hidden_layers(solver: MLPClassifier, mean: Tensor, std: Tensor, classes: int) -> nn.Sequential:
    (first, second), (shift, bias) = (
        [torch.from_numpy(part).float() for part in parts]
        for parts in (solver.coefs_, solver.intercepts_)
    )
    weight, bias = _by_class(solver.classes_, second.T, bias, classes)
    last = nn.Linear(weight.shape[1], classes)
    last.weight.copy_(weight)
    last.bias.copy_(bias)
    return nn.Sequential(linear_head(first.T, shift, mean, std), nn.ReLU(), last).eval()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature; the latter is 1 where a feature hardly varies.

    Division by a tiny deviation would amplify the rounding of such a feature.
    """
    mean, std = features.mean(dim=0), features.std(dim=0, unbiased=False)
    return mean, torch.where(std > LEAST_STD, std, torch.ones_like(std))


def _fitted(
    solver: LogisticRegression, scaled: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        # A probe that has not wholly converged is scored on validation images like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(scaled, labels)
    weight, bias = (torch.from_numpy(part).float() for part in (solver.coef_, solver.intercept_))
    return _by_class(solver.classes_, weight, bias, classes)


def _by_class(
    labels: np.ndarray, rows: Tensor, shift: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Weights (classes, f) and bias (classes,) from those of the classes in the training images."""
    if len(labels) == 2 and len(rows) == 1:  # scikit-learn keeps one row for two classes
        rows, shift = torch.cat([-rows / 2, rows / 2]), torch.cat([-shift / 2, shift / 2])
    weight, bias = torch.zeros(classes, rows.shape[1]), torch.full((classes,), UNSEEN_LOGIT)
    weight[torch.from_numpy(labels)], bias[torch.from_numpy(labels)] = rows, shift
    return weight, bias


def _scores(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    right = (logits.argmax(dim=1) == labels).double().mean()
    return float(right), float(nn.functional.cross_entropy(logits, labels))


def l2_relevance(probe: LinearProbe) -> Tensor:
    """Norm of each standardised feature's weights over the classes, (features,): Head2Toe
    (Evci et al. 2022, arXiv 2201.03529), eq. 4 with one feature in a group."""
    relevance: Tensor = probe.weight.norm(dim=0)
    return relevance


def taylor_relevance(probe: LinearProbe, train: tuple[Tensor, Tensor]) -> Tensor:
    """Mean |x ∂L/∂x| of each standardised feature over training images, (features,): the first
    order of the loss's change when the feature is removed (Molchanov et al. 2017, 1611.06440).
    """
    features, labels = train
    scaled = probe.standardized(features)
    error = torch.softmax(scaled @ probe.weight.T + probe.bias, dim=1)
    error[torch.arange(len(labels)), labels] -= 1  # ∂L/∂logits of each image
    relevance: Tensor = (scaled * (error @ probe.weight)).abs().mean(dim=0)
    return relevance


_FIELDS = tuple(field.name for field in fields(LinearProbe))
_CACHE_METADATA = {"fitted": json.dumps([DECAYS, ITERATIONS])}


def write_probes(probes: Sequence[LinearProbe], file: Path) -> None:
    """Write probes, in their order, whole or not at all. Raises: OutputError."""
    values = {
        f"{index}.{name}": _as_tensor(getattr(probe, name))
        for index, probe in enumerate(probes)
        for name in _FIELDS
    }
    with replaced_file(file) as partial:
        partial.write_bytes(save(values, metadata=_CACHE_METADATA))


def read_probes(file: Path, count: int) -> list[LinearProbe] | None:
    """The first `count` probes; None if the file is missing, damaged, or of other settings."""
    try:
        with safe_open(file, framework="pt") as stored:
            if stored.metadata() != _CACHE_METADATA:
                return None
            probes = [
                {name: stored.get_tensor(f"{index}.{name}") for name in _FIELDS}
                for index in range(count)
            ]
    except (OSError, SafetensorError):
        return None
    return [
        LinearProbe(**{name: value if value.ndim else value.item() for name, value in each.items()})
        for each in probes
    ]


def _as_tensor(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    return torch.tensor(value, dtype=torch.float64)
