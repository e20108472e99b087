"""A folder that holds finished steps, so that an interrupted job goes on where it stopped."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from graftkit.errors import OutputError
from graftkit.files import Busy, Lock, writing

MARKER = "graftkit-job"
"""The file that makes a folder ours; it says whose steps are here, and is locked meanwhile."""


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
        """Make the folder ready for `job` and keep others out until `close` or `remove`.

        What another job left there is thrown away.
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
        """As `open`, for work that does not go on: whatever was left there is thrown away.

        Raises: OutputError.
        """
        with writing(self.path):
            lock = self._taken()
            # Until all of it is gone, what is left belongs to no job.
            lock.write("")
            self._clear()
        return lock

    def close(self) -> None:
        """Let other runs have the folder; the finished steps stay."""
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
        """The lock of the folder, which is made if it is missing."""
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
