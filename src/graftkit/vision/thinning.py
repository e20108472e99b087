"""Take channels out of modules; and out of the last layer of a cut trunk those nobody reads.

Thin a donor's layers: hidden channels that carry little are taken out, outputs stay.

Hidden is a channel between two convolutions, or two dense layers, of one layer of the donor, with
nothing but activations, normalization and depthwise convolutions on its way. Whoever reads the
layer's output notices no other shape, so a thinned donor is cut, read and trained like any other.
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
from graftkit.vision.rootstock import batches

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


LEAST_KEPT = 0.1
"""Share of the hidden channels that stays wherever channels are taken out."""
BLOCK = 16
"""Channels that go together where a module has a multiple of them: kernels of inference work on
blocks of 8 or 16 channels, and are much slower where the last one is not full."""

Dense = nn.Conv2d | nn.Linear
Unit = Literal["parameters", "macs"]


@dataclass(frozen=True)
class Hidden:
    """Channels inside a layer: those that one of its modules makes and another one reads.

    Attributes:
        producer, between, consumer: names of modules of the layer, in the order of their work.
        channels: how many there are.
        parameters, macs: that one channel costs, with batch normalization folded away.
    """

    producer: str
    between: tuple[str, ...]
    consumer: str
    channels: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    output: Tensor


@torch.no_grad()
def find_hidden(layer: nn.Module, x: Tensor) -> list[Hidden]:
    """All hidden channels of a layer that can be taken out, seen in one pass of its input `x`.

    Neither what runs between modules nor what an activation does is seen, so every finding is tried
    on a copy of the layer.

    Args:
        x: one image's map or tokens: costs are counted for it.
    """
    calls = _calls(layer, x)
    runs = Counter(call.name for call in calls)
    found = [_follow(calls, index) for index, call in enumerate(calls) if runs[call.name] == 1]
    return [hidden for hidden in found if hidden and _can_be_thinned(layer, hidden, x)]


@torch.no_grad()
def narrow(
    layer: nn.Module, hidden: Hidden, kept: Sequence[int], means: Tensor | None = None
) -> None:
    """Leave only these channels of `hidden`, in place.

    Args:
        kept: ascending, each once, at least one.
        means: of all channels as the consumer reads them; those that go leave their mean in its
            bias, if it has one.
    """
    consumer = layer.get_submodule(hidden.consumer)
    assert isinstance(consumer, Dense)
    if means is not None and consumer.bias is not None:
        gone = sorted(set(range(hidden.channels)) - set(kept))
        weight = consumer.weight[:, gone]
        consumer.bias += (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ means[gone]
    for name in (hidden.producer, *hidden.between):
        keep_outputs(layer.get_submodule(name), kept)
    keep_inputs(consumer, kept)


def hidden_channels(donor: Donor) -> list[int]:
    """Of every layer, how many hidden channels it has."""
    counts = [0] * len(donor.layers)
    for layer, hidden in _find_in_donor(donor):
        counts[layer] += hidden.channels
    return counts


class Thinner:
    """The hidden channels of a donor in the order in which they are taken out.

    A channel's worth is the share of its consumer's variance that goes through it,
    var(a) ‖W‖² / Σ var(a) ‖W‖², over what it costs. What is worth least goes first, by blocks.

    Args:
        pixels: training images to measure on, uint8 (n, 3, size, size).
        unit: what is short.
    """

    def __init__(self, donor: Donor, pixels: np.ndarray, unit: Unit):
        self.donor = donor
        self.hidden = _find_in_donor(donor)
        self.moments = _measure(donor, self.hidden, pixels)
        self.order = self._order(unit)

    def thinned(self, cut: int, fits: Callable[[Donor], bool]) -> Donor | None:
        """The first `cut` layers with as few channels taken out as `fits` asks for.

        Args:
            fits: whether a donor is small enough; must not turn false when channels go.
        Returns: None where that is not enough, or nothing is hidden there.
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

    def _order(self, unit: str) -> list[tuple[int, Hidden, list[int]]]:
        ranked = []
        for layer, hidden in self.hidden:
            weight = _weight(self.donor.layers[layer].get_submodule(hidden.consumer))
            norms = weight.transpose(0, 1).flatten(1).square().sum(1)
            worth = self.moments[layer, hidden].variance * norms.double()
            worth = worth / worth.sum().clamp_min(torch.finfo(torch.float64).tiny)
            order = torch.argsort(worth, stable=True).tolist()
            for block in _blocks(order):
                cost = getattr(hidden, unit) * len(block)
                ranked.append((float(worth[block].sum()) / cost, layer, hidden, block))
        ranked.sort(key=lambda item: item[0])
        return [item[1:] for item in ranked]

    def _without(self, cut: int, gone: Sequence[tuple[int, Hidden, list[int]]]) -> Donor:
        layers = [copy.deepcopy(layer) for layer in self.donor.layers[:cut]]
        dropped: dict[tuple[int, Hidden], set[int]] = {}
        for layer, hidden, block in gone:
            dropped.setdefault((layer, hidden), set()).update(block)
        for (layer, hidden), channels in dropped.items():
            kept = sorted(set(range(hidden.channels)) - channels)
            means = self.moments[layer, hidden].mean.float()
            narrow(layers[layer], hidden, kept, means)
        return self.donor.with_layers(layers)


