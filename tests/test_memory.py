"""What the process holds."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
BYTES = 2**26
# In a process of its own: what other tests have freed would be used again here.
MEASURE = f"""
import numpy as np
from graftkit.parallel import kept_memory

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

def allocate_and_free():
    np.ones({BYTES}, np.uint8)

allocate_and_free()
before = resident()
with kept_memory():
    allocate_and_free()
    print(resident() - before)
print(resident() - before)
allocate_and_free()
print(resident() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc"
)
def test_freed_memory_is_kept_inside_and_given_back_behind() -> None:
    environment = dict(os.environ, PYTHONPATH=str(SOURCE))
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    inside, behind, later = map(int, done.stdout.split())
    assert inside > 0.9 * BYTES
    assert behind < 0.5 * BYTES
    assert later < 0.5 * BYTES
