"""What coding a Gaussian value with a dead-zone step costs: bits, and the error that is left.

Tables over the ratio of standard deviation to step, made once by numerical integration; and what
one more unit costs where codes are there already.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftkit.compress.feedback import DEAD_ZONE

Array = npt.NDArray[np.float64]
_MOST_PER_UNIT = 12.0  # bits
_LOWEST, _HIGHEST, _POINTS = -6.0, 10.0, 129  # log2 of the ratio


def coding(ratio: Array) -> tuple[Array, Array]:
    """What coding a Gaussian value costs, by its standard deviation in steps.

    Returns: the entropy of its code in bits; the mean squared error in squared steps, which is that
        of leaving the value out where it is small.
    """
    grid, bits, share = _tables()
    logs = np.log2(np.maximum(ratio, 1e-30))
    over = np.maximum(logs - _HIGHEST, 0.0)
    error = ratio**2 * np.interp(logs, grid, share, left=1.0) * 4.0**-over
    return np.interp(logs, grid, bits, left=0.0) + over, error


def bits_per_unit(codes: Tensor) -> Tensor:
    """What one more unit of |code| costs an entry, bits; of codes (rows, columns), float.

    Entries are taken as two-sided geometric, P(k) ∝ t^|k|, with the mean |code| that their row
    and column lead one to expect: 2 t / (1 - t²).
    """
    size = codes.abs()
    rows, columns = size.shape
    of_row = size.mean(dim=1, keepdim=True) + 0.5 / columns
    of_column = size.mean(dim=0, keepdim=True) + 0.5 / rows
    mean = of_row * of_column / size.mean().clamp(min=0.5 / codes.numel())
    chance = ((mean.square() + 1).sqrt() - 1) / mean
    return torch.log2(chance).neg().clamp(min=0.01, max=_MOST_PER_UNIT)


@cache
def _tables() -> tuple[Array, Array, Array]:
    """log2 of the ratio, bits, error as a share of the variance."""
    grid = np.linspace(_LOWEST, _HIGHEST, _POINTS)
    values = np.linspace(-8, 8, 80_001)
    density = np.exp(-(values**2) / 2)
    density /= density.sum()
    bits, error = np.empty(_POINTS), np.empty(_POINTS)
    for i, ratio in enumerate(2.0**grid):
        scaled = values * ratio
        codes = np.sign(scaled) * np.floor(np.abs(scaled) + DEAD_ZONE)
        chance = np.bincount((codes - codes.min()).astype(np.int64), weights=density)
        chance = chance[chance > 0]
        bits[i] = -(chance * np.log2(chance)).sum()
        error[i] = (density * (scaled - codes) ** 2).sum() / ratio**2
    return grid, np.maximum.accumulate(bits), error
