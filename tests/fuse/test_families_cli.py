"""`graftkit family` at the command line."""

import json

import pytest

from graftkit.delta import Checkpoint
from graftkit.fuse.family import Family
from graftkit.skillpack import SkillPack


@pytest.fixture(scope="module")
def family(skills, files, tmp_path_factory):
    """A family of two packs, made by the command."""
    import commands

    path = tmp_path_factory.mktemp("family") / "two.skillfamily"
    options = ("--method", "emr", "--budget", "60%", "--names", "first,second")
    assert commands.run("family", "make", skills.target, *files[:2], *options, "-o", path) == 0
    return path


def test_make_takes_names_and_settings(run, skills, files, tmp_path):
    path = tmp_path / "f.skillfamily"
    options = ("--method", "tall", "--scaling", 0.5, "--threshold", 1, "--budget", "60%")
    code, out, _ = run("family", "make", skills.target, *files[:2], *options, "-o", path, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["manifest"]["settings"] == {"scaling": 0.5, "threshold": 1.0}
    assert [skill["name"] for skill in result["skills"]] == ["skill-0", "skill-1"]
    assert result["bytes"] == path.stat().st_size


def test_inspect_shows_the_parts_and_needs_no_model(run, family):
    code, out, _ = run("family", "inspect", family)
    assert code == 0
    for word in ("emr", "shared", "first", "second", "% of the target"):
        assert word in out
    code, out, _ = run("family", "inspect", family, "--json")
    result = json.loads(out)
    parts = result["shared_bytes"] + sum(skill["bytes"] for skill in result["skills"])
    assert 0 < parts < result["bytes"] == family.stat().st_size


def test_unfold_writes_a_pack_that_other_commands_take(run, skills, family, tmp_path):
    path = tmp_path / "one.skillpack"
    options = ("--skill", "second", "--target", skills.target)
    code, out, _ = run("family", "unfold", family, *options, "-o", path)
    assert code == 0
    assert "second" in out
    assert run("verify", path, "--target", skills.target)[0] == 0
    name = "lm_head.weight"
    target = Checkpoint.open(skills.target)
    expected = Family.open(family).tensor("second", name, target.read(name))
    assert SkillPack.load(path).rebuild(name, target.read).equal(expected)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("inspect", "absent"), "absent: cannot be read"),
        (("unfold", "FAMILY", "--skill", "third", "--target", "TARGET"), "it holds first, second"),
        (("unfold", "FAMILY", "--skill", "first", "--target", "TUNED"), "other values"),
        (("make", "TARGET", "PACK", "--method", "emr"), "two or more"),
        (("make", "TARGET", "PACK", "OTHER", "--method", "twin", "--budget", "1%"), "at least"),
    ],
)
def test_what_is_refused_says_so_in_one_line(arguments, told, run, skills, files, family, tmp_path):
    places = {
        **{"FAMILY": family, "TARGET": skills.target, "TUNED": skills.tuned[0]},
        **{"PACK": files[0], "OTHER": files[1]},
    }
    output = () if arguments[0] == "inspect" else ("-o", tmp_path / "out")
    code, out, err = run("family", *(places.get(word, word) for word in arguments), *output)
    assert (code, out) == (1, "")
    assert told in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
