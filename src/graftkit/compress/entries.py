"""Fixed-length codecs of the entries of δ: every one (dense), or the largest by magnitude (sparse).

Dense: group-wise integers (GPTQ, arXiv 2210.17323) for a flat spectrum, or for a matrix so small
that its factors would cost more, such as the k and v projections of grouped-query attention.

Sparse: magnitude pruning (GraftLLM, section 3.2) for embeddings and heads. Positions are a bitmap
or lists of columns by row, whichever is smaller; values share a scale per group in reading order.

The payloads are laid out in docs/skillpack-format.md, sections 3.3 and 3.5.
"""

import struct
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.quantize import (
    BLOCK_ELEMENTS,
    GROUP_SIZE,
    QuantizedRows,
    inverse_factor,
    pack_bits,
    pack_rows,
    packed_bytes,
    quantize_rows,
    rows_bytes,
    unpack_bits,
    unpack_rows,
)
from graftkit.errors import CorruptPackError

VALUE_BITS = 4
"""Width of a sparse value: the group scale follows the magnitude, 4 bits keep it within 4 %."""

_DENSE_HEAD = struct.Struct("<BH")  # bits, group size
_SPARSE_HEAD = struct.Struct("<BBHQ")  # how positions are stored, bits, group size, entries kept
_BITMAP, _ROW_LISTS = 0, 1


def dense_bytes(shape: tuple[int, int], bits: int, group_size: int = GROUP_SIZE) -> int:
    """Exact bytes of `encode_dense` for a matrix of this shape."""
    return _DENSE_HEAD.size + rows_bytes(*shape, bits, group_size)


