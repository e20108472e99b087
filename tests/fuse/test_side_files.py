"""What lies beside the weights of a merged checkpoint, and what a pack holds of it."""

import json
import os
from copy import deepcopy

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from tiny_models import architectures, build, lossless_pack, make_pair, perturb

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, ConfigError, CorruptPackError, PackMismatchError
from graftkit.fuse.merge import fuse_packs, merge_packs
from graftkit.fuse.sequential import merge_in_turn
from graftkit.interop import export_lora
from graftkit.model_files import card_with_note, config_for_weights, copied_names, is_side_file
from graftkit.models.views import CheckpointWriter
from graftkit.skillpack.manifest import parse_manifest

CARRIED = {
    "preprocessor_config.json": b"{}",
    "processor_config.json": b'{"a": 1}',
    "sentencepiece.bpe.model": b"\x01\x02",
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "additional_chat_templates/tools.jinja": b"{{ x }}",
    "LICENSE": b"free",
    "NOTICE.txt": b"thanks",
    "labels.csv": b"a,b",
}
LEFT = (
    *("model.onnx", "model.onnx_data", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin"),
    *("model-q4.gguf", "consolidated.00.pth", "last.ckpt", "optimizer.pt", "rng_state.pth"),
    *("training_args.bin", "scheduler.pt", "lora/adapter_config.json"),
    *("pytorch_model.bin.index.json", "tf_model.h5.index.json", "trainer_state.json"),
    *(".git/config", ".cache/x.json", ".gitattributes", "checkpoint-50/config.json"),
    *("onnx/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "runs/log.txt"),
    *("modeling_own.py", "old.skillpack"),
)


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def set_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings, indent=2))


@pytest.fixture
def pair(tmp_path):
    return make_pair(tmp_path, "gpt2", torch.float32)


@pytest.mark.slow
def test_a_merged_checkpoint_has_every_file_of_the_target_that_is_no_weight(pair, tmp_path):
    target, tuned = pair
    write(target, CARRIED | dict.fromkeys(LEFT, b"x"))
    merged = merge_packs(target, lossless_pack(target, tuned), tmp_path / "merged")
    assert {name: (merged / name).read_bytes() for name in CARRIED} == CARRIED
    assert [name for name in LEFT if (merged / name).exists()] == []


def test_links_out_of_the_target_are_not_followed_but_those_of_the_hub_are(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "note.txt").write_text("away")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    os.symlink("../../blobs/0123", snapshot / "preprocessor_config.json")
    os.symlink("../../blobs/0123", snapshot / "label_names.json")
    os.symlink(tmp_path / "secret.txt", snapshot / "secret.txt")
    os.symlink(tmp_path / "away", snapshot / "away")
    os.symlink(snapshot, snapshot / "myself")
    assert copied_names(snapshot) == ["label_names.json", "preprocessor_config.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["source.spm", "preprocessor_config.json", "1_Pooling/config.json", "tekken.json"]
)
def test_a_file_of_the_tuned_models_own_comes_out_of_its_pack(pair, tmp_path, name):
    target, tuned = pair
    write(target, {name: b"the target's, and more"})
    write(tuned, {name: b"the tuned model's"})
    lossless_pack(target, tuned).save(tmp_path / "x.skillpack")
    merged = merge_packs(target, tmp_path / "x.skillpack", tmp_path / "merged")
    assert (merged / name).read_bytes() == b"the tuned model's"


@pytest.mark.slow
def test_a_file_that_no_pack_can_hold_is_refused_by_its_name(pair):
    target, tuned = pair
    for folder, content in ((target, b"1"), (tuned, b"2")):
        write(folder, {"README.md": content, "eval_results.json": content, "x.png": content})
    lossless_pack(target, tuned)
    for folder, content in ((target, b"1"), (tuned, b"2")):
        write(folder, {"lexicon.json": content})
    with pytest.raises(CheckpointError, match=r"lexicon\.json"):
        lossless_pack(target, tuned)


@pytest.mark.parametrize(
    "name",
    ["../x.model", "a/b.model", "/x.model", ".x.model", "x.py", "model.safetensors", "x.json"],
)
def test_no_other_name_is_a_side_file(name):
    assert not is_side_file(name)


@pytest.mark.slow
def test_a_pack_that_names_another_file_is_refused(pair):
    target, tuned = pair
    write(tuned, {"source.spm": b"x"})
    manifest = lossless_pack(target, tuned).manifest
    assert [file.name for file in manifest.files] == ["source.spm"]
    forged = manifest.to_json().replace("source.spm", "a/b.spm")
    with pytest.raises(CorruptPackError, match=r"a/b\.spm"):
        parse_manifest(forged)


@pytest.mark.slow
def test_code_comes_along_only_where_it_is_trusted(pair, tmp_path, capsys):
    target, tuned = pair
    write(target, {"modeling_own.py": b"1"})
    lossless_pack(target, tuned).save(tmp_path / "x.skillpack")
    run("merge", target, tmp_path / "x.skillpack", "-o", tmp_path / "plain")
    assert "modeling_own.py" in capsys.readouterr().out
    trusting = [target, tmp_path / "x.skillpack", "-o", tmp_path / "t", "--trust-remote-code"]
    run("merge", *trusting)
    assert not (tmp_path / "plain" / "modeling_own.py").exists()
    assert (tmp_path / "t" / "modeling_own.py").read_bytes() == b"1"


@pytest.mark.slow
def test_code_that_differs_is_not_taken_for_the_tuned_models(pair, tmp_path):
    target, tuned = pair
    write(target, {"modeling_own.py": b"1"})
    write(tuned, {"modeling_own.py": b"2"})
    pack = lossless_pack(target, tuned)
    merge_packs(target, pack, tmp_path / "without")
    with pytest.raises(PackMismatchError, match=r"modeling_own\.py"):
        merge_packs(target, pack, tmp_path / "with", trust_remote_code=True)


@pytest.mark.slow
def test_the_targets_card_says_what_the_folder_is(pair, tmp_path):
    target, tuned = pair
    write(target, {"README.md": b"---\nlicense: mit\n---\n# Target\nIt is good."})
    merged = merge_packs(target, lossless_pack(target, tuned), tmp_path / "m")
    card = (merged / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert card.index("Merged by graftkit from target and tuned") < card.index("# Target")
    assert card_with_note(b"no metadata", "note") == b"\n> note\n\nno metadata"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures(["gpt2", "llama"], quick=("llama",)))
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_json_says_the_dtype_of_the_tensors(tmp_path, architecture, key):
    model = build(architecture, torch.bfloat16)
    model.save_pretrained(tmp_path / "target")
    tuned = deepcopy(model).float()
    perturb(tuned, seed=1, scale=0.02)
    tuned.save_pretrained(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {key: "float32"}))
    pack = lossless_pack(tmp_path / "target", tmp_path / "tuned")
    merges = {"float32": None, "bfloat16": [0.5]}
    for dtype, weights in merges.items():
        merged = merge_packs(tmp_path / "target", pack, tmp_path / dtype, weights=weights)
        assert json.loads((merged / "config.json").read_text())[key] == dtype
        tensors = load_file(merged / "model.safetensors").values()
        assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{dtype}"}
    in_turn = merge_in_turn(tmp_path / "target", [pack], tmp_path / "turn", "opcm")
    assert json.loads((in_turn / "config.json").read_text())[key] == "bfloat16"


def test_dtypes_of_inner_configurations_follow_and_right_ones_stay():
    config = {"dtype": "float32", "text_config": {"dtype": "float16", "x": {"dtype": "odd"}}}
    written = json.loads(
        config_for_weights(json.dumps(config).encode(), {"float32": 1, "bfloat16": 9})
    )
    inner = {"dtype": "bfloat16", "x": {"dtype": "odd"}}
    assert written == {"dtype": "float32", "text_config": inner}
    for right in (b'{"dtype":"bfloat16"}', b'{"dtype": null}', b"{}", b"no json"):
        assert config_for_weights(right, {"bfloat16": 1}) == right


@pytest.mark.slow
def test_config_json_does_not_name_weights_that_are_not_there(pair, tmp_path):
    target, tuned = pair
    for folder in pair:
        (folder / "model.safetensors").rename(folder / "own.safetensors")
        set_config(folder, transformers_weights="own.safetensors")
    merged = merge_packs(target, lossless_pack(target, tuned), tmp_path / "m")
    assert Checkpoint.open(merged).tensors.keys() == Checkpoint.open(tuned).tensors.keys()
    assert "transformers_weights" not in json.loads((merged / "config.json").read_text())


def test_a_trained_checkpoint_keeps_the_files_and_dtype_of_its_target(tmp_path):
    model = build("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "target")
    set_config(tmp_path / "target", dtype="float32")
    write(tmp_path / "target", {"preprocessor_config.json": b"{}", "modeling_own.py": b"1"})
    writer = CheckpointWriter(model, Checkpoint.open(tmp_path / "target"))
    writer.write(model.float().state_dict(), tmp_path / "tuned")
    assert (tmp_path / "tuned" / "preprocessor_config.json").read_bytes() == b"{}"
    assert not (tmp_path / "tuned" / "modeling_own.py").exists()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def relu(tmp_path):
    """A target, a pack that changes its activation, and one that does not."""
    target, tuned = make_pair(tmp_path, "gpt2", torch.float32)
    plain = lossless_pack(target, tuned)
    set_config(tuned, activation_function="relu")
    return target, lossless_pack(target, tuned), plain


@pytest.mark.slow
def test_a_change_of_the_computation_is_merged_alone_and_whole_or_refused(relu, tmp_path):
    target, pack, plain = relu
    other = tmp_path / "other"
    merge_packs(target, plain, other)
    merged = merge_packs(target, pack, tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["activation_function"] == "relu"
    attempts = [
        lambda: merge_packs(target, pack, tmp_path / "half", weights=[0.5]),
        lambda: merge_packs(target, [pack, plain], tmp_path / "both"),
        lambda: fuse_packs(target, [pack, plain], tmp_path / "both.skillpack"),
        lambda: merge_in_turn(target, [pack], tmp_path / "turn", "opcm"),
    ]
    for attempt in attempts:
        with pytest.raises(PackMismatchError, match="activation_function"):
            attempt()
    merge_packs(target, [pack, plain], tmp_path / "only", weights=[0, 1])


def test_a_lora_cannot_carry_a_change_of_the_computation(relu, tmp_path):
    target, pack, _ = relu
    with pytest.raises(ConfigError, match="activation_function"):
        export_lora(pack, target, tmp_path / "lora", rank=2)
