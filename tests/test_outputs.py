"""What commands write: never over what is somebody else's, never half, never two at once."""

import errno
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import commands
import pytest
import torch
from killing import CHANGES, Forked, killed_at, restore, signal_at, states_at_changes, tree
from safetensors.torch import save_file
from tiny_models import perturb, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from graftkit.checkpoint import save_tensors
from graftkit.errors import GraftError, OutputError
from graftkit.files import WorkFolder, replaced_file
from graftkit.fuse import merge_packs
from graftkit.fuse.merge import fuse_packs
from graftkit.fuse.sequential import fuse_in_turn, merge_in_turn
from graftkit.outputs import claimed, own_folder
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack

SOME = (1, 13, 55)
"""Changes of files at which the quick tests kill; the slow ones look at all of them."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """target, tuned-1, tuned-2 and their lossless packs 1.skillpack and 2.skillpack."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    # Matrices of at least 4,096 weights, so that they are not all stored exactly; of at most 16 KB,
    # which are hashed on one thread: a process that is forked has none of the others.
    # A few such matrices are enough: a pack of every state that a kill leaves is made again.
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, **sizes)).bfloat16()
    model.save_pretrained(folder / "target")
    save_tokenizer(folder / "target")
    for seed in (1, 2):
        perturb(model, seed=seed, scale=0.02)
        model.save_pretrained(folder / f"tuned-{seed}")
        save_tokenizer(folder / f"tuned-{seed}")
        pack = pack_delta(folder / "target", folder / f"tuned-{seed}", recipe="lossless", workers=1)
        pack.save(folder / f"{seed}.skillpack")
    return folder


def pack(models: Path, output: Path, tuned: int = 1, *options: object) -> int:
    return commands.run(
        *("pack", models / "target", models / f"tuned-{tuned}", "-o", output),
        *("--recipe", "lossless", "--workers", 1, *options),
    )


COMMANDS: dict[str, Callable[[Path, Path], tuple]] = {
    "pack": lambda m, o: ("pack", m / "target", m / "tuned-1", "-o", o, "--recipe", "lossless"),
    "fuse": lambda m, o: (
        *("fuse", m / "target", m / "1.skillpack", m / "2.skillpack", "-o", o),
        *("--recipe", "lossless"),
    ),
    "interference": lambda m, o: (
        *("interference", m / "target", m / "1.skillpack", m / "2.skillpack", "--figure", o),
    ),
    "merge": lambda m, o: ("merge", m / "target", m / "1.skillpack", "-o", o),
    "export": lambda m, o: (
        *("export", m / "1.skillpack", "--target", m / "target", "-o", o, "--rank", 4),
    ),
}
FILES = ("pack", "fuse", "interference")
FOLDERS = ("merge", "export")


@pytest.fixture
def line(capsys):
    """Run a command that is refused; its one line."""

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert commands.run(*arguments) == 1
        message = capsys.readouterr().err
        assert message.startswith("graftkit: ")
        assert message.count("\n") == 1
        return message

    return refused


