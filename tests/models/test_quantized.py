import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import lossless_pack, make_pair

from graftkit.errors import CheckpointError
from graftkit.interop import import_lora

CONFIGS = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
    "awq": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
}
Q = "model.layers.0.self_attn.q_proj."
TENSORS = {
    "gptq": {Q + "qweight": torch.zeros(4, 32, dtype=torch.int32)},
    "compressed-tensors": {Q + "weight_scale": torch.ones(32, 1)},
    "bitsandbytes": {Q + "SCB": torch.ones(32)},
    "i8 weights": {Q + "weight": torch.zeros(32, 32, dtype=torch.int8)},
    "F8_E4M3": {Q + "weight": torch.zeros(32, 32).to(torch.float8_e4m3fn)},
}


def refusal(target, tuned):
    with pytest.raises(CheckpointError) as caught:
        lossless_pack(target, tuned)
    return str(caught.value)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_config_that_says_quantized_is_refused_with_the_method(tmp_path, method, side):
    folders = make_pair(tmp_path, "llama")
    file = folders[side] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIGS[method]))
    assert f"quantized ({method}); use the unquantized model" in refusal(*folders)


@pytest.mark.parametrize("method", TENSORS)
@pytest.mark.parametrize("side", [0, 1])
def test_tensors_tell_that_a_checkpoint_is_quantized(tmp_path, method, side):
    folders = make_pair(tmp_path, "llama")
    file = folders[side] / "model.safetensors"
    tensors = load_file(file)
    del tensors[Q + "weight"]
    save_file(tensors | TENSORS[method], file, {"format": "pt"})
    line = refusal(*folders)
    assert "quantized (" in line
    assert method in line
    assert "architectures" not in line


def test_an_adapter_of_a_quantized_target_is_refused_alike(tmp_path):
    from interop.adapters import make_adapter

    target, adapter = make_adapter(tmp_path, "llama", target_modules=["q_proj"])
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIGS["fp8"]))
    with pytest.raises(CheckpointError, match=r"quantized \(fp8\)"):
        import_lora(target, adapter, tmp_path / "x.skillpack")
