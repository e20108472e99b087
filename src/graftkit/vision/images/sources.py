"""Where the bytes of images are: a folder or a zip archive. Nothing is extracted to disk."""

import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from graftkit.errors import ImagesError
from graftkit.vision.images.decoding import SUFFIXES

FILE_LIMIT_BYTES = 2**28
"""Larger files are not read: a small archive may hold a member that fills the memory."""

DIRECTORY_LIMIT_BYTES = 2**26
"""Larger lists of an archive's files are not read: each entry takes ten times its bytes."""

Read = Callable[[str], bytes]
"""The bytes of one file. Raises: ImagesError, its message the reason alone."""


class Folder:
    """Files under a folder, named relative to it."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Ordinary files that are not hidden, sorted; links to folders are followed, once each."""
        found: list[str] = []
        seen: set[str] = set()
        for base, folders, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(base)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not _is_hidden(name)]
            inside = Path(base).relative_to(self.path)
            found += [(inside / name).as_posix() for name in files if not _is_hidden(name)]
        return sorted(name for name in found if name in self)

    def __contains__(self, name: str) -> bool:
        # Not a pipe or a device: reading one would wait for ever.
        return os.path.isfile(self.path / name)  # False also for a name that no file can have

    def stamp(self, name: str) -> tuple[int, int]:
        """What differs when the file was changed."""
        status = (self.path / name).stat()
        return status.st_size, status.st_mtime_ns

    @contextmanager
    def opened(self) -> Iterator[Read]:
        """A function that reads files."""
        yield lambda name: read_file(self.path / name)


class Archive:
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
    def opened(self) -> Iterator[Read]:
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


Source = Folder | Archive
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
