"""Energy of a matrix in a layer's output, block by block."""

import torch
from torch import Tensor

from graftkit.compress.quantize import BLOCK_ELEMENTS


def output_energy(matrix: Tensor, covariance: Tensor | None) -> float:
    """E‖W x‖² = tr(W H Wᵀ), or ‖W‖² without H, summed in float64.

    Args:
        matrix: W, (m, n), any float dtype; an embedding is never copied whole.
        covariance: H = E[x xᵀ], (n, n), or None.
    """
    total = 0.0
    step = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step].float()
        weighted = part if covariance is None else part @ covariance
        total += float((weighted * part).sum(dtype=torch.float64))
    return total
