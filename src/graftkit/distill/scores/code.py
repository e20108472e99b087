"""Whether an answer's code passes the tests of its prompt, judged inside bubblewrap.

bubblewrap (`bwrap`, the sandbox of Flatpak) starts two processes of referee.py, one with the answer
and one with its tests, each with

    namespaces    no network, no view of other processes, no capabilities
    files         Python and its libraries to read, and an empty /tmp in memory; nothing else
    limits        processor time, memory, size and number of files (referee.py sets them)
    seccomp       no further processes: threads are allowed, fork and new namespaces are not

and ends both when the tests are over, the time is up or this process is killed. All of it is the
kernel's and holds whatever Python code does. A hole in the kernel itself is a way out, so run the
answers of sources that you do not trust on a machine without secrets.

The answer cannot change the verdict. Its process shares no object, file or standard output with the
process of the tests, which decides every comparison on copies of plain data. Two limits remain. A
helper that the tests take from the answer, without defining or importing it, says what the answer
wants. Tests that need the answer inside their own process (its standard output, its global names
replaced) fail.
"""

import errno
import json
import math
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from functools import cache
from tempfile import TemporaryFile
from typing import IO, Self

from graftkit.distill.config import CodeRule
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.distill.scores import UNJUDGED, Verdict, finished, referee
from graftkit.errors import ConfigError, RowsError, SourceError

TEMPORARY_BYTES = 2**26  # of /tmp
PYTHON = (sys.executable, "-P", "-s", "-B")
# Nothing of the parent's environment; sets of strings have one order in every run.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
NAMESPACES = ("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
DATA = ("/usr/share/zoneinfo", "/etc/ld.so.cache")
INSIDE = "/referee.py"  # where the sandbox has it

# Numbers of the architecture; of clone; of fork and vfork (on x86), unshare and setns.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 272, 308)),
    "aarch64": (0xC00000B7, 220, (97, 268)),
}
CLONE3, X32_CALLS, CLONE_THREAD = 435, 0x40000000, 0x10000


def check_sandbox() -> None:
    """Run an empty answer with empty tests.

    Raises: ConfigError elsewhere than on Linux, or without bubblewrap; SourceError where it fails.
    """
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        raise ConfigError(
            f"score code: {sys.platform} {platform.machine()} found; expected Linux on "
            f"{' or '.join(SYSTEM_CALLS)}, whose kernel confines the tests"
        )
    if shutil.which("bwrap") is None:
        raise ConfigError(
            "score code: its sandbox is bubblewrap, which is not installed; install it (apt-get "
            "install bubblewrap, dnf install bubblewrap) or leave the rule out"
        )
    failed = run_tests("", "", timeout_seconds=60, memory_bytes=2**30)
    if failed is not None:
        raise SourceError(
            f"score code: an empty program fails in the sandbox ({failed}); expected a Python that "
            f"runs from {sys.base_prefix} alone, such as one in a virtual environment"
        )


def run_tests(answer: str, tests: str, timeout_seconds: float, memory_bytes: int) -> str | None:
    """Execute `answer`, and `tests` on it from another process, where they can do no harm.

    What they print is lost. Safe to call from several threads.

    Returns: None where the tests ran to their end; else timeout, ended early, the built-in
        exception that ended them, or UNJUDGED and the reason.
    Raises: SourceError when the sandbox itself cannot start.
    """
    end = time.monotonic() + timeout_seconds
    limits = (str(math.ceil(timeout_seconds)), str(memory_bytes))
    with ExitStack() as stack:
        ours, theirs = map(stack.enter_context, socket.socketpair())
        processes = [
            stack.enter_context(_Process(part, code, wire, limits))
            for part, code, wire in (("answer", answer, ours), ("tests", tests, theirs))
        ]
        for wire in (ours, theirs):
            wire.close()  # each process has its end now, and sees when the other is gone
        report = processes[1].finish(end - time.monotonic())
        processes[0].finish(0)
    if report is None:
        return "timeout"
    if report == referee.PASSED:
        return None
    if report == referee.REFUSED:
        return UNJUDGED + "the tests use more of the answer than plain values"
    if not report.startswith(referee.RAISED):
        return "ended early"
    name = report.removeprefix(referee.RAISED)
    return name if name in referee.ERRORS else "another exception"


