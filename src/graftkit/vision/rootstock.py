"""Rootstock: the first layers of a donor, and a small head on the pooled outputs of some of them.

Knowledge Grafting (arXiv 2507.19261): feature maps of the donor, averaged over the image,
concatenated, classified by a few dense layers. Which features are read is the scion.

A donor whose batch normalization is folded into its convolutions trains badly. So every
convolution gets one that leaves the function unchanged (`insert_norms`), and before the export
all of them are folded away again (`fold_rootstock`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from graftkit.errors import DonorError, ImagesError
from graftkit.vision.donor import Donor, Normalization, pool

DROPOUT = 0.2
HeadFactory = Callable[[int, int], nn.Module]
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
    folded: list[nn.Module] = []
    norm: nn.BatchNorm1d | None = None
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            norm = layer
        elif norm is not None and isinstance(layer, nn.Linear):
            folded.append(_absorbed(norm, layer))
            norm = None
        elif not isinstance(layer, nn.Dropout):
            folded.append(copy.deepcopy(layer))
    return nn.Sequential(*folded).eval()


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


@dataclass(frozen=True)
class Scion:
    """Which features of a donor a rootstock reads.

    Attributes:
        cut: layers of the donor that stay, 0 to cut - 1.
        channels: by layer, the indices into `pool(output, poolings)` that the head reads; sorted
            here, each once. A layer without an entry is computed and not read.
        poolings: of every layer that is read.
    """

    cut: int
    channels: Mapping[int, tuple[int, ...]]
    poolings: tuple[str, ...] = ("mean",)

    def __post_init__(self) -> None:
        ordered = {i: tuple(sorted(set(self.channels[i]))) for i in sorted(self.channels)}
        object.__setattr__(self, "channels", {i: read for i, read in ordered.items() if read})

    @property
    def features(self) -> int:
        """How many features the head reads."""
        return sum(map(len, self.channels.values()))


class Rootstock(nn.Module):
    """A donor's layers, cut, with a head. Made by `grow`.

    Attributes:
        trunk: layers 0 to scion.cut - 1, a chain. head: (n, features) -> (n, classes).
        size: pixels of a side. Inputs are RGB 0..255; the normalization is inside.
    """

    def __init__(
        self,
        scion: Scion,
        normalization: Normalization,
        size: int,
        classes: Sequence[str],
        trunk: nn.ModuleList,
        head: nn.Module,
    ):
        super().__init__()
        self.scion, self.normalization, self.size = scion, normalization, size
        self.classes = tuple(classes)
        self.trunk, self.head = trunk, head

    def features(self, x: Tensor) -> Tensor:
        """What the head reads: by layer, then by channel.

        Args:
            x: images (n, 3, size, size), float, RGB 0..255.
        Returns: (n, scion.features).
        """
        read = []
        x = self.normalization.apply(x)
        for index, layer in enumerate(self.trunk):
            x = layer(x)
            if index in self.scion.channels:
                pooled = pool(x, self.scion.poolings)
                read.append(_pick(pooled, self.scion.channels[index]))
        return torch.cat(read, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 3, size, size), float, RGB 0..255."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def describe(self) -> dict[str, Any]:
        """What the weights do not hold: scion, size, normalization and classes."""
        channels = {str(i): list(read) for i, read in self.scion.channels.items()}
        return {
            "cut": self.scion.cut,
            "channels": channels,
            "poolings": list(self.scion.poolings),
            "mean": list(self.normalization.mean),
            "std": list(self.normalization.std),
            "size": self.size,
            "classes": list(self.classes),
        }


def grow(donor: Donor, scion: Scion, classes: Sequence[str], head: nn.Module) -> Rootstock:
    """Copy the layers of `donor` that `scion` keeps, and put `head` on the features it reads.

    Raises: DonorError for a scion that the donor cannot give.
    """
    _check_layers(scion, donor)
    trunk = nn.ModuleList(copy.deepcopy(layer) for layer in list(donor.layers)[: scion.cut])
    rootstock = Rootstock(scion, donor.normalization, donor.size, classes, trunk, head)
    _check_channels(rootstock.eval())
    return rootstock.requires_grad_()


def _pick(pooled: Tensor, channels: tuple[int, ...]) -> Tensor:
    if len(channels) == pooled.shape[1]:
        return pooled
    # Not a buffer: an average over training steps would round indices.
    return pooled.index_select(1, torch.tensor(channels, device=pooled.device))


def _check_layers(scion: Scion, donor: Donor) -> None:
    layers = len(donor.layers)
    if not 1 <= scion.cut <= layers:
        raise DonorError(
            f"{donor.name} has {layers} layers, but the scion keeps {scion.cut}; keep 1 to {layers}"
        )
    if not scion.channels:
        raise DonorError("the scion reads no channel; name at least one")
    outside = [index for index in scion.channels if not 0 <= index < scion.cut]
    if outside:
        raise DonorError(
            f"the scion reads layer {outside[0]}, but keeps layers 0 to {scion.cut - 1}; "
            "cut behind the last layer that is read"
        )


@torch.no_grad()
def _check_channels(rootstock: Rootstock) -> None:
    scion, size = rootstock.scion, rootstock.size
    x = rootstock.normalization.apply(torch.zeros(1, 3, size, size))
    for index, layer in enumerate(rootstock.trunk):
        x = layer(x)
        read = scion.channels.get(index, (0,))
        width = pool(x, scion.poolings).shape[1] if index in scion.channels else 1
        if not 0 <= read[0] <= read[-1] < width:
            raise DonorError(
                f"layer {index} has {width} pooled features, but the scion reads number "
                f"{read[-1] if read[-1] >= width else read[0]}; numbers go from 0 to {width - 1}"
            )


class NormedConv(nn.Sequential):
    """A convolution and the normalization that `insert_norms` put behind it."""


@torch.no_grad()
def insert_norms(module: nn.Module, pixels: np.ndarray) -> None:
    """Put a BatchNorm2d behind every convolution, in place; in eval mode the function stays.

        γ = √(var + ε), β = mean:   γ (x − mean) / √(var + ε) + β = x

    As the function does not change, one pass measures the channels of all convolutions.

    Args:
        module: a network of images (n, 3, size, size), float, RGB 0..255.
        pixels: training images to measure on, uint8 (n, 3, size, size).
    Raises: ImagesError without images.
    """
    if len(pixels) == 0:
        raise ImagesError("there is no image to measure batch normalization on; give at least one")
    module.eval()
    moments: dict[nn.Module, ChannelMoments] = {}
    hooks = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            moments[part] = ChannelMoments(part.out_channels, part.weight.device)
            hooks.append(part.register_forward_hook(_add_to(moments[part])))
    try:
        for images in batches(pixels):
            module(images.to(_device(module)))
    finally:
        for hook in hooks:
            hook.remove()
    normed = {conv: NormedConv(conv, _identity_norm(each)) for conv, each in moments.items()}
    _replace_modules(module, normed)
    module.eval()


@torch.no_grad()
def fold_norms(module: nn.Module, size: int) -> None:
    """Fold every BatchNorm2d that reads a convolution's output into the convolution, in place.

    A pass of one black image of `size` pixels a side shows which convolution a normalization
    reads; one that reads something else stays. In eval mode the function is the same afterwards.
    """
    module.eval()
    readers = _readers(module, size)
    for norm, conv in readers.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
    _replace_modules(module, {norm: nn.Identity() for norm in readers})
    inserted = [part for part in module.modules() if isinstance(part, NormedConv)]
    _replace_modules(module, {part: part[0] for part in inserted})


def fold_rootstock(rootstock: Rootstock) -> Rootstock:
    """A copy in eval mode without batch normalization, for export; the same function."""
    folded = copy.deepcopy(rootstock)
    fold_norms(folded, folded.size)
    folded.head = fold_head(folded.head)
    return folded.eval()


def exported_parameters(rootstock: Rootstock) -> int:
    """Parameters after batch normalization is folded away, as in the exported file."""
    return sum(weights.numel() for weights in fold_rootstock(rootstock).parameters())


class ChannelMoments:
    """Mean and variance of every channel over images and positions, from batches."""

    def __init__(self, channels: int, device: torch.device | None = None):
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.sum)

    def add(self, rows: Tensor, over: tuple[int, ...] = (0,)) -> None:
        """Take in values whose dimensions are positions, `over`, and the channels."""
        var, mean = torch.var_mean(rows, dim=over, correction=0)
        mean, var = mean.double(), var.double()
        count = rows.numel() // len(self.sum)
        self.count += count
        self.sum += count * mean
        self.squares += count * (var + mean**2)

    @property
    def mean(self) -> Tensor:
        """Mean of every channel, float64."""
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of every channel, float64."""
        return (self.squares / self.count - self.mean**2).clamp_min(0)


