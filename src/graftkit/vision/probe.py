"""Linear probes: logistic regression on frozen features, with the relevance of every feature.

Probes are cached on disk, so that a run with another budget does not fit them again.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from graftkit.files import replaced_file
from graftkit.vision.rootstock import linear_head, standardized_head

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
