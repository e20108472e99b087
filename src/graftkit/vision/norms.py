"""Batch normalization into a network that has none, and out of one that has it.

A donor whose normalization is folded into its convolutions trains badly. Here every convolution
gets one that leaves the function as it is, and gives it back before the network is exported.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from graftkit.errors import ImagesError
from graftkit.vision.heads import fold_head
from graftkit.vision.rootstock import Rootstock
from graftkit.vision.scoring import batches


class NormedConv(nn.Sequential):
    """A convolution and the normalization that `insert_norms` put behind it."""


@torch.no_grad()
def insert_norms(module: nn.Module, pixels: np.ndarray) -> None:
    """Put a BatchNorm2d behind every convolution, in place; the eval function stays.

        γ = √(var + ε), β = mean:   γ (x − mean) / √(var + ε) + β = x

    The function does not change, so one pass measures the channels of all convolutions.

    Args:
        module: a network of images (n, 3, size, size), float, RGB 0..255.
        pixels: training images to measure on, uint8 (n, 3, size, size).
    Raises: ImagesError without images.
    """
    if len(pixels) == 0:
        raise ImagesError("there is no image to measure batch normalization on; give at least one")
    module.eval()
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    moments = {conv: _Moments(conv) for conv in convolutions}
    watched = [conv.register_forward_hook(moment.watch) for conv, moment in moments.items()]
    try:
        for images in batches(pixels):
            module(images.to(_device(module)))
    finally:
        for hook in watched:
            hook.remove()
    _exchange(module, {conv: NormedConv(conv, found.norm()) for conv, found in moments.items()})
    module.eval()


@torch.no_grad()
def fold_norms(module: nn.Module, size: int) -> None:
    """Multiply every BatchNorm2d that reads a convolution's output into it, in place.

    Which convolution a normalization reads is seen in a pass of one black image of `size` pixels
    a side. The function in eval mode stays; a normalization that reads something else stays too.
    """
    module.eval()
    readers = _readers(module, size)
    for norm, conv in readers.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
    _exchange(module, {norm: nn.Identity() for norm in readers})
    inserted = [part for part in module.modules() if isinstance(part, NormedConv)]
    _exchange(module, {part: part[0] for part in inserted})


def fold_rootstock(rootstock: Rootstock) -> Rootstock:
    """A copy in eval mode without batch normalization, for export; the same function."""
    folded = copy.deepcopy(rootstock)
    fold_norms(folded, folded.size)
    folded.head = fold_head(folded.head)
    return folded.eval()


def exported_parameters(rootstock: Rootstock) -> int:
    """Parameters that are left when batch normalization is folded away, as in the exported file."""
    return sum(weights.numel() for weights in fold_rootstock(rootstock).parameters())


class _Moments:
    """Mean and variance of every channel over images and positions, from batches."""

    def __init__(self, conv: nn.Conv2d):
        self.count = 0
        self.sum = conv.weight.new_zeros(conv.out_channels, dtype=torch.float64)
        self.squares = torch.zeros_like(self.sum)

    def watch(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """A forward hook: takes in an output (n, channels, height, width)."""
        count = output.numel() // output.shape[1]
        var, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()
        self.count += count
        self.sum += count * mean
        self.squares += count * (var + mean**2)

    def norm(self) -> nn.BatchNorm2d:
        """The normalization that leaves these channels as they are."""
        norm = nn.BatchNorm2d(len(self.sum), device=self.sum.device)
        mean = self.sum / self.count
        var = (self.squares / self.count - mean**2).clamp_min(0)
        for kept, value in (
            (norm.running_mean, mean),
            (norm.running_var, var),
            (norm.weight, torch.sqrt(var + norm.eps)),
            (norm.bias, mean),
        ):
            assert kept is not None
            kept.copy_(value)
        return norm


def _readers(module: nn.Module, size: int) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    """By normalization, the convolution whose output it reads."""
    outputs: list[tuple[nn.Conv2d, Tensor]] = []
    found: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def note_output(conv: Any, _inputs: Any, output: Tensor) -> None:
        outputs.append((conv, output))

    def note_input(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        for conv, output in outputs:
            if output is inputs[0]:
                found[norm] = conv

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
    return found


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _exchange(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules where the keys of `replacements` stand."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in replacements:
                setattr(parent, name, replacements[child])
