"""Families: several packs as one shared part and a small private part for each. Pure maths.

A merge gives one model for all skills; a family gives each skill its own approximation Δ̂_i of its
delta, for a mask or a rest more than the merge takes. Every function here takes deltas Δ_i of one
tensor (one shape, float32). Private parts are made for the shared part τ̂ that a reader will have,
which coding has changed: what coding lost of τ is not lost a second time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graftkit.fuse.rules import task_arithmetic


def emr_shared(deltas: Sequence[Tensor]) -> Tensor:
    """The elected delta of EMR-Merging (arXiv 2405.17461 and its code).

        γ = sgn Σ Δ_i,  τ = γ max over i with sgn Δ_i = γ of |Δ_i|

    Where the sum is 0 nobody is elected.
    """
    elected = task_arithmetic(deltas, [1.0] * len(deltas)).sign_()
    largest = torch.zeros_like(elected)
    for delta in deltas:
        largest = torch.maximum(largest, delta.abs() * ((delta * elected) > 0))
    return largest * elected


def emr_private(delta: Tensor, shared: Tensor) -> tuple[Tensor, float]:
    """Mask and scale of EMR-Merging, Δ̂ = s M ⊙ τ̂.

        M = [sgn Δ = sgn τ̂ ≠ 0],  s = Σ |Δ| / Σ |τ̂ ⊙ M|

    Differences from the code: it sums Σ over the means of all tensors, so that a norm weighs as
    much as a matrix; here every tensor has its own s.
    """
    # By signs: a product of two small numbers may vanish.
    mask = (delta.sign() == shared.sign()) & (shared != 0)
    own, kept = _total(delta), _total(shared * mask)
    scale = own / kept if kept else 0.0
    return mask, scale if scale <= torch.finfo(torch.float32).max else 0.0


def tall_private(delta: Tensor, shared: Tensor, threshold: float) -> Tensor:
    """The TALL mask, Δ̂ = M ⊙ τ̂ (arXiv 2405.07813), of a weighted sum τ of the deltas.

        M = [|Δ| > threshold |τ̂ − Δ|]

    Args:
        threshold: λ of the paper, 0.2 to 0.6 there; larger keeps fewer entries. At 1 an entry is
            kept where that is nearer to Δ than zero is.
    """
    return delta.abs() > threshold * (shared - delta).abs()


def _total(tensor: Tensor) -> float:
    return float(tensor.abs().sum(dtype=torch.float64))
