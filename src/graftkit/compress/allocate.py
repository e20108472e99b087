"""Rate and distortion of a delta: what each precision costs in bytes and leaves in error.

Errors are energies of the layer's output, E‖(δ − δ̂) x‖², so that those of different tensors can be
added once each is weighted by its sensitivity. Here are

- the energy of a matrix in a layer's output;
- the rate-distortion bound of a delta (reverse water-filling, Cover & Thomas, theorem 10.3.3);
- the expected error and exact bytes of the fixed-length precisions of recipe `graftllm`;
- the expected error and bytes of the entropy-coded precisions of recipe `auto`.

Recipe `auto` codes all tensors at one water level c. It stands for one Lagrange multiplier λ: where
every coded value is rounded with the same step, in the unit in which errors are added, no byte
saves more error in one tensor than in another.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftkit.compress.codecs import (
    CodedDense,
    CodedHybrid,
    CodedLowRank,
    Dense,
    FixedPrecision,
    LowRankTiers,
    Precision,
    Shape,
    Sparse,
    Zero,
    payload_bytes,
)
from graftkit.compress.entropy import LARGEST_CODE
from graftkit.compress.lowrank import Tier
from graftkit.compress.quantize import BLOCK_ELEMENTS, DEAD_ZONE

_CACHED_ELEMENTS = 2**16  # few enough that float32 sums them well
_SMALLEST_SUM = 1e-30  # float32 loses digits of the squares that add up to less


def output_energy(matrix: Tensor, covariance: Tensor | None) -> float:
    """E‖W x‖² = tr(W H Wᵀ), or ‖W‖² without H; blocks are summed in float64.

    A block whose squares float32 cannot hold is computed in float64 as well.

    Args:
        matrix: W, (m, n), any float dtype; an embedding is never copied whole.
        covariance: H = E[x xᵀ], (n, n), or None.
    """
    total = 0.0
    block = _CACHED_ELEMENTS if covariance is None else BLOCK_ELEMENTS
    step = max(1, block // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step].float()
        energy = _block_energy(part, covariance)
        if not _SMALLEST_SUM < energy < float("inf") and bool(part.any()):
            wide = None if covariance is None else covariance.double()
            energy = _block_energy(part.double(), wide)
        total += energy
    return total


def _block_energy(part: Tensor, covariance: Tensor | None) -> float:
    if covariance is None:
        flat = part.reshape(-1)
        return float(torch.dot(flat, flat))
    return float((part @ covariance * part).sum(dtype=torch.float64))


def waterfilling_bits(energies: np.ndarray, columns: int, distortion: float) -> float:
    """Least bits per parameter at a relative distortion, by reverse water-filling.

    The model: rows of a delta are independent Gaussians with a common covariance whose eigenvalues
    λ_j are the squared singular values divided by the number of rows. Then, with water level θ,

        R(θ) = (1/n) Σ_j ½ log2⁺(λ_j / θ)   bits per parameter,   D(θ) = (1/n) Σ_j min(θ, λ_j)

    It bounds codes that treat deltas as such Gaussians; one matrix may do better.

    Args:
        energies: squared singular values (k,), any common scale.
        columns: number of eigenvalues n >= k; the missing ones are zero.
        distortion: ‖δ − δ̂‖² / ‖δ‖², in [0, 1]; clipped from below at 1e-12.
    """
    eigenvalues = np.asarray(energies, dtype=np.float64)
    total = float(eigenvalues.sum())
    if total <= 0 or distortion >= 1:
        return 0.0
    allowed = max(distortion, 1e-12) * total
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(100):
        level = (low + high) / 2
        if float(np.minimum(eigenvalues, level).sum()) > allowed:
            high = level
        else:
            low = level
    above = eigenvalues[eigenvalues > high]
    return float(0.5 * np.log2(above / high).sum() / columns)


# Mean squared error of a min-max grid with groups of 128 on unit Gaussian weights, by bits;
# measured by tests/compress/test_allocate.py.
GRID_NOISE = {2: 0.255, 3: 0.047, 4: 0.0103, 5: 0.0024, 6: 0.00058, 8: 3.6e-5}
DENSE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MatrixFacts:
    """Statistics of one tensor that decide its precision (a stack counts once, energies summed).

    shape: (out, in) of one matrix; count: matrices in the stack.
    energies: E‖s_k u_k v_kᵀ x‖² of every singular component, descending, float64.
    norms: s_k² = ‖s_k u_k v_kᵀ‖² of the same components; equal to energies without calibration.
    gain: what error feedback leaves of white rounding noise in the output, in (0, 1].
    kept_energy: for prunable tensors, ((share kept, share of energy kept), ...), else empty.
    weight: sensitivity, so that errors of different modules can be added.
    spread: energies of a sample of entries over their mean, as rows and columns spread them.
    trainable: once coded, factors are trained against the whole model.
    """

    shape: Shape
    count: int
    energies: np.ndarray
    norms: np.ndarray
    gain: float
    kept_energy: tuple[tuple[float, float], ...]
    weight: float
    spread: np.ndarray
    trainable: bool = False


@dataclass(frozen=True)
class RatePoint:
    """One choice for one tensor: exact payload bytes and expected weighted error."""

    nbytes: int
    error: float
    precision: FixedPrecision


def tiers_point(facts: MatrixFacts, tiers: tuple[Tier, ...]) -> RatePoint:
    """Bytes and expected error of tiers: dropped energy plus the noise of both factors."""
    error, start = 0.0, 0
    for tier in tiers:
        span = slice(start, start + tier.rank)
        error += float(_component_errors(facts, tier.bits, span).sum())
        start += tier.rank
    error += float(facts.energies[start:].sum())
    precision = LowRankTiers(tiers) if tiers else Zero()
    size = facts.count * payload_bytes(facts.shape, precision)
    return RatePoint(size, facts.weight * error, precision)


def _component_errors(facts: MatrixFacts, bits: int, span: slice) -> np.ndarray:
    """Error of components whose factors take `bits`: never more than leaving them out.

    Noise on u_k costs its share of the component's energy. Noise on v_k is white in the input
    space and costs its share of s_k², less what error feedback saves.
    """
    noise = GRID_NOISE[bits] * (facts.energies[span] + facts.gain * facts.norms[span])
    return np.minimum(noise, facts.energies[span])


def dense_points(facts: MatrixFacts) -> list[RatePoint]:
    """The direct form at every width."""
    total = facts.weight * facts.gain * float(facts.norms.sum())
    return [
        RatePoint(
            facts.count * payload_bytes(facts.shape, Dense(bits)),
            total * GRID_NOISE[bits],
            Dense(bits),
        )
        for bits in DENSE_BITS
    ]


def sparse_points(facts: MatrixFacts) -> list[RatePoint]:
    """Pruning at every share measured, values in 4 bits."""
    total = facts.weight * float(facts.energies.sum())
    points = []
    for share, energy in facts.kept_energy:
        kept = max(1, round(share * facts.shape[0] * facts.shape[1]))
        size = facts.count * payload_bytes(facts.shape, Sparse(kept))
        error = total * (1 - energy + energy * GRID_NOISE[4])
        points.append(RatePoint(size, error, Sparse(kept)))
    return points


def zero_point_of(facts: MatrixFacts) -> RatePoint:
    """Storing nothing."""
    return RatePoint(0, facts.weight * float(facts.energies.sum()), Zero())


Array = npt.NDArray[np.float64]
_MOST_PER_UNIT = 12.0  # bits
_LOWEST, _HIGHEST, _POINTS = -6.0, 10.0, 129  # log2 of the ratio


def gaussian_rate_distortion(ratio: Array) -> tuple[Array, Array]:
    """Rate and distortion of a Gaussian value that is rounded with a dead zone.

    Args:
        ratio: standard deviation of the value, in steps.
    Returns: the entropy of its code in bits; the mean squared error in squared steps, which is that
        of leaving the value out where it is small. Both are interpolated in tables made once by
        numerical integration.
    """
    grid, bits, share = _tables()
    logs = np.log2(np.maximum(ratio, 1e-30))
    over = np.maximum(logs - _HIGHEST, 0.0)
    error = ratio**2 * np.interp(logs, grid, share, left=1.0) * 4.0**-over
    return np.interp(logs, grid, bits, left=0.0) + over, error


def bits_per_unit(codes: Tensor) -> Tensor:
    """Bits that one more unit of |code| costs each entry of codes (rows, columns), float.

    Entries are taken as two-sided geometric, P(k) ∝ t^|k|, with the mean |code| that their row
    and column lead one to expect: 2 t / (1 - t²).
    """
    size = codes.abs()
    rows, columns = size.shape
    of_row = size.mean(dim=1, keepdim=True) + 0.5 / columns
    of_column = size.mean(dim=0, keepdim=True) + 0.5 / rows
    mean = of_row * of_column / size.mean().clamp(min=0.5 / codes.numel())
    ratio = ((mean.square() + 1).sqrt() - 1) / mean  # t
    return torch.log2(ratio).neg().clamp(min=0.01, max=_MOST_PER_UNIT)


@cache
def _tables() -> tuple[Array, Array, Array]:
    """log2 of the ratio, bits, error as a share of the variance."""
    grid = np.linspace(_LOWEST, _HIGHEST, _POINTS)
    values = np.linspace(-8, 8, 80_001)
    density = np.exp(-(values**2) / 2)
    density /= density.sum()
    bits, error = np.empty(_POINTS), np.empty(_POINTS)
    for i, ratio in enumerate(2.0**grid):
        scaled = values * ratio
        codes = np.sign(scaled) * np.floor(np.abs(scaled) + DEAD_ZONE)
        probability = np.bincount((codes - codes.min()).astype(np.int64), weights=density)
        probability = probability[probability > 0]
        bits[i] = -(probability * np.log2(probability)).sum()
        error[i] = (density * (scaled - codes) ** 2).sum() / ratio**2
    return grid, np.maximum.accumulate(bits), error


COMPONENT_BITS = 24.0
"""Scales that a component takes beside its codes."""
MATRIX_BITS = 400.0
"""Header, column steps and ends of streams."""
SERVABLE_SHARE = 0.25
"""Multiply-accumulates that a servable pack may add to those of a matrix."""

UNTRAINED = 2.0
"""How much more an error counts that code training cannot lower afterwards."""
FACTORS_BYTES, FACTORS_ERROR = 0.88, 0.75
"""What coded factors took of a Gaussian's bytes and error on the nursery: their entries have
heavier tails, and the refit of U takes back a part of what V lost."""
_LARGEST = LARGEST_CODE / 4  # code of a typical entry; values of larger norm have coarser steps


@dataclass(frozen=True)
class CodingOption:
    """One way to code a tensor, with its expected bytes and weighted error."""

    precision: Precision
    nbytes: float
    error: float

    def cost(self, level: float) -> float:
        """D + λR: the error plus the bits times the Lagrange multiplier of the level."""
        return self.error + lagrange_multiplier(level) * 8 * self.nbytes


def lagrange_multiplier(level: float) -> float:
    """λ = −dD/dR = ln 2 / 6 · c²: the weighted error that one bit must save at this level."""
    return math.log(2) / 6 * level**2


def finest_level(facts: MatrixFacts) -> float:
    """Lowest level of use to a tensor: codes of the largest component fill their range."""
    largest = math.sqrt(facts.weight * float(facts.energies[0]) / facts.count)
    return largest / math.sqrt(min(facts.shape)) / _LARGEST


def coding_options(facts: MatrixFacts, level: float, servable: bool = False) -> list[CodingOption]:
    """Ways to code one tensor at one level: not at all, and at most one of each codec.

    Args:
        level: c in the weighted unit; the tensor's own step is c / √weight.
        servable: factors only, of a rank that keeps the side path cheap.
    """
    nothing = CodingOption(Zero(), 0.0, facts.weight * float(facts.energies.sum()))
    if nothing.error <= 0:
        return [nothing]
    own = level / math.sqrt(facts.weight)
    bits, error = _components(facts, own)
    options = [nothing, *_factors(facts, own, level, servable, (bits, error))]
    if not servable:
        others = _entries_and_hybrid(facts, own, level, (bits, error))
        options += [replace(c, error=UNTRAINED * c.error) if facts.trainable else c for c in others]
    return options


def _components(facts: MatrixFacts, own: float) -> tuple[np.ndarray, np.ndarray]:
    """Bits and error of each coded component of one matrix of the stack."""
    norms = np.sqrt(facts.energies / facts.count) / own
    bits, error = np.full_like(norms, COMPONENT_BITS), np.zeros_like(norms)
    for side in facts.shape:
        ratio = norms / math.sqrt(side)
        of_side = gaussian_rate_distortion(ratio)
        bits += side * of_side[0]
        error += side * of_side[1]
    return bits, np.minimum(error * own**2, facts.energies / facts.count)


def _factors(
    facts: MatrixFacts,
    own: float,
    level: float,
    servable: bool,
    components: tuple[np.ndarray, np.ndarray],
) -> list[CodingOption]:
    bits, error = components
    saved = facts.energies / facts.count - error
    rank = int((facts.weight * saved > lagrange_multiplier(level) * bits).sum())
    if servable:
        rows, columns = facts.shape
        rank = min(rank, int(SERVABLE_SHARE * rows * columns / (rows + columns)))
    if rank == 0:
        return []
    total = facts.count * (float(bits[:rank].sum()) + MATRIX_BITS)
    left = facts.count * float(error[:rank].sum()) + float(facts.energies[rank:].sum())
    nbytes, lost = FACTORS_BYTES * total / 8, FACTORS_ERROR * facts.weight * left
    return [CodingOption(CodedLowRank(rank, own), nbytes, lost)]


def _entries_and_hybrid(
    facts: MatrixFacts, own: float, level: float, components: tuple[np.ndarray, np.ndarray]
) -> list[CodingOption]:
    """All entries alone, and behind a few components whose norm is far above that of the flat rest.

    The entries code what the components leave, their own rounding included.
    """
    component_bits, lost = components
    ranks = [0, *(rank for rank in (2, 4, 8, 16, 32) if rank < min(facts.shape) // 2)]
    rest = [facts.energies[rank:].sum() + facts.count * lost[:rank].sum() for rank in ranks]
    energies = np.array(rest, dtype=np.float64)
    bits, error = _flat(facts, energies, own)
    alone = CodingOption(CodedDense(own), float(bits[0]) / 8, facts.weight * float(error[0]))
    hybrids = []
    for i, rank in enumerate(ranks[1:], start=1):
        total = facts.count * (float(component_bits[:rank].sum()) + MATRIX_BITS) + float(bits[i])
        hybrids.append(
            CodingOption(CodedHybrid(rank, own), total / 8, facts.weight * float(error[i]))
        )
    best = [min(hybrids, key=lambda option: option.cost(level))] if hybrids else []
    return [alone, *best]


def _flat(facts: MatrixFacts, energies: np.ndarray, own: float) -> tuple[np.ndarray, np.ndarray]:
    """Bits and error of entries whose energy is spread as rows and columns spread it."""
    values = facts.shape[0] * facts.shape[1]
    ratio = np.sqrt(energies[:, None] / facts.count / values * facts.spread) / own
    of_value = [table.mean(axis=1) for table in gaussian_rate_distortion(ratio)]
    bits = facts.count * (values * of_value[0] + MATRIX_BITS)
    return bits, facts.count * values * of_value[1] * own**2
