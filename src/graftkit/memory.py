"""Memory of the running process."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIM_THRESHOLD, _MAPPINGS = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
_KEEPING = {_MAPPINGS: 0, _TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_MAPPINGS: 65_536, _TRIM_THRESHOLD: 128 * 1024}


def peak_rss_bytes() -> int:
    """Most memory this process has held.

    On Linux from its own status: getrusage also counts what the process that started it held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, what is freed stays with this process for what it allocates next.

    Every step of training frees large tensors and asks for as large ones. glibc maps each of them
    anew, and the kernel finds and clears its pages: up to half of a step's time. Other C libraries
    are left as they are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not all(hasattr(library, name) for name in ("mallopt", "malloc_trim")):
        yield
        return
    for option, value in _KEEPING.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
