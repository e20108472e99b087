"""The guard of every output: it is checked, locked, made in a work folder and moved in place.

    OUTPUT                      the result, a file or a folder; there when it is whole
    OUTPUT.partial/             unfinished work (files.py) and the result while it is made
    .OUTPUT.graftkit-lock       held by the run that writes OUTPUT

The lock's text notes what the run is about to move in place. A killed run leaves it behind, so that
the same command recognises its own output, and several outputs appear together or not at all.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.errors import OutputError
from graftkit.files import Busy, Lock, WorkFolder, reporting_full_disk, writing

MARKER = ".graftkit"
"""The file that reserves a folder of results for one command; it holds the command's name."""

_OUTPUT_KINDS = (".skillpack", ".png")  # may be written into a folder that is read


class Claim:
    """The right to write one output; nobody else has it.

    Attributes:
        path: the output, behind any symbolic links. folder: whether it is a folder.
        job: a digest of all that decides the output. committed: whether the output is in place.
        work: the folder of unfinished work. result: where the block writes the output.
    """

    def __init__(self, path: Path, job: str, folder: bool, lock: Lock):
        self.path, self.job, self.folder = path, job, folder
        self.work = _work_of(path)
        self.result = self.work / "result"
        self._lock, self._work = lock, WorkFolder(self.work)
        self._note = _read_note(lock)
        self.committed = False

    @property
    def done(self) -> bool:
        """Whether a run of the same job was killed after it had put everything in place."""
        moves = self._note.get("moves", [])
        return self._note.get("job") == self.job and bool(moves) and all(map(_is_placed, moves))

    def open_work(self) -> Path:
        """The empty folder of unfinished work. Raises: OutputError."""
        self._work.open_empty()
        return self.work

    def commit(self, *others: "Claim") -> None:
        """Put the results of other claims, then this one, in place: all of them or none.

        Raises: OutputError.
        """
        claims = (*others, self)
        with writing(self.path):
            self._note = {"job": self.job, "moves": [claim._move() for claim in claims]}
            self._lock.write(json.dumps(self._note))
            try:
                for claim in claims:
                    _place(claim.result, claim.path)
                    claim.committed = True
            except OSError:
                for claim in others:
                    if claim.committed:
                        os.replace(claim.path, claim.result)
                        claim.committed = False
                raise

    def begin(self, force: bool) -> None:
        """Finish or undo what a killed run left, and check the output. Raises: OutputError."""
        self._work.is_there()
        self._recover()
        if not self.done:
            _refuse_existing(self.path, self.folder, force)

    def _recover(self) -> None:
        """Finish what a killed run had begun to move in place together with other outputs.

        Raises: OutputError where another run is writing one of them.
        """
        moves = self._note.get("moves", [])
        if len(moves) < 2:
            return
        if all(map(_can_be_placed, moves)):
            for move in moves:
                path = Path(move["to"])
                if path == self.path:
                    _place_noted(move)
                    continue
                with locked(path) as lock:
                    _place_noted(move)
                    WorkFolder(_work_of(path)).remove()
                    with suppress(OSError):
                        lock.path.unlink()
        else:
            self._note = {}
        self._work.remove()

    def finish(self) -> None:
        """Remove the work and the lock: the output is in place."""
        self._work.remove()
        self._lock.remove()

    def abandon(self, keep_work: bool) -> None:
        """Remove the unfinished output; the note of an output that a killed run finished stays."""
        if keep_work:
            self._work.close()
        else:
            self._work.remove()
        moves = self._note.get("moves", [])
        if moves and all(map(_is_placed, moves)) and not self.committed:
            self._lock.release()
        else:
            self._lock.remove()

    def _move(self) -> dict[str, Any]:
        before, identity = _identity(self.path), _identity(self.result)
        return {"to": str(self.path), "before": before, "identity": identity}


