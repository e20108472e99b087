"""A data set of images: files become pixels of one size, with classes and splits.

sources    bytes of files, in a folder or a zip
listing    which file is of which class and split
decoding   one file as RGB pixels
cache      the pixels of all files in one file on disk
splitting  training, validation and test, where the user did not say
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from graftkit.errors import ConfigError, ImagesError
from graftkit.vision.images.cache import (
    Decoded,
    Report,
    cache_key,
    decode_to_cache,
    open_cache,
)
from graftkit.vision.images.decoding import Skipped, decode_image
from graftkit.vision.images.listing import Listing, list_images
from graftkit.vision.images.splitting import SPLITS, TRAIN, split_images

__all__ = ["SPLITS", "ImageSet", "Part", "Report", "Skipped", "decode_image", "open_images"]


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one split, in memory: names, labels int64 (n,), pixels uint8 (n, 3, s, s)."""

    names: tuple[str, ...]
    labels: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of several classes, all of one size, ordered by the names of their files.

    Attributes:
        classes: sorted.
        names: of the files, one per image.
        labels: int64 (n,), indices into classes.
        splits: int8 (n,), indices into SPLITS.
        pixels: uint8 (n, 3, size, size), RGB, a read-only map of the cache's file.
        skipped: files that could not be read as an image.
        warnings: sentences for a report.
        digest: blake3 of classes, names, labels, splits and pixels.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    splits: np.ndarray
    pixels: np.ndarray
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    digest: str

    def part(self, split: str) -> Part:
        """The images of "train", "val" or "test"."""
        chosen = np.flatnonzero(self.splits == SPLITS.index(split))
        names = tuple(self.names[index] for index in chosen)
        return Part(names, self.labels[chosen], np.asarray(self.pixels[chosen]))


def _quiet(step: str, done: int, total: int) -> None:
    pass


def open_images(
    path: Path, size: int, cache: Path, seed: int = 0, report: Report = _quiet
) -> ImageSet:
    """Read a data set: a folder or zip of `Class/file` or `split/Class/file`, or a CSV.

    A CSV has the columns file, class (or label) and optionally split; its files are relative to its
    folder, or inside the only zip beside it. Where there are no splits, images are split 70/15/15
    by `seed`, stratified, equal files together. Decoding happens once: pixels are kept under
    `cache`, whatever the seed.

    Args:
        size: pixels of a side; the largest centred square of an image is scaled to it.

    Raises: ImagesError for data that cannot be used, OutputError when the cache cannot be written.
    """
    if size < 1 or seed < 0:
        raise ConfigError(f"image size {size}, seed {seed}; expected at least 1 and at least 0")
    listing = list_images(path)
    names = [entry.name for entry in listing.entries]
    file = cache / f"images-{cache_key(listing.source, names, size)}.npy"
    decoded = open_cache(file, size) or decode_to_cache(file, listing.source, names, size, report)
    classes = listing.classes
    entries = [entry for entry in listing.entries if entry.name in decoded.contents]
    labels = np.array([classes.index(entry.label) for entry in entries], dtype=np.int64)
    contents = list(decoded.contents.values())
    if listing.is_split:
        splits = np.array([entry.split for entry in entries], dtype=np.int8)
        _check_splits(path, classes, labels, splits)
    else:
        splits = split_images(labels, contents, classes, seed)
    kept = tuple(decoded.contents)
    return ImageSet(
        classes=classes,
        names=kept,
        labels=labels,
        splits=splits,
        pixels=decoded.pixels,
        skipped=listing.skipped + decoded.skipped,
        warnings=_warnings(listing, classes, labels, splits, contents),
        digest=_digest(classes, kept, labels, splits, decoded),
    )


def _check_splits(
    path: Path, classes: Sequence[str], labels: np.ndarray, splits: np.ndarray
) -> None:
    for label, name in enumerate(classes):
        if not np.any((labels == label) & (splits == TRAIN)):
            raise ImagesError(
                f"{path}: class {name!r} has no training images; add some or leave the class out"
            )
    for split, name in enumerate(SPLITS):
        if not np.any(splits == split):
            raise ImagesError(
                f"{path}: no images for {name}; add some, or give all images without splits and "
                "they are split here"
            )


def _warnings(
    listing: Listing,
    classes: Sequence[str],
    labels: np.ndarray,
    splits: np.ndarray,
    contents: Sequence[str],
) -> tuple[str, ...]:
    """What a reader of the results should know."""
    found = []
    for split, told in ((1, "validation"), (2, "test")):
        present = set(labels[splits == split])
        lacking = [name for label, name in enumerate(classes) if label not in present]
        if lacking:
            found.append(f"No {told} images of {', '.join(lacking)}: {told} says nothing of it.")
    groups: dict[str, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(content, []).append(index)
    crossing = sum(len(set(splits[members])) > 1 for members in groups.values())
    if crossing:
        found.append(f"Images that are, byte for byte, in more than one split: {crossing}.")
    doubtful = sum(len(set(labels[members])) > 1 for members in groups.values())
    if doubtful:
        found.append(f"Images that are, byte for byte, in more than one class: {doubtful}.")
    if listing.others:
        found.append(
            f"Files left out, as they are not named like images: {len(listing.others)}, such as "
            f"{listing.others[0]!r}."
        )
    return tuple(found)


def _digest(
    classes: Sequence[str],
    names: Sequence[str],
    labels: np.ndarray,
    splits: np.ndarray,
    decoded: Decoded,
) -> str:
    record = [list(classes), list(names), labels.tolist(), splits.tolist(), decoded.digest]
    return blake3(json.dumps(record).encode()).hexdigest()
