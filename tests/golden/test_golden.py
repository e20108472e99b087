"""Version 1 files still open and decode to the same tensors; these files are never made anew."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftkit.compress.codecs import matrices
from graftkit.delta import Checkpoint, fingerprint, tensor_digest
from graftkit.skillpack import SkillPack

FOLDER = Path(__file__).parent / "tiny-v1"
TARGET = Checkpoint.open(FOLDER / "target")
PACK = SkillPack.load(FOLDER / "tiny.skillpack")
TUNED = load_file(FOLDER / "tuned.safetensors")
RECORDS = {record.name: record for record in PACK.manifest.tensors}


def before(record):
    if record.target_name is None:
        return torch.zeros(record.shape, dtype=TUNED[record.name].dtype)
    return TARGET.read(record.target_name)


def assert_same(record, found, expected):
    """Bit for bit, but for factors: the order of a product's sums is the machine's affair."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if record.codec == "lowrank":
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_version_1_files_still_open_and_decode_to_the_same_tensors(name):
    record = RECORDS[name]
    assert_same(record, PACK.decode(name, before(record)), TUNED[name])


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_the_delta_is_the_decoded_tensor_less_the_target(name):
    record = RECORDS[name]
    weight, tuned = before(record).to(TUNED[name].dtype).float(), TUNED[name].float()
    rows = min(weight.shape[0], tuned.shape[0])
    expected = tuned.clone()
    expected[:rows] -= weight[:rows]
    found = PACK.delta(name, before(record))
    bound = 2.0**-8 if TUNED[name].dtype == torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * float(tuned.abs().max()))


def test_factors_multiply_to_the_delta_in_out_by_in_orientation():
    found = {name: PACK.factors(name) for name in RECORDS}
    found = {name: factors for name, factors in found.items() if factors}
    assert sorted(found) == ["h.0.attn.q.weight", "h.0.mlp.weight"]
    for name, (left, right) in found.items():
        [delta] = matrices(PACK.delta(name, before(RECORDS[name])), RECORDS[name].layout)
        torch.testing.assert_close(left @ right, delta)


def test_version_1_side_files_still_come_back():
    files = {name: content.decode() for name, content in PACK.side_files(TARGET).items()}
    assert files == json.loads((FOLDER / "files.json").read_text(encoding="utf-8"))


def test_the_golden_pack_knows_its_target():
    PACK.check_target(TARGET.read, set(TARGET.tensors), "target")
    entries = [
        (t.name, t.dtype, t.shape, tensor_digest(TARGET.read(t.name)))
        for t in TARGET.tensors.values()
    ]
    assert fingerprint(entries) == PACK.manifest.target.fingerprint


def test_the_golden_pack_has_every_codec_every_layout_and_both_kinds_of_resize():
    records = RECORDS.values()
    assert {r.codec for r in records} == {"zero", "exact", "sparse", "lowrank", "dense"}
    assert {r.layout for r in records} == {"matrix", "transposed", "stack", "stack_transposed"}
    grown = {r.name for r in records if r.appended_bytes}
    resized = {r.name for r in records if r.tuned_shape}
    assert (grown, resized) == ({"embed.weight"}, {"embed.weight", "vocabulary.bias"})
    assert {r.base for r in records} == {None, "", "embed.weight"}
    assert {PACK.describe(name).get("positions") for name in RECORDS} >= {"bitmap", "row lists"}
    files = PACK.manifest.files
    assert any(f.prefix and f.suffix for f in files)
    assert any(f.prefix + f.suffix == f.bytes for f in files)


def test_golden_files_are_small():
    assert all(path.stat().st_size < 20_000 for path in FOLDER.rglob("*"))


def test_golden_files_cannot_be_made_anew(capsys):
    tool = Path(__file__).parents[2] / "tools" / "write_golden.py"
    spec = importlib.util.spec_from_file_location("write_golden", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    content = (FOLDER / "tiny.skillpack").read_bytes()
    assert module.main() == 1
    assert "never made anew" in capsys.readouterr().err
    assert (FOLDER / "tiny.skillpack").read_bytes() == content


def test_safetensors_itself_opens_the_pack():
    with safe_open(FOLDER / "tiny.skillpack", framework="pt") as file:
        assert file.metadata()["format"] == "skillpack"
        assert set(file.keys()) == set(PACK.manifest.payload_order)
        for name in PACK.manifest.payload_order:
            if not name.startswith("file:"):
                assert file.get_tensor(name).numpy().tobytes() == bytes(PACK.payload(name))
