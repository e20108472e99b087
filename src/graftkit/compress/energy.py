"""Energy of a matrix in a layer's output, block by block."""

import torch
from torch import Tensor

from graftkit.compress.quantize import BLOCK_ELEMENTS

_CACHED_ELEMENTS = 2**16  # few enough that float32 sums them well
_SMALLEST_SUM = 1e-30  # float32 loses digits of the squares that add up to less


def output_energy(matrix: Tensor, covariance: Tensor | None) -> float:
    """E‖W x‖² = tr(W H Wᵀ), or ‖W‖² without H; blocks are summed in float64.

    A block whose squares float32 cannot hold is computed in float64 as well.

    Args:
        matrix: W, (m, n), any float dtype; an embedding is never copied whole.
        covariance: H = E[x xᵀ], (n, n), or None.
    """
    total = 0.0
    block = _CACHED_ELEMENTS if covariance is None else BLOCK_ELEMENTS
    step = max(1, block // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step].float()
        energy = _block_energy(part, covariance)
        if not _SMALLEST_SUM < energy < float("inf") and bool(part.any()):
            wide = None if covariance is None else covariance.double()
            energy = _block_energy(part.double(), wide)
        total += energy
    return total


def _block_energy(part: Tensor, covariance: Tensor | None) -> float:
    if covariance is None:
        flat = part.reshape(-1)
        return float(torch.dot(flat, flat))
    return float((part @ covariance * part).sum(dtype=torch.float64))
