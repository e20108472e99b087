"""In which floating-point format this machine computes fastest."""

from collections.abc import Mapping
from typing import Any

import torch

_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")


def bfloat16_pays(device: str = "cpu") -> bool:
    """Whether this device multiplies in bfloat16. Emulated, it is ten times slower than float32.

    Older torch does not tell of processors; the answer is no then.

    Args:
        device: cpu or cuda.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(instruction) for instruction in _BFLOAT16_INSTRUCTIONS)
