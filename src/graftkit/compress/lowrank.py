"""Low-rank codec: δ ≈ U diag(S) Vh, factors quantized in 8/4/2-bit tiers by singular value.

Mixed-precision tiers are those of Delta-CoMe (arXiv 2406.08903). GraftLLM, section 3.2, quantizes
V̂h = Quant(Vh, x), then Û = Quant(U, S V̂h x); here U is refitted to V̂h before it is quantized, which
carries the error of the first step into the second.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.quantize import (
    GROUP_SIZE,
    QuantizedRows,
    cholesky,
    expand_groups,
    gptq_codes,
    gram_matrix,
    inverse_factor,
    minmax_grid,
    pack_rows,
    quantize_rows,
    rows_bytes,
    solve_ridged,
    unpack_rows,
)
from graftkit.errors import CorruptPackError

TIER_BITS = (8, 4, 2)
TIER_SHARES = ((0.02, 0.18, 0.80), (0.05, 0.45, 0.50), (0.10, 0.90, 0.0))
"""Shares of the kept rank per tier. The first are 20, 180 and 800 of 1,000, GraftLLM's run script;
the others put more of the rank at 4 bits, which a matrix of small rank needs."""

_HEAD = struct.Struct("<BH")
_TIER = struct.Struct("<BH")
_PEAK = struct.Struct("<f")
MAX_RANK = 2**16 - 1
_RIDGE = 1e-6
_PRECISE_SIDE = 512  # up to this side, a Gram matrix is summed in float64: it costs next to nothing


@dataclass(frozen=True)
class Tier:
    """`rank` neighbouring singular components whose codes are `bits` wide."""

    bits: int
    rank: int


@dataclass(frozen=True)
class LowRank:
    """Decoded factors: left (out, rank) with S folded in, right (rank, in), float32."""

    left: Tensor
    right: Tensor

    def delta(self) -> Tensor:
        """left @ right, (out, in)."""
        return self.left @ self.right


def split_tiers(rank: int, shares: tuple[float, float, float]) -> tuple[Tier, ...]:
    """8/4/2-bit tiers of `rank` components in these proportions; at least one at 8 bits."""
    high = max(1, round(rank * shares[0])) if rank else 0
    middle = rank - high if shares[2] == 0 else min(rank - high, round(rank * shares[1]))
    counts = (high, middle, rank - high - middle)
    return tuple(
        Tier(bits, count) for bits, count in zip(TIER_BITS, counts, strict=True) if count > 0
    )


def eigenbasis(delta: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular directions of δ (or of δ H^½), from the Gram matrix of the smaller side.

    Args:
        delta: (m, n) float32. covariance: H, (n, n), or None for H = I.
    Returns: energies (k,) descending, k = min(m, n), the squared singular values of δ H^½; and a
        basis: for m <= n the left vectors themselves, (m, k); otherwise P, (n, k), with U = δ P.
    """
    rows, columns = delta.shape
    # float64 where it is affordable: the Gram matrix squares the condition number.
    precise = torch.float64 if min(rows, columns) <= 1024 else torch.float32
    if rows <= columns:
        weighted = delta if covariance is None else delta @ covariance
        summed = precise if rows <= _PRECISE_SIDE else torch.float32
        gram = (weighted.to(summed) @ delta.to(summed).T).to(precise)
        energies, vectors = _eigh((gram + gram.T) / 2)
        return energies.flip(0).clamp_(min=0).float(), vectors.flip(1).float()
    gram = (delta.T @ delta).to(precise)
    if covariance is None:
        energies, vectors = _eigh((gram + gram.T) / 2)
        basis = vectors
    else:
        root = cholesky(covariance.to(precise))
        energies, vectors = _eigh(root.T @ gram @ root)
        basis = root @ vectors
    energies, basis = energies.flip(0).clamp_(min=0), basis.flip(1)
    floor = energies[0].clamp(min=1e-30) * 1e-12
    return energies.float(), (basis / energies.clamp(min=floor).sqrt()).float()


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a symmetric matrix, ascending.

    LAPACK gives up on some float32 matrices whose eigenvalues coincide; float64 has room for them.
    """
    try:
        energies, vectors = torch.linalg.eigh(gram)
    except RuntimeError:  # LinAlgError is one
        energies, vectors = (part.to(gram.dtype) for part in torch.linalg.eigh(gram.double()))
    return energies, vectors


def left_vectors(delta: Tensor, basis: Tensor, rank: int) -> Tensor:
    """U, (m, rank), from what `eigenbasis` returned."""
    rows, columns = delta.shape
    return basis[:, :rank] if rows <= columns else delta @ basis[:, :rank]


def leading_rows(delta: Tensor, basis: Tensor, rank: int, covariance: Tensor | None) -> Tensor:
    """Uᵀ δ, (rank, n), of the first components, without U where the matrix is tall.

    With B = basis, Σ = H and X = Σ⁻¹ B, row k is x_kᵀ / (b_k · x_k): no product with δ is needed.
    """
    rows, columns = delta.shape
    first = basis[:, :rank]
    if rows <= columns:
        return first.T @ delta
    dual = first.double()
    if covariance is not None:
        dual = torch.cholesky_solve(dual, cholesky(covariance.double()))
    return (dual / (first * dual).sum(dim=0).clamp(min=1e-300)).T.float()


def right_rows(delta: Tensor, basis: Tensor) -> Tensor:
    """Uᵀ δ, (k, n), for all k components, on the smaller side of the matrix."""
    rows, columns = delta.shape
    return basis.T @ delta if rows <= columns else basis.T @ (delta.T @ delta)


def payload_bytes(shape: tuple[int, int], tiers: tuple[Tier, ...], group: int = GROUP_SIZE) -> int:
    """Exact bytes of `encode` for a matrix of this shape."""
    rows, columns = shape
    rank = sum(tier.rank for tier in tiers)
    size = _HEAD.size + len(tiers) * _TIER.size + _PEAK.size + 2 * rank
    for tier in tiers:
        size += rows_bytes(tier.rank, columns, tier.bits, group)
        size += rows_bytes(tier.rank, rows, tier.bits, group)
    return size


def encode(
    delta: Tensor, left: Tensor, covariance: Tensor | None, tiers: tuple[Tier, ...]
) -> bytes:
    """Quantize the factors of δ.

    Args:
        delta: (m, n) float32. left: (m, r) from `left_vectors`, r = sum of the tiers' ranks.
        covariance: H of the layer's inputs, (n, n); None rounds to nearest.
    Returns: the payload laid out in docs/skillpack-format.md, codec `lowrank`.
    """
    right = left.T @ delta
    norms = right.norm(dim=1).clamp_(min=1e-30)
    peak = float(norms.max())
    stored = (norms / peak).clamp_(min=6.2e-5).half()
    values = stored.float() * peak
    feedback = None if covariance is None else inverse_factor(covariance)
    quantized = [
        quantize_rows(part, tier.bits, feedback)
        for tier, part in zip(tiers, _split(right / norms[:, None], tiers), strict=True)
    ]
    decoded = torch.cat([part.dequantize() for part in quantized]) * values[:, None]
    weighted, gram = gram_matrix(decoded, covariance)
    # U minimizing ‖(δ − U S V̂h) H^½‖, transposed: (r, m).
    refitted = solve_ridged(gram, weighted @ delta.to(weighted.dtype).T, _RIDGE).float()
    left_parts = _quantize_left(refitted, None if covariance is None else gram.float(), tiers)
    parts = [_HEAD.pack(len(tiers), GROUP_SIZE)]
    parts += [_TIER.pack(tier.bits, tier.rank) for tier in tiers]
    parts += [_PEAK.pack(peak), stored.numpy().astype("<f2").tobytes()]
    parts += [pack_rows(part) for part in quantized + left_parts]
    return b"".join(parts)


def decode(payload: memoryview, shape: tuple[int, int]) -> LowRank:
    """Factors from a payload. Raises: CorruptPackError for anything but a whole, sane payload."""
    tiers, group, offset = _read_head(payload, shape)
    if len(payload) != payload_bytes(shape, tiers, group):
        raise CorruptPackError(
            f"low-rank payload takes {payload_bytes(shape, tiers, group)} bytes, "
            f"found {len(payload)}"
        )
    rank = sum(tier.rank for tier in tiers)
    (peak,) = _PEAK.unpack_from(payload, offset)
    offset += _PEAK.size
    stored = np.frombuffer(payload[offset : offset + 2 * rank], dtype="<f2").astype(np.float32)
    offset += 2 * rank
    if not (np.isfinite(peak) and np.isfinite(stored).all()):
        raise CorruptPackError("a singular value is NaN or infinite")
    factors = []
    for columns in (shape[1], shape[0]):
        rows = []
        for tier in tiers:
            size = rows_bytes(tier.rank, columns, tier.bits, group)
            part = payload[offset : offset + size]
            rows.append(unpack_rows(part, tier.rank, columns, tier.bits, group).dequantize())
            offset += size
        factors.append(torch.cat(rows))
    right, left = factors
    return LowRank(left.T * (torch.from_numpy(stored) * peak), right)


def describe(payload: memoryview, shape: tuple[int, int]) -> dict[str, object]:
    """Rank and tiers, for `inspect`."""
    tiers, _, _ = _read_head(payload, shape)
    text = " + ".join(f"{tier.rank}@{tier.bits}" for tier in tiers)
    return {"rank": sum(tier.rank for tier in tiers), "tiers": text}


def _read_head(payload: memoryview, shape: tuple[int, int]) -> tuple[tuple[Tier, ...], int, int]:
    if len(payload) < _HEAD.size:
        raise CorruptPackError("low-rank payload ends inside its header")
    count, group = _HEAD.unpack_from(payload, 0)
    offset = _HEAD.size + count * _TIER.size
    if not 1 <= count <= 8 or group == 0 or len(payload) < offset:
        raise CorruptPackError(f"low-rank header names {count} tiers of group size {group}")
    tiers = tuple(
        Tier(*_TIER.unpack_from(payload, _HEAD.size + i * _TIER.size)) for i in range(count)
    )
    rank = sum(tier.rank for tier in tiers)
    sane = all(1 <= tier.bits <= 8 and tier.rank > 0 for tier in tiers)
    if not sane or rank > min(shape):
        raise CorruptPackError(f"low-rank header asks rank {rank} of a {list(shape)} matrix")
    return tiers, group, offset


def _split(rows: Tensor, tiers: tuple[Tier, ...]) -> list[Tensor]:
    return list(rows.split([tier.rank for tier in tiers]))


def _quantize_left(
    left: Tensor, gram: Tensor | None, tiers: tuple[Tier, ...]
) -> list[QuantizedRows]:
    """Quantize U, given as (r, m): groups run along each component, feedback across components."""
    rows = left.shape[1]
    grids = [
        minmax_grid(part, tier.bits, GROUP_SIZE)
        for tier, part in zip(tiers, _split(left, tiers), strict=True)
    ]
    scale = torch.cat([expand_groups(scale, GROUP_SIZE, rows) for scale, _ in grids])
    zero = torch.cat([expand_groups(zero, GROUP_SIZE, rows) for _, zero in grids])
    top = torch.cat([torch.full((tier.rank,), 2.0**tier.bits - 1) for tier in tiers])
    feedback = None if gram is None else inverse_factor(gram)
    codes = gptq_codes(left.T.contiguous(), scale.T, zero.T, top[None, :], feedback).T
    return [
        QuantizedRows(
            part.to(torch.uint8).contiguous().numpy(),
            grid_scale.half().numpy(),
            grid_zero.to(torch.uint8).numpy(),
            tier.bits,
            GROUP_SIZE,
        )
        for tier, part, (grid_scale, grid_zero) in zip(
            tiers, _split(codes, tiers), grids, strict=True
        )
    ]
