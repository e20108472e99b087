"""Which layers of an adapter PEFT keeps when it loads one, on models where it does not keep all."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import ONE_LAYER, lossless_pack, save_pair

from graftkit.interop import export_lora
from graftkit.models import load_model


def mamba():
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    return transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**sizes))


def mixture_with_a_dense_layer():
    config = transformers.AfmoeConfig(
        **ONE_LAYER,
        vocab_size=96,
        num_key_value_heads=2,
        head_dim=8,
        num_dense_layers=1,
        moe_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
    )
    return transformers.AfmoeForCausalLM(config)


def pooling_by_attention():
    """A vision tower whose pooling hands the weight of a projection to torch.nn.functional."""
    config = transformers.SiglipVisionConfig(**ONE_LAYER, image_size=16, patch_size=8)
    return transformers.SiglipVisionModel(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (pooling_by_attention, "attention.out_proj"),
        (mamba, "mixer.out_proj"),
        (mixture_with_a_dense_layer, "mlp.down_proj"),
    ],
)
def test_what_peft_does_not_load_or_call_is_left_out_and_listed(tmp_path, make, lost):
    peft = pytest.importorskip("peft")
    save_pair(tmp_path, make().eval())
    pack = lossless_pack(tmp_path / "target", tmp_path / "tuned")
    export = export_lora(pack, tmp_path / "target", tmp_path / "lora", rank=4)
    modules = {module.module for module in export.modules}
    assert modules
    assert not any(lost in module and "self_" not in module for module in modules)
    assert any(lost in tensor.name for tensor in export.left_out)

    on_disk = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(load_model(tmp_path / "target"), tmp_path / "lora")
    for name in modules:
        layer = loaded.base_model.model.get_submodule(name)
        key = f"base_model.model.{name}.lora_B.weight"
        assert torch.equal(layer.lora_B["default"].weight, on_disk[key])
    assert len(on_disk) == 2 * len(modules)
