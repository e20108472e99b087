"""The best factors of a given rank, δ ≈ B A, with the loudness of each component shared evenly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftkit.compress.lowrank import eigenbasis, left_vectors


@dataclass(frozen=True)
class Components:
    """Loudest components of a matrix: δ ≈ left @ right; column k of left with row k of right.

    left: (out, k), right: (k, in), float32, loudest first, ‖left_k‖ = ‖right_k‖.
    energies: squared singular values of all of δ, descending, float64.
    """

    left: Tensor
    right: Tensor
    energies: Tensor


def truncate(delta: Tensor, rank: int) -> Components:
    """Best approximation of δ (m, n) float32 in the Frobenius norm (Eckart–Young).

    δ_r = U Uᵀ δ,   ‖δ − δ_r‖² = Σ_{k>r} s_k²
    """
    # By a power of two, which changes no digit: squares of any delta then fit float32.
    half = max(-50, min(50, math.frexp(float(delta.abs().max()))[1] // 2))
    delta = delta * 4.0**-half
    energies, basis = eigenbasis(delta, None)
    # Of a delta that has fewer components, left vectors of rounding noise lean on the loud ones.
    left = torch.linalg.qr(left_vectors(delta, basis, rank).double())[0].float()
    found = _balanced(left, left.T @ delta, energies.double() * 16.0**half)
    return Components(found.left * 2.0**half, found.right * 2.0**half, found.energies)


def truncate_factors(left: Tensor, right: Tensor, rank: int) -> Components:
    """The same for δ = left @ right, left (m, r), right (r, n), without making δ.

    left = Q₁ R₁, rightᵀ = Q₂ R₂: the singular values of δ are those of R₁ R₂ᵀ.
    """
    first, upper = torch.linalg.qr(left.double())
    second, lower = torch.linalg.qr(right.T.double())
    inner, values, outer = torch.linalg.svd(upper @ lower.T)
    rows = (values[:, None] * outer[: len(values)] @ second.T)[:rank]
    columns = (first @ inner[:, : len(values)])[:, :rank]
    found = _balanced(columns, rows, values.square())
    return Components(found.left.float(), found.right.float(), found.energies)


def smallest_rank(energies: Sequence[Tensor], ranks: Sequence[int], share: float) -> int:
    """The first of the ascending ranks at which all matrices together keep `share` of their energy.

    energies: squared singular values of each matrix, descending. The last rank where none does.
    """
    total = sum(float(part.double().sum()) for part in energies)
    for rank in ranks:
        if sum(float(part[:rank].double().sum()) for part in energies) >= share * total:
            return rank
    return ranks[-1]


def pad_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with components of zero up to a rank."""
    missing = rank - right.shape[0]
    return (
        torch.cat([left, left.new_zeros(left.shape[0], missing)], dim=1),
        torch.cat([right, right.new_zeros(missing, right.shape[1])]),
    )


def _balanced(left: Tensor, right: Tensor, energies: Tensor) -> Components:
    """Directions (unit columns of left) times what they hold, made equally loud on both sides."""
    root = right.norm(dim=1).sqrt()
    return Components(left * root, right / root.clamp(min=1e-30)[:, None], energies)
