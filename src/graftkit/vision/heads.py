"""Heads of a rootstock: from pooled features (n, features) to logits (n, classes)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

DROPOUT = 0.2
HeadMaker = Callable[[int, int], nn.Module]
"""A head from the numbers of features and of classes."""


def linear_head(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> nn.Linear:
    """A logistic regression on standardised features, as one layer on the features themselves.

        W (x − μ) / σ + b = W′ x + b′,   W′ = W / σ,   b′ = b − W′ μ

    Args:
        weight: (classes, features). bias: (classes,).
        mean, std: of every feature, (features,); a std of 0, a constant feature, counts as 1.
    """
    std = torch.where(std > 0, std, torch.ones_like(std))
    return _rescaled(weight, bias, 1 / std, -mean / std)


@torch.no_grad()
def standardized_head(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> nn.Sequential:
    """The same function as `linear_head`, to be trained further: batch normalization and a layer.

    Features differ in scale by orders of magnitude; one rate serves weights of standardised ones.
    """
    norm = nn.BatchNorm1d(len(mean))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(torch.where(std > 0, std, torch.ones_like(std)).square() - norm.eps)
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return nn.Sequential(norm, linear).eval()


def hidden_head(features: int, hidden: int, classes: int) -> nn.Sequential:
    """Batch normalization, a hidden layer with ReLU, dropout, and the layer of the classes."""
    return nn.Sequential(
        nn.BatchNorm1d(features),
        nn.Linear(features, hidden),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(hidden, classes),
    )


def fold_head(head: nn.Module) -> nn.Module:
    """The same function in eval mode, as a copy without batch normalization and dropout.

    W (γ (x − μ) / √(var + ε) + β) + b = W′ x + b′
    """
    if not isinstance(head, nn.Sequential):
        return copy.deepcopy(head).eval()
    kept: list[nn.Module] = []
    norm: nn.BatchNorm1d | None = None
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            norm = layer
        elif norm is not None and isinstance(layer, nn.Linear):
            kept.append(_absorbed(norm, layer))
            norm = None
        elif not isinstance(layer, nn.Dropout):
            kept.append(copy.deepcopy(layer))
    return nn.Sequential(*kept).eval()


def _absorbed(norm: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - scale * norm.running_mean
    return _rescaled(linear.weight, linear.bias, scale, shift)


@torch.no_grad()
def _rescaled(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> nn.Linear:
    """W (scale · x + shift) + b as one layer; computed in float64."""
    wide = weight.double()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    linear.weight.copy_(wide * scale.double())
    linear.bias.copy_(bias.double() + wide @ shift.double())
    return linear.eval()