class _Process:
    """One of the two processes, in a sandbox of its own that ends with the block."""

    def __init__(self, part: str, code: str, wire: socket.socket, limits: tuple[str, str]):
        self._filter, self._errors = _file(_seccomp_program()), _file(b"")
        descriptors = (wire.fileno(), self._filter.fileno())
        inside = (*PYTHON, INSIDE, part, str(descriptors[0]), *limits)
        self._process = subprocess.Popen(
            [*_bubblewrap(), "--seccomp", str(descriptors[1]), "--", *inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=ENVIRONMENT,
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the others
        )
        assert self._process.stdin is not None
        self._input, self._process.stdin = self._process.stdin, None  # open until the end
        with suppress(BrokenPipeError):  # a sandbox that does not start says why
            self._input.write(json.dumps(code).encode() + b"\n")
            self._input.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for file in (self._input, self._filter, self._errors, self._process.stdout):
            with suppress(BrokenPipeError):
                if file is not None:
                    file.close()

    def finish(self, seconds: float) -> str | None:
        """Wait, then end the process. Returns: what it wrote; None where the time was too short.

        Raises: SourceError when its sandbox did not start.
        """
        try:
            content, _ = self._process.communicate(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            content = None
        self._end()
        # Before it executes anything, referee.py has put standard error aside.
        self._errors.seek(0)
        failure = self._errors.read(1000).decode(errors="replace").strip()
        if failure:
            raise SourceError(
                f"score code: the sandbox cannot start ({failure.splitlines()[-1]}); see that you "
                "may make namespaces, which many containers forbid, or leave the rule out; what is "
                "finished is kept"
            )
        return None if content is None else content.decode(errors="replace")

    def _end(self) -> None:
        # All of the sandbox ends with bwrap, which --die-with-parent promises.
        self._process.kill()
        self._process.wait()


def _file(content: bytes) -> IO[bytes]:
    """A nameless file, to be read from its beginning."""
    file = TemporaryFile()  # noqa: SIM115
    file.write(content)
    file.flush()
    file.seek(0)
    return file


@cache
def _bubblewrap() -> tuple[str, ...]:
    """bwrap with everything but the program."""
    readable = [*LIBRARIES, *DATA, sys.base_prefix, sys.prefix]
    binds = [("--ro-bind-try", path, path) for path in dict.fromkeys(readable)]
    return (
        *(shutil.which("bwrap") or "bwrap", *NAMESPACES, "--cap-drop", "ALL"),
        *("--die-with-parent", "--new-session", "--chdir", "/tmp"),
        *("--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"),
        *("--dev-bind", os.devnull, os.devnull),
        *(word for bind in binds for word in bind),
        *("--ro-bind", os.path.realpath(referee.__file__), INSIDE, "--remount-ro", "/"),
    )


@cache
def _seccomp_program() -> bytes:
    """A BPF program that refuses fork and new namespaces, and lets threads be.

    Each instruction is (code, offset if true, offset if false, operand) of <linux/filter.h>.
    """
    architecture, clone, forbidden = SYSTEM_CALLS[platform.machine()]
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    program = [
        *((load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)),
        *((at_least, 0, 1, X32_CALLS), (leave, 0, 0, kill)),
        # clone3 hides its flags from a filter; without it the C library takes clone.
        *((equal, 0, 1, CLONE3), (leave, 0, 0, error | errno.ENOSYS)),
    ]
    for call in forbidden:
        program += [(equal, 0, 1, call), (leave, 0, 0, error | errno.EPERM)]
    program += [
        *((equal, 1, 0, clone), (leave, 0, 0, allow), (load, 0, 0, 16)),
        *((any_bit, 1, 0, CLONE_THREAD), (leave, 0, 0, error | errno.EPERM)),
        (leave, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


FENCE = "```"
LABELS = ("python", "python3", "py")


class CodeTests:
    """The tests of the prompt on the answer's code, in a sandbox, one for each core.

    Raises: ConfigError elsewhere than on Linux, or without bubblewrap; SourceError where its
        sandbox does not start.
    """

    costly = True

    def __init__(self, rule: CodeRule):
        self.rule = rule
        check_sandbox()

    def score(
        self, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """1.0, or why not, as tests end. Raises: RowsError for a prompt without tests."""
        todo = [(i, a, _tests(prompts[a.prompt_id])) for i, a in finished(answers) if i not in done]
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            futures = {pool.submit(self._run, answer, tests): i for i, answer, tests in todo}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _run(self, answer: SourceAnswer, tests: str) -> Verdict:
        rule = self.rule
        code = find_code(answer.text)
        failed = run_tests(code, tests, rule.timeout_seconds, rule.memory_bytes)
        return 1.0 if failed is None else failed


def find_code(text: str) -> str:
    """The last fenced block that says it is Python, else the last that says nothing, else all."""
    labelled: list[list[str]] = []
    plain: list[list[str]] = []
    block: list[str] | None = None
    for line in text.split("\n"):
        mark = line.strip()
        if not mark.startswith(FENCE):
            if block is not None:
                block.append(line)
        elif block is None:
            block, label = [], mark.removeprefix(FENCE).strip().lower()
            if label in LABELS or not label:
                (labelled if label else plain).append(block)
        else:
            block = None
    blocks = labelled or plain
    return "\n".join(blocks[-1]) if blocks else text


def _tests(prompt: Prompt) -> str:
    if prompt.tests is None:
        raise RowsError(
            f"prompt {prompt.id} (from 0): no tests; expected Python in its field tests, or leave "
            "the rule code out"
        )
    return prompt.tests
