"""A data set of images: files become pixels of one size, with classes and splits.

Decoded pixels are cached in one .npy file, which later runs map instead of decoding again. A .json
of the same name holds the digest of the pixels and what could not be read; a cache that does not
agree with it is written again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from graftkit.errors import ConfigError, ImagesError, OutputError
from graftkit.files import replaced_file
from graftkit.progress import Progress, silent
from graftkit.vision.images.files import ImageSource, Listing, Skipped, decode_image, list_images

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
HOLDOUT_SHARE = 0.15
"""Share of each class for validation, and again for test."""
PREPARATION = 1
"""Version of the decoding; a cache of another version is not used."""
BROKEN_SHARE = 0.1
"""Largest share of files that may be unreadable; beyond it the data set is refused."""


@dataclass(frozen=True, eq=False)
class LabeledImages:
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

    def subset(self, split: str) -> LabeledImages:
        """The images of "train", "val" or "test"."""
        chosen = np.flatnonzero(self.splits == SPLITS.index(split))
        names = tuple(self.names[index] for index in chosen)
        return LabeledImages(names, self.labels[chosen], np.asarray(self.pixels[chosen]))


@dataclass(frozen=True, eq=False)
class Decoded:
    """The images of a data set after decoding.

    Attributes:
        contents: digest of the bytes of every file that is an image, by name, ordered as pixels.
        skipped: files that could not be read.
        pixels: uint8 (n, 3, size, size), a read-only map of the file.
        digest: blake3 of the pixels.
    """

    contents: dict[str, str]
    skipped: tuple[Skipped, ...]
    pixels: np.ndarray
    digest: str


def open_images(
    path: Path, size: int, cache: Path, seed: int = 0, progress: Progress = silent
) -> ImageSet:
    """Read a data set: a folder or zip of `Class/file` or `split/Class/file`, or a CSV.

    A CSV has the columns file, class (or label) and optionally split; its files are relative to its
    folder, or inside the only zip beside it. Where there are no splits, images are split 70/15/15
    by `seed`, stratified, equal files together. Decoding happens once: pixels are cached under
    `cache`, whatever the seed.

    Args:
        size: pixels of a side; the largest centred square of an image is scaled to it.

    Raises: ImagesError for data that cannot be used, OutputError when the cache cannot be written.
    """
    if size < 1 or seed < 0:
        raise ConfigError(f"image size {size}, seed {seed}; expected at least 1 and at least 0")
    listing = list_images(path)
    files = [entry.name for entry in listing.entries]
    file = cache / f"images-{cache_key(listing.source, files, size)}.npy"
    decoded = open_cache(file, size) or decode_to_cache(file, listing.source, files, size, progress)
    classes = listing.classes
    entries = [entry for entry in listing.entries if entry.name in decoded.contents]
    labels = np.array([classes.index(entry.label) for entry in entries], dtype=np.int64)
    contents = list(decoded.contents.values())
    if listing.is_split:
        splits = np.array([entry.split for entry in entries], dtype=np.int8)
        _check_splits(path, classes, labels, splits)
    else:
        splits = split_images(labels, contents, classes, seed)
    names = tuple(decoded.contents)
    return ImageSet(
        classes=classes,
        names=names,
        labels=labels,
        splits=splits,
        pixels=decoded.pixels,
        skipped=listing.skipped + decoded.skipped,
        warnings=_warnings(listing, classes, labels, splits, contents),
        digest=_digest(classes, names, labels, splits, decoded),
    )


def split_images(
    labels: np.ndarray, contents: Sequence[str], classes: Sequence[str], seed: int
) -> np.ndarray:
    """A stratified random split, 70/15/15; int8 (n,), indices into SPLITS.

    Files of equal bytes go into one split, so that no exact duplicate of a training image is in
    test; that split is the one of the first of them, even if their labels differ.

    Args:
        labels: (n,), indices into classes. contents: digest of every file's bytes.

    Raises: ImagesError for a class of fewer than three different images.
    """
    groups: dict[str, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(content, []).append(index)
    splits = np.full(len(labels), TRAIN, dtype=np.int8)
    for label, name in enumerate(classes):
        own = [members for members in groups.values() if labels[members[0]] == label]
        if len(own) < len(SPLITS):
            raise ImagesError(
                f"class {name!r} has {len(own)} different image{'' if len(own) == 1 else 's'}; "
                "train, validation and test need one each: add images or leave the class out"
            )
        count = max(1, round(HOLDOUT_SHARE * len(own)))
        order = np.random.default_rng([seed, label]).permutation(len(own))
        for position, group in enumerate(order[: 2 * count]):
            splits[own[group]] = TEST if position < count else VAL
    return splits


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
    warnings = []
    for split, name in ((1, "validation"), (2, "test")):
        present = set(labels[splits == split])
        lacking = [label for index, label in enumerate(classes) if index not in present]
        if lacking:
            warnings.append(f"No {name} images of {', '.join(lacking)}: {name} says nothing of it.")
    groups: dict[str, list[int]] = {}
    for index, content in enumerate(contents):
        groups.setdefault(content, []).append(index)
    crossing = sum(len(set(splits[members])) > 1 for members in groups.values())
    if crossing:
        warnings.append(f"Images that are, byte for byte, in more than one split: {crossing}.")
    ambiguous = sum(len(set(labels[members])) > 1 for members in groups.values())
    if ambiguous:
        warnings.append(f"Images that are, byte for byte, in more than one class: {ambiguous}.")
    if listing.others:
        warnings.append(
            f"Files left out, as they are not named like images: {len(listing.others)}, such as "
            f"{listing.others[0]!r}."
        )
    return tuple(warnings)


def _digest(
    classes: Sequence[str],
    names: Sequence[str],
    labels: np.ndarray,
    splits: np.ndarray,
    decoded: Decoded,
) -> str:
    record = [list(classes), list(names), labels.tolist(), splits.tolist(), decoded.digest]
    return blake3(json.dumps(record).encode()).hexdigest()


def cache_key(source: ImageSource, names: Sequence[str], size: int) -> str:
    """A digest of everything that the pixels depend on, without reading the images."""
    stamps = [[name, *source.stamp(name)] for name in names]
    where = str(source.path.resolve())
    return blake3(json.dumps([PREPARATION, where, size, stamps]).encode()).hexdigest(length=16)


def open_cache(file: Path, size: int) -> Decoded | None:
    """Map the pixels; None where they were never written, or are damaged."""
    try:
        record = json.loads(file.with_suffix(".json").read_bytes())
        skipped = tuple(Skipped(*entry) for entry in record["skipped"])
        pixels = np.load(file, mmap_mode="r", allow_pickle=False)
        whole = (
            pixels.shape == (len(record["contents"]), 3, size, size) and pixels.dtype == np.uint8
        )
        if whole and blake3(pixels.data).hexdigest() == record["digest"]:
            return Decoded(record["contents"], skipped, pixels, record["digest"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        pass
    return None


def decode_to_cache(
    file: Path, source: ImageSource, names: Sequence[str], size: int, progress: Progress
) -> Decoded:
    """Decode every image, write the cache, and map it.

    Raises: ImagesError when more than a tenth of the files are no images, OutputError when the
    cache cannot be written; no file is left then.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as partial:
            decoded = _write_pixels(partial, source, names, size, progress)
        record = {"contents": decoded.contents, "digest": decoded.digest}
        skipped = [[skip.name, skip.reason] for skip in decoded.skipped]
        with replaced_file(file.with_suffix(".json")) as partial:
            partial.write_text(json.dumps(record | {"skipped": skipped}))
    except (OSError, OutputError) as error:
        raise OutputError(f"{file}: the cache of images cannot be written ({error})") from error
    return decoded


