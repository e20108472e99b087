"""Numbers that tell the shape of a delta: flat, decaying, spiked or sparse. Tensors in, floats out.

Every spectrum is read beside that of white noise of the same shape, seen through the same inputs
and outputs: what noise has as well is no structure of the delta.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

WIDE, NARROW = 0.10, 0.01  # shares of components, rows or entries whose energy is reported
MAX_STEPS = 60  # of a bisection: 60 halvings of 2^80 leave nothing
ERRORS = (0.10, 0.01)  # relative errors at which rates are compared
WATERS = (1.0, 0.4, 0.15, 0.05, 0.02, 0.007)  # error of an entry over its mean energy
ROUNDING = 1e-6  # of the largest singular value: what is smaller is no part of a fit
RIDGE = 1e-6  # of the mean diagonal, so that a Cholesky factor exists


def root(covariance: Tensor) -> Tensor:
    """R with R Rᵀ = H, (n, n) float64; negative eigenvalues, which are rounding, count as 0."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp_min(0).sqrt()


def singular_values(
    delta: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None
) -> Tensor:
    """Singular values of F δ R, descending float64, as many as the smaller side of δ.

    With R Rᵀ = H (inputs, (n, k)) and Fᵀ F = G (outputs, (l, m)) they are those of G^½ δ H^½.
    They come from the Gram matrix: below 1e-7 of the largest they are rounding.
    """
    seen = delta.double()
    if inputs is not None:
        seen = seen @ inputs.double()
    if outputs is not None:
        seen = outputs.double() @ seen
    gram = seen @ seen.T if seen.shape[0] < seen.shape[1] else seen.T @ seen
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
    return values[: min(delta.shape)]


