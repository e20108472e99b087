"""Threads, memory, and the number formats that this machine is fast at.

torch is imported by the functions that use it: the command line imports this module at its start.
"""

import ctypes
import resource
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int | None = None
) -> Iterator[_Result]:
    """Results of `work` in the order of the items, at most a few ahead of the reader.

    Every thread computes with one core, so that results do not depend on the number of workers
    (a matrix product cut into other pieces is rounded otherwise). Entropy decoding takes turns,
    as constriction keeps the interpreter's lock, while other threads multiply and add.

    Args:
        workers: threads, default as many as torch may use.
    """
    import torch

    cores = torch.get_num_threads()
    count = workers or cores
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # What a thread sets is also what threads started later begin with.
        torch.set_num_threads(cores)


_TRIM_THRESHOLD, _MAPPINGS = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
_KEEP_FREED = {_MAPPINGS: 0, _TRIM_THRESHOLD: 2**31 - 1}
_DEFAULTS = {_MAPPINGS: 65_536, _TRIM_THRESHOLD: 128 * 1024}  # of glibc


def peak_rss_bytes() -> int:
    """Peak resident memory of this process.

    On Linux from /proc/self/status: getrusage also counts the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, freed memory stays with this process for its next allocations.

    Every step of training frees large tensors and allocates as large ones. glibc maps each of them
    anew, and the kernel has to find and clear its pages: up to half of a step's time. Other C
    libraries are left as they are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not all(hasattr(library, name) for name in ("mallopt", "malloc_trim")):
        yield
        return
    for option, value in _KEEP_FREED.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _DEFAULTS.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def bfloat16_pays(device: str = "cpu") -> bool:
    """Whether this device multiplies in bfloat16. Emulated, it is ten times slower than float32.

    False where torch is too old to report what processors can do.

    Args:
        device: cpu or cuda.
    """
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(instruction) for instruction in _BFLOAT16_INSTRUCTIONS)


class MemoryGate:
    """Bounds the weights of all tensors that threads work on at the same time."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, weights: int) -> Iterator[None]:
        """Wait until `weights` fit beside those in work; one tensor alone always fits."""
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
