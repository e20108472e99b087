"""The fence inside Python, which both processes of a verdict stand behind.

An audit hook that refuses processes, sockets, foreign functions and looks behind the scenes; files
too, where the kernel does not see to them. It needs no other file of graftkit.
"""

import _posixsubprocess
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

FORBIDDEN = frozenset(
    {
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"),
        *("os.kill", "os.killpg", "sys.settrace", "sys.setprofile"),
        *("sys._current_frames", "sys._current_exceptions"),
        *("gc.get_objects", "gc.get_referrers", "gc.get_referents"),
    }
)
FORBIDDEN_FAMILIES = frozenset({"ctypes", "pty", "resource", "socket", "subprocess"})
# Event loops wake themselves through a pair of sockets; to connect one is another event.
HARMLESS = frozenset({"socket.__new__", "os.putenv", "os.unsetenv"})
FORBIDDEN_IMPORTS = frozenset({"_ctypes", "ctypes", "_posixsubprocess"})

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LISTING = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk"})
CHANGING = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2}  # paths, as many folders


def enclose(folder: str, walls: Sequence[str], readable: list[str]) -> None:
    """Put up the fence, for as long as the process lives."""
    vars(_posixsubprocess)["fork_exec"] = None
    sys.addaudithook(_hook(None if "landlock" in walls else _files_rule(folder, readable)))


def _hook(files_are_fine: Callable[[str, Sequence[Any]], bool] | None) -> Any:
    """Refuses processes, sockets, foreign functions, and looks behind the scenes.

    It reads no global name, which the answer could give another value by way of a traceback.
    """
    imports, events, families = FORBIDDEN_IMPORTS, FORBIDDEN, FORBIDDEN_FAMILIES
    harmless = HARMLESS

    def hook(event: str, arguments: Sequence[Any]) -> None:
        if event == "import" and arguments[0] in imports:
            raise ImportError("not in the sandbox")
        if event in events or (event.partition(".")[0] in families and event not in harmless):
            raise PermissionError("not in the sandbox")
        if files_are_fine is not None and not files_are_fine(event, arguments):
            raise PermissionError("not in the sandbox")

    return hook


def _files_rule(folder: str, readable: list[str]) -> Callable[[str, Sequence[Any]], bool]:
    """Whether an event keeps to the files it may touch; where the kernel does not see to it."""
    work, shown = folder + "/", (folder + "/", *(path + "/" for path in readable))
    writing, listing, changing, harmless = WRITING, LISTING, CHANGING, HARMLESS
    # The types of a path that can be looked at, and of one that was opened before, or is not given.
    kind, text, opened = type, str, (int, type(None))

    def inside(path: Any, roots: Any) -> bool:
        # No links can be made and no folder entered, so a relative path stays where it begins.
        if kind(path) is not text:
            return kind(path) in opened
        return ".." not in path and (path[:1] != "/" or (path + "/").startswith(roots))

    def fine(event: str, arguments: Sequence[Any]) -> bool:
        if event == "open":
            return inside(arguments[0], work if arguments[2] & writing else shown)
        if event in listing:
            return inside(arguments[0], shown)
        if event in changing:
            paths = changing[event]
            own = [inside(path, work) for path in arguments[:paths]]
            return False not in own and arguments[-1] == -1 and arguments[-paths] == -1
        return event in harmless or event.partition(".")[0] not in ("os", "sqlite3")

    return fine
