"""One pass of a donor over all images: pooled features of every layer, cached on disk.

Probes and the choice of a scion read these files; the donor is not run again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from graftkit.files import replaced_file
from graftkit.progress import Progress, silent
from graftkit.vision.donor import Donor, pool
from graftkit.vision.images import SPLITS, ImageSet
from graftkit.vision.rootstock import Scion

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
