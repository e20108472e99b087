"""A library on disk: a folder of packs and library.toml, which lists them.

    library.toml                            the target and every pack
    packs/NAME-VERSION-DIGEST.skillpack     the packs
    classifier.safetensors                  a trained router, where there is one
    learning/NAME/                          what `learn` made a pack from
    .lock                                   held by the process that changes the library
    .change                                 files that a change in progress adds or removes

library.toml:

    format = 1

    [target]
    reference = "/models/base"
    fingerprint = "…"
    config_blake3 = "…"

    [[pack]]
    name = "math"
    version = 1
    digest = "…"            # BLAKE3 of the file
    file = "packs/math-1-0f3c5a7b9d1e.skillpack"
    bytes = 409600
    added = 2026-11-23T04:05:06Z
    has_key = true

A process holds the lock while it changes a library; the system releases the lock of a process that
died. A new file is written under a temporary name and renamed. library.toml is replaced last when a
pack is added and first when one is removed, so that every pack it lists is there. A change first
writes the names of its files to `.change`. If it is interrupted, the next change deletes those that
library.toml does not list, and temporary files. Any other file in `packs` stays, so that restoring
an older library.toml loses no pack.
"""

import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from blake3 import blake3
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, ValidationError

from graftkit.config import Settings
from graftkit.errors import ConfigError, LibraryError, OutputError
from graftkit.files import replaced_file, temporary_of
from graftkit.route import TARGET
from graftkit.route.classifier import Classifier
from graftkit.skillpack import SkillPack

FORMAT = 1
"""Format that this package writes, and the newest that it reads."""

FILE = "library.toml"
CLASSIFIER = "classifier.safetensors"
LEARNING = "learning"
PACKS = "packs"

LOCK_SECONDS = 120.0
"""Longest wait for another process; a pack of 10 GB is copied in less."""

_LOCK = ".lock"
_CHANGE = ".change"
_REMEDY = "put back a copy of the file, or make a new library and add the packs again"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_DIGEST = r"[0-9a-f]{64}"
_SHORT = 12  # digits of the digest in a file name
_LEAST_PREFIX = 8  # digits of a digest that may stand for it

PACK_FILE = re.compile(rf"{PACKS}/{_NAME}-[1-9][0-9]*-[0-9a-f]{{{_SHORT}}}\.skillpack")
"""Paths that a library gives to packs, and to nothing else."""


class _StrictSettings(Settings):
    model_config = ConfigDict(strict=True)


class LibraryTarget(_StrictSettings):
    """The target of every pack of a library."""

    reference: str = Field(min_length=1)
    """A directory, or a Hub id[@revision]."""
    fingerprint: str = Field(pattern=rf"^{_DIGEST}$")
    """One digest over all tensors (`Checkpoint.fingerprint`)."""
    config_blake3: str = Field(pattern=rf"^{_DIGEST}$")
    """Digest of config.json."""


class PackEntry(_StrictSettings):
    """One pack of a library."""

    name: str = Field(pattern=rf"^{_NAME}$")
    """Its name in routes and commands."""
    version: int = Field(ge=1)
    """1 for the first pack of a name, and one more for each update."""
    digest: str = Field(pattern=rf"^{_DIGEST}$")
    """BLAKE3 of the file."""
    file: str
    """Path inside the library, made of name, version and digest."""
    bytes: int = Field(ge=1)
    """Length of the file."""
    added: datetime
    """When it was added, UTC."""
    has_key: bool
    """Whether the pack carries a router key."""

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"


