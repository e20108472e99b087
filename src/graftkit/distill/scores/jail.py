"""Walls of the kernel around one program. Run as a script by sandbox.py, before the program.

    python jail.py FOLDER CPU_SECONDS MEMORY_BYTES COMMAND...

COMMAND gets three more arguments: the folder, the walls that stand, and what may be read. This
process waits for it, outside of the walls between processes, and ends it on SIGTERM.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from contextlib import suppress

FILES_BYTES = 2**26  # each file, and where the folder is in memory, all of them
MOST_FILES, MOST_THREADS = 256, 64

# <linux/sched.h>: user, mount, process, network and IPC namespaces of its own
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000
PRIVATE_MOUNTS, NOSUID_NODEV = (1 << 14) | (1 << 18), 2 | 4  # <linux/mount.h>
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # <linux/prctl.h>
CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, anywhere
READ_FILE, READ = 0b101, 0b1101  # <linux/landlock.h>: execute and read files; and list folders

LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Build what walls there can be, and run the command behind them."""
    folder, cpu_seconds, memory_bytes, *command = sys.argv[1:]
    # Nobody outlives the process that asked for the verdict.
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    walls, readable = [], _readable()
    with suppress(OSError):
        _own_namespaces(folder)
        walls.append("namespaces")
    os.chdir(folder)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with suppress(OSError):
        _fence_files(folder, readable)
        walls.append("landlock")
    _limit(int(cpu_seconds), int(memory_bytes), "namespaces" in walls)
    _call("capset", struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    child = os.fork()
    if child == 0:
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        os.execv(command[0], [*command, folder, json.dumps(walls), json.dumps(readable)])
    signal.signal(signal.SIGTERM, lambda *_: _kill(child))
    os.waitpid(child, 0)


def _kill(child: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(child, signal.SIGKILL)


def _own_namespaces(folder: str) -> None:
    """No network, no other processes, and a folder in memory that vanishes. Raises: OSError."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", NAMESPACES)
    for name, value in (
        ("uid_map", f"{uid} {uid} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(value)
    _call("mount", None, b"/", None, PRIVATE_MOUNTS, None)
    size = f"size={FILES_BYTES},mode=700".encode()
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", NOSUID_NODEV, size)


def _fence_files(folder: str, readable: list[str]) -> None:
    """Landlock: read `readable`, do anything in the folder, touch no other file. Raises: OSError.

    Newer kernels keep off TCP, other processes' signals and abstract sockets too.
    """
    version = _call("syscall", CREATE_RULESET, None, 0, 1)
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network, scopes = 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0
    ruleset = struct.pack("=QQQ", everything, network, scopes)
    rules = _call("syscall", CREATE_RULESET, ruleset, len(ruleset), 0)
    allowed = {path: READ if os.path.isdir(path) else READ_FILE for path in readable}
    for path, access in {**allowed, folder: everything}.items():
        place = os.open(path, os.O_PATH)
        _call("syscall", ADD_RULE, rules, 1, struct.pack("=Qi", access, place), 0)
        os.close(place)
    _call("syscall", RESTRICT_SELF, rules, 0)
    os.close(rules)


def _readable() -> list[str]:
    """Python itself, and the libraries that it is linked with."""
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
    data = ("/usr/share/zoneinfo", "/etc/ld.so.cache")
    paths = (sys.base_prefix, sys.prefix, *libraries, *data)
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _limit(cpu_seconds: int, memory_bytes: int, own_users: bool) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILES_BYTES,
        resource.RLIMIT_NOFILE: MOST_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if own_users:
        # Elsewhere it counts what the user runs outside as well.
        limits[resource.RLIMIT_NPROC] = MOST_THREADS
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (least, least))


def _call(function: str, *arguments: int | bytes | None) -> int:
    """A function of the C library. Raises: OSError."""
    wide = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    result: int = getattr(LIBC, function)(*wide)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as failure:
        os.write(1, str(failure).encode())
        sys.exit(1)
