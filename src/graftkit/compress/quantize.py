"""Integers in place of weights: packed bits, group-wise grids (GPTQ), and steps with feedback.

Packed bits. Codes of 1 to 8 bits lie in bytes without gaps: code i occupies the bits
[i * bits, (i + 1) * bits) of the stream, bit j of the stream is bit j % 8 (least significant first)
of byte j // 8, and the last byte is filled up with zero bits. Eight codes fill exactly `bits`
bytes, so one 64-bit word holds eight codes, one a byte, and three shift-and-merge steps close (or
open) the gaps between them: pairs, quads, all eight.

Group-wise grids. w ≈ scale · (code − zero_point), asymmetric min-max over a group of columns,
always containing 0 (the quantizer of Delta-CoMe; GraftLLM, section 3.2). The grid is fixed first,
then GPTQ (arXiv 2210.17323) chooses the codes: each column's error is pushed onto those behind it.

Steps with feedback. One step per column, for entropy coding. For the error E of a matrix,
tr(E Σ Eᵀ) = Σ_j L_jj² ‖t_j − δ̂_j‖², Σ = L Lᵀ, where t_j is column j plus the errors of the columns
behind it, as L weights them. Steps in proportion to 1 / L_jj spread the error evenly, as reverse
water-filling asks (WaterSIC, arXiv 2603.04956).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftkit.errors import CorruptPackError

Bytes = npt.NDArray[np.uint8]
Lanes = npt.NDArray[np.uint64]

CODES_PER_LANE = 8
LANES_PER_BLOCK = 1 << 14  # 131,072 codes at a time: temporaries stay inside the cache


def packed_bytes(count: int, bits: int) -> int:
    """Size of `count` packed codes in bytes: ceil(count * bits / 8).

    Raises: ValueError when bits is outside 1..8 or count is negative.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; a code has 1 to 8 bits")
    if count < 0:
        raise ValueError(f"count is {count}; it cannot be negative")
    return -(-count * bits // 8)


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """Pack `codes` without gaps, as the module describes.

    Args:
        codes: uint8, any shape, read in C order; every code below 2**bits.
        bits: width of one code, 1 to 8.
    Returns: uint8, (packed_bytes(codes.size, bits),).
    Raises: ValueError when bits is outside 1..8 or a code does not fit.
    """
    packed = np.empty(packed_bytes(codes.size, bits), dtype=np.uint8)
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"code {int(flat.max())} does not fit into {bits} bits")
    if bits == 8:
        return flat.copy()
    step = LANES_PER_BLOCK * CODES_PER_LANE
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        rows = _close_gaps(_as_lanes(block), bits).view(np.uint8).reshape(-1, 8)[:, :bits]
        first = packed_bytes(start, bits)
        size = packed_bytes(block.size, bits)
        packed[first : first + size] = rows.reshape(-1)[:size]
    return packed


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """Inverse of `pack_bits`.

    Args:
        packed: uint8, (packed_bytes(count, bits),).
        bits: width of one code, 1 to 8.
        count: number of codes.
    Returns: uint8 codes, (count,).
    Raises: CorruptPackError when the number of bytes is wrong or a padding bit is set; ValueError
        when bits is outside 1..8 or count is negative.
    """
    expected = packed_bytes(count, bits)
    if packed.size != expected:
        raise CorruptPackError(
            f"{count} codes of {bits} bits take {expected} bytes; found {packed.size}. "
            "The file is damaged; fetch it again."
        )
    flat = np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1)
    used = count * bits % 8
    if used and int(flat[-1]) >> used:
        raise CorruptPackError("a padding bit after the last code is set; the file is damaged.")
    if bits == 8:
        return flat.copy()
    codes = np.empty(count, dtype=np.uint8)
    step = LANES_PER_BLOCK * CODES_PER_LANE
    for start in range(0, count, step):
        size = min(step, count - start)
        first = packed_bytes(start, bits)
        lanes = _read_lanes(flat[first : first + packed_bytes(size, bits)], bits)
        codes[start : start + size] = _open_gaps(lanes, bits).view(np.uint8)[:size]
    return codes


