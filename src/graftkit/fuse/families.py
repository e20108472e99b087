"""Families: several packs as one shared part and a small private part for each. Pure maths.

A merge gives one model for all skills; a family gives each skill its own approximation Δ̂_i of its
delta, for a mask or a few factors more than the merge takes. Every function here takes the deltas
Δ_i of one tensor (one shape, float32).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftkit.compress.codecs import Layout, assemble, matrices
from graftkit.fuse.rules import task_arithmetic


@dataclass(frozen=True)
class Masked:
    """Δ̂_i = s_i M_i ⊙ τ.

    Attributes:
        shared: τ. masks: M_i, bool, one per delta. scales: s_i; None where all are 1.
    """

    shared: Tensor
    masks: list[Tensor]
    scales: list[float] | None = None

    def delta(self, index: int) -> Tensor:
        """Δ̂_i."""
        kept = self.shared * self.masks[index]
        return kept if self.scales is None else kept * self.scales[index]


@dataclass(frozen=True)
class Twin:
    """Δ̂_i = τ + L_i R_i for every matrix of the tensor.

    Attributes:
        shared: τ. rests: per delta, per matrix, L (out, r) and R (r, in); layout: how the tensor
            becomes matrices. A vector's rest is kept whole, as L (n, 1) and R = 1.
    """

    shared: Tensor
    rests: list[list[tuple[Tensor, Tensor]]]
    layout: Layout

    def delta(self, index: int) -> Tensor:
        """Δ̂_i."""
        parts = [left @ right for left, right in self.rests[index]]
        if self.shared.dim() < 2:
            return self.shared + parts[0].reshape(self.shared.shape)
        return self.shared + assemble(parts, tuple(self.shared.shape), self.layout)


def emr(deltas: Sequence[Tensor]) -> Masked:
    """Elect, mask and rescale (EMR-Merging, arXiv 2405.17461 and its code).

        γ = sgn Σ Δ_i,  τ = γ max over i with sgn Δ_i = γ of |Δ_i|
        M_i = [Δ_i γ > 0],  s_i = Σ |Δ_i| / Σ |τ ⊙ M_i|

    Differences from the code: it sums Σ over the means of all tensors, so that a norm weighs as
    much as a matrix; here every tensor has its own s_i. And where the sum is 0 nobody is elected.
    """
    elected = task_arithmetic(deltas, [1.0] * len(deltas)).sign_()
    masks = [(delta * elected) > 0 for delta in deltas]
    shared = torch.zeros_like(elected)
    for delta, mask in zip(deltas, masks, strict=True):
        shared = torch.maximum(shared, delta.abs() * mask)
    sums = [
        (_total(delta), _total(shared * mask)) for delta, mask in zip(deltas, masks, strict=True)
    ]
    scales = [own / kept if kept else 0.0 for own, kept in sums]
    return Masked(shared * elected, masks, scales)


def tall(
    deltas: Sequence[Tensor], scaling: float, thresholds: Sequence[float], consensus: int = 0
) -> Masked:
    """TALL masks over a sum of the deltas (arXiv 2405.07813).

        τ = scaling Σ Δ_i,   M_i = [|Δ_i| > threshold_i |τ − Δ_i|],   s_i = 1

    Args:
        thresholds: λ_i of the paper, 0.2 to 0.6, one per delta; larger keeps fewer entries.
        consensus: entries of τ that fewer masks than this keep become 0 (the paper's consensus
            merging: 2); 0 and 1 change no Δ̂_i.
    """
    shared = task_arithmetic(deltas, [scaling] * len(deltas))
    masks = [
        delta.abs() > threshold * (shared - delta).abs()
        for delta, threshold in zip(deltas, thresholds, strict=True)
    ]
    agreed = torch.stack(masks).sum(dim=0) >= consensus
    return Masked(shared * agreed, [mask & agreed for mask in masks])


def twin(deltas: Sequence[Tensor], scaling: float, rank_share: float, layout: Layout) -> Twin:
    """Twin-Merging: a shared sum, and of every rest the best low rank (arXiv 2406.15479).

    τ = scaling Σ Δ_i,   L_i R_i = rank-r SVD of Δ_i − τ,   r = max(1, ⌊rank_share min(m, n)⌋)
    """
    shared = task_arithmetic(deltas, [scaling] * len(deltas))
    rests = [_factored(delta - shared, rank_share, layout) for delta in deltas]
    return Twin(shared, rests, layout)


def _factored(rest: Tensor, rank_share: float, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    if rest.dim() < 2:
        return [(rest.reshape(-1, 1), torch.ones(1, 1))]
    factors = []
    for matrix in matrices(rest, layout):
        rank = max(1, int(rank_share * min(matrix.shape)))
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        factors.append((U[:, :rank] * S[:rank], Vh[:rank].contiguous()))
    return factors


def _total(tensor: Tensor) -> float:
    return float(tensor.abs().sum(dtype=torch.float64))