class LibraryIndex(_StrictSettings):
    """The content of library.toml."""

    format: int = Field(ge=1)
    """Version of this file's format."""
    target: LibraryTarget
    """The target of every pack."""
    pack: Annotated[tuple[PackEntry, ...], Field(strict=False)] = ()
    """The packs, in the order in which they were added."""

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read the text of library.toml; `where` begins every message.

        Raises: LibraryError for text that is not TOML, is of a newer format, or is not valid.
        """
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise LibraryError(f"{where}: damaged, it is not TOML ({error}); {_REMEDY}") from error
        version = values.get("format")
        if type(version) is int and version > FORMAT:
            raise LibraryError(
                f"{where}: format {version}; this graftkit reads up to {FORMAT}, upgrade graftkit"
            )
        try:
            index = cls.model_validate(values)
        except ValidationError as error:
            raise LibraryError(f"{where}: damaged, {_first_fault(error)}; {_REMEDY}") from error
        index._validate(where)
        return index

    def with_entry(self, entry: PackEntry) -> "LibraryIndex":
        """This index and one more pack."""
        return self.model_copy(update={"pack": (*self.pack, entry)})

    def without(self, digests: set[str]) -> "LibraryIndex":
        """This index without the packs of these digests."""
        rest = tuple(entry for entry in self.pack if entry.digest not in digests)
        return self.model_copy(update={"pack": rest})

    @property
    def newest(self) -> dict[str, PackEntry]:
        """The newest version of every name, sorted by name: what routers choose from."""
        by_age = sorted(self.pack, key=lambda entry: (entry.name, entry.version))
        return {entry.name: entry for entry in by_age}

    def find(self, address: str) -> PackEntry:
        """The pack of NAME (its newest version), NAME@VERSION or a digest's first digits.

        Raises: LibraryError where there is none, or the digits fit several.
        """
        return max(self.find_all(address), key=lambda entry: entry.version)

    def find_all(self, address: str) -> list[PackEntry]:
        """Every version of NAME, or the one pack of NAME@VERSION or a digest's first digits.

        Raises: LibraryError where there is none, or the digits fit several.
        """
        named = [entry for entry in self.pack if address in (entry.name, entry.label)]
        if named:
            return named
        if not re.fullmatch(rf"[0-9a-f]{{{_LEAST_PREFIX},64}}", address):
            raise LibraryError(f"no pack {address!r} here; {self._list_names()}")
        fitting = [entry for entry in self.pack if entry.digest.startswith(address)]
        if len(fitting) > 1:
            labels = ", ".join(entry.label for entry in fitting)
            raise LibraryError(f"digest {address} fits {labels}; write more digits")
        if not fitting:
            raise LibraryError(f"no pack with digest {address} here; {self._list_names()}")
        return fitting

    def next_version(self, name: str, update: bool) -> int:
        """The version that a new pack of this name gets.

        Raises: ConfigError for an invalid name, and for a name that is taken without `update`.
        """
        check_name(name)
        taken = [entry.version for entry in self.pack if entry.name == name]
        if taken and not update:
            raise ConfigError(
                f"a pack called {name} is here already (version {max(taken)}); choose another "
                "name, or say --update to make this its next version"
            )
        return max(taken, default=0) + 1

    def check_new(self, digest: str) -> None:
        """Raises: LibraryError where a pack of these very bytes is here already."""
        for entry in self.pack:
            if entry.digest == digest:
                raise LibraryError(f"this very pack is here already, as {entry.label}")

    def _list_names(self) -> str:
        names = ", ".join(self.newest)
        return f"the packs are {names}" if names else "the library is empty"

    def _validate(self, where: str) -> None:
        """Check paths, names and duplicates. Raises: LibraryError."""
        listed: set[str] = set()
        for entry in self.pack:
            expected = file_of(entry.name, entry.version, entry.digest)
            if entry.file != expected:
                raise LibraryError(
                    f"{where}: damaged, pack {entry.label} lies in {entry.file!r}, expected "
                    f"{expected!r}; {_REMEDY}"
                )
            if entry.name == TARGET:
                raise LibraryError(f"{where}: damaged, a pack is called {TARGET}; {_REMEDY}")
            for key in (entry.label, entry.digest):
                if key in listed:
                    raise LibraryError(f"{where}: damaged, {key} is listed twice; {_REMEDY}")
                listed.add(key)


def file_of(name: str, version: int, digest: str) -> str:
    """Path of a pack's file inside its library."""
    return f"{PACKS}/{name}-{version}-{digest[:_SHORT]}.skillpack"


def check_name(name: str) -> None:
    """Raises: ConfigError for an invalid name, and for "target"."""
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{name!r} is no name for a pack; expected up to 64 letters, digits, dots, dashes and "
            "underscores, the first a letter or digit"
        )
    if name == TARGET:
        raise ConfigError(f"{TARGET!r} stands for no pack at all; choose another name")


