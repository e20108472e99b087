"""Group-wise integers with error feedback (GPTQ), and how their codes lie in a payload.

A grid is fixed before the codes are chosen: w ≈ scale · (code − zero_point), asymmetric min-max
over a group, always containing 0 (Delta-CoMe's quantizer, GraftLLM section 3.2).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.bitpack import pack_bits, packed_bytes, unpack_bits
from graftkit.errors import CorruptPackError

GROUP_SIZE = 128
"""Weights that share one scale; the paper's value."""

_BLOCK_COLUMNS = 128
"""GPTQ updates the columns behind a block once per block: same result, far fewer passes."""

BLOCK_ELEMENTS = 2**22
"""Large matrices are worked on in blocks of rows of about this many weights, to bound memory."""

_SCALE_BYTES = 2
_MOST_DAMPING = 1e6
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class QuantizedRows:
    """Codes of a matrix whose groups run along its rows.

    codes: uint8 (rows, columns); scale: float16 (rows, groups); zero_point: uint8 (rows, groups);
    bits: width of a code and of a zero point, 1 to 8; group_size: columns per group.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int
    group_size: int

    def dequantize(self) -> Tensor:
        """scale · (code − zero_point), float32 (rows, columns), a block of rows at a time."""
        rows, columns = self.codes.shape
        weight = torch.empty(rows, columns)
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            block = slice(start, start + step)
            parts = (self.scale[block], self.zero_point[block])
            scale, zero = (
                expand_groups(torch.from_numpy(part).float(), self.group_size, columns)
                for part in parts
            )
            codes = torch.from_numpy(self.codes[block]).float()
            weight[block] = codes.sub_(zero).mul_(scale)
        return weight


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of `columns` weights; the last may be shorter."""
    return -(-columns // group_size)


def expand_groups(values: Tensor, group_size: int, columns: int) -> Tensor:
    """(rows, groups) -> (rows, columns), each value repeated over its group."""
    # A group may be far longer than the row that a file declares.
    return values.repeat_interleave(min(group_size, columns), dim=1)[:, :columns]


def minmax_grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Asymmetric min-max grid of every group, containing 0.

    Args:
        weight: float32 (rows, columns).
    Returns: scale float32 (rows, groups), already rounded to float16; zero_point float32
        (rows, groups), an integer in [0, 2^bits − 1]. An all-zero group has scale 0.
    """
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - columns))
    padded = padded.view(rows, groups, group_size)
    low = padded.amin(dim=2).clamp_(max=0)
    high = padded.amax(dim=2).clamp_(min=0)
    top = float(2**bits - 1)
    exact = ((high - low) / top).clamp_(max=_FP16_MAX)
    scale = exact.half()
    # Up to the next float16: a grid that falls short of its ends clips them, and below 6e-5, where
    # deltas live, float16 is coarse enough for that to cost more than half a step.
    short = (scale.float() < exact).to(torch.int16)
    scale = (scale.view(torch.int16) + short).view(torch.float16).float()
    zero = torch.where(scale > 0, (-low / scale.clamp(min=1e-30)).round_(), 0.0)
    return scale, zero.clamp_(0, top)


def inverse_factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """What GPTQ needs of the layer's inputs.

    Args:
        covariance: H = E[x xᵀ], (n, n), symmetric, positive semi-definite.
    Returns: T, upper Cholesky factor of H⁻¹ with columns in `order`; and `order`, columns by
        descending diagonal of H (act-order). Damping rises until the factorization succeeds.
    """
    diagonal = covariance.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    permuted = covariance[order][:, order].clone()
    mean = diagonal.mean().clamp(min=1e-30)
    damping = 1e-4
    while damping < _MOST_DAMPING:
        damped = permuted.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return factor, order
        damping *= 10
    raise ValueError("the covariance holds NaN or infinity")


def feedback_gain(covariance: Tensor | None) -> float:
    """Share of white rounding noise that GPTQ leaves in the output, in (0, 1].

    Column j can only be corrected by the columns behind it: what remains of its noise is its
    variance given them, 1 / T_jj². The mean of these over the mean diagonal of H.
    """
    if covariance is None:
        return 1.0
    factor, _ = inverse_factor(covariance)
    remaining = factor.diagonal().double().square().reciprocal().mean()
    return float(remaining / covariance.diagonal().double().mean())


def gptq_codes(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    top: Tensor | float,
    feedback: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Codes whose output error on the layer's inputs is small (GPTQ; OPTQ eq. 2 and 3).

    Args:
        weight: (rows, columns) float32.
        scale, zero_point: the grid, broadcastable to weight's shape after expansion.
        top: largest code, a number or (1, columns).
        feedback: `inverse_factor(H)`; None rounds to nearest (no calibration data).
    Returns: codes, float32 (rows, columns), integers in [0, top].
    """
    inverse_scale = torch.where(scale > 0, 1 / scale.clamp(min=1e-30), 0.0)
    top = torch.as_tensor(top, dtype=torch.float32).expand(1, weight.shape[1])
    if feedback is None:
        codes = (weight * inverse_scale).round_().add_(zero_point)
        return torch.minimum(codes.clamp_(min=0), top)
    factor, order = feedback
    parts = [part.expand_as(weight)[:, order] for part in (weight, scale, inverse_scale)]
    zero = zero_point.expand_as(weight)[:, order]
    permuted = _feedback_columns(parts[0].clone(), parts[1], parts[2], zero, top[:, order], factor)
    codes = torch.empty_like(permuted)
    codes[:, order] = permuted
    return codes


def _feedback_columns(
    weight: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, top: Tensor, factor: Tensor
) -> Tensor:
    """Quantize column by column and push each column's error onto the ones behind it."""
    codes = torch.empty_like(weight)
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, columns)
        errors = torch.empty(weight.shape[0], stop - start)
        for j in range(start, stop):
            column = weight[:, j]
            code = (column * inverse[:, j]).round_().add_(zero[:, j])
            code.clamp_(min=0).clamp_(max=top[0, j])
            codes[:, j] = code
            error = (column - (code - zero[:, j]) * scale[:, j]) / factor[j, j]
            if j + 1 < stop:
                weight[:, j + 1 : stop].addr_(error, factor[j, j + 1 : stop], alpha=-1)
            errors[:, j - start] = error
        if stop < columns:
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return codes