def _add_to(moments: ChannelMoments) -> Callable[..., None]:
    """A forward hook that adds an output (n, channels, height, width) to the moments."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        moments.add(output, over=(0, 2, 3))

    return hook


def _identity_norm(moments: ChannelMoments) -> nn.BatchNorm2d:
    """The normalization that leaves channels of these moments unchanged."""
    mean, var = moments.mean, moments.variance
    norm = nn.BatchNorm2d(len(mean), device=mean.device)
    for parameter, value in (
        (norm.running_mean, mean),
        (norm.running_var, var),
        (norm.weight, torch.sqrt(var + norm.eps)),
        (norm.bias, mean),
    ):
        assert parameter is not None
        parameter.copy_(value)
    return norm


def _readers(module: nn.Module, size: int) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """By normalization, the convolution whose output it reads."""
    outputs: list[tuple[nn.Conv2d, Tensor]] = []
    readers: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def note_output(conv: Any, _inputs: Any, output: Tensor) -> None:
        outputs.append((conv, output))

    def note_input(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        for conv, output in outputs:
            if output is inputs[0]:
                readers[norm] = conv

    hooks = []
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            hooks.append(part.register_forward_hook(note_output))
        elif type(part) is nn.BatchNorm2d:  # a subclass may hold an activation as well
            hooks.append(part.register_forward_pre_hook(note_input))
    try:
        module(torch.zeros(1, 3, size, size, device=_device(module)))
    finally:
        for hook in hooks:
            hook.remove()
    return readers


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _replace_modules(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace the parts of a module that are keys of `replacements` by their values."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])


BATCH = 64


@torch.inference_mode()
def logits_of(
    module: nn.Module, pixels: np.ndarray, batch: int = BATCH, bfloat16: bool = False
) -> Tensor:
    """Logits (n, classes) of images as they are, in eval mode; float32, on the CPU.

    Args:
        pixels: uint8 (n, 3, size, size), RGB.
        bfloat16: compute so, for speed (autocast).
    """
    device = next(module.parameters()).device
    training = module.training
    module.eval()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        logits = [module(images.to(device)).float().cpu() for images in batches(pixels, batch)]
    module.train(training)
    return torch.cat(logits) if logits else torch.empty(0, 0)


def batches(pixels: np.ndarray, batch: int = BATCH) -> Iterator[Tensor]:
    """Images, uint8 (n, 3, size, size), as networks take them: float32, channels last."""
    for start in range(0, len(pixels), batch):
        rows = torch.from_numpy(np.array(pixels[start : start + batch]))
        yield rows.float().contiguous(memory_format=torch.channels_last)