def _as_lanes(codes: Bytes) -> Lanes:
    """A copy of codes (n,) as little-endian uint64 (ceil(n / 8),), zero-padded."""
    lanes = np.zeros(-(-codes.size // CODES_PER_LANE), dtype="<u8")
    lanes.view(np.uint8)[: codes.size] = codes
    return lanes


def _read_lanes(packed: Bytes, bits: int) -> Lanes:
    """Packed bytes (n,) as little-endian uint64 (ceil(n / bits),), `bits` bytes in each."""
    lanes = np.zeros(-(-packed.size // bits), dtype="<u8")
    rows = lanes.view(np.uint8).reshape(-1, 8)
    whole = packed.size // bits
    rows[:whole, :bits] = packed[: whole * bits].reshape(-1, bits)
    if whole < len(rows):
        rows[whole, : packed.size - whole * bits] = packed[whole * bits :]
    return lanes


def _merge_steps(bits: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """(shift, low mask, high mask) of the three steps from 8-bit fields to one 64-bit field."""
    steps = []
    for field in (8, 16, 32):  # width of the fields that are merged in pairs
        width = bits * field // 8
        mask = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * field))
        steps.append((np.uint64(field - width), np.uint64(mask), np.uint64(mask << width)))
    return steps


def _close_gaps(lanes: Lanes, bits: int) -> Lanes:
    """Move the eight codes of each lane together, in place; returns lanes."""
    for shift, low, high in _merge_steps(bits):
        upper = lanes >> shift
        upper &= high
        lanes &= low
        lanes |= upper
    return lanes


def _open_gaps(lanes: Lanes, bits: int) -> Lanes:
    """Inverse of `_close_gaps`, in place; returns lanes."""
    for shift, low, high in reversed(_merge_steps(bits)):
        upper = lanes & high
        upper <<= shift
        lanes &= low
        lanes |= upper
    return lanes


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
    """The factor of the inverse Hessian that GPTQ pushes errors with.

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


DEAD_ZONE = 0.4
"""A value is rounded up from 1 − DEAD_ZONE of a step: with entropy coding zeros are cheap."""

_FEEDBACK_COLUMNS = 64


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


def gram_matrix(rows: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """V Σ, (r, n), and V Σ Vᵀ, (r, r) float64, of rows V (r, n); covariance: Σ, None for I.

    The products are float32 unless a square is below what float32 holds to full precision; then
    both are float64.
    """
    weighted = rows if covariance is None else rows @ covariance
    gram = weighted @ rows.T
    limits = torch.finfo(torch.float32)
    if gram.diagonal().min() > limits.tiny / limits.eps:
        return weighted, gram.double()
    weighted = rows.double() if covariance is None else rows.double() @ covariance.double()
    return weighted, weighted @ rows.double().T


def solve_ridged(gram: Tensor, right_side: Tensor, ridge: float) -> Tensor:
    """X, float64, with (G + ridge · mean(diagonal of G) · I) X = right_side, G (r, r) float64."""
    ridged = gram.clone()
    ridged.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-300))
    return torch.linalg.solve(ridged, right_side.double())


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
    corrected = weight.clone()
    columns = weight.shape[1]
    for stop in range(columns, 0, -_FEEDBACK_COLUMNS):
        start = max(0, stop - _FEEDBACK_COLUMNS)
        relative = lower[start:, start:stop] / lower.diagonal()[start:stop]
        if stop < columns:
            corrected[:, start:stop].addmm_(errors[:, stop:], relative[stop - start :])
        for j in range(stop - 1, start - 1, -1):
            column = corrected[:, j]
            if j + 1 < stop:
                column = (
                    column
                    + errors[:, j + 1 : stop] @ relative[j + 1 - start : stop - start, j - start]
                )
            codes[:, j] = round_codes(column / steps[j])
            errors[:, j] = weight[:, j] - codes[:, j] * steps[j]
    return codes
