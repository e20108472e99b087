"""Image files: their pixels, the folder or zip that holds them, and their classes and splits.

Hostile bytes become an error with a reason. Nothing is extracted to disk. Classes and splits come
from the folders of the files, or from a CSV.
"""

import csv
import os
import stat
import struct
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from graftkit.errors import ConfigError, ImagesError

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ConfigError(
        "images are read with Pillow, which is missing; pip install 'graftkit[vision]'"
    ) from error

FILE_LIMIT_BYTES = 2**28
"""Larger files are not read: a member of a small archive may fill the memory."""

DIRECTORY_LIMIT_BYTES = 2**26
"""Larger lists of an archive's files are not read: each entry takes ten times its bytes."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
"""The only decoders that are tried: Pillow's reader of EPS, for one, starts a program."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""How the names of image files end, in lower case."""

PIXEL_LIMIT = 2**26
"""Larger images are not decoded: their pixels would fill the memory (decompression bombs).

One at the limit takes about 8 bytes a pixel, 0.5 GB, and beyond LARGE_PIXELS one is decoded at a
time, however many threads there are.
"""
LARGE_PIXELS, STRIP_PIXELS = 2**23, 2**20
"""Of images that wait for each other, and of what is converted to RGB at once."""
_ONE_LARGE_IMAGE = threading.Lock()

_SPLIT_NAMES = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
_LAYOUTS = "expected Class/file or train/Class/file, val/Class/file, test/Class/file"
_SPLITS_EXPECTED = "the splits are train, val (also valid, validation) and test"


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read as an image, and why."""

    name: str
    reason: str


def decode_image(content: bytes, size: int) -> np.ndarray:
    """RGB pixels of the largest centred square, uint8 (3, size, size).

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is divided by 257. The
    square is scaled with a bilinear filter as wide as the step (antialiased); one of the right size
    stays as it is. Of an animation, the first frame.

    Raises: ImagesError; its message is the reason alone.
    """
    try:
        with Image.open(BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > PIXEL_LIMIT:
                raise ImagesError(
                    f"{picture.width}x{picture.height} pixels, more than {PIXEL_LIMIT:,}"
                )
            large = picture.width * picture.height > LARGE_PIXELS
            with _ONE_LARGE_IMAGE if large else nullcontext():
                return _pixels(picture, size)
    except ImagesError:
        raise
    except UnidentifiedImageError as error:
        raise ImagesError(f"not an image of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:  # Decoders raise errors of every kind on damaged or hostile files.
        raise ImagesError(f"damaged: {error or type(error).__name__}") from error


def _pixels(picture: Image.Image, size: int) -> np.ndarray:
    # A large JPEG is decoded at a half, quarter or eighth, never below twice what we need.
    picture.draft(None, (2 * size, 2 * size))
    ImageOps.exif_transpose(picture, in_place=True)
    square = _centre_square(picture)
    if square.width != size:
        square = square.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square.convert("RGB")).transpose(2, 0, 1))


def _centre_square(picture: Image.Image) -> Image.Image:
    """In RGB or grey, converted in strips, so that no second copy of all pixels is made."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    rows = max(1, STRIP_PIXELS // side)
    if rows >= side:
        return _to_rgb(picture.crop((left, top, left + side, top + side)))
    square = Image.new("L" if picture.mode.startswith("I;16") else "RGB", (side, side))
    for start in range(0, side, rows):
        end = min(start + rows, side)
        strip = picture.crop((left, top + start, left + side, top + end))
        square.paste(_to_rgb(strip), (0, start))
    return square


def _to_rgb(picture: Image.Image) -> Image.Image:
    """RGB, or one channel of grey."""
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, and nearly every pixel would be white.
        return Image.fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ImagesError("32 bits a pixel, so that white is unknown; save it with 8 or 16")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


ReadFile = Callable[[str], bytes]
"""The bytes of one file. Raises: ImagesError; its message is the reason alone."""


class ImageFolder:
    """Files under a folder, named relative to it."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Ordinary files that are not hidden, sorted; links to folders are followed, once each."""
        names: list[str] = []
        visited: set[str] = set()
        for base, folders, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(base)
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = [name for name in folders if not _is_hidden(name)]
            inside = Path(base).relative_to(self.path)
            names += [(inside / name).as_posix() for name in files if not _is_hidden(name)]
        return sorted(name for name in names if name in self)

    def __contains__(self, name: str) -> bool:
        # No pipe and no device, whose reading would never end.
        return os.path.isfile(self.path / name)  # False also for a name that no file can have

    def stamp(self, name: str) -> tuple[int, int]:
        """What differs when the file was changed."""
        status = (self.path / name).stat()
        return status.st_size, status.st_mtime_ns

    @contextmanager
    def opened(self) -> Iterator[ReadFile]:
        """A function that reads files."""
        yield lambda name: read_file(self.path / name)


