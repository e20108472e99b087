"""Tiers of singular components as published: V̂h and Û quantized one after the other, no refit."""

import struct

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.lowrank import Tier
from graftkit.compress.quantize import (
    GROUP_SIZE,
    QuantizedRows,
    expand_groups,
    gptq_codes,
    inverse_factor,
    minmax_grid,
    pack_rows,
    quantize_rows,
    rows_bytes,
    unpack_rows,
)

_HEAD = struct.Struct("<BBH")


def encode_tier(left: Tensor, right: Tensor, bits: int, covariance: Tensor) -> tuple[bytes, Tensor]:
    """Quantize one tier.

        V̂h = argmin ‖(Vh − V̂h) x‖,   Û = argmin ‖(U − Û) S V̂h x‖

    Args:
        left: U, (m, r). right: S Vh, (r, n). covariance: H of the inputs x, (n, n).
    Returns: the payload, and its δ̂ (m, n).
    """
    values = right.norm(dim=1).clamp(min=1e-30).half().float().clamp(min=6.2e-5)
    rows = quantize_rows(right / values[:, None], bits, inverse_factor(covariance))
    decoded = rows.dequantize() * values[:, None]
    columns = _quantize_columns(left, bits, decoded @ covariance @ decoded.T)
    payload = _HEAD.pack(bits, 0, len(values)) + values.half().numpy().tobytes()
    delta = columns.dequantize().T @ decoded
    return payload + pack_rows(rows) + pack_rows(columns), delta


def decode_tiers(payload: bytes, shape: tuple[int, int]) -> Tensor:
    """The sum of all tiers of one matrix, (m, n) float32."""
    delta, offset = torch.zeros(shape), 0
    while offset < len(payload):
        bits, _, rank = _HEAD.unpack_from(payload, offset)
        offset += _HEAD.size
        values = np.frombuffer(payload, "<f2", rank, offset).astype(np.float32)
        offset += 2 * rank
        factors = []
        for columns in (shape[1], shape[0]):
            size = rows_bytes(rank, columns, bits, GROUP_SIZE)
            part = memoryview(payload)[offset : offset + size]
            factors.append(unpack_rows(part, rank, columns, bits, GROUP_SIZE).dequantize())
            offset += size
        delta += factors[1].T @ (factors[0] * torch.from_numpy(values)[:, None])
    return delta


def tiers_bytes(shape: tuple[int, int], tiers: tuple[Tier, ...]) -> int:
    """Exact bytes of all tiers of one matrix."""
    return sum(
        _HEAD.size + 2 * tier.rank
        + sum(rows_bytes(tier.rank, side, tier.bits, GROUP_SIZE) for side in shape)
        for tier in tiers
    )  # fmt: skip


def _quantize_columns(left: Tensor, bits: int, gram: Tensor) -> QuantizedRows:
    """U as (r, m): groups run down each component, feedback goes across components."""
    rows = left.shape[0]
    scale, zero = minmax_grid(left.T.contiguous(), bits, GROUP_SIZE)
    codes = gptq_codes(
        left.contiguous(),
        expand_groups(scale, GROUP_SIZE, rows).T,
        expand_groups(zero, GROUP_SIZE, rows).T,
        float(2**bits - 1),
        inverse_factor(gram),
    )
    return QuantizedRows(
        codes.T.to(torch.uint8).contiguous().numpy(),
        scale.half().numpy(),
        zero.to(torch.uint8).numpy(),
        bits,
        GROUP_SIZE,
    )
