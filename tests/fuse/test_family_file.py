"""Families as files: made, opened, unfolded, and refused where something is wrong in them."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from graftkit.attachment import attached
from graftkit.compress.codes import encode_codes
from graftkit.delta import Checkpoint
from graftkit.errors import (
    BudgetError,
    ConfigError,
    CorruptPackError,
    FamilyError,
    OutputError,
    PackMismatchError,
)
from graftkit.fuse.family import Family
from graftkit.fuse.family_file import Masks, apply_mask, decode_mask, encode_mask
from graftkit.fuse.family_making import make_family
from graftkit.library import Library
from graftkit.models import load_model
from graftkit.packing import pack_delta
from graftkit.skillpack import SkillPack

METHODS = ("emr", "tall", "twin")
BUDGETS = {"emr": "60%", "tall": "60%", "twin": "60%"}
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def families(skills, tmp_path_factory):
    """One file of each method, made of the lossless packs."""
    folder = tmp_path_factory.mktemp("families")
    paths = {method: folder / f"{method}.skillfamily" for method in METHODS}
    for method, path in paths.items():
        make_family(skills.target, skills.exact, path, method, budget=BUDGETS[method])
    return paths


@pytest.fixture(scope="module")
def target(skills):
    return Checkpoint.open(skills.target)


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ----------------------------------------------------------------------------------------- masks


@st.composite
def masked(draw):
    shape = draw(st.sampled_from([(1,), (7,), (5, 3), (2, 4, 3), (40, 50)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    density, zeros = draw(st.sampled_from([0.0, 0.1, 0.7, 1.0])), draw(st.sampled_from([0, 0.5, 1]))
    shared = torch.randn(shape, generator=generator)
    shared *= torch.rand(shape, generator=generator) >= zeros
    return torch.rand(shape, generator=generator) < density, shared


@given(masked())
@settings(deadline=None)
def test_a_mask_comes_back_wherever_the_shared_part_is_not_zero(case):
    mask, shared = case
    found = decode_mask(memoryview(encode_mask(mask, shared)), shared)
    assert torch.equal(found, mask & (shared != 0))


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.95])
def test_a_mask_takes_little_more_than_the_entropy_of_its_density(density):
    generator = torch.Generator().manual_seed(0)
    shared = torch.ones(200, 500)
    mask = torch.rand(shared.shape, generator=generator) < density
    share = float(mask.float().mean())
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert 8 * len(encode_mask(mask, shared)) < 1.02 * entropy * mask.numel() + 4000


def test_a_scale_is_rounded_as_the_file_keeps_it():
    shared = torch.ones(3)
    content = Masks.encode([(encode_mask(shared > 0, shared), 0.1)])
    found = Masks(memoryview(content), ["w"]).apply("w", shared)
    assert torch.equal(found, apply_mask(shared > 0, 0.1, shared))
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<IfI", 1, 1, 2),
        struct.pack("<IfI", 1, 1, 0) + b"x",
        struct.pack("<IfI", 2, 1, 0),
    ],
    ids=["nothing", "half a place", "a mask is missing", "a byte too many", "another count"],
)
def test_masks_of_another_length_are_refused(content):
    with pytest.raises(CorruptPackError):
        Masks(memoryview(content), ["w"])


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(CorruptPackError, match="scale"):
        Masks(memoryview(struct.pack("<IfI", 1, scale, 0)), ["w"])


@pytest.mark.parametrize("codes", [[[0, 2, 1]], [[0, -1, 1]], [[0, 1]], [[0, 1, 1, 0]]])
def test_a_mask_of_other_numbers_or_another_length_is_refused(codes):
    payload = encode_codes(np.array(codes, dtype=np.int32))
    with pytest.raises(CorruptPackError):
        decode_mask(memoryview(payload), torch.ones(3))


def test_a_mask_over_nothing_is_refused():
    with pytest.raises(CorruptPackError, match="over nothing"):
        decode_mask(memoryview(b"\1x"), torch.zeros(3))


# --------------------------------------------------------------------------- what a family gives


@pytest.mark.parametrize("method", METHODS)
def test_a_family_is_no_larger_than_its_budget_and_says_what_it_holds(
    method, families, skills, target
):
    path, family = families[method], Family.open(families[method])
    assert family.nbytes == path.stat().st_size <= 0.6 * target.nbytes
    assert family.skills == ("skill-0", "skill-1", "skill-2")
    digests = [skill.pack_blake3 for skill in family.manifest.skills]
    assert digests == [pack.digest for pack in skills.exact]
    assert family.manifest.target == skills.exact[0].manifest.target
    assert load_file(path).keys() == set(family.manifest.entries)


@pytest.mark.parametrize("method", METHODS)
def test_the_errors_in_the_manifest_are_those_of_the_deltas_a_reader_gets(
    method, families, skills, target
):
    family = Family.open(families[method])
    for pack, skill in zip(skills.exact, family.manifest.skills, strict=True):
        missed = whole = 0.0
        for name in target.tensors:
            before = target.read(name)
            wanted = pack.delta(name, before)
            missed += float((family.delta(skill.name, name, before) - wanted).square().sum())
            whole += float(wanted.square().sum())
        assert skill.error == pytest.approx((missed / whole) ** 0.5, rel=1e-3)


def test_twin_with_room_for_all_gives_every_skill_back(skills, target, tmp_path):
    """Rests are coded in float32: rounded to the target's bf16 they would be lost."""
    family = make_family(skills.target, skills.lossy, tmp_path / "f", "twin", budget="100%")
    before = target.read(MATRIX)
    for pack, skill in zip(skills.lossy, family.skills, strict=True):
        wanted = pack.delta(MATRIX, before)
        assert relative(family.delta(skill, MATRIX, before), wanted) < 0.01