class ImageArchive:
    """Members of a zip, named as in it but for empty, `.` and `..` steps: names lead nowhere."""

    def __init__(self, path: Path):
        self.path = path
        _check_directory(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ImagesError(f"{path}: not a zip that can be read ({error})") from error
        plain = {plain_name(member.filename): member for member in members if not member.is_dir()}
        self._members = {
            name: member
            for name, member in plain.items()
            if name and not any(_is_hidden(step) for step in name.split("/"))
        }

    def names(self) -> list[str]:
        """Files that are not hidden, sorted."""
        return sorted(self._members)

    def __contains__(self, name: str) -> bool:
        return plain_name(name) in self._members

    def stamp(self, name: str) -> tuple[int, int]:
        """What differs when the member was changed."""
        member = self._members[plain_name(name)]
        return member.file_size, member.CRC

    @contextmanager
    def opened(self) -> Iterator[ReadFile]:
        """A function that reads members; threads may share it."""
        with zipfile.ZipFile(self.path) as archive:

            def read(name: str) -> bytes:
                member = self._members[plain_name(name)]
                _check_size(member.file_size)
                try:
                    return archive.read(member)
                except Exception as error:  # zipfile lets errors of every compression through.
                    raise ImagesError(f"cannot be unpacked: {error}") from error

            yield read


ImageSource = ImageFolder | ImageArchive
_LONGEST_TAIL = 2**16 + 22 + 20 + 56 + 2**10  # records at the end of a zip, and their comment


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises: ImagesError, its message the reason alone."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImagesError("not an ordinary file")
        _check_size(status.st_size)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ImagesError(f"cannot be read: {reason or error}") from error


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as images' names do."""
    return name.lower().endswith(SUFFIXES)


def plain_name(name: str) -> str:
    """A member's name without empty, `.` and `..` steps."""
    return "/".join(step for step in name.split("/") if step not in ("", ".", ".."))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _check_directory(path: Path) -> None:
    """The size of a list of files, before zipfile reads it (APPNOTE.TXT, 4.3.14 to 4.3.16).

    Raises: ImagesError.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST_TAIL))
            tail = file.read()
    except OSError as error:
        raise ImagesError(f"{path}: cannot be read ({error.strerror})") from error
    place, size = tail.rfind(b"PK\5\6"), 0
    if 0 <= place <= len(tail) - 22:
        (size,) = struct.unpack_from("<I", tail, place + 12)
    place = tail.rfind(b"PK\6\6")
    if 0 <= place <= len(tail) - 56:
        size = max(size % (2**32 - 1), struct.unpack_from("<Q", tail, place + 40)[0])
    if size > DIRECTORY_LIMIT_BYTES:
        raise ImagesError(
            f"{path}: lists files in {size:,} bytes, more than {DIRECTORY_LIMIT_BYTES:,}; unpack "
            "it and give the folder"
        )


def _check_size(count: int) -> None:
    if count > FILE_LIMIT_BYTES:
        raise ImagesError(f"{count:,} bytes, more than {FILE_LIMIT_BYTES:,}")


@dataclass(frozen=True)
class ListedImage:
    """A file that should be an image. split: index into SPLITS, None in a data set without."""

    name: str
    label: str
    split: int | None


@dataclass(frozen=True)
class Listing:
    """The files of a data set with their classes and splits, before any image is read.

    Attributes:
        entries: sorted by name.
        skipped: images that belong to no class.
        others: files without the name of an image, which are ignored.
    """

    source: ImageSource
    entries: tuple[ListedImage, ...]
    skipped: tuple[Skipped, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, sorted."""
        return tuple(sorted({entry.label for entry in self.entries}))

    @property
    def is_split(self) -> bool:
        """Whether the data set names its training, validation and test images."""
        return self.entries[0].split is not None


def list_images(path: Path) -> Listing:
    """Files, classes and splits of a folder, a zip or a CSV.

    Raises: ImagesError for anything else, for no images or one class only, for an unknown split,
        for a CSV that lacks a column or names missing files.
    """
    if path.is_dir():
        listing = _by_folders(ImageFolder(path))
    elif not path.exists():
        raise ImagesError(f"{path}: no such folder or file; give a folder, a .zip or a .csv")
    elif not path.is_file():
        raise ImagesError(f"{path}: no ordinary file; give a folder, a .zip or a .csv")
    elif path.suffix.lower() == ".csv":
        listing = _by_csv(path)
    elif zipfile.is_zipfile(path):
        listing = _by_folders(ImageArchive(path))
    else:
        raise ImagesError(f"{path}: neither a folder, nor a zip that can be read, nor a .csv")
    if not listing.entries:
        raise ImagesError(
            f"{path}: no images in class folders ({_ignored_files(listing)}); {_LAYOUTS}"
        )
    if len(listing.classes) == 1:
        raise ImagesError(
            f"{path}: one class only, {listing.classes[0]!r}; a classifier needs two or more"
        )
    return listing


def _ignored_files(listing: Listing) -> str:
    outside, others = len(listing.skipped), listing.others
    counts = f"{outside} outside of them, {len(others)} other file{'' if len(others) == 1 else 's'}"
    return counts + (f" such as {others[0]!r}" if others else "")


def _by_folders(source: ImageSource) -> Listing:
    names = source.names()
    images = [name for name in names if is_image_name(name)]
    others = tuple(name for name in names if not is_image_name(name))
    steps = _below_wrapper([tuple(name.split("/")) for name in images])
    splits = _split_folders(source.path, steps)
    depth = 2 if splits else 1  # folders above a file
    entries, skipped = [], []
    for name, parts in zip(images, steps, strict=True):
        if len(parts) <= depth:
            skipped.append(Skipped(name, "lies in no class folder"))
        elif splits:
            entries.append(ListedImage(name, parts[1], splits[parts[0]]))
        else:
            entries.append(ListedImage(name, parts[0], None))
    return Listing(source, tuple(entries), tuple(skipped), others)


def _below_wrapper(steps: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without the one folder that archives often put around everything."""
    inside = list(steps)
    while (
        len({parts[0] for parts in inside}) == 1
        and all(len(parts) > 2 for parts in inside)
        and inside[0][0].lower() not in _SPLIT_NAMES
    ):
        inside = [parts[1:] for parts in inside]
    return inside


def _split_folders(path: Path, steps: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Index into SPLITS by folder; empty where the folders are classes."""
    tops = sorted({parts[0] for parts in steps if len(parts) > 1})
    if not any(top.lower() in _SPLIT_NAMES for top in tops):
        return {}
    unknown = [top for top in tops if top.lower() not in _SPLIT_NAMES]
    if unknown:
        raise ImagesError(f"{path}: folder {unknown[0]!r} is no split; {_SPLITS_EXPECTED}")
    return {top: _SPLIT_NAMES[top.lower()] for top in tops}


def _by_csv(path: Path) -> Listing:
    rows = _read_rows(path)
    columns = rows[0].keys() if rows else set()
    label = "class" if "class" in columns else "label"
    missing = [name for name in ("file", label) if name not in columns]
    if missing:
        column = "'class' (or 'label')" if missing[0] == "label" else "'file'"
        raise ImagesError(
            f"{path}: no column {column} in a line below a header; expected the columns file, "
            "class and, if you like, split"
        )
    entries = [_entry(path, number, row, label) for number, row in enumerate(rows, start=2)]
    twice = [name for name, count in Counter(e.name for e in entries).items() if count > 1]
    if twice:
        raise ImagesError(f"{path}: {twice[0]!r} is listed more than once; list each file once")
    return Listing(_source_of(path, entries), tuple(sorted(entries, key=lambda e: e.name)))


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows by column, with column names in lower case."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImagesError(f"{path}: cannot be read as a CSV in UTF-8 ({error})") from error


def _entry(path: Path, number: int, row: dict[str, str], label: str) -> ListedImage:
    name, label_text = row["file"].strip(), row[label].strip()
    if not name or not label_text:
        raise ImagesError(f"{path}: row {number} lacks {label if name else 'a file'}; fill it in")
    if "split" not in row:
        return ListedImage(name, label_text, None)
    split = row["split"].strip()
    if split.lower() not in _SPLIT_NAMES:
        raise ImagesError(f"{path}: row {number}: split {split!r} is unknown; {_SPLITS_EXPECTED}")
    return ListedImage(name, label_text, _SPLIT_NAMES[split.lower()])


def _source_of(path: Path, entries: Sequence[ListedImage]) -> ImageSource:
    """The CSV's folder, or the only zip in it, whichever holds the files."""
    source: ImageSource = ImageFolder(path.parent)
    archives = sorted(path.parent.glob("*.zip"))
    if len(archives) == 1 and entries[0].name not in source:
        source = ImageArchive(archives[0])
    missing = [entry.name for entry in entries if entry.name not in source]
    if missing:
        raise ImagesError(
            f"{path}: {missing[0]!r} is not in {source.path}, in all {len(missing)} of "
            f"{len(entries)} files; name them relative to the CSV, or to the only zip beside it"
        )
    return source