def _write_pixels(
    file: Path, source: ImageSource, names: Sequence[str], size: int, progress: Progress
) -> Decoded:
    contents: dict[str, str] = {}
    skipped: list[Skipped] = []
    pixel_digest = blake3()
    with file.open("wb") as output:
        _write_header(output, len(names), size)
        for done, result in enumerate(_decode(source, names, size), start=1):
            progress("reading images", done, len(names))
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            contents[names[done - 1]], pixels = result
            pixel_digest.update(pixels.data)
            output.write(pixels.data)
        # NumPy pads headers, so the number of rows can be corrected in place.
        output.seek(0)
        _write_header(output, len(contents), size)
    _check_broken(skipped, len(names))
    mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    return Decoded(contents, tuple(skipped), mapped, pixel_digest.hexdigest())


def _write_header(output: BinaryIO, count: int, size: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    np.lib.format.write_array_header_1_0(output, header)


def _decode(
    source: ImageSource, names: Sequence[str], size: int
) -> Iterator[tuple[str, np.ndarray] | Skipped]:
    """Digest and pixels of every file, in order, decoded in as many threads as there are cores."""
    with source.opened() as read, ThreadPoolExecutor(os.cpu_count()) as pool:

        def decode(name: str) -> tuple[str, np.ndarray] | Skipped:
            try:
                content = read(name)
                return blake3(content).hexdigest(length=16), decode_image(content, size)
            except ImagesError as error:
                return Skipped(name, str(error))

        yield from pool.map(decode, names)


def _check_broken(skipped: Sequence[Skipped], total: int) -> None:
    if len(skipped) > BROKEN_SHARE * total:
        raise ImagesError(
            f"{len(skipped)} of {total} files cannot be read as images, more than a tenth; the "
            f"first is {skipped[0].name!r} ({skipped[0].reason}): mend or remove them"
        )
