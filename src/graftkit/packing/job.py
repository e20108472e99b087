"""What the steps of one packing job share: files mapped from its work folder, and memory."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftkit.work import WorkFolder

__all__ = ["MemoryGate", "WorkFolder", "mapped_file"]

_MAP_FROM_BYTES = 2**16
"""Smaller payloads are read into memory: a map costs a page and a slot of the kernel each."""


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
