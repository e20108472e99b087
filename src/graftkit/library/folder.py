"""A library on disk: packs and the file that lists them, changed one step at a time.

    library.toml              what is here (library/index.py)
    packs/NAME-VERSION-DIGEST.skillpack
    classifier.safetensors    a trained router, where there is one
    learning/NAME/            what `learn` made a pack from
    .lock                     held by whoever changes the library
    .change                   files that come or go, while they do

Whoever changes a library holds its lock, which the system takes back from a dead process. A file
comes under a temporary name and is renamed; library.toml is replaced last when a pack comes and
first when one goes, so that every pack it lists is there. A change first names its files in
`.change`: what a killed process leaves behind, those that are not listed and temporary names, goes
with the next change. Any other file in `packs` stays, so that an older library.toml costs no pack.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from blake3 import blake3
from filelock import FileLock, Timeout

from graftkit.errors import LibraryError, OutputError
from graftkit.files import replaced_file, temporary_of
from graftkit.library.index import FORMAT, PACK_FILE, PACKS, Entry, Index, LibraryTarget, file_of
from graftkit.route.classifier import Classifier
from graftkit.skillpack import SkillPack

FILE = "library.toml"
CLASSIFIER = "classifier.safetensors"
LEARNING = "learning"

LOCK_SECONDS = 120.0
"""Longest wait for another process; a pack of 10 GB is copied in less."""

_LOCK = ".lock"
_CHANGE = ".change"


class PackFolder:
    """The folder of a library. It is read when it is asked, never kept open."""

    def __init__(self, path: Path):
        self.path = path
        self._read: tuple[bytes, Index] | None = None

    @classmethod
    def create(cls, path: Path, target: LibraryTarget) -> Self:
        """Make an empty library in a new or empty folder.

        Raises: LibraryError where there is one, or something else, already; OutputError.
        """
        folder = cls(path)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            folder._check_new()  # before a lock is laid into a folder of somebody else
        with folder._locked():
            with _writing(path):
                folder._check_new()
                (path / PACKS).mkdir(exist_ok=True)
            folder._write(Index(format=FORMAT, target=target))
        return folder

    def read(self) -> Index:
        """What library.toml says now, the same object while it says the same; nothing else is
        opened. Raises: LibraryError."""
        file = self.path / FILE
        try:
            content = file.read_bytes()
            if self._read is None or self._read[0] != content:
                self._read = content, Index.parse(content.decode(), str(file))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise LibraryError(
                f"{self.path}: no library here ({FILE} is missing); make one with "
                "`graftkit library init`"
            ) from error
        except OSError as error:
            raise LibraryError(f"{file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise LibraryError(
                f"{file}: damaged, byte {error.start + 1} is not UTF-8; put back a copy of the file"
            ) from error
        return self._read[1]

    def load(self, entry: Entry) -> SkillPack:
        """A pack, mapped from its file.

        Raises: LibraryError where the file is missing or another than the listed one;
            PackFormatError as `SkillPack.load`.
        """
        file = self.path / entry.file
        try:
            digest = file_digest(file)
        except OSError as error:
            raise LibraryError(
                f"{file}: listed in {FILE} but missing ({error.strerror}); put the file back, or "
                f"`graftkit library remove` {entry.label}"
            ) from error
        if digest != entry.digest:
            raise LibraryError(
                f"{file}: not the file that was added (digest {digest[:12]}, listed "
                f"{entry.digest[:12]}); put back a copy, or `graftkit library remove` {entry.label}"
            )
        return SkillPack.load(file)

    def add(self, source: Path, name: str, has_key: bool, update: bool) -> Entry:
        """Copy a pack into the library, byte for byte, as the next version of its name.

        Raises: ConfigError for a name that cannot be or is taken; LibraryError where the library
            has this very pack; OutputError where the disk refuses. The library is then as before.
        """
        with self._changing() as index:
            version = index.next_version(name, update)
            with _writing(source):
                digest, size = file_digest(source), source.stat().st_size
            index.check_new(digest)
            entry = Entry(
                name=name,
                version=version,
                digest=digest,
                file=file_of(name, version, digest),
                bytes=size,
                added=datetime.now(UTC).replace(microsecond=0),
                has_key=has_key,
            )
            self._announce([entry])
            with replaced_file(self.path / entry.file) as partial:
                shutil.copyfile(source, partial)
                if file_digest(partial) != digest:
                    raise LibraryError(f"{source}: changed while it was copied; add it again")
                _sync(partial)
            self._write(index.with_entry(entry))
        return entry

    def remove(self, address: str) -> list[Entry]:
        """Forget a pack and delete its file: every version of NAME, or one by NAME@VERSION or
        digest. A classifier goes too: it was trained to know the pack.

        Raises: LibraryError where there is no such pack; OutputError.
        """
        with self._changing() as index:
            gone = index.find_all(address)
            self._announce(gone)
            with _writing(self.path):
                (self.path / CLASSIFIER).unlink(missing_ok=True)
            self._write(index.without({entry.digest for entry in gone}))
        return gone

    def copy_to(self, path: Path, without: set[str]) -> "PackFolder":
        """Another library of the same packs, but for those of some digests.

        Files are linked where the disk can, copied elsewhere. Raises: as `create`.
        """
        index = self.read().without(without)
        copy = PackFolder.create(path, index.target)
        with copy._locked():
            for entry in index.pack:
                with _writing(path):
                    _link(self.path / entry.file, path / entry.file)
            copy._write(index)
        return copy

    def save_classifier(self, classifier: Classifier) -> None:
        """Keep a trained router. Raises: OutputError."""
        with self._locked():
            classifier.save(self.path / CLASSIFIER)

    def _check_new(self) -> None:
        """Raises: LibraryError where there is a library, or something else, already."""
        found = {file.name for file in self.path.iterdir() if not _is_leftover(file)}
        if FILE in found:
            raise LibraryError(f"{self.path}: a library already; add packs to it")
        if found - {_LOCK, _CHANGE, PACKS}:
            raise LibraryError(f"{self.path}: holds other files; name a new or an empty folder")

    @contextmanager
    def _changing(self) -> Iterator[Index]:
        """The lock, and no leftovers before or after."""
        with self._locked():
            self._clean()
            try:
                yield self.read()
            finally:
                self._clean()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.path / _LOCK, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise LibraryError(
                f"{self.path}: another process has been changing this library for "
                f"{LOCK_SECONDS:.0f} seconds; wait for it and try again"
            ) from error
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be locked ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    def _announce(self, entries: Sequence[Entry]) -> None:
        """Name the files of a change before it begins. Raises: OutputError."""
        self._replace(_CHANGE, "\n".join(entry.file for entry in entries))

    def _clean(self) -> None:
        """Delete what the last change announced and library.toml does not list."""
        listed = {entry.file for entry in self.read().pack}
        change = self.path / _CHANGE
        with _writing(self.path):
            (self.path / PACKS).mkdir(exist_ok=True)
            places = (self.path, self.path / PACKS)
            leftovers = [file for place in places for file in place.iterdir() if _is_leftover(file)]
            if change.exists():
                named = change.read_text(encoding="utf-8", errors="replace").split("\n")
                gone = [name for name in named if PACK_FILE.fullmatch(name) and name not in listed]
                leftovers += [*(self.path / name for name in gone), change]
            for file in leftovers:
                file.unlink(missing_ok=True)

    def _write(self, index: Index) -> None:
        """Replace library.toml. Raises: OutputError."""
        with _writing(self.path):
            _sync(self.path / PACKS)  # the names of the files it lists
        self._replace(FILE, index.to_toml())

    def _replace(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all. Raises: OutputError."""
        with _writing(self.path):
            with replaced_file(self.path / name) as partial:
                partial.write_text(text, encoding="utf-8")
                _sync(partial)
            _sync(self.path)


def _is_leftover(file: Path) -> bool:
    """Whether a file is one of ours that a killed process had not written to its end."""
    name = temporary_of(file.name)
    return name in (FILE, CLASSIFIER, _CHANGE) or (
        name is not None and PACK_FILE.fullmatch(f"{PACKS}/{name}") is not None
    )


def file_digest(file: Path) -> str:
    """BLAKE3 of a file's bytes, 64 hexadecimal digits. Raises: OSError."""
    # On one thread: a process that was forked has none of the threads that hashed before.
    return blake3().update_mmap(file).hexdigest()


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Raises: OutputError for what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{place}: cannot be changed ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy)
    except OSError:
        shutil.copyfile(source, copy)
