"""Files that are written whole or not at all, locks that end with their process, and work folders.

A work folder holds finished steps, so that an interrupted job goes on where it stopped.
"""

import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from blake3 import blake3

from graftkit.errors import OutputError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d{1,10})(-\d+)?\.tmp")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ATTEMPTS = 1000  # to lock a file that others keep removing


_MAP_FROM_BYTES = 2**16
"""Smaller payloads are read into memory: a map costs a page and a slot of the kernel each."""


def mapped_file(file: Path) -> memoryview:
    """Contents of a file, readable also when it is deleted: mapped, or read if it is small."""
    with file.open("rb") as handle:
        if os.fstat(handle.fileno()).st_size < _MAP_FROM_BYTES:
            return memoryview(handle.read())
        return memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


class Busy(Exception):
    """Another process, or another thread of this one, holds the lock."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error of one line: full, read-only, no such folder.

    Raises: OutputError in place of every OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, met anywhere on the way to `path`, into one line.

    Raises: OutputError in place of these; every other OSError as it is.
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
    match = _TEMPORARY.fullmatch(name)
    return None if match is None else match["name"]


class Lock:
    """A file that one holder at a time has open; the system frees it when the holder dies.

    Its text is a note of the holder, which remains where the holder was killed.
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
        """The text, with U+FFFD in place of bytes that are not UTF-8."""
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
        """Unlock the file, which stays."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Delete the file, then unlock it."""
        with suppress(OSError):
            self.path.unlink()
        self.release()


def _remove_stale(path: Path) -> None:
    """Remove what dead processes left of writing `path`."""
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match and match["name"] == path.name and not _is_alive(int(match["process"])):
                os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


MARKER = "graftkit-job"
"""The file that makes a folder ours: it names the job whose steps are here, and is its lock."""


def is_work_folder(folder: Path) -> bool:
    """Whether a folder holds unfinished work of ours."""
    return (folder / MARKER).is_file()


class WorkFolder:
    """Finished steps of one job, each a file; files appear whole or not at all.

    A folder without our marker is somebody else's and never touched.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: Lock | None = None

    def open(self, job: str) -> bool:
        """Prepare the folder for `job` and lock it until `close` or `remove`.

        Steps of another job are deleted.
        Returns: True when finished steps of the same job are there.
        Raises: OutputError, also for a folder that is not ours or where another run is at work.
        """
        key = blake3(job.encode()).hexdigest()
        with writing(self.path):
            if self._taken().read() == key:
                return True
            self.open_empty().write(key)
        return False

    def open_empty(self) -> Lock:
        """Prepare the folder for work that cannot be resumed: what is there is deleted.

        Raises: OutputError, also for a folder that is not ours or where another run is at work.
        """
        with writing(self.path):
            lock = self._taken()
            # Until all of it is gone, what is left belongs to no job.
            lock.write("")
            self._clear()
        return lock

    def close(self) -> None:
        """Unlock the folder; the finished steps stay."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def remove(self) -> None:
        """Delete the folder, if it is ours and nobody else is at work there."""
        try:
            if self._lock is None and not self.is_there():
                return
            self.open_empty().remove()
            self._lock = None
            self.path.rmdir()
        except (OSError, OutputError):
            self.close()

    def is_there(self) -> bool:
        """Whether there is a folder, and it is ours; an empty one is anybody's.

        Raises: OutputError for something that is not ours.
        """
        if not os.path.lexists(self.path):
            return False
        with writing(self.path):
            if self.path.is_dir() and not self.path.is_symlink():
                try:
                    names = os.listdir(self.path)
                except FileNotFoundError:  # another run has just removed it
                    return False
                if not names or MARKER in names:
                    return True
        raise OutputError(
            f"{self.path}: not made by graftkit, which keeps unfinished work under this name; move "
            "it away or choose another output"
        )

    def write(self, name: str, content: bytes) -> None:
        """Write one finished step. Raises: OutputError."""
        partial = self.path / f"{name}.writing"
        with writing(self.path):
            partial.write_bytes(content)
            os.replace(partial, self.path / name)

    def remove_file(self, name: str) -> None:
        """Forget one step, finished or not."""
        (self.path / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        """Forget a folder of intermediate files."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        """A finished step, or None."""
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def write_json(self, name: str, content: Any) -> None:
        """Write one finished step as JSON."""
        self.write(name, json.dumps(content).encode())

    def read_json(self, name: str) -> Any:
        """A finished step from JSON, or None."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def write_array(self, name: str, array: np.ndarray) -> None:
        """Write one finished array."""
        partial = self.path / f"{name}.writing"
        with writing(self.path):
            with partial.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(partial, self.path / name)

    def read_array(self, name: str) -> np.ndarray | None:
        """A finished array, or None."""
        file = self.path / name
        return np.load(file, allow_pickle=False) if file.is_file() else None

    def _taken(self) -> Lock:
        """The lock of the folder, taken once; a missing folder is made."""
        while self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.is_there():
                continue
            try:
                self._lock = Lock.take(self.path / MARKER)
            except FileNotFoundError:  # another run has just removed the folder
                continue
            except Busy as error:
                raise OutputError(
                    f"{self.path}: another run is at work here; wait for it, or choose another "
                    "output"
                ) from error
        return self._lock

    def _clear(self) -> None:
        """Remove everything but the marker."""
        for entry in list(os.scandir(self.path)):
            if entry.name == MARKER:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
