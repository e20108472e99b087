"""Remove channels: unread ones of a trunk's last layer, and hidden ones inside a donor's layers.

Hidden is a channel between two convolutions, or two dense layers, of one layer of the donor, with
nothing but activations, normalization and depthwise convolutions in between. Without some of them
the layer's output has the same shape, so a thinned donor is cut, read and trained like any other.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.vision.donor import Donor
from graftkit.vision.donors.architectures import InvertedResidual
from graftkit.vision.rootstock import ChannelMoments, batches

LEAST_SHARE = 0.1
"""Of the hidden channels, the share that stays wherever channels are removed."""
BLOCK = 16
"""Channels that go together where a module has a multiple of them: kernels of inference work on
blocks of 8 or 16 channels, and are much slower where the last one is not full."""

ConvOrLinear = nn.Conv2d | nn.Linear

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
class PruningResult:
    """Layers after pruning, how many channels the last one lost, and the reason where none."""

    layers: tuple[nn.Module, ...]
    dropped: int
    reason: str = ""


class PickChannels(nn.Module):
    """Selects some channels of a map."""

    index: Tensor

    def __init__(self, keep: Sequence[int]):
        super().__init__()
        self.register_buffer("index", torch.tensor(keep))

    def forward(self, x: Tensor) -> Tensor:
        """The selected channels of a map (n, C, H, W), in their order."""
        return x.index_select(1, self.index)


def drop_unread_channels(layers: Sequence[nn.Module], keep: Sequence[int]) -> PruningResult:
    """Remove the output channels of the last layer that are not in `keep`, where that is simple.

    It is simple for inverted residuals of the .npz MobileNetV2, and for an nn.Sequential that ends
    in an ordinary convolution with batch normalization and activation. The last layer is copied;
    output channel keep[i] becomes channel i.

    Args:
        keep: output channels that are read, ascending, each once.
    """
    last = copy.deepcopy(layers[-1])
    body = last.body if isinstance(last, InvertedResidual) else last
    reason, conv, norms = _find_convolution(body)
    if conv is None:
        return PruningResult(tuple(layers), 0, reason)
    dropped = conv.out_channels - len(keep)
    if not keep or dropped == 0:
        reason = "every channel is read" if keep else "no channel is read: cut before this layer"
        return PruningResult(tuple(layers), 0, reason)
    for module in (conv, *norms):
        keep_outputs(module, keep)
    if isinstance(last, InvertedResidual) and last.skip is not None:
        last.skip = PickChannels(keep)
    return PruningResult((*layers[:-1], last), dropped)


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
def keep_outputs(module: nn.Module, keep: Sequence[int]) -> None:
    """Keep only these output channels of a convolution, dense layer or normalization, in place.

    A depthwise convolution and a normalization lose the same input channels.
    """
    _slice(module, ("weight", "bias", "running_mean", "running_var"), 0, keep)
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            module.in_channels = module.groups = len(keep)
        module.out_channels = len(keep)
    elif isinstance(module, nn.Linear):
        module.out_features = len(keep)
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(keep)


@torch.no_grad()
def keep_inputs(module: nn.Conv2d | nn.Linear, keep: Sequence[int]) -> None:
    """Keep only these input channels of an ordinary convolution or a dense layer, in place."""
    _slice(module, ("weight",), 1, keep)
    if isinstance(module, nn.Conv2d):
        module.in_channels = len(keep)
    else:
        module.in_features = len(keep)


def _slice(module: nn.Module, names: Sequence[str], dim: int, keep: Sequence[int]) -> None:
    for name in names:
        value = getattr(module, name, None)
        if value is not None:
            part = value.detach().index_select(dim, torch.tensor(keep, device=value.device))
            trained = isinstance(value, nn.Parameter)
            setattr(module, name, nn.Parameter(part, value.requires_grad) if trained else part)


@dataclass(frozen=True)
class HiddenChannels:
    """Channels inside a layer, which one of its modules computes and another one reads.

    Attributes:
        producer, between, consumer: names of modules of the layer, in the order in which they run.
        channels: how many there are.
        parameters, macs: cost of one channel, with batch normalization folded away.
    """

    producer: str
    between: tuple[str, ...]
    consumer: str
    channels: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class _ModuleCall:
    name: str
    module: nn.Module
    output: Tensor


@torch.no_grad()
def find_hidden(layer: nn.Module, x: Tensor) -> list[HiddenChannels]:
    """All hidden channels of a layer that can be removed, observed in one pass of its input `x`.

    Hooks observe modules only, not the code between them, so every candidate is tried on a copy
    of the layer.

    Args:
        x: the map or tokens of one image; costs are counted for it.
    """
    calls = _calls(layer, x)
    runs = Counter(call.name for call in calls)
    candidates = [_follow(calls, index) for index, call in enumerate(calls) if runs[call.name] == 1]
    return [hidden for hidden in candidates if hidden and _can_be_thinned(layer, hidden, x)]


@torch.no_grad()
def narrow(
    layer: nn.Module, hidden: HiddenChannels, keep: Sequence[int], means: Tensor | None = None
) -> None:
    """Keep only these channels of `hidden`, in place.

    Args:
        keep: ascending, each once, at least one.
        means: of all channels as the consumer reads them; the means of removed channels go into
            the consumer's bias, if it has one.
    """
    consumer = layer.get_submodule(hidden.consumer)
    assert isinstance(consumer, ConvOrLinear)
    if means is not None and consumer.bias is not None:
        removed = sorted(set(range(hidden.channels)) - set(keep))
        weight = consumer.weight[:, removed]
        consumer.bias += (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ means[removed]
    for name in (hidden.producer, *hidden.between):
        keep_outputs(layer.get_submodule(name), keep)
    keep_inputs(consumer, keep)


def hidden_channels(donor: Donor) -> list[int]:
    """The number of hidden channels of every layer."""
    counts = [0] * len(donor.layers)
    for layer, hidden in _find_in_donor(donor):
        counts[layer] += hidden.channels
    return counts


class Thinner:
    """The hidden channels of a donor in the order in which they are removed.

    The relevance of a channel is the share of its consumer's variance that goes through it, over
    its cost: var(a) ‖W‖² / Σ var(a) ‖W‖². The least relevant ones go first, in blocks.

    Args:
        pixels: training images to measure on, uint8 (n, 3, size, size).
        cost: what has to become less.
    """

    def __init__(
        self, donor: Donor, pixels: np.ndarray, cost: Literal["parameters", "macs"]
    ) -> None:
        self.donor = donor
        self.hidden = _find_in_donor(donor)
        self.moments = _measure(donor, self.hidden, pixels)
        self.order = self._order(cost)

    def thin(self, cut: int, fits: Callable[[Donor], bool]) -> Donor | None:
        """The first `cut` layers with as few channels removed as it takes to fit.

        Args:
            fits: whether a donor is small enough; must not turn false when channels go.
        Returns: None where no removal is enough, or there are no hidden channels.
        """
        order = [item for item in self.order if item[0] < cut]
        low, high = 0, len(order)
        if not order or not fits(self._without(cut, order)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if fits(self._without(cut, order[:middle])):
                high = middle
            else:
                low = middle
        return self._without(cut, order[:high])

    def _order(self, cost: str) -> list[tuple[int, HiddenChannels, list[int]]]:
        ranked = []
        for layer, hidden in self.hidden:
            weight = _weight(self.donor.layers[layer].get_submodule(hidden.consumer))
            norms = weight.transpose(0, 1).flatten(1).square().sum(1)
            share = self.moments[layer, hidden].variance * norms.double()
            share = share / share.sum().clamp_min(torch.finfo(torch.float64).tiny)
            for block in _blocks(torch.argsort(share, stable=True).tolist()):
                block_cost = getattr(hidden, cost) * len(block)
                ranked.append((float(share[block].sum()) / block_cost, layer, hidden, block))
        ranked.sort(key=lambda item: item[0])
        return [item[1:] for item in ranked]

    def _without(self, cut: int, blocks: Sequence[tuple[int, HiddenChannels, list[int]]]) -> Donor:
        layers = [copy.deepcopy(layer) for layer in self.donor.layers[:cut]]
        removed: dict[tuple[int, HiddenChannels], set[int]] = {}
        for layer, hidden, block in blocks:
            removed.setdefault((layer, hidden), set()).update(block)
        for (layer, hidden), channels in removed.items():
            keep = sorted(set(range(hidden.channels)) - channels)
            means = self.moments[layer, hidden].mean.float()
            narrow(layers[layer], hidden, keep, means)
        return self.donor.with_layers(layers)


def _blocks(order: list[int]) -> list[list[int]]:
    """The channels that may be removed, in the blocks and in the order in which they go."""
    size = BLOCK if len(order) % BLOCK == 0 else 1
    least = max(1, math.ceil(LEAST_SHARE * len(order) / size)) * size
    removable = order[: len(order) - least]
    return [removable[start : start + size] for start in range(0, len(removable), size)]


@torch.no_grad()
def _find_in_donor(donor: Donor) -> list[tuple[int, HiddenChannels]]:
    # An image of noise, because different layers may agree on a black one.
    draws = np.random.default_rng(0).integers(0, 256, (1, 3, donor.size, donor.size))
    x = donor.normalization.apply(torch.from_numpy(draws).float())
    places = []
    for index, layer in enumerate(donor.layers):
        places += [(index, hidden) for hidden in find_hidden(layer, x)]
        x = layer(x)
    return places


@torch.inference_mode()
def _measure(
    donor: Donor, places: Sequence[tuple[int, HiddenChannels]], pixels: np.ndarray
) -> dict[tuple[int, HiddenChannels], ChannelMoments]:
    moments = {place: ChannelMoments(place[1].channels) for place in places}
    hooks = [
        donor.layers[layer].get_submodule(hidden.consumer).register_forward_pre_hook(_add_to(each))
        for (layer, hidden), each in moments.items()
    ]
    try:
        for images in batches(pixels):
            donor(images)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _add_to(moments: ChannelMoments) -> Callable[..., None]:
    """A forward pre-hook that adds what a module reads to the moments."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(_by_channel(module, inputs[0]))

    return hook


