"""Memory of the running process."""

import resource
import sys
from pathlib import Path


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
