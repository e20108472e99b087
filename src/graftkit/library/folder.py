"""library.toml: which packs a library holds, and of which target. Text in, text out; no files.

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

A library on disk: packs and the file that lists them, changed one step at a time.

    library.toml              what is here (library/folder.py)
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
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from blake3 import blake3
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftkit.errors import ConfigError, LibraryError, OutputError
from graftkit.files import replaced_file, temporary_of
from graftkit.route import TARGET
from graftkit.route.classifier import Classifier
from graftkit.skillpack import SkillPack

FORMAT = 1
"""What this package writes, and the newest that it reads."""

PACKS = "packs"
"""The folder of the packs inside a library."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_DIGEST = r"[0-9a-f]{64}"
_SHORT = 12  # digits of the digest in a file name
_LEAST_PREFIX = 8  # digits of a digest that may stand for it

PACK_FILE = re.compile(rf"{PACKS}/{_NAME}-[1-9][0-9]*-[0-9a-f]{{{_SHORT}}}\.skillpack")
"""Places that a library gives to files of packs, and to nothing else."""


class _StrictModel(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class LibraryTarget(_StrictModel):
    """The target of every pack of a library."""

    reference: str = Field(min_length=1)
    """A directory, or a Hub id[@revision]."""
    fingerprint: str = Field(pattern=rf"^{_DIGEST}$")
    """One digest over all tensors (delta.fingerprint)."""
    config_blake3: str = Field(pattern=rf"^{_DIGEST}$")
    """Digest of config.json."""


class PackEntry(_StrictModel):
    """One pack of a library."""

    name: str = Field(pattern=rf"^{_NAME}$")
    """What routes and commands call it."""
    version: int = Field(ge=1)
    """Counts the packs of one name."""
    digest: str = Field(pattern=rf"^{_DIGEST}$")
    """BLAKE3 of the file."""
    file: str
    """Place inside the library; name, version and digest decide it."""
    bytes: int = Field(ge=1)
    """Length of the file."""
    added: datetime
    """When it came, UTC."""
    has_key: bool
    """Whether the pack carries a router key."""

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"


class LibraryIndex(_StrictModel):
    """Everything that library.toml says."""

    format: int = Field(ge=1)
    """Version of this file's format."""
    target: LibraryTarget
    """The target of every pack."""
    pack: Annotated[tuple[PackEntry, ...], Field(strict=False)] = ()
    """The packs, in the order in which they came."""

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read the text of library.toml; `where` begins every message.

        Raises: LibraryError for what is not TOML, of a newer format, or says what cannot be.
        """
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise LibraryError(f"{where}: damaged, it is not TOML ({error}); {_REMEDY}") from error
        found = values.get("format")
        if type(found) is int and found > FORMAT:
            raise LibraryError(
                f"{where}: format {found}; this graftkit reads up to {FORMAT}, upgrade graftkit"
            )
        try:
            index = cls.model_validate(values)
        except ValidationError as error:
            raise LibraryError(f"{where}: damaged, {_first(error)}; {_REMEDY}") from error
        index._check(where)
        return index

    def to_toml(self) -> str:
        """The text of library.toml."""
        return tomli_w.dumps(self.model_dump(mode="python"))

    def with_entry(self, entry: PackEntry) -> "LibraryIndex":
        """This index and one more pack."""
        return self.model_copy(update={"pack": (*self.pack, entry)})

    def without(self, gone: set[str]) -> "LibraryIndex":
        """This index without the packs of these digests."""
        kept = tuple(entry for entry in self.pack if entry.digest not in gone)
        return self.model_copy(update={"pack": kept})

    @property
    def newest(self) -> dict[str, PackEntry]:
        """The newest version of every name, in the order of names: what routers choose from."""
        by_age = sorted(self.pack, key=lambda entry: (entry.name, entry.version))
        return {entry.name: entry for entry in by_age}

    def find(self, address: str) -> PackEntry:
        """The pack of NAME (its newest version), NAME@VERSION or a digest's first digits.

        Raises: LibraryError where there is none, or the digits fit several.
        """
        return max(self.find_all(address), key=lambda entry: entry.version)

    def find_all(self, address: str) -> list[PackEntry]:
        """Every version of NAME, or the one pack of NAME@VERSION or a digest's first digits.

        Raises: LibraryError as `find`.
        """
        named = [entry for entry in self.pack if address in (entry.name, entry.label)]
        if named:
            return named
        if not re.fullmatch(rf"[0-9a-f]{{{_LEAST_PREFIX},64}}", address):
            raise LibraryError(f"no pack {address!r} here; {self._known()}")
        fitting = [entry for entry in self.pack if entry.digest.startswith(address)]
        if len(fitting) > 1:
            labels = ", ".join(entry.label for entry in fitting)
            raise LibraryError(f"digest {address} fits {labels}; write more digits")
        if not fitting:
            raise LibraryError(f"no pack with digest {address} here; {self._known()}")
        return fitting

    def next_version(self, name: str, update: bool) -> int:
        """The version that a new pack of this name gets.

        Raises: ConfigError for a name that cannot be, or that is taken while `update` is not said.
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

    def _known(self) -> str:
        names = ", ".join(self.newest)
        return f"the packs are {names}" if names else "the library is empty"

    def _check(self, where: str) -> None:
        """What no single field can say of itself. Raises: LibraryError."""
        seen: set[str] = set()
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
                if key in seen:
                    raise LibraryError(f"{where}: damaged, {key} is listed twice; {_REMEDY}")
                seen.add(key)


def file_of(name: str, version: int, digest: str) -> str:
    """Place of a pack's file inside its library."""
    return f"{PACKS}/{name}-{version}-{digest[:_SHORT]}.skillpack"


def check_name(name: str) -> None:
    """Raises: ConfigError for a name that no pack may have."""
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{name!r} is no name for a pack; expected up to 64 letters, digits, dots, dashes and "
            "underscores, the first a letter or digit"
        )
    if name == TARGET:
        raise ConfigError(f"{TARGET!r} stands for no pack at all; choose another name")


_REMEDY = "put back a copy of the file, or make a new library and add the packs again"


def _first(error: ValidationError) -> str:
    """The first fault, in one line."""
    fault: Any = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {place}"
    if fault["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {fault['msg'].lower()} (found {str(fault['input'])[:80]!r})"


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
        self._read: tuple[bytes, LibraryIndex] | None = None

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
            folder._write(LibraryIndex(format=FORMAT, target=target))
        return folder

    def read(self) -> LibraryIndex:
        """What library.toml says now, the same object while it says the same; nothing else is
        opened. Raises: LibraryError."""
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

    def add(self, source: Path, name: str, has_key: bool, update: bool) -> PackEntry:
        """Copy a pack into the library, byte for byte, as the next version of its name.

        Raises: ConfigError for a name that cannot be or is taken; LibraryError where the library
            has this very pack; OutputError where the disk refuses. The library is then as before.
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
            self._announce([entry])
            with replaced_file(self.path / entry.file) as partial:
                shutil.copyfile(source, partial)
                if file_digest(partial) != digest:
                    raise LibraryError(f"{source}: changed while it was copied; add it again")
                _sync(partial)
            self._write(index.with_entry(entry))
        return entry

    def remove(self, address: str) -> list[PackEntry]:
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
    def _changing(self) -> Iterator[LibraryIndex]:
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

    def _announce(self, entries: Sequence[PackEntry]) -> None:
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

    def _write(self, index: LibraryIndex) -> None:
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
