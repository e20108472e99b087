"""Decoded pixels in one .npy file, which later runs map instead of decoding again.

Beside it a .json of the same name holds what decoding found, and the digest of the pixels: a cache
that does not agree with it is made again.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from graftkit.errors import ImagesError, OutputError
from graftkit.files import replaced_file
from graftkit.vision.images.decoding import Skipped, decode_image
from graftkit.vision.images.sources import Source

Report = Callable[[str, int, int], None]
"""What was done, how much of it, of how much."""

PREPARATION = 1
"""Raised when the same file would give other pixels than before, so that old caches go unused."""


BROKEN_SHARE = 0.1
"""More files than this that are no images: the data set is not what the user thinks it is."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What decoding gave.

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


def cache_key(source: Source, names: Sequence[str], size: int) -> str:
    """A digest of everything that the pixels depend on, without reading the images."""
    stamps = [[name, *source.stamp(name)] for name in names]
    where = str(source.path.resolve())
    return blake3(json.dumps([PREPARATION, where, size, stamps]).encode()).hexdigest(length=16)


def open_cache(file: Path, size: int) -> Decoded | None:
    """Map the pixels; None where they were never written, or are damaged."""
    try:
        found = json.loads(file.with_suffix(".json").read_bytes())
        skipped = tuple(Skipped(*record) for record in found["skipped"])
        pixels = np.load(file, mmap_mode="r", allow_pickle=False)
        whole = pixels.shape == (len(found["contents"]), 3, size, size) and pixels.dtype == np.uint8
        if whole and blake3(pixels.data).hexdigest() == found["digest"]:
            return Decoded(found["contents"], skipped, pixels, found["digest"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        pass
    return None


def decode_to_cache(
    file: Path, source: Source, names: Sequence[str], size: int, report: Report
) -> Decoded:
    """Decode every image, write the cache, and map it.

    Raises: ImagesError when more than a tenth of the files are no images, OutputError when the
    cache cannot be written. Nothing stays behind then.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(file) as partial:
            decoded = _write_pixels(partial, source, names, size, report)
        record = {"contents": decoded.contents, "digest": decoded.digest}
        skipped = [[skip.name, skip.reason] for skip in decoded.skipped]
        with replaced_file(file.with_suffix(".json")) as partial:
            partial.write_text(json.dumps(record | {"skipped": skipped}))
    except (OSError, OutputError) as error:
        raise OutputError(f"{file}: the cache of images cannot be written ({error})") from error
    return decoded


def _write_pixels(
    file: Path, source: Source, names: Sequence[str], size: int, report: Report
) -> Decoded:
    contents: dict[str, str] = {}
    skipped: list[Skipped] = []
    pixel_digest = blake3()
    with file.open("wb") as output:
        _write_header(output, len(names), size)
        for done, result in enumerate(_decode(source, names, size), start=1):
            report("reading images", done, len(names))
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            contents[names[done - 1]], pixels = result
            pixel_digest.update(pixels.data)
            output.write(pixels.data)
        # NumPy pads headers so that the number of rows can be written anew in place.
        output.seek(0)
        _write_header(output, len(contents), size)
    _check_broken(skipped, len(names))
    mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    return Decoded(contents, tuple(skipped), mapped, pixel_digest.hexdigest())


def _write_header(output: BinaryIO, count: int, size: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    np.lib.format.write_array_header_1_0(output, header)


def _decode(
    source: Source, names: Sequence[str], size: int
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