def _calls(layer: nn.Module, x: Tensor) -> list[_ModuleCall]:
    """The calls of a layer's leaf modules, in the order in which they run."""
    calls: list[_ModuleCall] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.append(_ModuleCall(name, module, output))

        return hook

    hooks = [
        part.register_forward_hook(record(name))
        for name, part in layer.named_modules()
        if not any(part.children())
    ]
    try:
        layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _follow(calls: Sequence[_ModuleCall], index: int) -> HiddenChannels | None:
    """The channels that a call computes, if the next module that mixes channels reads just them."""
    producer = calls[index]
    if not _mixes(producer.module):
        return None
    between: list[_ModuleCall] = []
    for call in calls[index + 1 :]:
        if _mixes(call.module):
            matches = _weight(call.module).shape[1] == len(_weight(producer.module))
            return _hidden(producer, between, call) if matches else None
        if _is_depthwise(call.module) or isinstance(call.module, nn.BatchNorm2d):
            between.append(call)
        elif [*call.module.parameters(), *call.module.buffers()]:
            return None
    return None


def _hidden(
    producer: _ModuleCall, between: Sequence[_ModuleCall], consumer: _ModuleCall
) -> HiddenChannels:
    depthwise = [call for call in between if _is_depthwise(call.module)]
    costs = [(_weight(call.module)[0].numel(), _positions(call)) for call in (producer, *depthwise)]
    read = (_weight(consumer.module)[:, 0].numel(), _positions(consumer))
    return HiddenChannels(
        producer.name,
        tuple(call.name for call in between),
        consumer.name,
        len(_weight(producer.module)),
        sum(weights + 1 for weights, _ in costs) + read[0],
        sum(weights * positions for weights, positions in (*costs, read)),
    )


