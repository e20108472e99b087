"""Random operations on one library: is anything lost, left behind, or leaking?

    python benchmarks/library_stress.py --operations 10000 --out benchmarks/out/library_stress.json

Packs are added, removed, routed to, answered with, attached and detached; disks fill up, processes
are killed between two steps, files are damaged, forward passes raise, and other processes change
the same folder. After each operation the library must be what a plain list says it is.
"""

import argparse
import errno
import gc
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from ledger import commit, machine
from library_stress_world import LETTERS, make_world

from graftkit import SkillPack, attached
from graftkit.checkpoint import fingerprint, tensor_digest
from graftkit.errors import AttachError, GraftError, LibraryError, OutputError
from graftkit.library import Library
from graftkit.library.folder import PackFolder, file_digest
from graftkit.models.loading import load_model

STEPS = 14  # a change asks the disk no more often than this
KEPT = ("library.toml", "packs", ".lock")  # what a library without work in progress is made of
CHECK_EVERY = 50  # operations between two looks at every byte

Ops = list[tuple[str, str, str]]  # ("add", name, file) and ("remove", label, "")


class Stress:
    """One library under attack.

    Args:
        target: its model directory. files: packs of it, all different. place: a new folder.
    """

    def __init__(self, target: Path, files: list[Path], place: Path, seed: int):
        self.random = random.Random(seed)
        self.files = {file_digest(file): file for file in files}
        self.library = Library.init(place, target)
        self.place, self.target = place, target
        self.expected: dict[str, str] = {}  # label: digest
        self.model = load_model(target)
        self.before = live_digest(self.model)
        self.on_disk = {file.name: file_digest(file) for file in target.iterdir()}
        self.context = multiprocessing.get_context("fork")
        self.counts: Counter[str] = Counter()
        self.memory: list[int] = []
        self.objects: list[int] = []

    def run(self, operations: int) -> dict[str, Any]:
        """The counts. Raises: AssertionError where anything is not as it should be."""
        work: dict[Callable[[], Any], float] = {
            self.add: 20,
            self.remove: 12,
            self.route: 10,
            self.answer: 25,
            self.attach: 8,
            self.reopen: 1,
            self.fill_the_disk: 6,
            self.damage_a_pack: 5,
            self.damage_the_list: 4,
            self.raise_in_a_pass: 6,
            self.kill_a_process: 1.5,
            self.share_the_folder: 1.5,
        }
        for done in range(operations):
            operation = self.random.choices(list(work), list(work.values()))[0]
            operation()
            self.counts[operation.__name__] += 1
            self.check(everything=done % CHECK_EVERY == 0)
        self.check(everything=True)
        return {"operations": operations, "packs_left": len(self.expected)} | self.growth()

    # What goes well.

    def add(self) -> bool:
        """A pack that is not there, under a new name or as the next version of one; False where
        all are."""
        actual = self.absent()
        if actual is not None:
            digest, file = actual
            entry = self.library.add(file, self.name(), update=True)
            self.expected[entry.label] = digest
        return actual is not None

    def remove(self) -> None:
        """A pack, or every version of a name."""
        if not self.expected:
            return
        label = self.random.choice(sorted(self.expected))
        address = self.random.choice([label, label.split("@")[0], self.expected[label][:16]])
        for entry in self.library.remove(address):
            del self.expected[entry.label]

    def route(self) -> None:
        """Prompts of all kinds, the empty one too."""
        prompts = self.prompts()
        names = {*self.library.index.newest, "target"}
        assert all(actual.name in names for actual in self.library.route(prompts))

    def answer(self) -> None:
        """A batch whose rows use different packs, under a limit that holds two of them."""
        route = self.random.choice(["auto", "target", *self.expected])
        answers = self.library.generate(self.prompts(), route=route, max_new_tokens=3)
        assert all(answer.note is None for answer in answers if answer.prompt)

    def attach(self) -> None:
        """A pack on another live model, with or without an exception."""
        pack = SkillPack.load(self.random.choice(list(self.files.values())))
        mode: Any = self.random.choice(["merged", "side"])
        with suppress(ZeroDivisionError), attached(self.model, pack, mode=mode):
            self.model(input_ids=torch.tensor([[5, 6, 7]]))
            if self.random.random() < 0.3:
                raise ZeroDivisionError
        assert live_digest(self.model) == self.before

    def reopen(self) -> None:
        """Forget everything that is in memory."""
        pack = next(iter(self.files.values())).stat().st_size
        self.library = Library.open(self.place, memory=self.random.choice([None, 3 * pack]))

    # What goes wrong.

    def fill_the_disk(self) -> None:
        """An addition or a removal whose disk is full at one of its steps."""
        operations = self.operations("a")
        with refusing(self.random.randrange(STEPS), disk_full), suppress(OutputError):
            apply(self.library, operations)
        self.settle(operations)

    def kill_a_process(self) -> None:
        """A process that dies at one of its steps."""
        operations = self.operations("a")
        arguments = (self.place, operations, self.random.randrange(STEPS))
        process = self.context.Process(target=change_and_die, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        self.settle(operations)

    def share_the_folder(self) -> None:
        """Another process and this one change the folder at the same time."""
        theirs = self.operations("b")
        taken = {file for kind, _, file in theirs if kind == "add"}
        process = self.context.Process(target=change_and_die, args=(self.place, theirs, None))
        process.start()
        mine = [one for one in self.operations("a") if one[2] not in taken]
        apply(self.library, mine)
        process.join(60)
        assert process.exitcode == 0
        for operations in (theirs, mine):
            self.note(operations)

    def damage_a_pack(self) -> None:
        """A file with other bytes is refused, and serves again when it is put back."""
        if not self.expected:
            return
        label = self.random.choice(sorted(self.expected))
        file = self.place / self.library.index.find(label).file
        content = file.read_bytes()
        file.write_bytes(content[: self.random.randrange(len(content))] + b"x")
        fresh = Library.open(self.place)
        try:
            fresh.load(label)
        except GraftError:
            file.write_bytes(content)
        fresh.load(label)

    def damage_the_list(self) -> None:
        """A damaged list stops every change and loses nothing."""
        file = self.place / "library.toml"
        content = file.read_bytes()
        file.write_bytes(content[: self.random.randrange(len(content))] + b"\n[[[")
        for change in (lambda: self.library.remove("a"), self.add_any):
            try:
                change()
            except LibraryError:
                continue
            raise AssertionError("a damaged list was taken for whole")
        file.write_bytes(content)

    def raise_in_a_pass(self) -> None:
        """An exception in the middle of a forward pass."""
        modules = [
            module for module in self.library.live.model.modules() if not list(module.children())
        ]
        handle = self.random.choice(modules).register_forward_hook(divide_by_zero)
        try:
            # Routing tries the model first, and says that it fails.
            with suppress(ZeroDivisionError, AttachError):
                self.library.generate(self.prompts(), max_new_tokens=2)
        finally:
            handle.remove()

    # What must hold.

    def check(self, everything: bool) -> None:
        """The library is what the list says."""
        actual = {entry.label: entry.digest for entry in self.library.packs()}
        assert actual == self.expected, f"{actual} instead of {self.expected}"
        if not everything:
            return
        for entry in self.library.packs():
            assert file_digest(self.place / entry.file) == entry.digest
        assert live_digest(self.library.live.model) == self.before
        assert {file.name: file_digest(file) for file in self.target.iterdir()} == self.on_disk
        gc.collect()
        self.memory.append(psutil.Process().memory_info().rss)
        self.objects.append(len(gc.get_objects()))

    def growth(self) -> dict[str, Any]:
        """Memory and objects at the first, the middle and the last look at them."""
        middle = len(self.memory) // 2
        return {
            "rss_bytes": [self.memory[0], self.memory[middle], self.memory[-1]],
            "objects": [self.objects[0], self.objects[middle], self.objects[-1]],
            "counts": dict(sorted(self.counts.items())),
        }

    def settle(self, operations: Ops) -> None:
        """After a change that may have failed: it happened or not, and nothing is left of it."""
        actual = {entry.label: entry.digest for entry in self.library.packs()}
        if actual != self.expected:
            self.note(operations)
        if not self.add():
            return
        listed = {Path(entry.file).name for entry in self.library.packs()}
        assert {file.name for file in (self.place / "packs").iterdir()} == listed
        assert {file.name for file in self.place.iterdir()} <= {*KEPT}

    def operations(self, prefix: str) -> Ops:
        """One change, to be made here or by another process."""
        own = [label for label in sorted(self.expected) if label.startswith(prefix)]
        if own and self.random.random() < 0.4:
            return [("remove", self.random.choice(own), "")]
        actual = self.absent()
        return (
            []
            if actual is None
            else [("add", f"{prefix}{self.random.randrange(4)}", str(actual[1]))]
        )

    def note(self, operations: Ops) -> None:
        """Take changes into the list of what is expected."""
        for kind, name, file in operations:
            if kind == "remove":
                del self.expected[name]
                continue
            versions = [
                int(label.split("@")[1]) for label in self.expected if label.split("@")[0] == name
            ]
            self.expected[f"{name}@{max(versions, default=0) + 1}"] = file_digest(Path(file))

    def absent(self) -> tuple[str, Path] | None:
        """A pack that is not in the library."""
        left = sorted(self.files.keys() - set(self.expected.values()))
        if not left:
            return None
        digest = self.random.choice(left)
        return digest, self.files[digest]

    def add_any(self) -> None:
        """An addition that must be refused."""
        self.library.add(next(iter(self.files.values())), "a9")

    def name(self) -> str:
        """One of few names, so that versions pile up."""
        return f"a{self.random.randrange(4)}"

    def prompts(self) -> list[str]:
        """One to four."""
        kinds = self.random.choices([*LETTERS, "~{}|"], k=self.random.randint(1, 4))
        texts = ["".join(self.random.choices(kind, k=8)) for kind in kinds]
        return texts if self.random.random() < 0.9 else [*texts, ""]


def apply(library: Library | PackFolder, operations: Ops) -> None:
    """Make changes."""
    for kind, name, file in operations:
        if kind == "remove":
            library.remove(name)
        elif isinstance(library, Library):
            library.add(Path(file), name, update=True)
        else:
            library.add(Path(file), name, True, True)


def change_and_die(place: Path, operations: Ops, step: int | None) -> None:
    """The work of another process, killed before a step of it where one is named."""
    if step is None:
        apply(PackFolder(place), operations)
        return
    with refusing(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        apply(PackFolder(place), operations)


@contextmanager
def refusing(step: int, act: Callable[[], None]) -> Iterator[None]:
    """In place of one thing that is asked of the disk, `act`."""
    left, real = [step], {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}

    def instead(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            return act() if left[0] == -1 else real[name](*arguments, **options)

        return call

    for name in real:
        setattr(os, name, instead(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def disk_full() -> None:
    """What a full disk says."""
    raise OSError(errno.ENOSPC, "No space left on device")


def divide_by_zero(*_: Any) -> None:
    """A forward hook that fails."""
    raise ZeroDivisionError


def live_digest(model: Any) -> str:
    """One digest over the bytes of all parameters of a live model."""
    return fingerprint(
        (name, str(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor))
        for name, tensor in model.named_parameters()
    )


def stress(operations: int, seed: int) -> dict[str, Any]:
    """Everything in a temporary folder; the counts. Raises: AssertionError."""
    with TemporaryDirectory(prefix="graftkit-") as folder:
        target, files = make_world(Path(folder))
        started = time.perf_counter()
        result = Stress(target, files, Path(folder) / "library", seed).run(operations)
        return result | {"seed": seed, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = stress(options.operations, options.seed) | {"machine": machine(), "commit": commit()}
    print(json.dumps(record, indent=1))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
