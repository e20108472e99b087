"""`merge`, `fuse` and `interference` at the command line."""

import json
from functools import partial

import pytest

from graftkit.checkpoint import Checkpoint, tensor_digest
from graftkit.fuse import merge_packs
from graftkit.fuse.search import search_weights
from graftkit.skillpack import SkillPack


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": " b c"}\n' * 3)
    return file


def digests(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: tensor_digest(checkpoint.read(name)) for name in checkpoint.tensors}


def test_merge_takes_method_and_settings(run, skills, files, tmp_path):
    options = ("--method", "ties", "--density", 0.3, "--lambda", 0.5, "--weights", "1,0.5,1")
    code, out, _ = run("merge", skills.target, *files, "-o", tmp_path / "cli", *options, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["settings"] == {"scaling": 0.5, "density": 0.3}
    assert (result["method"], result["weights"]) == ("ties", [1, 0.5, 1])
    settings = {"density": 0.3, "scaling": 0.5}
    merge_packs(skills.target, files, tmp_path / "api", [1, 0.5, 1], None, "ties", settings)
    assert digests(tmp_path / "cli") == digests(tmp_path / "api")


def test_merge_without_json_prints_one_line(run, skills, files, tmp_path):
    code, out, err = run("merge", skills.target, files[0], "-o", tmp_path / "m")
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'm'}: target + 1 pack, an ordinary checkpoint\n"


@pytest.mark.slow
def test_a_search_prints_its_weights_and_merges_with_them(
    run, skills, files, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "graftkit.fuse.search.search_weights", partial(search_weights, evaluations=6)
    )
    options = ("--method", "linear", "--search", rows)
    code, out, _ = run("merge", skills.target, *files, "-o", tmp_path / "cli", *options, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["search"]["evaluations"] <= 6
    assert result["search"]["loss"] <= result["search"]["loss_given"]
    merge_packs(
        skills.target,
        files,
        tmp_path / "api",
        result["weights"],
        None,
        "linear",
        result["settings"],
    )
    assert digests(tmp_path / "cli") == digests(tmp_path / "api")
    code, out, _ = run("merge", skills.target, *files, "-o", tmp_path / "text", *options)
    assert code == 0
    assert out.startswith(f"weights {result['weights'][0]:.3f}, ")
    assert "nats per token" in out


@pytest.mark.slow
def test_fuse_writes_one_pack_and_its_numbers(run, skills, files, tmp_path):
    file = tmp_path / "f.skillpack"
    options = ("--method", "dare", "--density", 0.9, "--budget", "20%")
    code, out, _ = run("fuse", skills.target, *files, "-o", file, *options, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["pack_bytes"] == file.stat().st_size <= result["budget_bytes"]
    assert result["settings"] == {"scaling": 1, "density": 0.9, "seed": 0}
    method = SkillPack.load(file).manifest.provenance["method"]
    assert method == "dare density=0.9 scaling=1 seed=0"
    code, out, _ = run("fuse", skills.target, *files, "-o", file, *options, "--force")
    assert code == 0
    assert out.startswith(f"{file}: 3 packs in one, ")


@pytest.mark.slow
def test_interference_prints_a_table_and_draws(run, skills, files, tmp_path):
    figure = tmp_path / "i.png"
    code, out, _ = run("interference", skills.target, *files, "--figure", figure)
    assert code == 0
    assert all(word in out for word in ("cosine", "sign conflicts", "attention", "norm"))
    assert figure.stat().st_size > 0
    code, out, _ = run("interference", skills.target, *files, "--json")
    pairs = json.loads(out)["pairs"]
    assert pairs[0]["packs"] == ["skill-0", "skill-1"]
    assert set(pairs[0]["total"]) == {
        "cosine",
        "sign_conflicts",
        "weighted_conflicts",
        "top_overlap",
    }
    assert set(pairs[0]["tensors"]) == set(Checkpoint.open(skills.target).tensors)


def test_packs_of_one_name_are_told_apart_by_their_paths(run, skills, files, tmp_path):
    other = tmp_path / files[0].name
    other.write_bytes(files[1].read_bytes())
    _, out, _ = run("interference", skills.target, files[0], other, "--json")
    assert json.loads(out)["pairs"][0]["packs"] == [str(files[0]), str(other)]


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("merge", ("--method", "tie"), "did you mean ties?"),
        ("merge", ("--density", "0.5"), "task_arithmetic has no setting 'density'"),
        ("merge", ("--search", "absent.jsonl"), "absent.jsonl"),
        ("fuse", ("--budget", "10B"), "budget 10B"),
        ("fuse", ("--weights", "1"), "1 weights for 3 packs"),
        ("interference", ("--figure", "absent/i.png"), "there is no folder"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    command, options, says, run, skills, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = () if command == "interference" else ("-o", tmp_path / "out")
    code, out, err = run(command, skills.target, *files, *output, *options)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []
