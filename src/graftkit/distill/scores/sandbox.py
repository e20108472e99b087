"""Untrusted Python in a process of its own, and its tests in another.

    jail.py      the kernel's walls around each of the two processes
    fence.py     an audit hook inside each
    judged.py    the answer's process: the code, and nothing of the tests
    referee.py   the process of the tests, which writes the verdict
    wire.py      messages between the two: their values (values.py), and objects of the other one
                 (remote.py)

What keeps them in, and what each part gives:

    limits        processor time, memory, size and number of files; wall time from outside
    namespaces    no network, no view of other processes, all of its processes end together, and a
                  folder in memory as its only disk (Linux, where a user may have namespaces)
    landlock      no file but Python's own, to read, and its folder (Linux 5.13 and newer)
    audit hook    no processes, sockets, foreign functions; files too, where Landlock is absent

The first three are the kernel's and hold whatever Python does. The hook is a fence and no jail: who
breaks Python's memory breaks it. Without namespaces and Landlock it is all there is, so give
answers of sources that you do not trust a machine without secrets. As root the number of threads
is not limited.

The verdict comes from a process that shares no object, no file and no standard output with the
answer: leaving early, printing, frames, changed modules and built-in names of the answer's process
reach nothing of the tests. What an object of the answer's own class is equal to, or in order with,
among plain values is decided by the tests' process (remote.py). Three limits remain. What a method,
or `in`, of such an object says about a plain value is the answer's word. So is what a helper says
that tests take from the answer without defining or importing it. And tests that need the answer
inside their own process (its standard output, replacing its global names, inheriting from its
classes) fail.
"""

import base64
import builtins
import json
import marshal
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import ModuleType
from typing import IO

from graftkit.distill.scores import fence, jail, judged, referee, remote, values, wire
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
    """Execute `answer`, and `tests` on it from another process, where they can do no harm.

    What they print is lost. Safe to call from several threads.
    Raises: SourceError when the sandbox itself cannot start.
    """
    end = time.monotonic() + timeout_seconds
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        started: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        with ours, theirs:
            for main, code, end_of_wire in ((judged, answer, ours), (referee, tests, theirs)):
                started.append(
                    _start(main, code, end_of_wire, timeout_seconds, memory_bytes, stack)
                )
                stack.callback(_end, started[-1][0])
        timed_out = not _wait(started[1][0], end - time.monotonic())
        _end(started[0][0])
        said = [_said(report) for _, report in started]
    for (process, _), text in zip(started, said, strict=True):
        if process.returncode > 0:
            raise SourceError(
                f"score code: the sandbox cannot start ({text}); what is finished is kept; run the "
                "same command to go on"
            )
    if timed_out:
        return Outcome("timeout")
    verdict, _, walls = said[1].partition(" ")
    if verdict == referee.PASSED:
        return Outcome(None, tuple(walls.split()))
    known = isinstance(getattr(builtins, verdict, None), type)
    return Outcome(verdict if known else "another exception" if verdict else "ended early")


def _start(
    main: ModuleType,
    code: str,
    wire_end: socket.socket,
    timeout_seconds: float,
    memory_bytes: int,
    stack: ExitStack,
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """One process behind the walls, and what its standard output will hold."""
    folder = stack.enter_context(TemporaryDirectory(prefix="graftkit-", ignore_cleanup_errors=True))
    standard_input = stack.enter_context(TemporaryFile())  # noqa: SIM115
    report = stack.enter_context(TemporaryFile())  # noqa: SIM115
    standard_input.write(json.dumps(code).encode())
    standard_input.seek(0)
    process = subprocess.Popen(
        [
            *(*PYTHON, jail.__file__, os.path.realpath(folder)),
            *(str(math.ceil(timeout_seconds)), str(memory_bytes)),
            *(*PYTHON, "-c", program(main), str(wire_end.fileno())),
        ],
        stdin=standard_input,
        stdout=report,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
        pass_fds=[wire_end.fileno()],
    )
    return process, report


@cache
def program(main: ModuleType) -> str:
    """Source that runs the function main of a module and needs no file of graftkit."""
    lines = ["import base64, marshal, sys, types"]
    for module in (fence, remote, values, wire, main):
        name, file = module.__name__, Path(str(module.__file__))
        code = compile(file.read_text(encoding="utf-8"), name, "exec")
        lines += [
            f"module = sys.modules[{name!r}] = types.ModuleType({name!r})",
            f"code = marshal.loads(base64.b64decode({base64.b64encode(marshal.dumps(code))!r}))",
            "exec(code, vars(module))",
        ]
    return "\n".join([*lines, "module.main()"])


def _said(report: IO[bytes]) -> str:
    report.seek(0)
    return report.read(256).decode(errors="replace")


def _wait(process: subprocess.Popen[bytes], timeout_seconds: float) -> bool:
    """Whether the process ended by itself in time; it has ended in any case."""
    # Popen.wait looks every 50 ms, which is as long as most answers run.
    descriptor = os.pidfd_open(process.pid)
    try:
        watch = select.poll()
        watch.register(descriptor, select.POLLIN)
        return bool(watch.poll(1000 * max(0.0, timeout_seconds)))
    finally:
        os.close(descriptor)
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a jailer and its prisoner, if they still run."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
