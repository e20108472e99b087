"""Quantized checkpoints are told apart from others before their tensors are looked at."""

import re
from typing import Any

from graftkit.delta import Checkpoint
from graftkit.errors import CheckpointError

# Names that GPTQ, AWQ, EETQ, compressed-tensors, fp8 and bitsandbytes give to their tensors.
_NAMES = {
    r"\.(qweight|qzeros)$": "gptq or awq",
    r"\.(weight_packed|weight_scale|weight_zero_point|weight_shape)$": "compressed-tensors",
    r"\.(weight_scale_inv|input_scale)$": "fp8",
    r"\.(SCB|weight_format|absmax|quant_map|quant_state\.\S+)$": "bitsandbytes",
}
_SETTINGS = ("quantization_config", "compression_config")
_CODES = ("I8", "U8")


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError for a quantized checkpoint, naming the method."""
    method = quantization_method(checkpoint)
    if method is not None:
        raise CheckpointError(f"{checkpoint.path}: quantized ({method}); use the unquantized model")


def quantization_method(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantized, None where they are not."""
    config = checkpoint.config
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in _SETTINGS:
            if isinstance(part.get(key), dict):
                return _method(part[key], key)
    for name, info in checkpoint.tensors.items():
        for pattern, method in _NAMES.items():
            if re.search(pattern, name):
                return method
        if info.dtype in _CODES and len(info.shape) == 2 and name.endswith(".weight"):
            return f"{info.dtype.lower()} weights"
    return None


def _method(settings: dict[str, Any], key: str) -> str:
    named = settings.get("quant_method") or settings.get("quant_algo")
    if isinstance(named, str):
        return " ".join(named.split())[:40]
    return "compressed-tensors" if key == "compression_config" else "method unknown"
