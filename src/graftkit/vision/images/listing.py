"""Which files are images of which class and split: by their folders, or by a CSV."""

import csv
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftkit.errors import ImagesError
from graftkit.vision.images.decoding import Skipped
from graftkit.vision.images.sources import Archive, Folder, Source, is_image_name

_SPLIT_NAMES = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
_LAYOUTS = "expected Class/file or train/Class/file, val/Class/file, test/Class/file"
_SPLITS_WANTED = "the splits are train, val (also valid, validation) and test"


@dataclass(frozen=True)
class Entry:
    """A file that should be an image. split: index into SPLITS, None where the user gave none."""

    name: str
    label: str
    split: int | None


@dataclass(frozen=True)
class Listing:
    """What a data set says of itself, before any image is read.

    Attributes:
        entries: by name.
        skipped: images that belong to no class.
        others: files that are not named like images, and are left alone.
    """

    source: Source
    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, sorted."""
        return tuple(sorted({entry.label for entry in self.entries}))

    @property
    def is_split(self) -> bool:
        """Whether the user said what is for training, validation and test."""
        return self.entries[0].split is not None


def list_images(path: Path) -> Listing:
    """Files, classes and splits of a folder, a zip or a CSV.

    Raises: ImagesError for what is none of these, an empty one, one class only, an unknown split, a
    CSV that lacks a column or names files that are missing.
    """
    if path.is_dir():
        listing = _by_folders(Folder(path))
    elif not path.exists():
        raise ImagesError(f"{path}: no such folder or file; give a folder, a .zip or a .csv")
    elif not path.is_file():
        raise ImagesError(f"{path}: no ordinary file; give a folder, a .zip or a .csv")
    elif path.suffix.lower() == ".csv":
        listing = _by_csv(path)
    elif zipfile.is_zipfile(path):
        listing = _by_folders(Archive(path))
    else:
        raise ImagesError(f"{path}: neither a folder, nor a zip that can be read, nor a .csv")
    if not listing.entries:
        raise ImagesError(f"{path}: no images in class folders ({_found(listing)}); {_LAYOUTS}")
    if len(listing.classes) == 1:
        raise ImagesError(
            f"{path}: one class only, {listing.classes[0]!r}; a classifier needs two or more"
        )
    return listing


def _found(listing: Listing) -> str:
    outside, others = len(listing.skipped), listing.others
    told = f"{outside} outside of them, {len(others)} other file{'' if len(others) == 1 else 's'}"
    return told + (f" such as {others[0]!r}" if others else "")


def _by_folders(source: Source) -> Listing:
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
            entries.append(Entry(name, parts[1], splits[parts[0]]))
        else:
            entries.append(Entry(name, parts[0], None))
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
        raise ImagesError(f"{path}: folder {unknown[0]!r} is no split; {_SPLITS_WANTED}")
    return {top: _SPLIT_NAMES[top.lower()] for top in tops}


def _by_csv(path: Path) -> Listing:
    rows = _read_rows(path)
    columns = rows[0].keys() if rows else set()
    label = "class" if "class" in columns else "label"
    missing = [column for column in ("file", label) if column not in columns]
    if missing:
        wanted = "'class' (or 'label')" if missing[0] == "label" else "'file'"
        raise ImagesError(
            f"{path}: no column {wanted} in a line below a header; expected the columns file, "
            "class and, if you like, split"
        )
    entries = [_entry(path, number, row, label) for number, row in enumerate(rows, start=2)]
    twice = [name for name, count in Counter(e.name for e in entries).items() if count > 1]
    if twice:
        raise ImagesError(f"{path}: {twice[0]!r} is listed more than once; list each file once")
    return Listing(_beside(path, entries), tuple(sorted(entries, key=lambda e: e.name)))


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows by column, with column names in lower case."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImagesError(f"{path}: cannot be read as a CSV in UTF-8 ({error})") from error


def _entry(path: Path, number: int, row: dict[str, str], label: str) -> Entry:
    name, given = row["file"].strip(), row[label].strip()
    if not name or not given:
        raise ImagesError(f"{path}: row {number} lacks {label if name else 'a file'}; fill it in")
    if "split" not in row:
        return Entry(name, given, None)
    split = row["split"].strip()
    if split.lower() not in _SPLIT_NAMES:
        raise ImagesError(f"{path}: row {number}: split {split!r} is unknown; {_SPLITS_WANTED}")
    return Entry(name, given, _SPLIT_NAMES[split.lower()])


def _beside(path: Path, entries: Sequence[Entry]) -> Source:
    """The CSV's folder, or the only zip in it, whichever holds the files."""
    source: Source = Folder(path.parent)
    archives = sorted(path.parent.glob("*.zip"))
    if len(archives) == 1 and entries[0].name not in source:
        source = Archive(archives[0])
    missing = [entry.name for entry in entries if entry.name not in source]
    if missing:
        raise ImagesError(
            f"{path}: {missing[0]!r} is not in {source.path}, in all {len(missing)} of "
            f"{len(entries)} files; name them relative to the CSV, or to the only zip beside it"
        )
    return source
