"""A folder that holds finished steps, so that an interrupted pack goes on where it stopped."""

import json
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.errors import OutputError

_MAP_FROM_BYTES = 2**16
"""Smaller payloads are read into memory: a map costs a page and a slot of the kernel each."""


class WorkFolder:
    """Finished steps of one job, each a file; files appear whole or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, job: str) -> bool:
        """Make the folder ready for `job`; what another job left there is thrown away.

        Returns: True when finished steps of the same job are there. Raises: OutputError.
        """
        marker = self.path / "job"
        with _writing(self.path):
            if marker.is_file() and marker.read_text() == job:
                return True
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            marker.write_text(job)
        return False

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, name: str, content: bytes) -> None:
        """Write one finished step. Raises: OutputError."""
        partial = self.path / f"{name}.writing"
        with _writing(self.path):
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
        with _writing(self.path):
            with partial.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(partial, self.path / name)

    def read_array(self, name: str) -> np.ndarray | None:
        """A finished array, or None."""
        file = self.path / name
        return np.load(file, allow_pickle=False) if file.is_file() else None


def mapped_file(file: Path) -> memoryview:
    """Contents of a file, mapped so that they stay readable when it is deleted."""
    with file.open("rb") as handle:
        if os.fstat(handle.fileno()).st_size < _MAP_FROM_BYTES:
            return memoryview(handle.read())
        return memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))


class MemoryGate:
    """Lets tensors of at most `capacity` weights in all be worked on at the same time."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, weights: int) -> Iterator[None]:
        """Wait until `weights` fit beside what is in work; one tensor always fits."""
        share = min(weights, self._capacity)
        with self._changed:
            self._changed.wait_for(lambda: self._used + share <= self._capacity)
            self._used += share
        try:
            yield
        finally:
            with self._changed:
                self._used -= share
                self._changed.notify_all()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose "
            "another place"
        ) from error