@contextmanager
def claimed(
    output: str | Path,
    job: Sequence[Any],
    *,
    folder: bool = False,
    inputs: Sequence[str | Path] = (),
    force: bool = False,
    resumable: bool = False,
) -> Iterator[Claim]:
    """The right to write `output`, which the block makes as `claim.result`.

    Where the block ends well the result is put in place; otherwise nothing stays behind.

    Args:
        job: the command, and all that decides what it writes.
        folder: whether the output is a folder; it may be there if it is empty.
        inputs: paths that the command reads, which must not be overwritten; Hub ids are ignored.
        force: whether a file that is there may be replaced.
        resumable: whether unfinished work stays when the block is interrupted.
    Raises: OutputError.
    """
    path, made = _destination(Path(output), folder)
    try:
        if not folder:  # a folder that is read is no empty one
            check_inputs(path, inputs)
        with locked(path, keep=True) as lock:
            claim = Claim(path, _digest(job), folder, lock)
            begun = False
            try:
                claim.begin(force)
                begun = True
                with reporting_full_disk(path):
                    yield claim
                if not claim.committed and os.path.lexists(claim.result):
                    claim.commit()
            except BaseException:
                claim.abandon(keep_work=resumable or not begun)
                raise
            claim.finish()
    finally:
        for parent in made:  # those that hold nothing but what did not come
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def own_folder(
    folder: str | Path, command: str, inputs: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """A folder of results that one command may fill again and again, one run at a time.

    A new or empty folder is reserved for the command by a marker file, which stays.
    Raises: OutputError for a folder that holds anything else; where an input lies in it; where
        another run is at work.
    """
    given = Path(folder)
    with writing(given):
        path = given.resolve()
        text = f"graftkit {command}\n"
        _check_own(path, given, text)
        check_inputs(path, inputs)
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock.take(path / MARKER)
        except Busy as error:
            raise OutputError(
                f"{given}: another run is at work here; wait for it, or choose another folder"
            ) from error
        try:
            if lock.read() != text:
                lock.write(text)
        except OSError:
            lock.remove()
            raise
    try:
        with reporting_full_disk(given):
            yield path
    finally:
        lock.release()


@contextmanager
def locked(path: Path, keep: bool = False) -> Iterator[Lock]:
    """The lock of an output. keep: the block removes or releases it.

    Raises: OutputError where another run writes it.
    """
    with writing(path):
        try:
            lock = Lock.take(_lock_of(path))
        except Busy as error:
            raise OutputError(
                f"{path}: another run is writing it; wait for that run, or choose another output"
            ) from error
    try:
        yield lock
    finally:
        if not keep:
            lock.release()


def check_inputs(output: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse an output that is an input, holds one, or is a file of an input folder.

    Args:
        output: a path without symbolic links.
    Raises: OutputError.
    """
    for given in inputs:
        with suppress(OSError):
            source = Path(given).resolve()
            same = source == output or (
                source.exists() and output.exists() and source.samefile(output)
            )
            part = source.is_dir() and output.is_file() and source in output.parents
            if (
                same
                or (source.exists() and output in source.parents)
                or (part and output.suffix not in _OUTPUT_KINDS)
            ):
                raise OutputError(
                    f"{output}: {given} is read by this command and would be written over; choose "
                    "another output"
                )


def check_output(
    output: str | Path,
    *,
    folder: bool = False,
    inputs: Sequence[str | Path] = (),
    force: bool = False,
) -> None:
    """Refuse early, before long work, what `claimed` would refuse then. Raises: OutputError."""
    path = _resolved(Path(output)) if folder else _destination(Path(output), False)[0]
    if not folder:
        check_inputs(path, inputs)
    with writing(path):
        if not _lock_of(path).exists():  # else a killed run may have made what is there
            _refuse_existing(path, folder, force)


def _resolved(output: Path) -> Path:
    try:
        return output.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"{output}: no place to write to ({error}); choose another") from error


def _destination(output: Path, folder: bool) -> tuple[Path, list[Path]]:
    """The place that a path stands for, and the parents that were made for it, innermost first."""
    path = _resolved(output)
    made: list[Path] = []
    with writing(output):
        if not folder:
            if path.is_dir():
                raise OutputError(f"{output}: is a folder; name the file to write")
            if not path.parent.is_dir():
                raise OutputError(
                    f"{output}: cannot be written, there is no folder {output.parent}; make it "
                    "first"
                )
            return path, made
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
    return path, made


def _refuse_existing(path: Path, folder: bool, force: bool) -> None:
    """Raises: OutputError where an output is there and not for us to replace."""
    if not os.path.lexists(path):
        return
    if folder:
        if not path.is_dir() or os.listdir(path):
            raise OutputError(f"{path}: exists and is not an empty folder; choose another name")
    elif not path.is_file():
        raise OutputError(f"{path}: is no file; name the file to write")
    elif not force:
        raise OutputError(f"{path}: exists; choose another name, or replace it with --force")


def _check_own(path: Path, given: Path, text: str) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError(f"{given}: cannot be made, a file is there; choose another folder")
    marker = path / MARKER
    owner = marker.read_bytes() if marker.is_file() and not marker.is_symlink() else None
    if owner == text.encode() or not set(os.listdir(path)) - ({MARKER} if owner == b"" else set()):
        return
    if owner is not None and owner.startswith(b"graftkit "):
        command = owner.decode(errors="replace").strip()
        raise OutputError(f"{given}: made by `{command}`; name a new or an empty folder")
    raise OutputError(
        f"{given}: holds files that are not of this command; name a new or an empty folder"
    )


def _read_note(lock: Lock) -> dict[str, Any]:
    """The note that a killed run left in the lock; empty where it is damaged."""
    try:
        note = json.loads(lock.read() or "{}")
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _digest(job: Sequence[Any]) -> str:
    return blake3(json.dumps(list(job), default=str, sort_keys=True).encode()).hexdigest()


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.graftkit-lock")


def _work_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _place(result: Path, path: Path) -> None:
    """Rename a result to its place. A folder that is replaced was made by the same job."""
    if result.is_dir() and path.is_dir() and os.listdir(path):
        os.rename(path, result.with_name("replaced"))
    os.replace(result, path)


def _place_noted(move: dict[str, Any]) -> None:
    path = Path(move["to"])
    result = _work_of(path) / "result"
    if _identity(result) == move["identity"]:
        _place(result, path)


def _is_placed(move: dict[str, Any]) -> bool:
    return bool(_identity(Path(move["to"])) == move["identity"])


def _can_be_placed(move: dict[str, Any]) -> bool:
    """Whether an output was put in place, or is made and nothing else came there since."""
    path = Path(move["to"])
    if _identity(_work_of(path) / "result") == move["identity"]:
        return bool(_identity(path) == move["before"])
    return os.path.lexists(path)


def _identity(path: Path) -> list[Any] | None:
    """Identity of a file, or of a folder by its files; None where there is nothing."""
    try:
        if path.is_dir():
            return [[entry.name, _identity(Path(entry.path))] for entry in _sorted(path)]
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _sorted(path: Path) -> list["os.DirEntry[str]"]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)
