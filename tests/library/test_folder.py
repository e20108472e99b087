import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from blake3 import blake3

from graftkit.errors import ConfigError, LibraryError, OutputError
from graftkit.library import folder as folders
from graftkit.library.folder import LibraryTarget, PackFolder
from graftkit.library.folder import file_of as place_of

TARGET = LibraryTarget(reference="base", fingerprint="0" * 64, config_blake3="1" * 64)


@pytest.fixture
def folder(tmp_path) -> PackFolder:
    return PackFolder.create(tmp_path / "library", TARGET)


def file_of(folder: PackFolder, content: str) -> Path:
    """A file to add; a folder of packs does not look into them."""
    file = folder.path.parent / f"{blake3(content.encode()).hexdigest()[:8]}.skillpack"
    file.write_text(content)
    return file


def add(folder: PackFolder, name: str, content: str | None = None, update: bool = False):
    return folder.add(file_of(folder, content or name), name, True, update)


def contents(folder: PackFolder) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        str(file.relative_to(folder.path)): file.read_bytes()
        for file in folder.path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_a_pack_is_copied_byte_for_byte_and_listed(folder):
    entry = add(folder, "math", "some bytes")
    assert (folder.path / entry.file).read_bytes() == b"some bytes"
    assert entry.digest == blake3(b"some bytes").hexdigest()
    assert entry.file == f"packs/math-1-{entry.digest[:12]}.skillpack"
    assert entry.bytes == 10
    assert PackFolder(folder.path).read().pack == (entry,)


def test_an_update_is_the_next_version_and_the_old_one_stays(folder):
    old, new = add(folder, "math", "old"), add(folder, "math", "new", update=True)
    assert (old.version, new.version) == (1, 2)
    assert (folder.path / old.file).read_bytes() == b"old"


def test_a_taken_name_and_a_known_file_are_refused_and_nothing_changes(folder):
    add(folder, "math")
    before = contents(folder)
    with pytest.raises(ConfigError, match="--update"):
        add(folder, "math", "other")
    with pytest.raises(LibraryError, match="this very pack is here already, as math@1"):
        add(folder, "law", "math")
    assert contents(folder) == before


def test_removing_a_name_removes_all_its_versions_and_nothing_else(folder):
    add(folder, "law")
    before = contents(folder)
    add(folder, "math", "1")
    add(folder, "math", "2", update=True)
    gone = folder.remove("math")
    assert [entry.version for entry in gone] == [1, 2]
    assert contents(folder) == before


def test_removing_one_version_leaves_the_others(folder):
    first = add(folder, "math", "1")
    add(folder, "math", "2", update=True)
    folder.remove("math@2")
    assert folder.read().pack == (first,)
    assert add(folder, "math", "3", update=True).version == 2


def test_a_removed_pack_takes_the_classifier_along(folder):
    add(folder, "math")
    (folder.path / "classifier.safetensors").write_text("trained on math")
    folder.remove("math")
    assert not (folder.path / "classifier.safetensors").exists()


