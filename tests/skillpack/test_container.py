import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from skillpack.forge import PACK, read_everything

from graftkit.errors import OutputError, PackMismatchError
from graftkit.skillpack import SkillPack

_SAVE = """
import resource, sys
from graftkit.errors import OutputError
from graftkit.skillpack import SkillPack

pack = SkillPack.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    pack.save(sys.argv[2])
except OutputError as error:
    print(error)
    sys.exit(7)
"""


def save_with_room_for(count, path):
    """Save the golden pack in a process that may not write more than `count` bytes."""
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2] / "src"))
    command = [sys.executable, "-c", _SAVE, str(PACK), str(path), str(count)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_saving_and_loading_gives_the_same_file(tmp_path):
    pack = SkillPack.load(PACK)
    path = tmp_path / "copy.skillpack"
    pack.save(path)
    again = SkillPack.load(path)
    assert again.manifest == pack.manifest
    assert [again.payload(r.name) for r in pack.manifest.tensors] == [
        pack.payload(r.name) for r in pack.manifest.tensors
    ]
    assert path.stat().st_size == pack.pack_bytes == again.pack_bytes
    again.save(path)  # onto the file that is mapped
    second = path.read_bytes()
    pack.save(path)
    assert path.read_bytes() == second == PACK.read_bytes()
    assert read_everything(path)[1] == read_everything(PACK)[1]


def test_a_saved_pack_is_padded_and_opens_with_safetensors_alone(tmp_path):
    path = tmp_path / "copy.skillpack"
    SkillPack.load(PACK).save(path)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, framework="np") as file:
        assert file.metadata()["version"] == "2"
        assert all(file.get_tensor(name).dtype == "uint8" for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("existing", [b"an older pack", None])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, existing):
    path = tmp_path / "skill.skillpack"
    if existing is not None:
        path.write_bytes(existing)
    done = save_with_room_for(7000, path)
    assert (done.returncode, done.stderr) == (7, "")
    assert "cannot be written (File too large); free some space" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if existing else [])
    assert existing is None or path.read_bytes() == existing


def test_an_interrupted_save_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "skill.skillpack"
    path.write_bytes(b"an older pack")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        SkillPack.load(PACK).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"an older pack"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OutputError, match="nowhere"):
        SkillPack.load(PACK).save(tmp_path / "nowhere" / "skill.skillpack")


def test_a_tensor_that_the_pack_does_not_know_is_named():
    with pytest.raises(PackMismatchError, match=r"no tensor a\.b"):
        SkillPack.load(PACK).record("a.b")
    assert SkillPack.load(PACK).payload("a.b") == b""


def test_names_of_tensors_never_stand_in_the_header():
    with safe_open(PACK, framework="np") as file:
        names = sorted(file.keys())
        tensors = file.get_tensor("tensors").tobytes()
    pack = SkillPack.load(PACK)
    assert names == ["file:chat_template.jinja", "file:config.json", "tensors"]
    assert tensors == b"".join(bytes(pack.payload(r.name)) for r in pack.manifest.tensors)


def test_a_pack_of_nothing_but_unchanged_tensors_has_no_payload_and_opens(tmp_path):
    pack = SkillPack.load(PACK)
    zero = [record for record in pack.manifest.tensors if record.name == "h.1.norm.weight"]
    target = pack.manifest.target.model_copy(update={"parameters": 16})
    changes = {"tensors": tuple(zero), "files": (), "payload_blake3": None, "target": target}
    empty = SkillPack(pack.manifest.model_copy(update=changes), {})
    empty.save(tmp_path / "empty.skillpack")
    assert SkillPack.load(tmp_path / "empty.skillpack").manifest == empty.manifest
