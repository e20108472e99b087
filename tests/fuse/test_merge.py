"""Merging packs into a checkpoint: what is written, what is refused, what does not matter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, build, lossless_pack, make_pair, perturb, save_tokenizer

from graftkit.checkpoint import Checkpoint, tensor_digest
from graftkit.errors import ConfigError, OutputError, PackMismatchError
from graftkit.fuse import merge_packs, methods
from graftkit.fuse.methods import METHODS, Method, find_method
from graftkit.pack import pack_delta

every_method = pytest.mark.parametrize("method", METHODS)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def digests(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: tensor_digest(checkpoint.read(name)) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    """A float32 target and three packs of it: there the order of a sum shows in the last bit."""
    folder = tmp_path_factory.mktemp("precise")
    packs = []
    for index in range(3):
        model = build("qwen3", torch.float32)
        model.save_pretrained(folder / "target")
        perturb(model, seed=index + 1, scale=0.02)
        model.save_pretrained(folder / str(index))
        packs.append(pack_delta(folder / "target", folder / str(index), recipe="lossless"))
    return folder / "target", packs


@every_method
def test_every_order_of_packs_gives_the_same_bytes(method, precise, tmp_path):
    target, packs = precise
    contents = set()
    for order in ((0, 1, 2), (2, 0, 1)):
        folder = tmp_path / "".join(map(str, order))
        weights = [(1.0, 0.7, 0.3)[i] for i in order]
        merge_packs(target, [packs[i] for i in order], folder, weights, None, method)
        contents.add((folder / "model.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pcb"])
def test_one_lossless_pack_merges_to_the_tuned_bytes_where_the_rule_keeps_it(
    method, skills, tmp_path
):
    settings = {"density": 1} if "density" in METHODS[method].model_fields else {}
    merge_packs(skills.target, skills.exact[0], tmp_path / "m", method=method, settings=settings)
    assert digests(tmp_path / "m") == digests(skills.tuned[0])


@every_method
def test_lambda_zero_gives_the_target_bit_for_bit(method, skills, tmp_path):
    settings = {"scaling": 0}
    merge_packs(skills.target, skills.exact, tmp_path / "m", method=method, settings=settings)
    assert digests(tmp_path / "m") == digests(skills.target)


def test_weights_of_zero_give_the_target_bit_for_bit(skills, tmp_path):
    merge_packs(skills.target, skills.exact, tmp_path / "m", [0, 0, 0])
    assert digests(tmp_path / "m") == digests(skills.target)


@every_method
def test_a_pack_of_weight_zero_takes_no_part(method, skills, tmp_path):
    merge_packs(skills.target, skills.exact, tmp_path / "a", [1, 0, 1], method=method)
    two = [skills.exact[0], skills.exact[2]]
    merge_packs(skills.target, two, tmp_path / "b", method=method)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_norms_and_every_other_tensor_take_part(skills, tmp_path):
    merge_packs(skills.target, skills.exact, tmp_path / "m", method="linear")
    merged, target = weights_of(tmp_path / "m"), weights_of(skills.target)
    tuned = [weights_of(folder) for folder in skills.tuned]
    for name, before in target.items():
        mean = sum(t[name].float() - before.float() for t in tuned) / len(tuned)
        torch.testing.assert_close(merged[name], (before.float() + mean).bfloat16())
        assert not torch.equal(merged[name], before)


@every_method
def test_low_rank_packs_merge_as_their_dense_deltas_do(method, skills, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    rule = find_method(method, {"density": 1} if "density" in METHODS[method].model_fields else {})
    merge_packs(skills.target, skills.lossy, tmp_path / "m", None, None, method, rule.model_dump())
    dense = [left @ right for left, right in (pack.factors(name) for pack in skills.lossy)]
    before = weights_of(skills.target)[name].float()
    expected = (before + rule.merge(dense, [1.0] * 3, [""] * 3)).bfloat16()
    merged = weights_of(tmp_path / "m")[name]
    # Sums in another order may round to the neighbour.
    torch.testing.assert_close(merged, expected, rtol=2**-7, atol=1e-5)
    assert (merged == expected).float().mean() > 0.98


def test_a_lossy_pack_alone_is_merged_as_it_is_decoded(skills, tmp_path):
    pack = skills.lossy[0]
    merge_packs(skills.target, pack, tmp_path / "m", [0.5], method="linear")
    target = Checkpoint.open(skills.target)
    expected = {name: tensor_digest(pack.rebuild(name, target.read)) for name in target.tensors}
    assert digests(tmp_path / "m") == expected


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "bert"])
def test_merging_works_on_every_kind_of_architecture(architecture, tmp_path):
    target, tuned = make_pair(tmp_path, architecture)
    pack = lossless_pack(target, tuned)
    merge_packs(target, [pack, pack], tmp_path / "m", method="ties", settings={"density": 0.5})
    before, after, merged = (Checkpoint.open(p) for p in (target, tuned, tmp_path / "m"))
    for name in before.tensors:
        delta = after.read(name).float() - before.read(name).float()
        expected = before.read(name).float() + methods.trim(delta, 0.5)
        assert torch.equal(merged.read(name), expected.bfloat16())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "tie"}, "did you mean ties"),
        ({"method": "zzz"}, "choose one of linear"),
        ({"method": "ties", "settings": {"densty": 0.5}}, "did you mean density"),
        ({"method": "linear", "settings": {"density": 0.5}}, "its settings: scaling"),
        ({"method": "ties", "settings": {"density": 0}}, "density is 0; "),
        ({"method": "sce", "settings": {"select": 1.5}}, "select is 1.5; "),
        ({"settings": {"scaling": float("nan")}}, "scaling is nan; "),
        ({"method": "dare_ties", "settings": {"seed": "x"}}, "seed is 'x'; "),
        ({"weights": [1, 2]}, "2 weights for 3 packs"),
        ({"weights": [1, 2, float("inf")]}, "too large"),
        ({"weights": [1, 2, float("nan")]}, "too large"),
        ({"weights": [1, 2, -1e7]}, "too large"),
        ({"settings": {"scaling": -1e39}}, "scaling is -1e"),
        ({"method": "linear", "weights": [0, 0, 0]}, "have no mean"),
        ({"method": "ties", "weights": [1, 1, -1]}, "use task_arithmetic"),
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_written(options, says, skills, tmp_path):
    with pytest.raises(ConfigError, match=says) as refusal:
        merge_packs(skills.target, skills.exact, tmp_path / "m", **options)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_that_the_targets_dtype_cannot_hold_are_refused(tmp_path):
    target, tuned = make_pair(tmp_path, "llama", torch.float16)
    pack = lossless_pack(target, tuned)
    with pytest.raises(ConfigError, match="float16 does not hold; use smaller ones"):
        merge_packs(target, pack, tmp_path / "m", [1e6], None, "task_arithmetic", {"scaling": 1e6})
    assert not (tmp_path / "m").exists()


def test_no_packs_at_all_are_refused(skills, tmp_path):
    with pytest.raises(ConfigError, match="no packs"):
        merge_packs(skills.target, [], tmp_path / "m")


def test_a_pack_of_another_target_is_refused_and_nothing_is_written(skills, tmp_path):
    stranger = lossless_pack(skills.tuned[1], skills.tuned[0])
    with pytest.raises(PackMismatchError, match="has other values"):
        merge_packs(skills.target, [skills.exact[0], stranger], tmp_path / "m", method="ties")
    assert list(tmp_path.iterdir()) == []


def tuned_copy(skills, folder):
    shutil.copytree(skills.tuned[0], folder)
    return folder


@pytest.mark.slow
def test_a_pack_that_grows_the_vocabulary_merges_alone_only(skills, tmp_path):
    tuned = tuned_copy(skills, tmp_path / "tuned")
    weights = weights_of(tuned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:2]])
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    config = json.loads((tuned / "config.json").read_text()) | {"vocab_size": VOCABULARY + 2}
    (tuned / "config.json").write_text(json.dumps(config))
    pack = lossless_pack(skills.target, tuned)
    with pytest.raises(PackMismatchError, match="changes its shape"):
        merge_packs(skills.target, [pack, skills.exact[1]], tmp_path / "m")
    with pytest.raises(PackMismatchError, match="changes its shape"):
        merge_packs(skills.target, pack, tmp_path / "m", method="pcb")
    merge_packs(skills.target, pack, tmp_path / "m", method="sce")
    assert digests(tmp_path / "m") == digests(tuned)


def with_file(skills, folder, name, content):
    tuned = tuned_copy(skills, folder)
    (tuned / name).write_text(content)
    return lossless_pack(skills.target, tuned)


def test_a_pack_that_changes_the_tokenizer_is_refused_among_others(skills, tmp_path):
    tuned = tuned_copy(skills, tmp_path / "tuned")
    save_tokenizer(tuned, VOCABULARY - 3)
    pack = lossless_pack(skills.target, tuned)
    with pytest.raises(PackMismatchError, match=r"tokenizer\.json: the pack of tuned changes"):
        merge_packs(skills.target, [skills.exact[1], pack], tmp_path / "m")
    merge_packs(skills.target, [pack, pack], tmp_path / "m", [0.5, 0.5])
    written = (tmp_path / "m" / "tokenizer.json").read_bytes()
    assert written == (tuned / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_side_file_is_taken_over_where_all_packs_change_it_alike(skills, tmp_path):
    name = "chat_template.jinja"
    alike = [with_file(skills, tmp_path / str(index), name, "{{ x }}") for index in range(2)]
    other = with_file(skills, tmp_path / "2", name, "{{ y }}")
    merge_packs(skills.target, alike, tmp_path / "same")
    assert (tmp_path / "same" / name).read_text() == "{{ x }}"
    merge_packs(skills.target, [*alike, other], tmp_path / "apart")
    assert not (tmp_path / "apart" / name).exists()


def test_an_interrupted_merge_leaves_nothing_behind(skills, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graftkit.checkpoint.save_file", fail)
    with pytest.raises(OutputError, match="No space left"):
        merge_packs(skills.target, skills.exact, tmp_path / "m", method="ties")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_tensors_to_the_end(skills, tmp_path):
    steps = []
    merge_packs(skills.target, skills.exact, tmp_path / "m", None, lambda *step: steps.append(step))
    count = len(Checkpoint.open(skills.target).tensors)
    assert steps[-1] == ("merging", count, count)


def test_every_setting_of_every_method_is_described():
    for kind in METHODS.values():
        assert issubclass(kind, Method)
        assert kind.__doc__
        assert all(field.description for field in kind.model_fields.values())


def test_a_merge_of_files_is_that_of_packs_in_memory(skills, tmp_path):
    files = [tmp_path / f"{index}.skillpack" for index in range(3)]
    for file, pack in zip(files, skills.lossy, strict=True):
        pack.save(file)
    for name, packs in (("files", files), ("packs", skills.lossy)):
        merge_packs(skills.target, packs, tmp_path / name, method="dare_ties")
    assert digests(tmp_path / "files") == digests(tmp_path / "packs")


def test_a_merge_does_not_depend_on_the_number_of_threads(skills, tmp_path):
    contents = set()
    for threads in (3, 1):
        torch.set_num_threads(threads)
        merge_packs(skills.target, skills.lossy, tmp_path / str(threads), method="dare_ties")
        contents.add((tmp_path / str(threads) / "model.safetensors").read_bytes())
    assert len(contents) == 1