def encode_dense(delta: Tensor, covariance: Tensor | None, bits: int) -> bytes:
    """Quantize δ, (m, n) float32, with GPTQ on H (n, n), or to nearest where H is None."""
    feedback = None if covariance is None else inverse_factor(covariance)
    rows, columns = delta.shape
    step = max(1, BLOCK_ELEMENTS // columns)
    edges = [*range(0, rows, step), rows]
    blocks = [quantize_rows(delta[start:stop], bits, feedback) for start, stop in pairwise(edges)]
    return _DENSE_HEAD.pack(bits, GROUP_SIZE) + pack_rows(_concatenate(blocks))


def decode_dense(payload: memoryview, shape: tuple[int, int]) -> Tensor:
    """δ̂, (m, n) float32. Raises: CorruptPackError for anything but a whole, sane payload."""
    bits, group = _read_dense_head(payload)
    return unpack_rows(payload[_DENSE_HEAD.size :], *shape, bits, group).dequantize()


def describe_dense(payload: memoryview, shape: tuple[int, int]) -> dict[str, object]:
    """Bits of a code, for `inspect`. Raises: CorruptPackError."""
    return {"bits": _read_dense_head(payload)[0]}


def sparse_bytes(shape: tuple[int, int], kept: int) -> int:
    """Exact bytes of `encode_sparse` when `kept` entries stay."""
    positions = min(_bitmap_bytes(shape), _row_list_bytes(shape, kept))
    return _SPARSE_HEAD.size + positions + rows_bytes(1, kept, VALUE_BITS, GROUP_SIZE)


def encode_sparse(delta: Tensor, kept: int) -> bytes:
    """Keep exactly `kept` entries, 1 <= kept <= δ.numel(), of δ (m, n) float32."""
    shape = (delta.shape[0], delta.shape[1])
    mask = largest_entries(delta, kept)
    values = delta.reshape(-1)[torch.from_numpy(mask)]
    if _row_list_bytes(shape, kept) < _bitmap_bytes(shape):
        mode, positions = _ROW_LISTS, _pack_row_lists(mask.reshape(shape))
    else:
        mode, positions = _BITMAP, np.packbits(mask, bitorder="little").tobytes()
    quantized = quantize_rows(values[None, :], VALUE_BITS, None)
    head = _SPARSE_HEAD.pack(mode, VALUE_BITS, GROUP_SIZE, kept)
    return head + positions + pack_rows(quantized)


def largest_entries(delta: Tensor, kept: int) -> np.ndarray:
    """Boolean mask over δ.reshape(-1) of the `kept` largest |δ|; ties go to the first entries."""
    magnitude = delta.abs().reshape(-1).numpy()
    # Only the working copy is partitioned in place: at the size of an embedding each copy counts.
    threshold = np.partition(magnitude, magnitude.size - kept)[magnitude.size - kept]
    mask: np.ndarray = magnitude > threshold
    missing = kept - int(np.count_nonzero(mask))
    if missing:
        mask[np.flatnonzero(magnitude == threshold)[:missing]] = True
    return mask


def decode_sparse(payload: memoryview, shape: tuple[int, int]) -> Tensor:
    """δ̂, (m, n) float32. Raises: CorruptPackError for anything but a whole, sane payload."""
    mode, bits, group, kept = _read_sparse_head(payload, shape)
    size = _bitmap_bytes(shape) if mode == _BITMAP else _row_list_bytes(shape, kept)
    if len(payload) != _SPARSE_HEAD.size + size + rows_bytes(1, kept, bits, group):
        raise CorruptPackError(f"sparse payload of {kept} entries has {len(payload)} bytes")
    positions = np.frombuffer(payload[_SPARSE_HEAD.size : _SPARSE_HEAD.size + size], np.uint8)
    if mode == _BITMAP:
        mask = np.unpackbits(positions, bitorder="little")
        if mask[shape[0] * shape[1] :].any():
            raise CorruptPackError("sparse bitmap marks entries behind its end")
        index = np.flatnonzero(mask)
    else:
        index = _unpack_row_lists(positions, shape, kept)
    if index.size != kept:
        raise CorruptPackError(f"sparse positions mark {index.size} entries, header says {kept}")
    values = unpack_rows(payload[_SPARSE_HEAD.size + size :], 1, kept, bits, group).dequantize()
    delta = torch.zeros(shape[0] * shape[1])
    delta[torch.from_numpy(index)] = values[0]
    return delta.reshape(shape)


def describe_sparse(payload: memoryview, shape: tuple[int, int]) -> dict[str, object]:
    """Entries kept and how their positions are stored, for `inspect`. Raises: CorruptPackError."""
    mode, bits, _, kept = _read_sparse_head(payload, shape)
    positions = "bitmap" if mode == _BITMAP else "row lists"
    return {"kept": kept, "bits": bits, "positions": positions}


def _read_dense_head(payload: memoryview) -> tuple[int, int]:
    if len(payload) < _DENSE_HEAD.size:
        raise CorruptPackError("dense payload ends inside its header")
    bits, group = _DENSE_HEAD.unpack_from(payload, 0)
    if not 1 <= bits <= 8 or group == 0:
        raise CorruptPackError(f"dense header names {bits} bits and group size {group}")
    return bits, group


def _concatenate(blocks: list[QuantizedRows]) -> QuantizedRows:
    if len(blocks) == 1:
        return blocks[0]
    codes, scale, zero = (
        np.concatenate([getattr(block, field) for block in blocks])
        for field in ("codes", "scale", "zero_point")
    )
    return QuantizedRows(codes, scale, zero, blocks[0].bits, blocks[0].group_size)


def _read_sparse_head(payload: memoryview, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    if len(payload) < _SPARSE_HEAD.size:
        raise CorruptPackError("sparse payload ends inside its header")
    mode, bits, group, kept = _SPARSE_HEAD.unpack_from(payload, 0)
    sane = mode in (_BITMAP, _ROW_LISTS) and 1 <= bits <= 8 and group > 0
    if not sane or not 1 <= kept <= shape[0] * shape[1]:
        raise CorruptPackError(
            f"sparse header names mode {mode}, {bits} bits, group {group}, {kept} entries"
        )
    return mode, bits, group, kept


def _bitmap_bytes(shape: tuple[int, int]) -> int:
    return packed_bytes(shape[0] * shape[1], 1)


def _row_list_bytes(shape: tuple[int, int], kept: int) -> int:
    rows, columns = shape
    return -(-rows * columns.bit_length() // 8) + -(-kept * _index_bits(columns) // 8)


def _index_bits(columns: int) -> int:
    return max(1, (columns - 1).bit_length())


def _pack_row_lists(mask: np.ndarray) -> bytes:
    """Entries per row, then the column of every entry, each in as few bits as the width needs."""
    rows, columns = np.nonzero(mask)
    counts = np.bincount(rows, minlength=mask.shape[0])
    width = mask.shape[1]
    return _pack_wide(counts, width.bit_length()) + _pack_wide(columns, _index_bits(width))


def _unpack_row_lists(positions: np.ndarray, shape: tuple[int, int], kept: int) -> np.ndarray:
    rows, columns = shape
    cut = -(-rows * columns.bit_length() // 8)
    counts = _unpack_wide(positions[:cut], columns.bit_length(), rows)
    index = _unpack_wide(positions[cut:], _index_bits(columns), kept)
    if int(counts.sum()) != kept or (index >= columns).any():
        raise CorruptPackError("sparse row lists do not add up to the entries kept")
    flat = np.repeat(np.arange(rows, dtype=np.int64), counts) * columns + index
    if (np.diff(flat) <= 0).any():
        raise CorruptPackError("sparse row lists are not in order")
    return flat


def _pack_wide(values: np.ndarray, bits: int) -> bytes:
    """Bit-pack unsigned integers of up to 32 bits, least significant bit first."""
    planes = np.empty((values.size, bits), np.uint8)
    for bit in range(bits):
        planes[:, bit] = (values >> bit) & 1
    return pack_bits(planes.reshape(-1), 1).tobytes()


def _unpack_wide(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    planes = unpack_bits(packed, 1, count * bits).reshape(count, bits)
    values = np.zeros(count, np.int64)
    for bit in range(bits):
        values |= planes[:, bit].astype(np.int64) << bit
    return values