def quantize_rows(
    weight: Tensor, bits: int, feedback: tuple[Tensor, Tensor] | None, group_size: int = GROUP_SIZE
) -> QuantizedRows:
    """Quantize (rows, columns) float32 with groups along each row; rows are independent."""
    scale, zero = minmax_grid(weight, bits, group_size)
    columns = weight.shape[1]
    codes = gptq_codes(
        weight,
        expand_groups(scale, group_size, columns),
        expand_groups(zero, group_size, columns),
        float(2**bits - 1),
        feedback,
    )
    return QuantizedRows(
        codes.to(torch.uint8).numpy(),
        scale.half().numpy(),
        zero.to(torch.uint8).numpy(),
        bits,
        group_size,
    )


def rows_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Exact payload bytes of `pack_rows` for a matrix of this shape."""
    groups = rows * group_count(columns, group_size)
    return groups * _SCALE_BYTES + packed_bytes(groups, bits) + packed_bytes(rows * columns, bits)


def pack_rows(quantized: QuantizedRows) -> bytes:
    """Scales (float16), zero points and codes (bit-packed), in this order."""
    return b"".join(
        (
            quantized.scale.astype("<f2").tobytes(),
            pack_bits(quantized.zero_point.reshape(-1), quantized.bits).tobytes(),
            pack_bits(quantized.codes.reshape(-1), quantized.bits).tobytes(),
        )
    )


def unpack_rows(
    payload: memoryview, rows: int, columns: int, bits: int, group_size: int
) -> QuantizedRows:
    """Inverse of `pack_rows`.

    Raises: CorruptPackError when the length is wrong or a scale is not finite or negative.
    """
    expected = rows_bytes(rows, columns, bits, group_size)
    if len(payload) != expected:
        raise CorruptPackError(f"quantized rows take {expected} bytes, found {len(payload)}")
    groups = group_count(columns, group_size)
    cut = rows * groups * _SCALE_BYTES
    scale = np.frombuffer(payload[:cut], dtype="<f2").reshape(rows, groups)
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise CorruptPackError("a scale is NaN, infinite or negative")
    middle = cut + packed_bytes(rows * groups, bits)
    zero = unpack_bits(np.frombuffer(payload[cut:middle], np.uint8), bits, rows * groups)
    codes = unpack_bits(np.frombuffer(payload[middle:], np.uint8), bits, rows * columns)
    return QuantizedRows(
        codes.reshape(rows, columns),
        scale.astype(np.float16),
        zero.reshape(rows, groups),
        bits,
        group_size,
    )
