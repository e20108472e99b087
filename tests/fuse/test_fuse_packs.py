"""Several packs as one pack."""

import pytest
import torch

from graftkit.checkpoint import Checkpoint
from graftkit.errors import BudgetError, ConfigError, OutputError
from graftkit.fuse import merge_packs
from graftkit.fuse.merge import fuse_packs, manifest_digest
from graftkit.skillpack import SkillPack


def test_a_losslessly_fused_pack_is_the_merged_checkpoint_bit_for_bit(skills, tmp_path):
    options = {"method": "ties", "settings": {"density": 0.4}}
    merge_packs(skills.target, skills.exact, tmp_path / "m", **options)
    file = tmp_path / "f.skillpack"
    fuse_packs(skills.target, skills.exact, file, **options, recipe="lossless")
    fused, merged = SkillPack.load(file), Checkpoint.open(tmp_path / "m")
    target = Checkpoint.open(skills.target)
    for name in merged.tensors:
        assert torch.equal(fused.rebuild(name, target.read), merged.read(name))


def test_a_fused_pack_keeps_its_budget_and_names_what_it_is_made_of(skills, tmp_path):
    file = tmp_path / "f.skillpack"
    fuse_packs(skills.target, skills.lossy, file, [1, 0.5, 0.25], method="linear", budget="15%")
    manifest = SkillPack.load(file).manifest
    assert file.stat().st_size <= 0.15 * manifest.target.bytes
    assert manifest.tuned.name == "linear-of-3-packs"
    assert manifest.provenance == {
        "method": "linear scaling=1",
        **{
            f"pack {i + 1}": f"{weight} x skill-{i} ({manifest_digest(skills.lossy[i])[:16]})"
            for i, weight in enumerate(("1", "0.5", "0.25"))
        },
    }
    assert [path.name for path in tmp_path.iterdir()] == ["f.skillpack"]


@pytest.mark.slow
def test_fusing_twice_gives_the_same_bytes(skills, tmp_path):
    for name in "ab":
        fuse_packs(skills.target, skills.lossy, tmp_path / name, method="dare_ties", budget="15%")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("MIT", "MIT"), "MIT"),
        (("MIT", "Apache-2.0"), "Apache-2.0 AND MIT"),
        (("MIT", "BSD-2-Clause OR X11"), "(BSD-2-Clause OR X11) AND MIT"),
        (("MIT", None), None),
    ],
)
def test_a_fused_pack_carries_every_licence(licences, expected, skills, tmp_path):
    packs = [
        SkillPack(pack.manifest.model_copy(update={"licence": licence}), pack._payloads)
        for pack, licence in zip(skills.exact, licences, strict=False)
    ]
    fused = fuse_packs(skills.target, packs, tmp_path / "f", recipe="lossless")
    assert fused.manifest.licence == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"budget": "100B"}, BudgetError),
        ({"method": "nonsense"}, ConfigError),
        ({"recipe": "nonsense"}, ConfigError),
    ],
)
def test_a_refused_fusion_leaves_nothing_behind(options, error, skills, tmp_path):
    with pytest.raises(error):
        fuse_packs(skills.target, skills.lossy, tmp_path / "f.skillpack", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "absent/f.skillpack", "/proc/f.skillpack"])
def test_a_place_that_cannot_be_written_is_refused(place, skills, tmp_path):
    with pytest.raises(OutputError):
        fuse_packs(skills.target, skills.lossy, tmp_path / place)
    assert list(tmp_path.iterdir()) == []
