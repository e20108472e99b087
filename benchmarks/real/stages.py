"""Stages of a long run: each makes one file or folder of a work folder, once, in its own process.

A stage that is interrupted leaves nothing under its name: it writes to another one and is renamed
at the end. Two runs on one folder take turns, stage by stage.

Imports neither torch nor graftkit: the parent of the stages stays small.
"""

import fcntl
import fnmatch
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ALLOCATOR = {
    # Freed memory is kept for the next step instead of returned to the system.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
}


@dataclass(frozen=True)
class Setup:
    """Where things are.

    Attributes:
        target: the target's folder, if it was made before. shared: a folder of fine-tunes that need
            not be trained anew. tag: names packs of another version of graftkit.
    """

    work: Path
    data: Path
    target: Path | None
    shared: Path | None
    tag: str = ""


@dataclass(frozen=True)
class Stage:
    """One output in the work folder, and what makes it (a function of the path to write)."""

    name: str
    make: Callable[[Path], None]
    needs: tuple[str, ...] = ()


StageList = Callable[[Setup], Sequence[Stage]]


def run_pending(setup: Setup, stages: StageList, pattern: str, command: Sequence[str]) -> list[str]:
    """Run what is not there yet, each stage in a process of its own.

    Args:
        stages: gives all stages that are known by now; it is called again after each of them.
        pattern: names of stages to run, with wildcards.
        command: runs one stage, whose name is appended.
    Returns: the names of stages that failed, or that wait for one that did.
    """
    failed: list[str] = []
    while True:
        pending = [
            stage
            for stage in stages(setup)
            if fnmatch.fnmatchcase(stage.name, pattern)
            and stage.name not in failed
            and not (setup.work / stage.name).exists()
        ]
        ready = [s for s in pending if all((setup.work / n).exists() for n in s.needs)]
        if not ready:
            return [*failed, *(stage.name for stage in pending)]
        name, began = ready[0].name, time.perf_counter()
        print(f"[{time.strftime('%H:%M:%S')}] {name}", file=sys.stderr, flush=True)
        environment = {**os.environ, **ALLOCATOR}
        if subprocess.run([*command, "--child", name], env=environment, check=False).returncode:
            failed.append(name)
        seconds = time.perf_counter() - began
        state = "failed after" if name in failed else "took"
        print(f"{name} {state} {seconds:.0f} s", file=sys.stderr, flush=True)


def run_stage(setup: Setup, stages: StageList, name: str, threads: int) -> None:
    """Make one stage in this process: under another name, then renamed. One at a time."""
    import torch

    torch.set_num_threads(threads)
    stage = next(stage for stage in stages(setup) if stage.name == name)
    partial = setup.work / f".partial-{name}"
    with (setup.work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (setup.work / name).exists():
            return  # another run made it while this one waited
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
        stage.make(partial)
        partial.rename(setup.work / name)
