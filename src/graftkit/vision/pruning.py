"""Take channels out of modules; and out of the last layer of a cut trunk those nobody reads."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftkit.vision.donors.mobilenet_npz import InvertedResidual

# Every output channel depends on the same input channel alone, and there are no weights.
_PER_CHANNEL = (
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
)


@dataclass(frozen=True)
class Pruned:
    """Layers after pruning, how many channels the last one lost, and why none, if none."""

    layers: tuple[nn.Module, ...]
    dropped: int
    reason: str = ""


class PickChannels(nn.Module):
    """Passes on some channels of a map."""

    index: Tensor

    def __init__(self, kept: Sequence[int]):
        super().__init__()
        self.register_buffer("index", torch.tensor(kept))

    def forward(self, x: Tensor) -> Tensor:
        """Of a map (n, C, H, W) the kept channels, in their order."""
        return x.index_select(1, self.index)


def drop_dead_channels(layers: Sequence[nn.Module], kept: Sequence[int]) -> Pruned:
    """Leave only the `kept` output channels of the last layer, where that is simple.

    The last layer is copied, the others are passed on. Its outputs are those of the kept channels,
    in their order, so whoever reads them must count anew: kept[i] becomes i. Simple are inverted
    residuals of the .npz MobileNetV2, and an nn.Sequential that ends in an ordinary convolution
    with batch normalization and activation.

    Args:
        kept: output channels that are read, ascending, each once.
    """
    last = copy.deepcopy(layers[-1])
    body = last.body if isinstance(last, InvertedResidual) else last
    reason, conv, norms = _find_convolution(body)
    if conv is None:
        return Pruned(tuple(layers), 0, reason)
    dropped = conv.out_channels - len(kept)
    if not kept or dropped == 0:
        reason = "every channel is read" if kept else "no channel is read: cut before this layer"
        return Pruned(tuple(layers), 0, reason)
    for module in (conv, *norms):
        keep_outputs(module, kept)
    if isinstance(last, InvertedResidual) and last.skip is not None:
        last.skip = PickChannels(kept)
    return Pruned((*layers[:-1], last), dropped)


def _find_convolution(
    body: nn.Module,
) -> tuple[str, nn.Conv2d | None, list[nn.BatchNorm2d]]:
    """The last convolution of a Sequential and the normalizations behind it, or why not."""
    norms: list[nn.BatchNorm2d] = []
    for part in reversed(list(body.children()) if isinstance(body, nn.Sequential) else [body]):
        if isinstance(part, nn.Conv2d):
            if part.groups == 1:
                return "", part, norms
            return "its last convolution is grouped", None, []
        if isinstance(part, nn.BatchNorm2d):
            norms.append(part)
        elif not isinstance(part, _PER_CHANNEL):
            return f"it ends in {type(part).__name__}, which is not pruned", None, []
    return "it has no convolution", None, []


@torch.no_grad()
def keep_outputs(module: nn.Module, kept: Sequence[int]) -> None:
    """Leave these output channels of a convolution, a dense layer or what is behind them, in place.

    A depthwise convolution and a normalization lose the same input channels.
    """
    _slice(module, ("weight", "bias", "running_mean", "running_var"), 0, kept)
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            module.in_channels = module.groups = len(kept)
        module.out_channels = len(kept)
    elif isinstance(module, nn.Linear):
        module.out_features = len(kept)
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(kept)


@torch.no_grad()
def keep_inputs(module: nn.Conv2d | nn.Linear, kept: Sequence[int]) -> None:
    """Leave these input channels of an ordinary convolution or a dense layer, in place."""
    _slice(module, ("weight",), 1, kept)
    if isinstance(module, nn.Conv2d):
        module.in_channels = len(kept)
    else:
        module.in_features = len(kept)


def _slice(module: nn.Module, names: Sequence[str], dim: int, kept: Sequence[int]) -> None:
    for name in names:
        value = getattr(module, name, None)
        if value is not None:
            part = value.detach().index_select(dim, torch.tensor(kept, device=value.device))
            trained = isinstance(value, nn.Parameter)
            setattr(module, name, nn.Parameter(part, value.requires_grad) if trained else part)
