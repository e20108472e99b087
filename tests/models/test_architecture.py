import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, ONE_LAYER, build, lossless_pack, make_pair, save_pair

from graftkit.attachment import attach
from graftkit.checkpoint import Checkpoint
from graftkit.errors import AttachError, CheckpointError
from graftkit.fuse import merge_packs
from graftkit.models import ModuleKind, load_model, tensor_roles, tied_names


def roles_of(folder, architecture):
    target, _ = make_pair(folder, architecture)
    return tensor_roles(Checkpoint.open(target))


def kinds_of(folder, architecture, layer="0"):
    """Kind by the part of the name that follows the layer's number."""
    return {
        name.partition(f".{layer}.")[2] or name: role.kind
        for name, role in roles_of(folder, architecture).items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_on_disk_has_a_role(tmp_path, architecture):
    target, _ = make_pair(tmp_path, architecture)
    checkpoint = Checkpoint.open(target)
    roles = tensor_roles(checkpoint)
    assert list(roles) == list(checkpoint.tensors)
    model = build(architecture)
    for role in roles.values():
        assert role.parameter in model.state_dict()
        assert role.parameter.startswith(role.module)


def test_kinds_come_from_classes_and_not_from_tensor_names(tmp_path):
    kinds = kinds_of(tmp_path, "qwen3_moe")
    assert kinds["self_attn.q_proj.weight"] is ModuleKind.ATTENTION
    assert kinds["self_attn.q_norm.weight"] is ModuleKind.NORM
    assert kinds["mlp.gate.weight"] is ModuleKind.ROUTER
    assert kinds["mlp.experts.3.gate_proj.weight"] is ModuleKind.MLP
    assert kinds["model.embed_tokens.weight"] is ModuleKind.EMBEDDING
    assert kinds["lm_head.weight"] is ModuleKind.HEAD


def test_the_output_of_an_encoders_attention_is_not_its_mlp(tmp_path):
    kinds = kinds_of(tmp_path, "bert")
    assert kinds["attention.output.dense.weight"] is ModuleKind.ATTENTION
    assert kinds["attention.output.LayerNorm.bias"] is ModuleKind.NORM
    assert kinds["output.dense.weight"] is ModuleKind.MLP
    assert kinds["output.dense.bias"] is ModuleKind.BIAS


def test_stacked_experts_are_transposed_and_their_biases_are_biases(tmp_path):
    roles = roles_of(tmp_path, "gpt_oss")
    stack = roles["model.layers.0.mlp.experts.down_proj"]
    assert (stack.kind, stack.transposed, stack.linear) == (ModuleKind.MLP, True, False)
    assert roles["model.layers.0.mlp.experts.down_proj_bias"].kind is ModuleKind.BIAS
    assert roles["model.layers.0.mlp.router.weight"].kind is ModuleKind.ROUTER


def test_conv1d_weights_are_transposed_linear_layers(tmp_path):
    roles = roles_of(tmp_path, "gpt2")
    role = roles["transformer.h.0.attn.c_attn.weight"]
    assert (role.kind, role.transposed, role.linear) == (ModuleKind.ATTENTION, True, True)
    assert not roles["transformer.wpe.weight"].linear


def test_one_expert_of_a_stack_is_no_linear_layer(tmp_path):
    roles = roles_of(tmp_path, "mixtral")
    role = roles["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    assert role.parameter == "model.layers.0.mlp.experts.gate_up_proj"
    assert not role.linear


def test_tied_names_are_those_of_the_config(tmp_path):
    expected = {
        "llama": {},
        "llama_tied": {"lm_head.weight": "model.embed_tokens.weight"},
        "bert": {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    }
    for architecture, names in expected.items():
        target, _ = make_pair(tmp_path / architecture, architecture)
        assert tied_names(Checkpoint.open(target)) == names


def test_a_checkpoint_saved_by_the_base_model_has_the_same_roles_under_its_own_names(tmp_path):
    build("gpt2").transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    roles = tensor_roles(checkpoint)
    assert roles["h.0.mlp.c_fc.weight"].module == "transformer.h.0.mlp.c_fc"
    assert tied_names(checkpoint) == {"lm_head.weight": "wte.weight"}


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


def test_a_tensor_that_no_module_owns_is_refused_by_name(tmp_path):
    target, _ = make_pair(tmp_path, "llama")
    checkpoint = rewrite(target, lambda tensors: tensors.update(stray=torch.ones(3)))
    with pytest.raises(CheckpointError, match="owns tensor stray"):
        tensor_roles(checkpoint)


def test_a_matrix_of_another_shape_than_the_config_announces_is_refused(tmp_path):
    target, _ = make_pair(tmp_path, "llama")
    checkpoint = rewrite(target, lambda tensors: tensors.update({"lm_head.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[3\] on disk"):
        tensor_roles(checkpoint)


def test_attention_masks_of_old_gpt2_files_have_a_role_but_no_parameter(tmp_path):
    target, _ = make_pair(tmp_path, "gpt2")
    name = "transformer.h.0.attn.bias"
    checkpoint = rewrite(target, lambda tensors: tensors.update({name: torch.ones(1, 1, 4, 4)}))
    role = tensor_roles(checkpoint)[name]
    assert (role.kind, role.parameter) == (ModuleKind.OTHER, "")


@pytest.mark.slow
def test_a_tensor_that_is_split_when_it_is_loaded_is_packed_merged_and_not_attached(tmp_path):
    config = transformers.NomicBertConfig(**ONE_LAYER, vocab_size=96, max_position_embeddings=64)
    torch.manual_seed(0)
    model = transformers.NomicBertModel(config).eval()
    save_pair(tmp_path, model)
    on_disk = Checkpoint.open(tmp_path / "target")
    split = [name for name in on_disk.tensors if "Wqkv" in name]
    assert split
    pack = lossless_pack(tmp_path / "target", tmp_path / "tuned")
    merge_packs(tmp_path / "target", pack, tmp_path / "merged")
    merged = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items())
    with pytest.raises(AttachError, match="split or permuted when"):
        attach(load_model(tmp_path / "target"), pack)