# Whose files


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_is_replaced_with_force_only(name, models, tmp_path, line):
    output = tmp_path / "out"
    output.write_text("mine")
    arguments = COMMANDS[name](models, output)
    assert "exists; choose another name, or replace it with --force" in line(*arguments)
    assert tree(tmp_path) == {"out": b"mine"}
    assert commands.run(*arguments, "--force") == 0
    assert output.read_bytes() != b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_holds_something_is_refused(name, models, tmp_path, line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert "is not an empty folder" in line(*COMMANDS[name](models, tmp_path / "out"))
    assert tree(tmp_path) == {"out/mine.txt": b"mine"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_under_the_name_of_unfinished_work_stays(name, models, tmp_path, line):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("mine")
    for other in (".out.writing", ".out.1.tmp", ".out.tmp"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    assert "not made by graftkit" in line(*COMMANDS[name](models, tmp_path / "out"))
    assert tree(tmp_path) == before


def test_a_work_folder_of_the_users_is_never_cleared(models, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not made by graftkit"):
        pack_delta(models / "target", models / "tuned-1", work_dir=tmp_path / "work")
    assert tree(tmp_path) == {"work/thesis.txt": b"mine"}


@pytest.mark.parametrize("how", ["itself", "relative", "link", "hard link"])
def test_an_input_is_no_output(how, models, tmp_path, monkeypatch, line):
    mine = tmp_path / "mine.skillpack"
    mine.write_bytes((models / "1.skillpack").read_bytes())
    named = {"relative": Path("mine.skillpack")}.get(how, mine)
    monkeypatch.chdir(tmp_path)
    if "link" in how:
        named = tmp_path / "other.skillpack"
        (named.symlink_to if how == "link" else named.hardlink_to)(mine)
    before = tree(tmp_path)
    message = line("fuse", models / "target", mine, "-o", named, "--recipe", "lossless", "--force")
    assert "is read by this command" in message
    assert tree(tmp_path) == before


def test_weights_of_an_input_folder_are_no_output_even_with_force(models, tmp_path, line):
    weights = models / "target/model.safetensors"
    before = weights.read_bytes()
    arguments = COMMANDS["pack"](models, weights)
    assert "is read by this command" in line(*arguments, "--force")
    assert weights.read_bytes() == before


@pytest.mark.parametrize("name", ["pack", "merge"])
def test_a_symbolic_link_is_followed(name, models, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there/out")
    assert commands.run(*COMMANDS[name](models, link)) == 0
    assert link.is_symlink()
    assert (tmp_path / "there/out").exists()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_results_may_be_read_by_whom_other_new_files_may(name, models, tmp_path):
    before = os.umask(0o027)
    try:
        assert commands.run(*COMMANDS[name](models, tmp_path / "out")) == 0
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        expected = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_the_state_of_a_running_merge_may_be_read_alike(models, tmp_path):
    merge_in_turn(
        models / "target", [models / "1.skillpack"], tmp_path / "m", "opcm", tmp_path / "s"
    )
    made = tmp_path / "other"
    made.touch()
    assert (tmp_path / "s").stat().st_mode == made.stat().st_mode


@pytest.mark.parametrize("place", ["absent/out", "n" * 250])
@pytest.mark.parametrize("name", FILES)
def test_a_place_that_cannot_be_is_told_in_one_line(name, place, models, tmp_path, line):
    line(*COMMANDS[name](models, tmp_path / place))
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_in_a_folder_of_the_target_is_not_carried_over(models, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(models / "target", target)
    merge_packs(target, models / "1.skillpack", target / "merged")
    assert {path.name for path in (target / "merged").iterdir()} == {
        path.name for path in (models / "target").iterdir()
    }


def test_folders_made_for_an_output_go_with_it(models, tmp_path):
    with pytest.raises(GraftError):
        merge_packs(models / "target", models / "tuned-1/config.json", tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["/dev/null", "fifo"])
def test_what_is_no_file_is_not_replaced(what, models, tmp_path, line):
    place = Path(what)
    if what == "fifo":
        place = tmp_path / "fifo"
        os.mkfifo(place)
    assert "is no file" in line(*COMMANDS["pack"](models, place), "--force")
    assert place.exists()


# A disk that is full


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(name, models, tmp_path, monkeypatch, line):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in line(*COMMANDS[name](models, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_between_result_and_state_leaves_neither(models, tmp_path, monkeypatch):
    real = os.replace

    def full(old: object, new: object) -> None:
        if str(new) == str(tmp_path / "s"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(old, new)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        merge_in_turn(
            models / "target", [models / "1.skillpack"], tmp_path / "m", "opcm", tmp_path / "s"
        )
    assert list(tmp_path.iterdir()) == []


# Two at once


@pytest.mark.slow
def test_a_second_run_is_refused_for_the_first_and_a_dead_one_blocks_nobody(models, tmp_path, line):
    output = tmp_path / "out"
    first = Forked(lambda: pack(models, output), signal_at(tmp_path, 6, signal.SIGSTOP))
    assert first.stopped()
    assert "another run is writing it" in line(*COMMANDS["pack"](models, output))
    for name in ("fuse", "merge"):
        assert "another run" in line(*COMMANDS[name](models, output))
    os.kill(first.pid, signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    assert pack(models, output) == 0
    assert output.read_bytes() == (models / "1.skillpack").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_states_at_once_are_refused(models, tmp_path):
    def merge(name: str) -> None:
        packs = [models / "1.skillpack"]
        merge_in_turn(models / "target", packs, tmp_path / name, "opcm", tmp_path / "state")

    with (
        claimed(tmp_path / "state", ["test"]),
        pytest.raises(OutputError, match="another run is writing it"),
    ):
        merge("m")
    assert list(tmp_path.iterdir()) == []
    merge("m")


def test_one_work_folder_serves_one_job_at_a_time(tmp_path):
    first, second = WorkFolder(tmp_path / "work"), WorkFolder(tmp_path / "work")
    assert not first.open("a")
    first.write("step", b"of a")
    with pytest.raises(OutputError, match="another run is at work here"):
        second.open("b")
    first.close()
    assert not second.open("b")
    assert second.read("step") is None


def test_work_that_does_not_go_on_begins_empty(tmp_path):
    for _ in range(2):
        work = WorkFolder(tmp_path / "work")
        work.open_empty()
        assert [path.name for path in (tmp_path / "work").iterdir()] == ["graftkit-job"]
        work.write("step", b"")
        work.close()
    work.remove()
    assert not (tmp_path / "work").exists()


def test_a_folder_of_results_belongs_to_one_command(tmp_path):
    with own_folder(tmp_path / "out", "distill") as folder:
        (folder / "result").write_text("")
        with (
            pytest.raises(OutputError, match="another run is at work here"),
            own_folder(tmp_path / "out", "distill"),
        ):
            pass
    with own_folder(tmp_path / "out", "distill"):
        pass
    with pytest.raises(OutputError, match="made by `graftkit distill`"), own_folder(folder, "demo"):
        pass
    with (
        pytest.raises(OutputError, match="is read by this command"),
        own_folder(folder, "distill", [folder / "result"]),
    ):
        pass


# Killed


def check_again(work: Callable[[Path], int | None], folder: Path, expected, where: str) -> None:
    """The same run again, after one that was killed in this folder, ends as if undisturbed."""
    assert not work(folder), f"{where}: the same again is refused"
    actual = tree(folder)
    assert actual.keys() == expected.keys(), where
    assert actual == expected, where
    assert not [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]


def killed_at_every_change(
    work: Callable[[Path], int | None], tmp_path: Path, changes: Sequence[str] = CHANGES
) -> Iterator[tuple[int, Path]]:
    """What a kill leaves, for every change: the number of the change, and the folder.

    Until results are put in their places it is a copy: one run makes all of them. From then on the
    note in the lock tells files by their inodes, which a copy lacks, and the run is killed.
    """
    folder = tmp_path / "killed"
    folder.mkdir()
    for state in states_at_changes(folder, lambda: work(folder), tmp_path / "states", changes):
        count = int(state.name)
        if any(lock.stat().st_size for lock in state.rglob(".*.graftkit-lock")):
            shutil.rmtree(folder)
            folder.mkdir()
            status = killed_at(folder, count, lambda: work(folder), changes)
            assert status == -signal.SIGKILL
        else:
            restore(state, folder)
        yield count, folder


def undisturbed(work: Callable[[Path], int | None], tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "undisturbed").mkdir()
    assert not work(tmp_path / "undisturbed")
    return tree(tmp_path / "undisturbed")


def lossy(models: Path) -> Callable[[Path], int]:
    """A pack with steps of many kinds."""
    return lambda folder: commands.run(
        *("pack", models / "target", models / "tuned-1", "-o", folder / "o.skillpack"),
        *("--budget", "60%", "--workers", 1),
    )


def merged(models: Path) -> Callable[[Path], int]:
    return lambda folder: commands.run(*COMMANDS["merge"](models, folder / "m"))


def fused(models: Path) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        packs = [models / "1.skillpack", models / "2.skillpack"]
        fuse_packs(models / "target", packs, folder / "f.skillpack", recipe="lossless", workers=1)

    return work


def in_turn(models: Path) -> Callable[[Path], None]:
    """The first of two merges with a state."""

    def work(folder: Path) -> None:
        packs = [models / "1.skillpack"]
        merge_in_turn(models / "target", packs, folder / "m", "opcm", folder / "state")

    return work


def fused_in_turn(models: Path) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        packs = [models / "1.skillpack"]
        state, file = folder / "state", folder / "f.skillpack"
        fuse_in_turn(models / "target", packs, file, "opcm", state, recipe="lossless", workers=1)

    return work


KILLED = {
    "pack": lossy,
    "merge": merged,
    "fuse": fused,
    "merge with a state": in_turn,
    "fuse with a state": fused_in_turn,
}


@pytest.mark.parametrize("name", ["pack", "merge", "merge with a state"])
def test_a_killed_run_is_run_again_as_if_nothing_had_been(name, models, tmp_path):
    work = KILLED[name](models)
    expected, killed = undisturbed(work, tmp_path), 0
    for count in SOME:
        folder = tmp_path / str(count)
        folder.mkdir()
        status = killed_at(folder, count, lambda folder=folder: work(folder))
        if status != -signal.SIGKILL:
            break
        check_again(work, folder, expected, f"killed at change {count}")
        killed += 1
    assert killed >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_at_any_change_is_run_again_as_if_nothing_had_been(name, models, tmp_path):
    work, counts = KILLED[name](models), []
    expected = undisturbed(work, tmp_path)
    for count, folder in killed_at_every_change(work, tmp_path):
        check_again(work, folder, expected, f"killed at change {count}")
        counts.append(count)
    assert len(counts) > 10


def second(models: Path, folder: Path) -> None:
    packs = [models / "2.skillpack"]
    merge_in_turn(models / "target", packs, folder / "m2", "opcm", folder / "state")


def check_next_pack(models: Path, tmp_path: Path, changes: Sequence[str]) -> None:
    """The first merge is killed at every change of some kinds; then only the second is run."""
    work = in_turn(models)
    undisturbed(work, tmp_path)
    second(models, tmp_path / "undisturbed")
    (tmp_path / "alone").mkdir()
    second(models, tmp_path / "alone")
    expected = {True: tree(tmp_path / "undisturbed"), False: tree(tmp_path / "alone")}
    seen = set()
    for count, folder in killed_at_every_change(work, tmp_path, changes):
        second(models, folder)  # without the first again
        actual, both = tree(folder), (folder / "m").exists()
        seen.add(both)
        strays = actual.keys() - expected[both].keys()
        assert all(name.startswith(("m.partial/", ".m.graftkit-lock")) for name in strays)
        kept = {name: actual.get(name) for name in expected[both]}
        assert kept == expected[both], f"killed at change {count}"
    assert seen == {True, False}


@pytest.mark.slow
def test_killed_at_a_rename_result_and_state_are_both_there_for_the_next_pack(models, tmp_path):
    check_next_pack(models, tmp_path, ["os.rename"])


@pytest.mark.slow
def test_killed_at_any_change_result_and_state_are_both_there_or_neither(models, tmp_path):
    check_next_pack(models, tmp_path, CHANGES)


def test_what_dead_processes_left_of_a_file_goes_with_the_next_one(tmp_path):
    dead = Forked(lambda: 0)
    dead.end()
    for name in (f".a.{dead.pid}.tmp", f".a.{dead.pid}-7.tmp", f".a.{os.getppid()}.tmp"):
        (tmp_path / name).write_text("half")
    for name in (".a.tmp", ".ab.1.tmp", f".b.{dead.pid}.tmp", "a.tmp"):
        (tmp_path / name).write_text("mine")
    with replaced_file(tmp_path / "a") as partial:
        partial.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a", ".a.tmp", ".ab.1.tmp", f".b.{dead.pid}.tmp", "a.tmp", f".a.{os.getppid()}.tmp"]
    )


def test_a_library_removes_its_own_unfinished_files_only(models, tmp_path):
    library = tmp_path / "library"
    assert commands.run("library", "init", library, "--target", models / "target") == 0
    for name in (".notes.tmp", ".thesis.7.tmp", "packs/.mine.tmp", "packs/.mine.1.tmp"):
        (library / name).write_text("mine")
    (library / ".library.toml.77.tmp").write_text("half a list")
    (library / "packs/.math-1-0123456789ab.skillpack.77-8.tmp").write_text("half a pack")
    assert commands.run("library", "add", library, models / "1.skillpack", "--name", "math") == 0
    left = {str(path.relative_to(library)) for path in library.rglob(".*.tmp")}
    assert left == {".notes.tmp", ".thesis.7.tmp", "packs/.mine.tmp", "packs/.mine.1.tmp"}


def test_no_lock_is_laid_into_a_folder_that_becomes_no_library(models, tmp_path, line):
    (tmp_path / "mine.txt").write_text("mine")
    line("library", "init", tmp_path, "--target", models / "target")
    assert tree(tmp_path) == {"mine.txt": b"mine"}


def test_safetensors_files_are_as_readable_as_others(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "theirs", {"format": "pt"})
    save_tensors({"x": torch.zeros(2)}, tmp_path / "ours")
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_in_python_replaces_as_ever(models, tmp_path):
    file = tmp_path / "x.skillpack"
    for number in (1, 2):
        SkillPack.load(models / f"{number}.skillpack").save(file)
        assert file.read_bytes() == (models / f"{number}.skillpack").read_bytes()
