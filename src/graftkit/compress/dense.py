"""Dense codec: δ itself as group-wise integers, for flat spectra and matrices too small to factor.

A matrix whose factors would cost more than its direct form (the k and v projections of
grouped-query attention) is written this way.
"""

import struct
from itertools import pairwise

import torch
from torch import Tensor

from graftkit.compress.quantize import (
    BLOCK_ELEMENTS,
    GROUP_SIZE,
    QuantizedRows,
    inverse_factor,
    pack_rows,
    quantize_rows,
    rows_bytes,
    unpack_rows,
)
from graftkit.errors import CorruptPackError

_HEAD = struct.Struct("<BH")


def payload_bytes(shape: tuple[int, int], bits: int, group_size: int = GROUP_SIZE) -> int:
    """Exact bytes of `encode` for a matrix of this shape."""
    return _HEAD.size + rows_bytes(*shape, bits, group_size)


def encode(delta: Tensor, covariance: Tensor | None, bits: int) -> bytes:
    """Quantize δ, (m, n) float32, with GPTQ on H (n, n), or to nearest where H is None."""
    feedback = None if covariance is None else inverse_factor(covariance)
    rows, columns = delta.shape
    step = max(1, BLOCK_ELEMENTS // columns)
    edges = [*range(0, rows, step), rows]
    blocks = [quantize_rows(delta[start:stop], bits, feedback) for start, stop in pairwise(edges)]
    return _HEAD.pack(bits, GROUP_SIZE) + pack_rows(_concatenate(blocks))


def decode(payload: memoryview, shape: tuple[int, int]) -> Tensor:
    """δ̂, (m, n) float32. Raises: CorruptPackError for anything but a whole, sane payload."""
    bits, group = _read_head(payload)
    return unpack_rows(payload[_HEAD.size :], *shape, bits, group).dequantize()


def describe(payload: memoryview, shape: tuple[int, int]) -> dict[str, object]:
    """Bits of a code, for `inspect`."""
    return {"bits": _read_head(payload)[0]}


def _read_head(payload: memoryview) -> tuple[int, int]:
    if len(payload) < _HEAD.size:
        raise CorruptPackError("dense payload ends inside its header")
    bits, group = _HEAD.unpack_from(payload, 0)
    if not 1 <= bits <= 8 or group == 0:
        raise CorruptPackError(f"dense header names {bits} bits and group size {group}")
    return bits, group


def _concatenate(blocks: list[QuantizedRows]) -> QuantizedRows:
    if len(blocks) == 1:
        return blocks[0]
    codes, scale, zero = (
        torch.cat([torch.from_numpy(getattr(block, field)) for block in blocks]).numpy()
        for field in ("codes", "scale", "zero_point")
    )
    return QuantizedRows(codes, scale, zero, blocks[0].bits, blocks[0].group_size)
