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
"""

import re
import tomllib
from datetime import datetime
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftkit.errors import ConfigError, LibraryError
from graftkit.route import TARGET

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


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class LibraryTarget(_Part):
    """The target of every pack of a library."""

    reference: str = Field(min_length=1)
    """A directory, or a Hub id[@revision]."""
    fingerprint: str = Field(pattern=rf"^{_DIGEST}$")
    """One digest over all tensors (delta.fingerprint)."""
    config_blake3: str = Field(pattern=rf"^{_DIGEST}$")
    """Digest of config.json."""


class Entry(_Part):
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


class Index(_Part):
    """Everything that library.toml says."""

    format: int = Field(ge=1)
    """Version of this file's format."""
    target: LibraryTarget
    """The target of every pack."""
    pack: Annotated[tuple[Entry, ...], Field(strict=False)] = ()
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

    def with_entry(self, entry: Entry) -> "Index":
        """This index and one more pack."""
        return self.model_copy(update={"pack": (*self.pack, entry)})

    def without(self, gone: set[str]) -> "Index":
        """This index without the packs of these digests."""
        kept = tuple(entry for entry in self.pack if entry.digest not in gone)
        return self.model_copy(update={"pack": kept})

    @property
    def newest(self) -> dict[str, Entry]:
        """The newest version of every name, in the order of names: what routers choose from."""
        by_age = sorted(self.pack, key=lambda entry: (entry.name, entry.version))
        return {entry.name: entry for entry in by_age}

    def find(self, address: str) -> Entry:
        """The pack of NAME (its newest version), NAME@VERSION or a digest's first digits.

        Raises: LibraryError where there is none, or the digits fit several.
        """
        return max(self.find_all(address), key=lambda entry: entry.version)

    def find_all(self, address: str) -> list[Entry]:
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