def test_a_library_is_made_in_an_empty_folder_only(folder, tmp_path):
    with pytest.raises(LibraryError, match="a library already"):
        PackFolder.create(folder.path, TARGET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(LibraryError, match="holds other files"):
        PackFolder.create(tmp_path / "mine", TARGET)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be changed"):
        PackFolder.create(tmp_path / "file", TARGET)


def test_a_library_whose_making_was_interrupted_is_made_again(folder, tmp_path):
    (folder.path / "library.toml").rename(folder.path / ".library.toml.77.tmp")
    assert PackFolder.create(folder.path, TARGET).read().pack == ()


def test_a_folder_without_a_list_is_no_library(tmp_path):
    with pytest.raises(LibraryError, match=r"no library here .*graftkit library init"):
        PackFolder(tmp_path).read()
    (tmp_path / "library.toml").mkdir()
    with pytest.raises(LibraryError, match="cannot be read"):
        PackFolder(tmp_path).read()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/library.toml").write_bytes(b"format = 1 # \xff")
    with pytest.raises(LibraryError, match="byte 14 is not UTF-8"):
        PackFolder(tmp_path / "other").read()


def test_a_missing_file_and_another_file_are_told_apart(folder):
    missing, changed = add(folder, "missing"), add(folder, "changed")
    (folder.path / missing.file).unlink()
    (folder.path / changed.file).write_text("changes")
    with pytest.raises(LibraryError, match=r"listed in library\.toml but missing.*missing@1"):
        folder.load(missing)
    with pytest.raises(LibraryError, match=r"not the file that was added.*changed@1"):
        folder.load(changed)


def test_a_damaged_list_stops_every_change_and_deletes_nothing(folder):
    add(folder, "math")
    (folder.path / "library.toml").write_text("format = 1")
    before = contents(folder)
    for change in (lambda: add(folder, "law"), lambda: folder.remove("math")):
        with pytest.raises(LibraryError, match="target is missing"):
            change()
    assert contents(folder) == before


def test_a_hundred_packs_are_listed_by_reading_one_file(folder):
    one = add(folder, "skill")
    many = [
        one.model_copy(
            update={
                "name": f"skill{number}",
                "digest": f"{number:064x}",
                "file": place_of(f"skill{number}", 1, f"{number:064x}"),
            }
        )
        for number in range(100)
    ]
    (folder.path / "library.toml").write_text(
        folder.read().model_copy(update={"pack": tuple(many)}).to_toml()
    )
    opened: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple) -> None:
        if watching[0] and event == "open" and str(folder.path) in str(arguments[0]):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(watch)  # there is no way to take it off again
    index = PackFolder(folder.path).read()
    watching[0] = False
    assert len(index.newest) == 100
    assert opened == ["library.toml"]


def test_what_did_not_change_is_not_parsed_again(folder):
    first = folder.read()
    assert folder.read() is first
    add(PackFolder(folder.path), "math")
    assert [entry.name for entry in folder.read().pack] == ["math"]


# A disk that refuses, at each step of a change.


def _steps_of(monkeypatch, change) -> list[str]:
    """What a change asks of the disk, in order."""
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), sync(file)))
    monkeypatch.setattr(
        os, "replace", lambda old, new: (steps.append(Path(new).name[:8]), replace(old, new))
    )
    change()
    monkeypatch.undo()
    return steps


def _fail_at(monkeypatch, step: int, act) -> None:
    """Do `act` in place of the step of that number."""
    count = [0]
    for name in ("replace", "fsync"):
        real = getattr(os, name)

        def call(*args, real=real):
            count[0] += 1
            return act() if count[0] == step + 1 else real(*args)

        monkeypatch.setattr(os, name, call)


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


STEPS = 9
LISTED = 7  # the step that replaces library.toml


def test_adding_takes_the_steps_that_the_next_tests_interrupt(folder, monkeypatch):
    steps = _steps_of(monkeypatch, lambda: add(folder, "math"))
    announced, copied = (
        ["fsync", ".change", "fsync"],
        ["fsync", f"math-1-{folder.read().find('math').digest[0]}"],
    )
    listed = ["fsync", "fsync", "library.", "fsync"]
    assert steps == announced + copied + listed
    assert (len(steps), steps[LISTED]) == (STEPS, "library.")


@pytest.mark.parametrize("step", range(STEPS))
def test_a_full_disk_at_any_step_leaves_a_whole_library(folder, monkeypatch, step):
    add(folder, "law")
    before, law = contents(folder), folder.read().pack
    _fail_at(monkeypatch, step, _full)
    with pytest.raises(OutputError, match="No space left on device"):
        add(folder, "math")
    monkeypatch.undo()
    after = PackFolder(folder.path).read().pack
    if step <= LISTED:
        assert contents(folder) == before
        assert after == law
    else:
        assert [entry.name for entry in after] == ["law", "math"]
        assert (folder.path / after[1].file).read_text() == "math"


