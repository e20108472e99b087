"""Untrusted Python with its tests in a process of its own.

What keeps it in, and what each part gives:

    limits        processor time, memory, size and number of files; wall time from outside
    namespaces    no network, no view of other processes, all of its processes end together, and a
                  folder in memory as its only disk (Linux, where a user may have namespaces)
    landlock      no file but Python's own, to read, and its folder (Linux 5.13 and newer)
    audit hook    no processes, sockets, foreign functions; files too, where Landlock is absent

The first three are the kernel's and hold whatever Python does. The hook is a fence and no jail: who
breaks Python's memory breaks it. Without namespaces and Landlock it is all there is, so give
answers of sources that you do not trust a machine without secrets. As root the number of threads
is not limited.

The verdict is a secret that only the end of the tests writes. Leaving early, printing, or an
exception caught by nobody proves nothing. But tests see the answer through its own objects: an
object that says it is equal to everything passes a test that only asks for equality, and changed
modules of the standard library stay changed. Tests that type their results catch most of that.
"""

import builtins
import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from graftkit.distill.scores import fence, jail
from graftkit.errors import ConfigError, SourceError

WALLS = ("namespaces", "landlock")
STOP_SECONDS = 5.0  # until a jailer that was asked to end its prisoner is ended too
# Nothing of the parent's environment; sets of strings have one order in every run.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
PYTHON = (sys.executable, "-P", "-s", "-B")


@dataclass(frozen=True)
class Outcome:
    """What came of one answer.

    Attributes:
        failed: None where the tests ran to their end; else timeout, ended early, or the exception.
        walls: the kernel's walls that stood; known where it passed.
    """

    failed: str | None
    walls: tuple[str, ...] = ()


def check_sandbox() -> tuple[str, ...]:
    """Run nothing at all in the sandbox. Returns: the WALLS that this machine lacks.

    Raises: ConfigError elsewhere than on Linux; SourceError where even that fails.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"score code: {sys.platform} found; expected Linux, whose kernel confines the tests"
        )
    outcome = run_tests("", "", timeout_seconds=60, memory_bytes=2**30)
    if outcome.failed is not None:
        raise SourceError(
            f"score code: an empty program fails in the sandbox ({outcome.failed}); expected a "
            f"Python that runs from {sys.base_prefix} alone, such as one in a virtual environment"
        )
    return tuple(wall for wall in WALLS if wall not in outcome.walls)


def run_tests(answer: str, tests: str, timeout_seconds: float, memory_bytes: int) -> Outcome:
    """Execute `answer` and then `tests`, in one module, where they can do no harm.

    What they print is lost. Safe to call from several threads.
    Raises: SourceError when the sandbox itself cannot start.
    """
    token = secrets.token_bytes(fence.TOKEN_BYTES)
    request = token + json.dumps({"answer": answer, "tests": tests}).encode()
    with (
        TemporaryDirectory(prefix="graftkit-", ignore_cleanup_errors=True) as folder,
        TemporaryFile() as standard_input,
        TemporaryFile() as report,
    ):
        standard_input.write(request)
        standard_input.seek(0)
        process = subprocess.Popen(
            [
                *(*PYTHON, jail.__file__, os.path.realpath(folder)),
                *(str(math.ceil(timeout_seconds)), str(memory_bytes)),
                *(*PYTHON, "-c", Path(fence.__file__).read_text(encoding="utf-8")),
            ],
            stdin=standard_input,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        timed_out = not _wait(process, timeout_seconds)
        report.seek(0)
        said = report.read(256)
    if process.returncode > 0:
        raise SourceError(
            f"score code: the sandbox cannot start ({said.decode(errors='replace')}); what is "
            "finished is kept; run the same command to go on"
        )
    if timed_out:
        return Outcome("timeout")
    if said.startswith(token):
        return Outcome(None, tuple(said.removeprefix(token).decode(errors="replace").split()))
    name = said.decode(errors="replace")
    known = isinstance(getattr(builtins, name, None), type)
    return Outcome(name if known else "another exception" if name else "ended early")


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    """Whether the process ended by itself in time; it has ended in any case."""
    # Popen.wait looks every 50 ms, which is as long as most answers run.
    descriptor = os.pidfd_open(process.pid)
    try:
        watch = select.poll()
        watch.register(descriptor, select.POLLIN)
        ended = bool(watch.poll(1000 * timeout_seconds))
        if not ended:
            process.terminate()
            watch.poll(1000 * STOP_SECONDS)
        return ended
    finally:
        os.close(descriptor)
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