def _positions(call: _ModuleCall) -> int:
    return len(_by_channel(call.module, call.output))


def _can_be_thinned(layer: nn.Module, hidden: HiddenChannels, x: Tensor) -> bool:
    """Whether a layer without half of these channels computes what it does when they are zero."""
    keep = list(range(0, hidden.channels, 2))
    masked, thinned = copy.deepcopy(layer), copy.deepcopy(layer)

    def mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        channels = torch.zeros(hidden.channels, device=x.device)
        channels[keep] = 1
        return (
            inputs[0] * (channels if isinstance(module, nn.Linear) else channels[:, None, None]),
        )

    masked.get_submodule(hidden.consumer).register_forward_pre_hook(mask)
    try:
        narrow(thinned, hidden, keep)
        output, expected = thinned(x), masked(x)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False  # the layer does more with these channels than its modules show
    scale = float(expected.abs().max())
    return output.shape == expected.shape and torch.allclose(output, expected, atol=1e-4 * scale)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, ConvOrLinear)
    return module.weight.detach()


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.groups == 1:
        return False
    return module.groups == module.in_channels == module.out_channels


def _by_channel(module: nn.Module, x: Tensor) -> Tensor:
    """An input or output, (n, C, H, W) or (..., C) for dense layers, as rows (m, C)."""
    return (x if isinstance(module, nn.Linear) else x.movedim(1, -1)).flatten(0, -2)
