"""One pass of a donor over all images: pooled features of every layer, kept on disk.

Whatever is probed or selected afterwards reads these files; the donor is not run again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from graftkit.files import replaced_file
from graftkit.vision.donor import Donor, pool
from graftkit.vision.images import SPLITS, ImageSet, Report
from graftkit.vision.rootstock import Scion

POOLINGS = ("mean", "std")
"""Of every layer. The spread over the image says what the mean discards (docs/adr/0015)."""
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
        """Which columns of the views hold these poolings of these layers."""
        starts = np.cumsum((0, *self.widths))
        found = []
        for layer in layers:
            channels = self.widths[layer] // len(POOLINGS)
            for pooling in poolings:
                first = starts[layer] + POOLINGS.index(pooling) * channels
                found.append(np.arange(first, first + channels))
        return np.concatenate(found)

    def of(
        self, split: str, columns: NDArray[Any], views: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor]:
        """Features (n, f) float32 and labels (n,) of a split, for each of these views in turn."""
        parts = [self._rows(split, view, columns) for view in views]
        labels = np.tile(self.labels[self.splits == SPLITS.index(split)], len(views))
        return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(labels)

    def _rows(self, split: str, view: int, columns: NDArray[Any]) -> NDArray[np.float32]:
        there = self.splits if view == 0 else self.splits[self.splits != TEST]
        rows = np.flatnonzero(there == SPLITS.index(split))
        return self.views[view][rows][:, columns].astype(np.float32)

    def redrawn(self, seed: int) -> "FeatureTable":
        """The same, with training and validation dealt out anew within every class.

        Test images stay what they are, and every class keeps its counts.
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
    report: Report = lambda *_: None,
) -> FeatureTable:
    """Pooled features of every layer of `donor`, from the cache as far as they are there.

    An interrupted pass goes on with the view that it was in.

    Raises: OutputError when the cache cannot be written.
    """
    name = cache_key(donor, images)
    widths = _widths(donor)
    untested = images.splits != TEST
    found = {}
    for done, view in enumerate(views):
        report("features of every layer, views", done, len(views))
        file = cache / f"features-{name}-{view}.npy"
        rows = images.pixels if view == 0 else images.pixels[untested]
        shape = (len(rows), sum(widths))
        if not _is_whole(file, shape):
            _write(donor, rows, view, shape, file, report)
        found[view] = np.load(file, mmap_mode="r", allow_pickle=False)
    report("features of every layer, views", len(views), len(views))
    return FeatureTable(widths, found, images.splits, images.labels)


def cache_key(donor: Donor, images: ImageSet) -> str:
    """Of whatever depends on how this donor sees these images."""
    seen = f"{donor.digest} {donor.normalization} {images.digest} {POOLINGS}"
    return blake3(seen.encode()).hexdigest()[:16]


@torch.inference_mode()
def _widths(donor: Donor) -> tuple[int, ...]:
    outputs = donor.eval()(torch.zeros(1, 3, donor.size, donor.size))
    return tuple(pool(output, POOLINGS).shape[1] for output in outputs)


def _is_whole(file: Path, shape: tuple[int, int]) -> bool:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return bool(found.shape == shape and found.dtype == np.float16)


def _write(
    donor: Donor,
    rows: NDArray[np.uint8],
    view: int,
    shape: tuple[int, int],
    file: Path,
    report: Report,
) -> None:
    with replaced_file(file) as partial:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, len(rows), BATCH):
            values[start : start + BATCH] = pooled_outputs(donor, rows[start : start + BATCH], view)
            report(f"view {view}: images", min(start + BATCH, len(rows)), len(rows))
        values.flush()


@torch.inference_mode()
def pooled_outputs(donor: Donor, rows: NDArray[np.uint8], view: int = 0) -> NDArray[np.float16]:
    """Pooled features of every layer, side by side: (n, sum of widths)."""
    images = turned(torch.from_numpy(np.array(rows)).float(), view)
    # Convolutions of small images are half as dear with channels last (docs/benchmarks.md).
    outputs = donor.eval()(images.contiguous(memory_format=torch.channels_last))
    pooled = torch.cat([pool(output, POOLINGS) for output in outputs], dim=1)
    # Activations of a network without batch normalization can pass what float16 holds.
    limit = torch.finfo(torch.float16).max
    return pooled.clamp(-limit, limit).half().numpy()


def scion_of(
    table: FeatureTable, columns: NDArray[Any], poolings: Sequence[str] = POOLINGS
) -> Scion:
    """The scion that reads these columns of a table."""
    starts = [0, *accumulate(table.widths)]
    layers = np.searchsorted(starts, columns, side="right") - 1
    channels = {
        int(layer): tuple(int(column - starts[layer]) for _, column in members)
        for layer, members in groupby(zip(layers, np.sort(columns), strict=True), lambda m: m[0])
    }
    return Scion(max(channels) + 1, channels, tuple(poolings))


def columns_of(table: FeatureTable, scion: Scion) -> NDArray[Any]:
    """The columns of a table that a scion reads, in its order."""
    starts = [0, *accumulate(table.widths)]
    return np.concatenate(
        [starts[layer] + np.array(kept) for layer, kept in scion.channels.items()]
    )
