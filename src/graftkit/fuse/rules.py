"""Merge rules: the deltas of several packs become one, tensor by tensor. Pure maths.

Every rule takes the deltas Δ_i of one tensor (one shape, float32) and one weight w_i > 0 for each
(task arithmetic also takes negative ones), and acts on deltas, never on factors. A rule may depend
on the order of its packs only by rounding; `merging` hands them over in one order. sgn 0 = 0
agrees with nobody.
"""

from collections.abc import Sequence

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.compress.sparse import largest_entries

PCB_TAIL = 1e-4  # share of entries clamped at both ends before PCB's min-max; code of the paper


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, Σ w_i Δ_i / Σ w_i (model soups, arXiv 2203.05482)."""
    return task_arithmetic(deltas, weights).div_(sum(weights))


def task_arithmetic(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, Σ w_i Δ_i (arXiv 2212.04089; GraftLLM eq. 10 and 11)."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim every delta to its largest entries, then `agreeing_mean` (arXiv 2306.01708).

    Args:
        density: share of a tensor's entries that stays, 0 < density <= 1.
    """
    return agreeing_mean([trim(delta, density) for delta in deltas], weights)


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, keys: Sequence[str]
) -> Tensor:
    """`drop`, then the weighted sum (arXiv 2311.03099)."""
    return task_arithmetic(_dropped(deltas, density, keys), weights)


def dare_ties(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, keys: Sequence[str]
) -> Tensor:
    """`drop` in place of TIES' trimming, then `agreeing_mean` (arXiv 2311.03099)."""
    return agreeing_mean(_dropped(deltas, density, keys), weights)


def sce(deltas: Sequence[Tensor], weights: Sequence[float], select: float) -> Tensor:
    """Select, calculate, erase, as FuseChat's own code does (arXiv 2408.07990).

        M = the share `select` of the entries that vary between packs, those that vary most
        e_i = mean((M Δ_i)²) / Σ_j mean((M Δ_j)²)
        E_i = [sgn Δ_i = sgn Σ_j w_j Δ_j]
        Δ = Σ w_i e_i E_i Δ_i / Σ w_i e_i E_i

    M decides the energies e_i only; all entries are merged. Where the packs do not differ at all,
    M is everything, so that equal packs give themselves.
    """
    mask = _varying(deltas, select)
    energies = [float((delta * mask).double().square().sum()) for delta in deltas]
    if not any(energies):
        energies = [float(delta.double().square().sum()) for delta in deltas]
    total = sum(energies)
    if total == 0:
        return torch.zeros_like(deltas[0])
    shares = [w * energy / total for w, energy in zip(weights, energies, strict=True)]
    return agreeing_mean(deltas, shares, votes=weights)


def pcb(deltas: Sequence[Tensor], weights: Sequence[float], ratio: float) -> Tensor:
    """Parameter competition balancing, per tensor (arXiv 2410.02396 and its code).

        a_i = |Δ_i|, both tails of 1e-4 clamped;  m = min-max over the entries of one delta
        S_i = exp(T m(a_i)²) tanh(Δ_i ⊙ Σ_j Δ_j)
        c_i = m(max(S_i, the entry at the share `ratio` from the top))
        Δ = Σ w_i c_i sgn(Δ_i) a_i / Σ c_i

    The paper's min-max runs over the whole model, so that one outlier sets every tensor's scale;
    here it runs over the tensor.
    """
    together = task_arithmetic(deltas, [1.0] * len(deltas))
    merged, total = torch.zeros_like(together), torch.zeros_like(together)
    for delta, weight in zip(deltas, weights, strict=True):
        count = delta.numel()
        tail = int(PCB_TAIL * count)
        magnitude = delta.abs()
        magnitude.clamp_(_smallest(magnitude, tail), _smallest(magnitude, count - 1 - tail))
        score = _min_max(magnitude).square_().mul_(len(deltas)).exp_()
        score *= torch.tanh(delta * together)
        score.clamp_(min=_smallest(score, count - _share(count, ratio)))
        competition = _min_max(score)
        total += competition
        merged += competition.mul_(weight) * delta.sign() * magnitude
    return _divided(merged, total)


def agreeing_mean(
    deltas: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float] | None = None
) -> Tensor:
    """Mean over the packs whose sign is the elected one, entry by entry.

        γ = sgn Σ v_i Δ_i,   Δ = Σ w_i [sgn Δ_i = γ] Δ_i / Σ w_i [sgn Δ_i = γ]

    Args:
        weights: w_i > 0. votes: v_i, default w_i.
    """
    elected = task_arithmetic(deltas, weights if votes is None else votes).sign_()
    merged, total = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta * elected) > 0
        merged.add_(delta * agrees, alpha=weight)
        total.add_(agrees, alpha=weight)
    return _divided(merged, total)


def trim(delta: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, zeros elsewhere; ⌊density · numel⌋ stay, at least one.

    Of equal entries the first stay.
    """
    count = delta.numel()
    if density >= 1 or count == 0:
        return delta
    mask = torch.from_numpy(largest_entries(delta, _share(count, density)))
    return delta * mask.reshape(delta.shape)


def drop(delta: Tensor, density: float, key: str) -> Tensor:
    """Each entry stays with probability `density` and is divided by it, so that E = Δ.

    Args:
        key: names the draw (seed, pack and tensor): it depends on no other pack or tensor.
    """
    if density >= 1:
        return delta
    seed = int.from_bytes(blake3(key.encode()).digest(length=8), "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept, delta / density, 0.0)


def _dropped(deltas: Sequence[Tensor], density: float, keys: Sequence[str]) -> list[Tensor]:
    return [drop(delta, density, key) for delta, key in zip(deltas, keys, strict=True)]


def _varying(deltas: Sequence[Tensor], select: float) -> Tensor:
    """True at the share `select` of the entries that vary, those of the largest variance."""
    # float64, so that squares of small deltas do not vanish; distances from the first pack are
    # exactly zero where packs agree, those from a mean are not.
    sums = torch.zeros_like(deltas[0], dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for delta in deltas[1:]:
        apart = (delta - deltas[0]).double()
        sums += apart
        squares += apart.square_()
    variance = squares / len(deltas) - (sums / len(deltas)).square_()
    varying = int(variance.count_nonzero())
    if varying == 0:
        return torch.zeros_like(sums, dtype=torch.bool)
    return torch.from_numpy(largest_entries(variance, _share(varying, select))).reshape(sums.shape)


def _share(count: int, share: float) -> int:
    return max(1, int(share * count))


def _smallest(tensor: Tensor, rank: int) -> Tensor:
    """The entry with `rank` smaller ones."""
    return tensor.reshape(-1).kthvalue(rank + 1).values


def _min_max(tensor: Tensor) -> Tensor:
    """Stretched to 0..1; a tensor of one value becomes 1 where that is positive, else 0."""
    low, high = tensor.aminmax()
    if low == high:
        return (tensor > 0).float()
    return (tensor - low) / (high - low)


def _divided(merged: Tensor, total: Tensor) -> Tensor:
    """merged / total, and 0 where nobody takes part."""
    return merged / torch.where(total == 0, torch.ones_like(total), total)