def _blocks(order: list[int]) -> list[list[int]]:
    """The channels that may go, the first first, as they go together; the rest always stays."""
    size = BLOCK if len(order) % BLOCK == 0 else 1
    least = max(1, math.ceil(LEAST_KEPT * len(order) / size)) * size
    gone = order[: len(order) - least]
    return [gone[start : start + size] for start in range(0, len(gone), size)]


class _Moments:
    """Mean and variance of every channel that a module reads, from batches."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sum)

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook: takes in what the module reads."""
        channels = _by_channel(module, inputs[0]).double()
        self.count += len(channels)
        self.sum += channels.sum(0)
        self.squares += channels.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        return (self.squares / self.count - self.mean**2).clamp_min(0)


@torch.no_grad()
def _find_in_donor(donor: Donor) -> list[tuple[int, Hidden]]:
    # An image of noise: what is equal for a black one need not be equal.
    draws = np.random.default_rng(0).integers(0, 256, (1, 3, donor.size, donor.size))
    x = donor.normalization.apply(torch.from_numpy(draws).float())
    found = []
    for index, layer in enumerate(donor.layers):
        found += [(index, hidden) for hidden in find_hidden(layer, x)]
        x = layer(x)
    return found


@torch.inference_mode()
def _measure(
    donor: Donor, places: Sequence[tuple[int, Hidden]], pixels: np.ndarray
) -> dict[tuple[int, Hidden], _Moments]:
    moments = {place: _Moments(place[1].channels) for place in places}
    hooks = [
        donor.layers[layer].get_submodule(hidden.consumer).register_forward_pre_hook(found.watch)
        for (layer, hidden), found in moments.items()
    ]
    try:
        for images in batches(pixels):
            donor(images)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _calls(layer: nn.Module, x: Tensor) -> list[_Call]:
    """The modules of a layer that have no parts, in the order in which they run."""
    calls: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.append(_Call(name, module, output))

        return hook

    hooks = [
        part.register_forward_hook(note(name))
        for name, part in layer.named_modules()
        if not any(part.children())
    ]
    try:
        layer(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _follow(calls: Sequence[_Call], index: int) -> Hidden | None:
    """The channels that a call makes, up to the next module that mixes channels."""
    made = calls[index]
    if not _mixes(made.module):
        return None
    between: list[_Call] = []
    for call in calls[index + 1 :]:
        if _mixes(call.module):
            fits = _weight(call.module).shape[1] == len(_weight(made.module))
            return _hidden(made, between, call) if fits else None
        if _is_depthwise(call.module) or isinstance(call.module, nn.BatchNorm2d):
            between.append(call)
        elif [*call.module.parameters(), *call.module.buffers()]:
            return None
    return None


def _hidden(made: _Call, between: Sequence[_Call], reader: _Call) -> Hidden:
    making = [made, *(call for call in between if _is_depthwise(call.module))]
    costs = [(_weight(call.module)[0].numel(), _positions(call)) for call in making]
    read = (_weight(reader.module)[:, 0].numel(), _positions(reader))
    return Hidden(
        made.name,
        tuple(call.name for call in between),
        reader.name,
        len(_weight(made.module)),
        sum(weights + 1 for weights, _ in costs) + read[0],
        sum(weights * positions for weights, positions in (*costs, read)),
    )


def _positions(call: _Call) -> int:
    return len(_by_channel(call.module, call.output))


def _can_be_thinned(layer: nn.Module, hidden: Hidden, x: Tensor) -> bool:
    """Whether a layer without half of these channels answers as one where they are zero."""
    kept = list(range(0, hidden.channels, 2))
    masked, thinned = copy.deepcopy(layer), copy.deepcopy(layer)

    def mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        channels = torch.zeros(hidden.channels, device=x.device)
        channels[kept] = 1
        return (
            inputs[0] * (channels if isinstance(module, nn.Linear) else channels[:, None, None]),
        )

    masked.get_submodule(hidden.consumer).register_forward_pre_hook(mask)
    try:
        narrow(thinned, hidden, kept)
        found, expected = thinned(x), masked(x)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False  # the layer does more with these channels than its modules show
    scale = float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4 * scale)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, Dense)
    return module.weight.detach()


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.groups == 1:
        return False
    return module.groups == module.in_channels == module.out_channels


def _by_channel(module: nn.Module, x: Tensor) -> Tensor:
    """What a module reads or makes, (n, C, H, W) or (..., C) for dense layers, as rows (m, C)."""
    return (x if isinstance(module, nn.Linear) else x.movedim(1, -1)).flatten(0, -2)
