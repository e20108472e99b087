"""Successive rounding with error feedback under a covariance, one step for every column.

For the error E of a matrix, tr(E Σ Eᵀ) = Σ_j L_jj² ‖t_j − δ̂_j‖², Σ = L Lᵀ, where t_j is column j
plus what the columns behind it got wrong. Steps in proportion to 1 / L_jj therefore spread the
error evenly, which is what reverse water-filling asks (WaterSIC, arXiv 2603.04956).
"""

import torch
from torch import Tensor

DEAD_ZONE = 0.4
"""A value is rounded up from 1 − DEAD_ZONE of a step: with entropy coding zeros are cheap."""

_BLOCK_COLUMNS = 64
_MOST_DAMPING = 1e6


def cholesky(covariance: Tensor) -> Tensor:
    """L, lower, with Σ = L Lᵀ; damping rises until it exists. Raises: ValueError on NaN."""
    damping = 0.0
    while damping < _MOST_DAMPING:
        damped = covariance.clone()
        damped.diagonal().add_(damping * covariance.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
        damping = max(10 * damping, 1e-8)
    raise ValueError("the covariance holds NaN or infinity")


def round_codes(values: Tensor) -> Tensor:
    """Integers with a dead zone around 0."""
    return values.abs().add_(DEAD_ZONE).floor_().copysign_(values)


def feedback_codes(weight: Tensor, steps: Tensor, lower: Tensor | None) -> Tensor:
    """Codes, float32 (rows, columns), so that codes · steps is near `weight` under Σ.

    Args:
        weight: (rows, columns) float32. steps: (columns,), all above 0.
        lower: L of Σ (columns, columns), or None for Σ = I, which needs no feedback.
    """
    if lower is None:
        return round_codes(weight / steps)
    # Every block must know its own past only: relative[i, j] = L_ij / L_jj.
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    wanted = weight.clone()
    columns = weight.shape[1]
    for stop in range(columns, 0, -_BLOCK_COLUMNS):
        start = max(0, stop - _BLOCK_COLUMNS)
        relative = lower[start:, start:stop] / lower.diagonal()[start:stop]
        if stop < columns:
            wanted[:, start:stop].addmm_(errors[:, stop:], relative[stop - start :])
        for j in range(stop - 1, start - 1, -1):
            column = wanted[:, j]
            if j + 1 < stop:
                column = (
                    column
                    + errors[:, j + 1 : stop] @ relative[j + 1 - start : stop - start, j - start]
                )
            codes[:, j] = round_codes(column / steps[j])
            errors[:, j] = weight[:, j] - codes[:, j] * steps[j]
    return codes