def _first_fault(error: ValidationError) -> str:
    """The first fault, in one line."""
    fault: Any = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place}"
    if fault["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {fault['msg'].lower()} (found {str(fault['input'])[:80]!r})"


class PackFolder:
    """The folder of a library. Every call reads it anew; no file is kept open."""

    def __init__(self, path: Path):
        self.path = path
        self._read: tuple[bytes, LibraryIndex] | None = None

    @classmethod
    def create(cls, path: Path, target: LibraryTarget) -> Self:
        """Make an empty library in a new or empty folder.

        Raises: LibraryError where there is one, or something else, already; OutputError.
        """
        folder = cls(path)
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            folder._check_new()  # before a lock file is made in a folder of somebody else
        with folder._locked():
            with _writing(path):
                folder._check_new()
                (path / PACKS).mkdir(exist_ok=True)
            folder._write(LibraryIndex(format=FORMAT, target=target))
        return folder

    def read(self) -> LibraryIndex:
        """Read library.toml; an unchanged file gives the same object. Raises: LibraryError."""
        file = self.path / FILE
        try:
            content = file.read_bytes()
            if self._read is None or self._read[0] != content:
                self._read = content, LibraryIndex.parse(content.decode(), str(file))
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

    def load(self, entry: PackEntry) -> SkillPack:
        """A pack, mapped from its file.

        Raises: LibraryError where the file is missing or not the listed one; PackFormatError for
            a file that is not a valid pack.
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

    def add(self, source: Path, name: str, has_key: bool, update: bool) -> PackEntry:
        """Copy a pack into the library, byte for byte, as the next version of its name.

        Raises: ConfigError for a name that is invalid or taken; LibraryError where the library has
            the same file already; OutputError where it cannot be written. The library is then
            unchanged.
        """
        with self._changing() as index:
            version = index.next_version(name, update)
            with _writing(source):
                digest, size = file_digest(source), source.stat().st_size
            index.check_new(digest)
            entry = PackEntry(
                name=name,
                version=version,
                digest=digest,
                file=file_of(name, version, digest),
                bytes=size,
                added=datetime.now(UTC).replace(microsecond=0),
                has_key=has_key,
            )
            self._log_change([entry])
            with replaced_file(self.path / entry.file) as partial:
                shutil.copyfile(source, partial)
                if file_digest(partial) != digest:
                    raise LibraryError(f"{source}: changed while it was copied; add it again")
                _sync(partial)
            self._write(index.with_entry(entry))
        return entry

    def remove(self, address: str) -> list[PackEntry]:
        """Delete packs: every version of NAME, or the one of NAME@VERSION or a digest. A trained
        classifier is deleted too, since it has a class for the pack.

        Raises: LibraryError where there is no such pack; OutputError.
        """
        with self._changing() as index:
            gone = index.find_all(address)
            self._log_change(gone)
            with _writing(self.path):
                (self.path / CLASSIFIER).unlink(missing_ok=True)
            self._write(index.without({entry.digest for entry in gone}))
        return gone

    def copy_to(self, path: Path, without: set[str]) -> "PackFolder":
        """Make another library of the same packs, except those of some digests.

        Files are hard-linked where possible, else copied. Raises: LibraryError, OutputError.
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
        """Save a trained router. Raises: OutputError."""
        with self._locked():
            classifier.save(self.path / CLASSIFIER)

    def _check_new(self) -> None:
        """Raises: LibraryError where there is a library, or something else, already."""
        names = {file.name for file in self.path.iterdir() if not _is_leftover(file)}
        if FILE in names:
            raise LibraryError(f"{self.path}: a library already; add packs to it")
        if names - {_LOCK, _CHANGE, PACKS}:
            raise LibraryError(f"{self.path}: holds other files; name a new or an empty folder")

    @contextmanager
    def _changing(self) -> Iterator[LibraryIndex]:
        """Hold the lock; leftovers are deleted before and after."""
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

    def _log_change(self, entries: Sequence[PackEntry]) -> None:
        """Write the files of a change to `.change` before it begins. Raises: OutputError."""
        self._replace(_CHANGE, "\n".join(entry.file for entry in entries))

    def _clean(self) -> None:
        """Delete files of an interrupted change that library.toml does not list."""
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

    def _write(self, index: LibraryIndex) -> None:
        """Replace library.toml. Raises: OutputError."""
        with _writing(self.path):
            _sync(self.path / PACKS)  # the names of the files it lists
        self._replace(FILE, index.to_toml())

    def _replace(self, name: str, text: str) -> None:
        """Replace a file of the folder atomically. Raises: OutputError."""
        with _writing(self.path):
            with replaced_file(self.path / name) as partial:
                partial.write_text(text, encoding="utf-8")
                _sync(partial)
            _sync(self.path)


def _is_leftover(file: Path) -> bool:
    """Whether a file of ours was left unfinished by a process that was killed."""
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
    """Turn an OSError into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{place}: cannot be changed ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
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