@pytest.mark.parametrize("step", range(STEPS))
def test_a_process_killed_at_any_step_loses_nothing_and_is_cleaned_up_after(
    folder, monkeypatch, step
):
    add(folder, "law")
    before = contents(folder)

    def killed() -> None:
        _fail_at(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        add(folder, "math")

    assert _in_a_process(killed) == -signal.SIGKILL
    folder = PackFolder(folder.path)
    for entry in folder.read().pack:
        assert (folder.path / entry.file).read_text() == entry.name
    if "math" not in folder.read().newest:
        add(folder, "math")
    folder.remove("math")
    assert contents(folder) == before


def test_a_killed_removal_is_finished_by_the_next_change(folder, monkeypatch):
    add(folder, "law")
    entry = add(folder, "math")
    real = Path.unlink

    def killed() -> None:
        def unlink(path, *args, **options):
            if path.name == Path(entry.file).name:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, *args, **options)

        monkeypatch.setattr(Path, "unlink", unlink)
        folder.remove("math")

    assert _in_a_process(killed) == -signal.SIGKILL
    assert list(PackFolder(folder.path).read().newest) == ["law"]
    assert (folder.path / entry.file).exists()
    add(folder, "art")
    assert not (folder.path / entry.file).exists()


def test_an_older_list_costs_no_pack(folder):
    add(folder, "law")
    older = (folder.path / "library.toml").read_text()
    math = add(folder, "math")
    (folder.path / "library.toml").write_text(older)
    (folder.path / "packs/notes.txt").write_text("mine")
    folder.remove("law")
    assert folder.read().pack == ()
    assert (folder.path / math.file).read_text() == "math"
    assert (folder.path / "packs/notes.txt").read_text() == "mine"


def test_nothing_but_packs_is_ever_deleted(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    names = [
        "../thesis.txt",
        "library.toml",
        "packs/../../thesis.txt",
        str(tmp_path / "thesis.txt"),
    ]
    (folder.path / ".change").write_text("\n".join(names))
    add(folder, "law")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert list(folder.read().newest) == ["law"]


def test_a_file_that_changes_while_it_is_copied_is_refused(folder, monkeypatch):
    before = contents(folder)
    real = folders.shutil.copyfile

    def copy(source, to):
        real(source, to)
        Path(to).write_text("another one")

    monkeypatch.setattr(folders.shutil, "copyfile", copy)
    with pytest.raises(LibraryError, match="changed while it was copied"):
        add(folder, "math")
    assert contents(folder) == before


# Several processes.


def _in_a_process(work) -> int:
    """Exit code of a function in a process of its own, negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(30)
    assert process.exitcode is not None
    return process.exitcode


def test_two_processes_that_add_at_once_both_succeed(folder):
    def work(who: str) -> None:
        own = PackFolder(folder.path)
        for number in range(10):
            add(own, f"{who}{number}")

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(who,)) for who in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    packs = folder.read().pack
    assert {entry.name for entry in packs} == {f"{who}{n}" for who in "ab" for n in range(10)}
    assert all((folder.path / entry.file).read_text() == entry.name for entry in packs)


@pytest.mark.slow
def test_a_reader_never_sees_a_half_made_change(folder):
    def work() -> None:
        for number in range(20):
            add(folder, "math", f"content {number}", update=number > 0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    seen = 0
    while process.is_alive():
        for entry in PackFolder(folder.path).read().pack:
            file = folder.path / entry.file
            assert blake3(file.read_bytes()).hexdigest() == entry.digest
            seen = max(seen, entry.version)
    process.join()
    assert process.exitcode == 0
    assert seen > 0


def test_a_change_waits_for_another_and_says_so_when_it_takes_too_long(folder, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.1)

    def hold() -> None:
        with PackFolder(folder.path)._locked():
            (folder.path.parent / "held").write_text("")
            time.sleep(30)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not (folder.path.parent / "held").exists():
        time.sleep(0.01)
    with pytest.raises(LibraryError, match="another process has been changing this library"):
        add(folder, "math")
    process.kill()
    process.join()
    assert add(folder, "math").version == 1  # a dead process leaves no lock behind


def test_a_copy_without_a_pack_is_a_library_that_never_had_it(folder, tmp_path):
    law, math = add(folder, "law"), add(folder, "math")
    copy = folder.copy_to(tmp_path / "copy", {math.digest})
    assert copy.read().pack == (law,)
    assert {file.name for file in (tmp_path / "copy/packs").iterdir()} == {Path(law.file).name}
    copy.remove("law")
    assert (folder.path / law.file).read_text() == "law"
