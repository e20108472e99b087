"""Packs merged in turn: the state file, what comes out, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import build, lossless_pack, perturb

from graftkit.checkpoint import Checkpoint, tensor_digest
from graftkit.errors import CheckpointError, ConfigError, OutputError, PackMismatchError
from graftkit.fuse import merge_packs, sequential
from graftkit.fuse.methods import IN_TURN, find_method
from graftkit.fuse.sequential import fuse_in_turn, merge_in_turn
from graftkit.rows import Row
from graftkit.skillpack import SkillPack

each_method = pytest.mark.parametrize("method", IN_TURN)
ROWS = [[Row(f"{a} ", f" {b}") for b in "xyz"] for a in "abc"]


def digests(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: tensor_digest(checkpoint.read(name)) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def states(skills, tmp_path_factory):
    """By method, the state that two packs leave behind."""
    folder = tmp_path_factory.mktemp("states")
    for method in IN_TURN:
        merge_in_turn(skills.target, skills.lossy[:2], folder / method, method, folder / "s")
        (folder / "s").rename(folder / f"{method}.state")
    return {method: folder / f"{method}.state" for method in IN_TURN}


@pytest.mark.parametrize(("method", "rows"), [("opcm", None), ("kif", None), ("kif", ROWS)])
def test_packs_one_by_one_give_the_bytes_of_all_in_one_call(method, rows, skills, tmp_path):
    packs = skills.lossy
    merge_in_turn(skills.target, packs, tmp_path / "all", method, tmp_path / "once", rows)
    for index, pack in enumerate(packs):
        own = None if rows is None else rows[index : index + 1]
        merge_in_turn(skills.target, [pack], tmp_path / f"{index}", method, tmp_path / "s", own)
    assert digests(tmp_path / "2") == digests(tmp_path / "all")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "once").read_bytes()


@each_method
def test_the_first_pack_comes_out_as_it_is(method, skills, tmp_path):
    merge_in_turn(skills.target, skills.lossy[:1], tmp_path / "turn", method)
    merge_packs(skills.target, skills.lossy[0], tmp_path / "pack")
    assert digests(tmp_path / "turn") == digests(tmp_path / "pack")


@each_method
def test_the_order_of_packs_matters(method, skills, tmp_path):
    for name, order in (("012", (0, 1, 2)), ("210", (2, 1, 0))):
        packs = [skills.lossy[index] for index in order]
        merge_in_turn(skills.target, packs, tmp_path / name, method)
    assert digests(tmp_path / "012") != digests(tmp_path / "210")


@each_method
def test_the_state_is_one_delta_whatever_the_number_of_packs(method, skills, states, tmp_path):
    state = tmp_path / "s"
    shutil.copyfile(states[method], state)
    merge_in_turn(skills.target, skills.lossy[2:], tmp_path / "m", method, state)
    target = Checkpoint.open(skills.target)
    tensors = load_file(state)
    assert tensors.keys() <= target.tensors.keys()
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert abs(state.stat().st_size - states[method].stat().st_size) < 1000


@pytest.mark.slow
def test_rows_change_what_matters_to_kif(skills, tmp_path):
    merge_in_turn(skills.target, skills.lossy, tmp_path / "energy", "kif")
    merge_in_turn(skills.target, skills.lossy, tmp_path / "rows", "kif", rows=ROWS)
    assert digests(tmp_path / "energy") != digests(tmp_path / "rows")


@pytest.mark.slow
@each_method
def test_a_pack_that_comes_out_is_the_checkpoint_that_comes_out(method, skills, tmp_path):
    merge_in_turn(skills.target, skills.lossy, tmp_path / "m", method)
    file = tmp_path / "f.skillpack"
    fuse_in_turn(skills.target, skills.lossy, file, method, recipe="lossless")
    fused, target = SkillPack.load(file), Checkpoint.open(skills.target)
    merged = Checkpoint.open(tmp_path / "m")
    for name in merged.tensors:
        assert torch.equal(fused.rebuild(name, target.read), merged.read(name))
    assert fused.manifest.tuned.name == f"{method}-of-3-packs"


@pytest.mark.slow
def test_a_fused_pack_names_the_packs_of_earlier_calls_too(skills, states, tmp_path):
    state, file = tmp_path / "s", tmp_path / "f.skillpack"
    shutil.copyfile(states["opcm"], state)
    fuse_in_turn(skills.target, skills.lossy[2:], file, "opcm", state, recipe="lossless")
    provenance = SkillPack.load(file).manifest.provenance
    assert provenance["method"] == "opcm"
    assert [provenance[f"pack {index}"].split()[0] for index in (1, 2, 3)] == [
        "skill-0",
        "skill-1",
        "skill-2",
    ]


def metadata_of(file):
    with safe_open(file, framework="pt") as handle:
        return handle.metadata()


def damage(file, how):
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif how == "not safetensors":
        file.write_bytes(b"abc")
    elif how == "one weight":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
    else:
        metadata, tensors = metadata_of(file), load_file(file)
        if how == "no header":
            metadata = {"format": "pt"}
        elif how == "other shape":
            name = min(tensors)
            tensors[name] = tensors[name].flatten()
        elif how == "other type":
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        elif how == "header":
            metadata = {key: text.replace("opcm", "kif") for key, text in metadata.items()}
        save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    "how",
    [
        *("truncated", "not safetensors", "one weight", "no header", "other shape", "other type"),
        "header",
    ],
)
def test_a_damaged_state_is_refused_and_left_alone(how, skills, states, tmp_path):
    state = tmp_path / "s"
    shutil.copyfile(states["opcm"], state)
    damage(state, how)
    before = state.read_bytes()
    with pytest.raises(CheckpointError, match=r"/s: "):
        merge_in_turn(skills.target, skills.lossy[2:], tmp_path / "m", "opcm", state)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"version": 2}, "version"),
        ({"packs": []}, "packs"),
        ({"extra": 1}, "extra"),
        ({"statistics": {"nonsense": 1.0}}, "statistics"),
        ({"statistics": {"packs": 2.0, "mean_norm": -1.0, "norm": 1.0}}, "statistics"),
    ],
)
def test_a_forged_header_with_its_right_digest_is_refused(changed, says, skills, states, tmp_path):
    state, tensors = tmp_path / "s", load_file(states["opcm"])
    _, _, header = metadata_of(states["opcm"])[sequential.FORMAT].partition(" ")
    text = json.dumps(json.loads(header) | changed)
    save_file(tensors, state, {sequential.FORMAT: f"{sequential._digest(text, tensors)} {text}"})
    with pytest.raises(CheckpointError, match=says):
        merge_in_turn(skills.target, skills.lossy[2:], tmp_path / "m", "opcm", state)


def test_a_state_of_another_method_is_refused(skills, states, tmp_path):
    with pytest.raises(ConfigError, match="--method opcm"):
        merge_in_turn(skills.target, skills.lossy[2:], tmp_path / "m", "kif", states["opcm"])


def test_a_pack_is_taken_once(skills, states, tmp_path):
    with pytest.raises(ConfigError, match="skill-1 was taken already"):
        merge_in_turn(skills.target, skills.lossy[1:2], tmp_path / "m", "opcm", states["opcm"])
    with pytest.raises(ConfigError, match="taken already"):
        merge_in_turn(skills.target, skills.lossy[:1] * 2, tmp_path / "m", "opcm")


def test_packs_and_states_of_another_target_are_refused(skills, states, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(skills.target, other)
    weights = load_file(other / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    pack = lossless_pack(other, skills.tuned[2])
    with pytest.raises(PackMismatchError, match="another target"):
        merge_in_turn(other, [pack], tmp_path / "m", "opcm", states["opcm"])
    with pytest.raises(PackMismatchError):
        merge_in_turn(other, skills.lossy[2:], tmp_path / "m", "opcm")


def test_a_failed_call_leaves_state_and_output_as_they_were(skills, states, tmp_path):
    state, folder = tmp_path / "s", tmp_path / "full"
    shutil.copyfile(states["opcm"], state)
    folder.mkdir()
    (folder / "file").touch()
    before = state.read_bytes()
    with pytest.raises(OutputError):
        merge_in_turn(skills.target, skills.lossy[2:], folder, "opcm", state)
    assert state.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "s"]


def test_a_state_that_cannot_be_written_is_refused(skills, tmp_path):
    with pytest.raises(OutputError):
        merge_in_turn(skills.target, skills.lossy, tmp_path / "m", "opcm", tmp_path / "no" / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("packs", "method", "rows", "says"),
    [
        (1, "ties", None, "opcm, kif"),
        (0, "opcm", None, "no packs"),
        (1, "opcm", ROWS[:1], "rows go with kif"),
        (2, "kif", ROWS[:1], "1 sets of rows for 2 packs"),
    ],
)
def test_wrong_arguments_are_refused(packs, method, rows, says, skills, tmp_path):
    with pytest.raises(ConfigError, match=says):
        merge_in_turn(skills.target, skills.lossy[:packs], tmp_path / "m", method, None, rows)


@each_method
def test_rules_with_a_memory_are_no_plain_methods(method, skills, tmp_path):
    with pytest.raises(ConfigError, match="merge_in_turn"):
        find_method(method, {})
    with pytest.raises(ConfigError, match="did you mean opcm"):
        find_method("ocpm", {})


@pytest.mark.slow
def test_packs_that_disagree_on_the_tokenizer_are_refused_also_one_by_one(tmp_path):
    build("llama").save_pretrained(tmp_path / "target")
    for name, words in (("a", ""), ("b", "one"), ("c", "one"), ("d", "two")):
        model = build("llama")
        perturb(model, seed=ord(name), scale=0.02)
        model.save_pretrained(tmp_path / name)
        if words:
            (tmp_path / name / "vocab.txt").write_text(words)
    packs = {n: lossless_pack(tmp_path / "target", tmp_path / n) for n in "abcd"}

    def merge(name, state):
        output = tmp_path / f"{name}-{state}"
        merge_in_turn(tmp_path / "target", [packs[name]], output, "opcm", tmp_path / state)

    merge("b", "alike")
    merge("c", "alike")
    assert (tmp_path / "c-alike" / "vocab.txt").read_text() == "one"
    for name in "ad":
        with pytest.raises(PackMismatchError, match=r"vocab\.txt"):
            merge(name, "alike")
    merge("a", "plain")
    with pytest.raises(PackMismatchError, match=r"vocab\.txt"):
        merge("b", "plain")


@pytest.mark.slow
def test_the_commands_take_packs_in_turn(run, skills, files, tmp_path):
    state, file = tmp_path / "s", tmp_path / "f.skillpack"
    options = ("--method", "opcm", "--state", state)
    code, out, _ = run("merge", skills.target, *files[:2], "-o", tmp_path / "m", *options, "--json")
    assert code == 0
    assert json.loads(out)["state"] == str(state)
    code, out, _ = run(
        "fuse", skills.target, files[2], "-o", file, *options, "--recipe", "lossless"
    )
    assert code == 0
    assert out.startswith(f"{file}: 1 more in one pack, ")
    merge_in_turn(skills.target, files, tmp_path / "api", "opcm")
    target, fused = Checkpoint.open(skills.target), SkillPack.load(file)
    made = {name: tensor_digest(fused.rebuild(name, target.read)) for name in target.tensors}
    assert made == digests(tmp_path / "api")


@pytest.mark.slow
def test_kif_takes_the_rows_of_every_pack(run, skills, files, tmp_path):
    names = [tmp_path / f"{index}.jsonl" for index in range(2)]
    for name, rows in zip(names, ROWS, strict=False):
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows]
        name.write_text("\n".join(lines))
    options = [part for name in names for part in ("--rows", name)]
    options += ["--method", "kif", "-o", tmp_path / "cli"]
    assert run("merge", skills.target, *files[:2], *options)[0] == 0
    merge_in_turn(skills.target, files[:2], tmp_path / "api", "kif", rows=ROWS[:2])
    assert digests(tmp_path / "cli") == digests(tmp_path / "api")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "ties", "--state", "s"), "--state and --rows go with opcm and kif"),
        (("--method", "opcm", "--weights", "1,1,1"), "without weights or settings"),
        (("--method", "kif", "--lambda", "0.5"), "without weights or settings"),
        (("--method", "opcm", "--search", "rows.jsonl"), "no weights to search"),
        (("--method", "kif", "--rows", "absent.jsonl"), "absent.jsonl"),
        (("--method", "opcn"), "did you mean opcm?"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "fuse"])
def test_options_that_do_not_belong_are_refused_in_one_line(
    command, options, says, run, skills, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(command, skills.target, *files, "-o", tmp_path / "out", *options)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []
