"""Checkpoints such as mergekit writes: several shards, other metadata, other files beside them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, lossless_pack, perturb

from graftkit.fuse import merge_packs
from graftkit.models import load_model
from graftkit.pack import pack_delta


def merged_checkpoint(folder, architecture, shards=3):
    """A target, and the mean of two fine-tunes of it as a merging tool leaves it on disk."""
    model = build(architecture, torch.bfloat16)
    model.save_pretrained(folder / "target")
    parts = []
    for seed in (1, 2):
        tuned = build(architecture, torch.bfloat16)
        perturb(tuned, seed=seed, scale=0.02)
        tuned.save_pretrained(folder / f"tuned-{seed}")
        parts.append(load_file(folder / f"tuned-{seed}" / "model.safetensors"))
    mean = {name: (parts[0][name].float() + parts[1][name].float()) / 2 for name in parts[0]}
    tensors = {name: tensor.bfloat16() for name, tensor in mean.items()}
    if architecture == "llama_tied":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    merged = folder / "merged"
    merged.mkdir()
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {name: tensors[name] for name in names[index::shards]}
        save_file(chosen, merged / file, metadata={"mergekit_version": "0.1.4", "format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"mergekit_version": "0.1.4"}, "weight_map": weight_map}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "target" / "config.json").read_text())
    renamed = config | {"_name_or_path": "base", "torch_dtype": "bfloat16", "use_cache": False}
    (merged / "config.json").write_text(json.dumps(renamed))
    (merged / "mergekit_config.yml").write_text("merge_method: linear\n")
    (merged / "README.md").write_text("---\ntags: [mergekit, merge]\n---\n")
    return folder / "target", merged, tensors


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_a_merged_checkpoint_packs_without_loss_like_any_tuned_model(tmp_path, architecture):
    target, merged, tensors = merged_checkpoint(tmp_path, architecture)
    pack = lossless_pack(target, merged)
    written = load_file(merge_packs(target, pack, tmp_path / "again") / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        merged / "config.json"
    ).read_bytes()
    assert not (tmp_path / "again" / "mergekit_config.yml").exists()
    load_model(tmp_path / "again")


@pytest.mark.slow
def test_a_merged_checkpoint_packs_into_a_budget(tmp_path):
    target, merged, _ = merged_checkpoint(tmp_path, "llama")
    pack = pack_delta(target, merged, budget="80%", workers=1)
    assert pack.pack_bytes <= 0.8 * (target / "model.safetensors").stat().st_size
    moved = [record for record in pack.manifest.tensors if record.codec != "zero"]
    assert len(moved) == len(pack.manifest.tensors)
