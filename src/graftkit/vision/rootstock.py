"""Rootstock: the first layers of a donor, and a small head on the pooled outputs of some of them.

Knowledge Grafting (arXiv 2507.19261): feature maps of the donor, averaged over the image,
concatenated, classified by a few dense layers. Which maps are read is the scion.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.errors import DonorError
from graftkit.vision.donor import Donor, Normalization, pool


@dataclass(frozen=True)
class Scion:
    """Which features of a donor a rootstock reads.

    cut: layers of the donor that are kept, 0 to cut - 1.
    channels: by layer, the indices into `pool(output, poolings)` that the head reads; sorted
        here, each once. A layer without an entry is computed and not read.
    poolings: of every layer that is read.
    """

    cut: int
    channels: Mapping[int, tuple[int, ...]]
    poolings: tuple[str, ...] = ("mean",)

    def __post_init__(self) -> None:
        ordered = {i: tuple(sorted(set(self.channels[i]))) for i in sorted(self.channels)}
        object.__setattr__(self, "channels", {i: kept for i, kept in ordered.items() if kept})

    @property
    def features(self) -> int:
        """How many features the head reads."""
        return sum(map(len, self.channels.values()))


class Rootstock(nn.Module):
    """A donor's layers, cut, with a head. Made by `grow`.

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
        """What weights alone do not say: scion, size, normalization and classes."""
        channels = {str(i): list(kept) for i, kept in self.scion.channels.items()}
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