def white_noise(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A matrix of standard normal entries, always the same for one shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shape_of(values: Tensor) -> dict[str, float]:
    """How the energy of a spectrum (n,), descending, lies over its components.

    rank90, rank99: components for 90 and 99 % of the energy, as a share of all. top1, top10: energy
    in the first 1 and 10 % of the components. spike: largest over median value. decay: a of the
    power law k^-a fitted to the first half.
    """
    energy = values.square()
    total = energy.sum()
    running = energy.cumsum(0) / total
    count = len(values)
    half = values[: max(2, count // 2)]
    half = half[half >= ROUNDING * values[0]].log()
    steps = torch.arange(1, len(half) + 1, dtype=torch.float64).log()
    centered = steps - steps.mean()
    return {
        "rank90": float((running < 0.90).sum() + 1) / count,
        "rank99": float((running < 0.99).sum() + 1) / count,
        "top1": float(running[round(NARROW * count + 0.5) - 1]),
        "top10": float(running[round(WIDE * count + 0.5) - 1]),
        "spike": float(values[0] / values[count // 2].clamp_min(1e-300)),
        "decay": float(-(centered * half).sum() / centered.square().sum()),
    }


def spikes_of(values: Tensor, noise: Tensor) -> dict[str, float]:
    """Components that stick out of a bulk of noise, and their energy.

    The bulk is white noise scaled to the same median; its largest value is the edge.
    """
    middle = len(values) // 2
    edge = noise[0] * values[middle] / noise[middle]
    out = values > 1.02 * edge  # finite matrices: the edge fluctuates by about 1 %
    energy = values.square()
    return {
        "spikes": float(out.sum()),
        "spike_energy": float(energy[out].sum() / energy.sum()),
    }


def entries_of(delta: Tensor) -> dict[str, float]:
    """How the energy lies over entries and rows.

    A normal distribution has kurtosis 0 and 8 % of its energy in the largest 1 % of the entries.
    row10, column10: share of energy in the tenth of the rows or columns that hold most. still_rows:
    share of rows that are zero.
    """
    energy = delta.double().square()
    total = energy.sum()
    centered = delta.double() - delta.double().mean()
    largest = energy.flatten().topk(max(1, round(NARROW * energy.numel()))).values.sum()
    return {
        "kurtosis": float(centered.pow(4).mean() / centered.square().mean().square() - 3),
        "largest1": float(largest / total),
        "row10": _held_by_a_tenth(energy.sum(1)),
        "column10": _held_by_a_tenth(energy.sum(0)),
        "still_rows": float((energy.sum(1) == 0).double().mean()),
    }


def common_shift(delta: Tensor, inputs: Tensor) -> float:
    """Share of the energy of δ R that all rows have in common.

    In an output head the mean row moves all logits alike, which a softmax does not see.
    """
    weighted = delta.double() @ inputs
    return float(len(weighted) * weighted.mean(0).square().sum() / weighted.square().sum())


def words_of(target: Tensor, tuned: Tensor) -> dict[str, float]:
    """Of two bf16 tensors: share of equal words, and the bits of a word's change.

    exact_bits is the entropy of the difference, counted in steps between neighboring bf16 numbers,
    given the exponent of the target's word. It is read off the tensor itself, so it is a little
    too low where differences take many values.
    """
    before, after = _ordered(target), _ordered(tuned)
    exponent = (target.view(torch.int16).int() >> 7) & 0xFF
    pairs = torch.stack([exponent.flatten(), (after - before).flatten()])
    _, joint = torch.unique(pairs, dim=1, return_counts=True)
    _, given = torch.unique(exponent, return_counts=True)
    return {
        "unchanged": float((before == after).double().mean()),
        "exact_bits": _entropy(joint) - _entropy(given),
    }


def lowrank_rate(values: Tensor, shape: tuple[int, int], error: float) -> float:
    """Bits per parameter for a relative error, both factors coded at the Gaussian limit.

    A component of energy s² whose two unit vectors are coded with error d each costs
    (m + n)/2 · log2(1/d) bits and leaves s² (2d - d²). One slope for all components.
    """
    energy = values.square()
    goal = error * energy.sum()

    def coded(slope: float) -> tuple[Tensor, Tensor]:
        d = (1 - (1 - 4 * slope / energy).clamp_min(0).sqrt()) / 2
        left = energy * (2 * d - d * d)
        # d solves the Lagrangian's derivative; dropping the component may still cost less.
        kept = (4 * slope < energy) & (left - 2 * slope * d.log() < energy)
        bits = torch.where(kept, -d.log2(), 0.0).sum() * sum(shape) / 2
        return torch.where(kept, left, energy).sum(), bits

    slope = _largest(lambda slope: bool(coded(slope)[0] <= goal), float(energy[0]))
    return float(coded(slope)[1]) / (shape[0] * shape[1])


def dense_rates(
    delta: Tensor, covariance: Tensor | None, errors: Sequence[float] = ERRORS
) -> list[float]:
    """Bits per parameter for relative errors, entries coded one by one at the Gaussian limit.

    Column by column from the last, with error feedback: H = L Lᵀ, and with E the errors so far,

        t_j = δ_j + Σ_{i>j} E_i L_ij / L_jj,    tr(E H Eᵀ) = Σ_j L_jj² ‖t_j - δ̂_j‖²

    A column is coded where the variance of L_jj t_j is above the water θ, with ½ log2(variance/θ)
    bits an entry. Whoever decodes needs neither H nor L. Between the waters tried, bits are linear
    in the logarithm of the error.
    """
    lower = _lower_root(covariance, delta.shape[1])
    seen = delta.double() @ lower
    total = float(seen.square().sum())
    generator = torch.Generator().manual_seed(0)
    points = []
    for water in WATERS:
        point = _feed_back(delta.float(), lower.float(), water * total / delta.numel(), generator)
        points.append((math.log(point[0] / total), point[1]))
    points.sort()
    return [_between(points, math.log(error)) for error in errors]


def _feed_back(
    delta: Tensor, lower: Tensor, water: float, generator: torch.Generator
) -> tuple[float, float]:
    """Error and bits per parameter at one water, Gaussian noise in the place of a quantizer."""
    left, bits = 0.0, 0.0
    errors = delta.clone()  # columns from j on hold E; those before hold δ still
    for j in range(delta.shape[1] - 1, -1, -1):
        scale = lower[j, j]
        expected = delta[:, j] + errors[:, j + 1 :] @ (lower[j + 1 :, j] / scale)
        variance = float((expected * scale).square().mean())
        if variance > water:
            keep = 1 - water / variance
            noise = torch.randn(len(expected), generator=generator) / scale
            coded = keep * expected + math.sqrt(keep * water) * noise
            errors[:, j] -= coded
            expected = expected - coded
            bits += math.log2(variance / water) / 2
        left += float((expected * scale).square().sum())
    return left, bits / delta.shape[1]


def _lower_root(covariance: Tensor | None, size: int) -> Tensor:
    """L with L Lᵀ = H, a millionth of its mean diagonal added; the identity without H."""
    identity = torch.eye(size, dtype=torch.float64)
    if covariance is None:
        return identity
    ridge = RIDGE * covariance.diagonal().double().mean()
    return torch.linalg.cholesky(covariance.double() + ridge * identity)


def _between(points: Sequence[tuple[float, float]], place: float) -> float:
    """Bits at the logarithm of an error; beyond the ends the last piece goes on, above 0 bits."""
    pieces = list(pairwise(points))
    (x0, y0), (x1, y1) = next((p for p in pieces if place <= p[1][0]), pieces[-1])
    return max(0.0, y0 + (y1 - y0) * (place - x0) / (x1 - x0)) if x1 > x0 else y0


def _largest(fits: Any, top: float) -> float:
    """The largest number up to `top` that fits, by bisection over 24 decades."""
    low, high = -80.0, 0.0
    for _ in range(MAX_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(top * 2.0**middle) else (low, middle)
    return top * 2.0**low


def _held_by_a_tenth(energy: Tensor) -> float:
    return float(energy.topk(max(1, round(WIDE * len(energy)))).values.sum() / energy.sum())


def _ordered(tensor: Tensor) -> Tensor:
    """bf16 words as integers in the order of their numbers; -0 comes right before +0."""
    word = tensor.view(torch.int16).int()
    return torch.where(word >= 0, word, -(word & 0x7FFF) - 1)


def _entropy(counts: Tensor) -> float:
    share = counts.double() / counts.sum()
    return float(-(share * share.log2()).sum())