def test_emr_gives_every_skill_its_own_signs_and_size(families, skills, target):
    family = Family.open(families["emr"])
    before = target.read(MATRIX)
    for pack, skill in zip(skills.exact, family.skills, strict=True):
        wanted, found = pack.delta(MATRIX, before), family.delta(skill, MATRIX, before)
        assert (found * wanted >= 0).all()
        torch.testing.assert_close(found.abs().sum(), wanted.abs().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_an_unfolded_skill_is_the_family_bit_for_bit(method, families, skills, target, tmp_path):
    family = Family.open(families[method])
    pack = family.pack("skill-1", skills.target)
    pack.save(tmp_path / "one.skillpack")
    opened = SkillPack.load(tmp_path / "one.skillpack")
    moved = 0
    for name in target.tensors:
        found = opened.rebuild(name, target.read)
        assert torch.equal(found, family.tensor("skill-1", name, target.read(name)))
        moved += int((found != target.read(name)).sum())
    assert moved > 0
    assert opened.manifest.tuned.name == "skill-1"
    assert opened.manifest.provenance["shares with"] == "skill-0, skill-2"


def test_an_unfolded_skill_attaches_and_joins_a_library(families, skills, tmp_path):
    pack = Family.open(families["twin"]).pack("skill-0", skills.target)
    model = load_model(Checkpoint.open(skills.target))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        bare = model(ids).logits
        with attached(model, pack):
            changed = model(ids).logits
        assert torch.equal(model(ids).logits, bare)
    assert not torch.equal(changed, bare)
    file = tmp_path / "one.skillpack"
    pack.save(file)
    library = Library.init(tmp_path / "library", skills.target)
    prompts = [f"prompt {index}" for index in range(20)]
    assert library.add(file, "skill-0", prompts).has_key


def test_making_twice_gives_the_same_bytes(families, skills, tmp_path):
    make_family(skills.target, skills.exact, tmp_path / "f", "emr", budget=BUDGETS["emr"])
    assert (tmp_path / "f").read_bytes() == families["emr"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_tensors_that_no_pack_changes_cost_nothing_and_stay(skills, target, tmp_path):
    same = pack_delta(skills.target, skills.target, recipe="lossless", workers=1)
    names = ["a", "b"]
    family = make_family(skills.target, [same, same], tmp_path / "f", "emr", None, "60%", names)
    before = target.read(MATRIX)
    assert not family.delta("b", MATRIX, before).any()
    assert [skill["bytes"] for skill in family.summary()["skills"]] == [4, 4]


def test_every_skill_keeps_its_own_side_files(skills, tmp_path):
    packs = [skills.exact[2]]
    for index in range(2):
        tuned = tmp_path / f"tuned-{index}"
        tuned.mkdir()
        for file in skills.tuned[index].iterdir():
            (tuned / file.name).write_bytes(file.read_bytes())
        (tuned / "generation_config.json").write_text(json.dumps({"max_new_tokens": index}))
        packs.append(pack_delta(skills.target, tuned, recipe="lossless", workers=1))
    family = make_family(skills.target, packs, tmp_path / "f", "emr", budget="60%")
    target = Checkpoint.open(skills.target)
    bare, *own = (family.pack(skill, skills.target).side_files(target) for skill in family.skills)
    assert bare == {}
    found = [json.loads(files["generation_config.json"])["max_new_tokens"] for files in own]
    assert found == [0, 1]


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"packs": 1}, ConfigError, "two or more"),
        ({"method": "twins"}, ConfigError, "did you mean twin"),
        ({"method": "emr", "settings": {"scaling": 1.0}}, ConfigError, "emr has no setting"),
        ({"settings": {"scaling": float("nan")}}, ConfigError, "scaling is nan"),
        ({"method": "tall", "settings": {"threshold": 0}}, ConfigError, "threshold is 0"),
        ({"names": ["a", "b"]}, ConfigError, "2 names for 3 packs"),
        ({"names": ["a", "b", "a"]}, ConfigError, "two skills are called a"),
        ({"names": ["a", "b", "../c"]}, ConfigError, "cannot be called"),
        ({"budget": "much"}, BudgetError, "not understood"),
    ],
)
def test_a_wrong_call_is_refused_and_leaves_nothing(change, error, told, skills, tmp_path):
    call = {"method": "twin", "settings": None, "budget": None, "names": None} | change
    packs = skills.exact[: call.pop("packs", 3)]
    with pytest.raises(error, match=re.escape(told)):
        make_family(skills.target, packs, tmp_path / "f", **call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["emr", "twin"])
