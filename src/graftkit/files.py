"""Files that are written whole or not at all, and locks that end with their process."""

import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from graftkit.errors import OutputError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d{1,10})(-\d+)?\.tmp")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ATTEMPTS = 1000  # to lock a file that others keep removing


class Busy(Exception):
    """Another process, or another thread of this one, holds the lock."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what the disk refuses: full, read-only, no such folder, too long a name.

    Raises: OutputError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error


@contextmanager
def told_of_full_disk(path: Path) -> Iterator[None]:
    """Say in one line that the disk is full, wherever on the way to `path` that shows.

    Raises: OutputError; other errors as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from error


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes otherwise.

    A symbolic link is followed. Temporary siblings of processes that are dead go, too.
    Raises: OutputError when the disk refuses (full, read-only, no such folder).
    """
    with writing(path):
        path = path.resolve()
        _remove_stale(path)
        # Two threads may write one file at a time, each its own.
        process = f"{os.getpid()}-{threading.get_native_id()}"
        partial = path.with_name(f".{path.name}.{process}.tmp")
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink()


def temporary_of(name: str) -> str | None:
    """The name that a file of this name gets when `replaced_file` is done; None for others."""
    found = _TEMPORARY.fullmatch(name)
    return None if found is None else found["name"]


class Lock:
    """A file that one holder at a time has open; the system frees it when the holder dies.

    Its text says what the holder is about, and stays behind where the holder was killed.
    """

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor

    @classmethod
    def take(cls, path: Path) -> Self:
        """Make the file if it is missing, and lock it.

        Raises: Busy; OSError, FileNotFoundError where the folder is gone.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        for _ in range(_ATTEMPTS):
            descriptor = os.open(path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The last holder may have removed the file while we waited for it.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                        return cls(path, descriptor)
            except BlockingIOError as error:
                os.close(descriptor)
                raise Busy from error
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise Busy

    def read(self) -> str:
        """The text. What is no text counts as none."""
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        """Replace the text. Raises: OSError."""
        content = text.encode()
        os.ftruncate(self._descriptor, 0)
        if os.pwrite(self._descriptor, content, 0) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._descriptor)

    def release(self) -> None:
        """Let others have it; the file stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Remove the file, and let others have the next one of its name."""
        with suppress(OSError):
            self.path.unlink()
        self.release()


def _remove_stale(path: Path) -> None:
    """Remove what dead processes left of writing `path`."""
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found and found["name"] == path.name and not _is_alive(int(found["process"])):
                os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
