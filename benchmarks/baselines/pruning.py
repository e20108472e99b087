"""Magnitude pruning: the largest entries of δ, positions entropy-coded, values in a few bits.

Our re-implementation of the baseline of GraftLLM, arXiv 2505.18502 section 3.2 (operator Prune_α):
δ̂_ij = Q(δ_ij) where |δ_ij| is among the largest, else 0. Positions are a bitmap or Golomb-Rice
coded gaps (Golomb 1966), whichever is smaller: the papers count none of them.
"""

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baselines.problem import Pair, Problem, TargetSide
from baselines.protocol import UnreachableError, join_parts, parts_overhead, split_parts
from graftkit.compress.quantize import (
    GROUP_SIZE,
    pack_rows,
    quantize_rows,
    rows_bytes,
    unpack_rows,
)

VARIANTS = (
    *((4, "global"), (3, "global"), (3, "even"), (2, "global"), (2, "even")),
    *((4, "even"), (5, "global"), (5, "even"), (6, "global"), (8, "global"), (16, "global")),
)
_TOLERANCE = 400  # the count is found to 1 / 400 of itself
_HEAD = struct.Struct("<BBII")
_BITMAP = 255


class Pruning:
    """Variants: bits of a value, and whether one threshold holds for all matrices or a share."""

    name = "pruning"
    takes_rest = False
    draft = None

    def variants(self) -> Sequence[tuple[int, str]]:
        """(bits, threshold)."""
        return VARIANTS

    def encode(
        self, problem: Problem, room: int, variant: tuple[int, str], embedding: bytes
    ) -> bytes:
        """As many entries as fit; the count is found by bisection on real bytes."""
        bits, spread = variant
        deltas = [delta.reshape(-1) for delta in problem.pair.deltas.values()]
        if room < parts_overhead(len(deltas)) + len(deltas) * _HEAD.size:
            raise UnreachableError(f"headers of {len(deltas)} matrices exceed {room:,} bytes")
        magnitudes = _ranked(problem.pair, spread)
        low, high = 0, min(magnitudes[0].size, 8 * room // bits)
        while high - low > low // _TOLERANCE:
            count = (low + high + 1) // 2
            sizes = [_part_bytes(mask, bits) for mask in _masks(deltas, magnitudes, count)]
            if sum(sizes) + parts_overhead(len(sizes)) <= room:
                low = count
            else:
                high = count - 1
        if low == 0:
            raise UnreachableError(f"not one entry fits into {room:,} bytes")
        masks = _masks(deltas, magnitudes, low)
        return join_parts(
            [_part(delta, mask, bits) for delta, mask in zip(deltas, masks, strict=True)]
        )

    def decode(self, side: TargetSide, payload: bytes) -> dict[str, Tensor]:
        """Values at their positions, zero elsewhere."""
        result = {}
        for name, part in zip(side.linears, split_parts(payload), strict=True):
            rows, columns = side.shape(name)
            flat = torch.zeros(rows * columns)
            bits, rice, count, size = _HEAD.unpack_from(part)
            coded, body = part[_HEAD.size : _HEAD.size + size], part[_HEAD.size + size :]
            if count:
                index = _read_positions(coded, rice, count)
                flat[torch.from_numpy(index)] = _read_values(body, bits, count)
            result[name] = flat.reshape(rows, columns)
        return result


def _ranked(pair: Pair, spread: str) -> tuple[np.ndarray, np.ndarray]:
    """What the threshold is taken of, all matrices behind one another; and the same, sorted."""
    if ("pruning", spread) not in pair.kept:
        parts = [delta.reshape(-1).abs() for delta in pair.deltas.values()]
        if spread == "even":
            # The place among its own matrix's entries: every matrix keeps the same share.
            parts = [part.argsort().argsort().float() / part.numel() for part in parts]
        ranked = torch.cat(parts).numpy()
        pair.kept["pruning", spread] = ranked, np.sort(ranked)
    result: tuple[np.ndarray, np.ndarray] = pair.kept["pruning", spread]
    return result


def _masks(
    deltas: Sequence[Tensor], magnitudes: tuple[np.ndarray, np.ndarray], count: int
) -> list[np.ndarray]:
    ranked, ordered = magnitudes
    ends = np.cumsum([delta.numel() for delta in deltas])[:-1]
    return np.split(ranked >= ordered[ordered.size - count], ends)


def _part_bytes(mask: np.ndarray, bits: int) -> int:
    index = np.flatnonzero(mask)
    _, size = _position_bytes(index, mask.size)
    return _HEAD.size + size + _value_bytes(index.size, bits)


def _value_bytes(count: int, bits: int) -> int:
    return 2 * count if bits == 16 else rows_bytes(1, count, bits, GROUP_SIZE) if count else 0


def _part(delta: Tensor, mask: np.ndarray, bits: int) -> bytes:
    index = np.flatnonzero(mask)
    values = delta[torch.from_numpy(index)]
    rice, _ = _position_bytes(index, mask.size)
    if rice == _BITMAP:
        positions = np.packbits(mask).tobytes()
    else:
        positions = _rice_encode(np.diff(index, prepend=-1) - 1, rice)
    body = b""
    if bits == 16:
        body = values.half().numpy().tobytes()
    elif index.size:
        body = pack_rows(quantize_rows(values[None, :], bits, None))
    return _HEAD.pack(bits, rice, index.size, len(positions)) + positions + body


def _read_values(body: bytes, bits: int, count: int) -> Tensor:
    if bits == 16:
        return torch.frombuffer(bytearray(body), dtype=torch.float16).float()
    return unpack_rows(memoryview(body), 1, count, bits, GROUP_SIZE).dequantize()[0]


def _position_bytes(index: np.ndarray, numel: int) -> tuple[int, int]:
    """Rice parameter (or _BITMAP) of the smallest form, and its bytes."""
    forms = [(_BITMAP, -(-numel // 8))]
    if index.size:
        gaps = np.diff(index, prepend=-1) - 1
        usual = int(np.log2(max(1.0, 0.7 * gaps.mean())))
        for rice in range(max(0, usual - 1), usual + 2):
            bits = int((gaps >> rice).sum()) + gaps.size * (1 + rice)
            forms.append((rice, -(-bits // 8)))
    else:
        forms.append((0, 0))
    return min(forms, key=lambda form: form[1])


def _rice_encode(gaps: np.ndarray, rice: int) -> bytes:
    """Unary quotients (ones, then a zero) of all gaps, then all remainders."""
    if not gaps.size:
        return b""
    ends = np.cumsum((gaps >> rice) + 1)
    unary = np.ones(int(ends[-1]), np.uint8)
    unary[ends - 1] = 0
    low = ((gaps[:, None] >> np.arange(rice)) & 1).astype(np.uint8).reshape(-1)
    return np.packbits(np.concatenate([unary, low])).tobytes()


def _read_positions(coded: bytes, rice: int, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(coded, np.uint8))
    if rice == _BITMAP:
        return np.flatnonzero(bits)
    ends = np.flatnonzero(bits == 0)[:count]
    quotients = np.diff(ends, prepend=-1) - 1
    start = int(ends[-1]) + 1
    low = bits[start : start + count * rice].reshape(count, rice).astype(np.int64)
    gaps = (quotients << rice) + (low << np.arange(rice)).sum(axis=1)
    return np.cumsum(gaps + 1) - 1