def test_a_budget_that_nothing_meets_names_one_that_does(method, skills, tmp_path):
    with pytest.raises(BudgetError, match=r"ask for at least (\d+)B") as refusal:
        make_family(skills.target, skills.exact, tmp_path / "f", method, budget="9%")
    assert list(tmp_path.iterdir()) == []
    (least,) = re.findall(r"at least (\d+)B", str(refusal.value))
    make_family(skills.target, skills.exact, tmp_path / "f", method, budget=f"{least}B")
    assert (tmp_path / "f").stat().st_size <= int(least)


@pytest.mark.parametrize("place", [".", "absent/f.skillfamily", "/proc/f.skillfamily"])
def test_a_place_that_cannot_be_written_is_refused(place, skills, tmp_path):
    with pytest.raises(OutputError):
        make_family(skills.target, skills.exact, tmp_path / place, "twin", budget="60%")
    assert list(tmp_path.iterdir()) == []


def test_a_pack_of_another_target_is_no_member(skills, tmp_path):
    stranger = pack_delta(skills.tuned[1], skills.tuned[0], recipe="lossless", workers=1)
    with pytest.raises(PackMismatchError, match="other values"):
        make_family(skills.target, [skills.exact[0], stranger], tmp_path / "f", "twin", names="ab")
    assert list(tmp_path.iterdir()) == []


