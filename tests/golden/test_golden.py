"""Files of every version still open and decode to the same tensors; they are never made anew."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from graftkit.checkpoint import Checkpoint
from graftkit.compress.codecs import matrices
from graftkit.skillpack import SkillPack

GOLDEN = Path(__file__).parent
VERSIONS = sorted(int(folder.name.removeprefix("tiny-v")) for folder in GOLDEN.glob("tiny-v*"))
both = pytest.mark.parametrize("version", VERSIONS)


class Golden:
    """One golden pack, its target and what it decodes to."""

    def __init__(self, version):
        self.folder = GOLDEN / f"tiny-v{version}"
        self.target = Checkpoint.open(self.folder / "target")
        self.pack = SkillPack.load(self.folder / "tiny.skillpack")
        self.tuned = load_file(self.folder / "tuned.safetensors")
        self.records = {record.name: record for record in self.pack.manifest.tensors}

    def before(self, record):
        if record.target_name is None:
            return torch.zeros(record.shape, dtype=self.tuned[record.name].dtype)
        return self.target.read(record.target_name)


FILES = {version: Golden(version) for version in VERSIONS}
TENSORS = [(version, name) for version in VERSIONS for name in sorted(FILES[version].records)]


def assert_same(record, decoded, expected):
    """Bit for bit, but for factors: the order of a product's sums is the machine's affair."""
    assert (decoded.dtype, decoded.shape) == (expected.dtype, expected.shape)
    if record.codec in ("lowrank", "hybrid"):
        torch.testing.assert_close(decoded, expected, rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize(("version", "name"), TENSORS)
def test_files_of_every_version_still_open_and_decode_to_the_same_tensors(version, name):
    golden = FILES[version]
    record = golden.records[name]
    assert_same(record, golden.pack.decode(name, golden.before(record)), golden.tuned[name])


@pytest.mark.parametrize(("version", "name"), TENSORS)
def test_the_delta_is_the_decoded_tensor_less_the_target(version, name):
    golden = FILES[version]
    before, after = golden.before(golden.records[name]), golden.tuned[name]
    weight, tuned = before.to(after.dtype).float(), after.float()
    rows = min(weight.shape[0], tuned.shape[0])
    expected = tuned.clone()
    expected[:rows] -= weight[:rows]
    decoded = golden.pack.delta(name, before)
    bound = 2.0**-8 if after.dtype == torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(decoded, expected, rtol=0, atol=bound * float(tuned.abs().max()))


FACTORED = {
    2: [
        "h.0.attn.q.weight",
        "h.0.gate.weight",
        "h.0.mlp.weight",
        "h.1.attn.q.weight",
        "h.2.attn.q.weight",
    ],
}
CODECS = {
    2: {"zero", "exact", "sparse", "lowrank", "dense", "hybrid"},
}


@both
def test_factors_multiply_to_the_delta_in_out_by_in_orientation(version):
    golden = FILES[version]
    decoded = {name: golden.pack.factors(name) for name in golden.records}
    decoded = {name: factors for name, factors in decoded.items() if factors}
    assert sorted(decoded) == FACTORED[version]
    for name, (left, right) in decoded.items():
        record = golden.records[name]
        [delta] = matrices(golden.pack.delta(name, golden.before(record)), record.layout)
        torch.testing.assert_close(left @ right, delta)


@both
def test_side_files_of_every_version_still_come_back(version):
    golden = FILES[version]
    side_files = golden.pack.side_files(golden.target).items()
    expected = json.loads((golden.folder / "files.json").read_text(encoding="utf-8"))
    assert {name: content.decode() for name, content in side_files} == expected


@both
def test_the_golden_pack_knows_its_target(version):
    pack, target = FILES[version].pack, FILES[version].target
    pack.check_target(target.read, set(target.tensors), "target")
    assert target.fingerprint() == pack.manifest.target.fingerprint


@both
def test_the_golden_pack_has_every_codec_every_layout_and_both_kinds_of_resize(version):
    pack, records = FILES[version].pack, FILES[version].records.values()
    assert {r.codec for r in records} == CODECS[version]
    assert {r.layout for r in records} == {"matrix", "transposed", "stack", "stack_transposed"}
    grown = {r.name for r in records if r.appended_bytes}
    resized = {r.name for r in records if r.tuned_shape}
    assert (grown, resized) == ({"embed.weight"}, {"embed.weight", "vocabulary.bias"})
    assert {r.base for r in records} == {None, "", "embed.weight"}
    described = [pack.describe(record.name) for record in records]
    assert {row.get("positions") for row in described} >= {"bitmap", "row lists"}
    coded = {r.codec for r, row in zip(records, described, strict=True) if row.get("coded")}
    assert coded == {"lowrank", "dense", "hybrid"}
    files = pack.manifest.files
    assert any(f.prefix and f.suffix for f in files)
    assert any(f.prefix + f.suffix == f.bytes for f in files)


def test_golden_files_are_small():
    files = [path for golden in FILES.values() for path in golden.folder.rglob("*")]
    assert all(path.stat().st_size < 20_000 for path in files)


def test_golden_files_cannot_be_made_anew(capsys):
    tool = Path(__file__).parents[2] / "tools" / "write_golden.py"
    spec = importlib.util.spec_from_file_location("write_golden", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for version in VERSIONS:
        file = FILES[version].folder / "tiny.skillpack"
        content = file.read_bytes()
        assert module.main(FILES[version].folder) == 1
        assert "never made anew" in capsys.readouterr().err
        assert file.read_bytes() == content


@both
def test_safetensors_itself_opens_the_pack(version):
    pack = FILES[version].pack
    with safe_open(FILES[version].folder / "tiny.skillpack", framework="pt") as file:
        assert file.metadata()["format"] == "skillpack"
        stored = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    tensors = {name: bytes(pack.payload(name)) for name in pack.manifest.stored_tensors}
    tensors = {"tensors": b"".join(tensors.values())}
    files = set(pack.manifest.stored_files)
    assert {name: part for name, part in stored.items() if name not in files} == tensors
    assert files <= stored.keys()
