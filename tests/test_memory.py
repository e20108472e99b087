"""What the process holds."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from graftkit.parallel import kept_memory

BYTES = 2**26


def held() -> int:
    """Resident memory now, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc"
)
def test_freed_memory_is_kept_inside_and_given_back_behind() -> None:
    before = held()
    with kept_memory():
        array = np.ones(BYTES, np.uint8)
        del array
        inside = held()
    assert inside > before + 0.9 * BYTES
    assert held() < before + 0.5 * BYTES
    array = np.ones(BYTES, np.uint8)
    del array
    assert held() < before + 0.5 * BYTES
