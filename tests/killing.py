"""Processes that are killed, stopped or watched at their changes of files below a folder."""

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "open")
SAMPLED = 1
_WRITING = os.O_WRONLY | os.O_RDWR


def changed_files(
    folder: Path, act: Callable[[int], None], changes: Sequence[str] = CHANGES
) -> None:
    """From now on, call act(1), act(2), ... before every change of files below `folder`."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in changes or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (arguments[2] or 0) & _WRITING:
            return
        if str(folder) in os.path.abspath(os.fspath(arguments[0])):
            seen[0] += 1
            act(seen[0])

    sys.addaudithook(hook)  # stays until the process ends


class Forked:
    """`work` in a child process; `before` runs there first.

    Its status is what `work` returns (None: 0), 99 where it raises, -n for a signal.
    """

    def __init__(self, work: Callable[[], int | None], before: Callable[[], None] | None = None):
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                if before is not None:
                    before()
                status = int(work() or 0)
            finally:
                os._exit(status)

    def stopped(self) -> bool:
        """Wait until it stops; False where it ends before."""
        _, state = os.waitpid(self.pid, os.WUNTRACED)
        self._state = state
        return os.WIFSTOPPED(state)

    def end(self, seconds: float = 60) -> int:
        """Let it go on, and wait for its status."""
        state = getattr(self, "_state", None)
        if state is not None and not os.WIFSTOPPED(state):
            return os.waitstatus_to_exitcode(state)
        os.kill(self.pid, signal.SIGCONT)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, state = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(state)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"not done within {seconds} s")


def signal_at(
    folder: Path, count: int, number: int, changes: Sequence[str] = CHANGES
) -> Callable[[], None]:
    """For `before`: this process gets signal `number` before its count-th change."""

    def act(seen: int) -> None:
        if seen == count:
            os.kill(os.getpid(), number)

    return lambda: changed_files(folder, act, changes)


def killed_at(
    folder: Path, count: int, work: Callable[[], int | None], changes: Sequence[str] = CHANGES
) -> int:
    """Status of `work`, killed before its count-th change of files below `folder`."""
    return Forked(work, signal_at(folder, count, signal.SIGKILL, changes)).end()


def states_at_changes(
    folder: Path, work: Callable[[], int | None], copies: Path, changes: Sequence[str] = CHANGES
) -> list[Path]:
    """What a kill before each change of files below `folder` would leave of it, in that order.

    `work`, of one thread at a time, runs once, in a process of its own that has ended when this
    returns. Each state is a copy of the folder below `copies`. One that equals the state before it
    is left out; so are, of states that differ from the ones before them in files of the same names
    but for numbers (a step for each tensor, say), all but the first, the last and `SAMPLED` others.
    """

    def copy(seen: int) -> None:
        shutil.copytree(folder, copies / f"{seen:04}", symlinks=True)

    copies.mkdir()
    assert Forked(work, lambda: changed_files(folder, copy, changes)).end(600) == 0
    alike: dict[frozenset[str], list[Path]] = {}
    before: dict[str, bytes] = {}
    for state in sorted(copies.iterdir()):
        entries = _entries(state)
        differ = {name for name, content in entries.items() if before.get(name) != content}
        differ |= before.keys() - entries.keys()
        if differ or not alike:
            kind = frozenset(re.sub(r"[0-9a-f]{8,}|[0-9]+", "#", name) for name in differ)
            alike.setdefault(kind, []).append(state)
        before = entries
    seeded, chosen = random.Random(0), set()
    for kind in alike.values():
        between = kind[1:-1]
        chosen |= {kind[0], kind[-1], *seeded.sample(between, min(SAMPLED, len(between)))}
    return sorted(chosen)


def restore(state: Path, folder: Path) -> None:
    """Put a state in the place of the folder that it was copied from."""
    shutil.rmtree(folder)
    state.rename(folder)


def _entries(folder: Path) -> dict[str, bytes]:
    """Contents of all files by their paths, and nothing by the paths of folders."""
    return {str(path.relative_to(folder)): b"" for path in folder.rglob("*")} | tree(folder)


def tree(folder: Path) -> dict[str, bytes]:
    """Contents of all files by their paths."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