def test_a_pack_that_changes_the_tokenizer_is_no_member(skills, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for file in skills.tuned[0].iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    (tuned / "tokenizer.json").write_text("{}")
    other = pack_delta(skills.target, tuned, recipe="lossless", workers=1)
    with pytest.raises(PackMismatchError, match=r"tokenizer\.json"):
        make_family(skills.target, [skills.exact[1], other], tmp_path / "f", "twin")
    assert not (tmp_path / "f").exists()


def test_a_family_refuses_another_target_and_unknown_skills(families, skills):
    family = Family.open(families["emr"])
    with pytest.raises(PackMismatchError, match="other values"):
        family.pack("skill-0", skills.tuned[0])
    with pytest.raises(ConfigError, match="it holds skill-0, skill-1, skill-2"):
        family.pack("skill-9", skills.target)


# ------------------------------------------------------------------------------ files taken apart


class Forgery:
    """A family taken apart; digests, sizes and offsets are made to fit whatever its parts say."""

    def __init__(self, path):
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        self.manifest = json.loads(self.metadata["manifest"])
        data = content[8 + length :]
        self.entries = {name: data[slice(*e["data_offsets"])] for name, e in header.items()}

    def build(self):
        data = b"".join(self.entries.values())
        self.manifest["payload_blake3"] = blake3(data).hexdigest()
        text = json.dumps(self.manifest)
        self.metadata |= {"manifest": text, "manifest_blake3": blake3(text.encode()).hexdigest()}
        header, offset = {"__metadata__": self.metadata}, 0
        for name, entry in self.entries.items():
            end = offset + len(entry)
            header[name] = {"dtype": "U8", "shape": [len(entry)], "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data


def assert_refused(path, content, told="[a-z]"):
    path.write_bytes(content)
    with pytest.raises(FamilyError, match=told) as refusal:
        Family.open(path)
    assert str(refusal.value).startswith(str(path))
    assert len(str(refusal.value)) < 1000


def test_a_family_put_together_again_opens(families, tmp_path):
    for method, path in families.items():
        (tmp_path / method).write_bytes(Forgery(path).build())
        assert Family.open(tmp_path / method).manifest.method == method


@pytest.mark.parametrize("method", METHODS)
def test_a_truncated_or_edited_file_is_refused(method, families, tmp_path):
    content = families[method].read_bytes()
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        assert_refused(tmp_path / "f", content[:length])
    assert_refused(tmp_path / "f", content + b"\0")
    for place in range(0, len(content), len(content) // 60):
        changed = bytearray(content)
        changed[place] ^= 4
        assert_refused(tmp_path / "f", bytes(changed))


def test_other_files_are_no_families(families, skills, tmp_path):
    skills.lossy[0].save(tmp_path / "pack")
    for path in (tmp_path / "pack", tmp_path / "absent", tmp_path):
        with pytest.raises(FamilyError):
            Family.open(path)
    with pytest.raises(Exception, match="not a SkillPack"):
        SkillPack.load(families["emr"])


def set_version(forged):
    forged.metadata["version"] = "2"


def set_huge_shape(forged):
    forged.manifest["target"]["parameters"] += 1


def set_twice(forged):
    forged.manifest["skills"][1]["name"] = "skill-0"
    forged.entries = {"shared": forged.entries["shared"], "skill/skill-0": b"x"}


def set_path(forged):
    forged.manifest["skills"][1]["name"] = "../../x"


def set_side_file(forged):
    record = {"name": "../x", "bytes": 1, "blake3": "0" * 64}
    forged.manifest["skills"][2]["files"] = [record]
    forged.entries["skill/skill-2/../x"] = b"x"


def set_lengths(forged):
    record = {"name": "merges.txt", "bytes": 1, "blake3": "0" * 64, "prefix": 9, "suffix": 9}
    forged.manifest["skills"][2]["files"] = [record]


def set_method(forged):
    forged.manifest["method"] = "twin" if forged.manifest["method"] == "emr" else "emr"


def set_one_skill(forged):
    del forged.manifest["skills"][1:]
    forged.entries = dict(list(forged.entries.items())[:2])


def set_empty_shared(forged):
    forged.entries["shared"] = b"\0"


def set_text_number(forged):
    forged.manifest["skills"][0]["error"] = "0.1"


def set_unknown_key(forged):
    forged.manifest["more"] = 1


def set_more_entries(forged):
    forged.entries["more"] = b"x"


def set_less(forged):
    forged.entries["skill/skill-1"] = forged.entries["skill/skill-1"][:-1]


@pytest.mark.parametrize("method", ["emr", "twin"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_version, "upgrade graftkit"),
        (set_huge_shape, "not of the family's target"),
        (set_twice, "twice"),
        (set_path, "skills.1.name"),
        (set_side_file, "not allowed"),
        (set_lengths, "do not fit"),
        (set_method, "[a-z]"),
        (set_one_skill, "skills"),
        (set_empty_shared, "too few"),
        (set_text_number, "error"),
        (set_unknown_key, "more"),
        (set_more_entries, "more"),
        (set_less, "[a-z]"),
    ],
)
def test_a_forged_family_is_refused_by_the_rule_it_breaks(method, change, told, families, tmp_path):
    forged = Forgery(families[method])
    change(forged)
    assert_refused(tmp_path / "f", forged.build(), told)


def test_a_key_that_stands_twice_is_refused(families, tmp_path):
    forged = Forgery(families["emr"])
    text = json.dumps(forged.manifest).replace('"method":', '"method": "twin", "method":')
    forged.build()
    payload = forged.manifest["payload_blake3"]
    text = re.sub(r'"payload_blake3": "\w+"', f'"payload_blake3": "{payload}"', text)
    content = forged.build()
    old = json.dumps(json.dumps(forged.manifest))[1:-1].encode()
    new = json.dumps(text)[1:-1].encode()
    digests = [
        blake3(t).hexdigest().encode()
        for t in (json.dumps(forged.manifest).encode(), text.encode())
    ]
    content = content.replace(old, new).replace(*digests)
    length = struct.unpack_from("<Q", content)[0] + len(new) - len(old)
    assert_refused(tmp_path / "f", struct.pack("<Q", length) + content[8:], "twice")


def test_a_rest_of_another_target_is_refused(families, skills, tmp_path):
    forged = Forgery(families["twin"])
    stranger = pack_delta(skills.tuned[1], skills.tuned[0], recipe="lossless", workers=1)
    forged.entries["skill/skill-1"] = b"".join(stranger.parts())
    assert_refused(
        tmp_path / "f", forged.build(), "the part of skill-1 is not of the family's target"
    )


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_masks_that_cannot_be_decoded_are_said_to_be_broken(method, families, target, tmp_path):
    forged = Forgery(families[method])
    content = bytearray(forged.entries["skill/skill-1"])
    content[-400:] = bytes(range(1, 201)) * 2
    forged.entries["skill/skill-1"] = bytes(content)
    (tmp_path / "f").write_bytes(forged.build())
    family = Family.open(tmp_path / "f")
    with pytest.raises(FamilyError, match="skill-1"):
        [family.delta("skill-1", name, target.read(name)) for name in target.tensors]
