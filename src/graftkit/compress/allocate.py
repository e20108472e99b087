"""What a fixed-length precision costs a matrix: expected error against exact bytes.

Errors are energies of the layer's output, E‖(δ − δ̂)x‖², estimated from the spectrum of the
delta and the noise of the grids; bytes are exact.
"""

from dataclasses import dataclass

import numpy as np

from graftkit.compress.codecs import (
    Dense,
    FixedPrecision,
    LowRankTiers,
    Shape,
    Sparse,
    Zero,
    payload_bytes,
)
from graftkit.compress.lowrank import Tier

# Mean squared error of a min-max grid with groups of 128 on unit Gaussian weights, by bits;
# measured by tests/compress/test_allocate.py.
GRID_NOISE = {2: 0.255, 3: 0.047, 4: 0.0103, 5: 0.0024, 6: 0.00058, 8: 3.6e-5}
DENSE_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MatrixFacts:
    """What allocation knows of one tensor (a stack counts once, energies summed over it).

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
class Point:
    """One choice for one tensor: exact payload bytes and expected weighted error."""

    nbytes: int
    error: float
    precision: FixedPrecision


def tiers_point(facts: MatrixFacts, tiers: tuple[Tier, ...]) -> Point:
    """Bytes and expected error of tiers: dropped energy plus the noise of both factors."""
    error, start = 0.0, 0
    for tier in tiers:
        span = slice(start, start + tier.rank)
        error += float(_component_errors(facts, tier.bits, span).sum())
        start += tier.rank
    error += float(facts.energies[start:].sum())
    precision = LowRankTiers(tiers) if tiers else Zero()
    size = facts.count * payload_bytes(facts.shape, precision)
    return Point(size, facts.weight * error, precision)


def _component_errors(facts: MatrixFacts, bits: int, span: slice) -> np.ndarray:
    """Error of components whose factors take `bits`: never more than leaving them out.

    Noise on u_k costs its share of the component's energy. Noise on v_k is white in the input
    space and costs its share of s_k², less what error feedback saves.
    """
    noise = GRID_NOISE[bits] * (facts.energies[span] + facts.gain * facts.norms[span])
    return np.minimum(noise, facts.energies[span])


def dense_points(facts: MatrixFacts) -> list[Point]:
    """The direct form at every width."""
    total = facts.weight * facts.gain * float(facts.norms.sum())
    return [
        Point(
            facts.count * payload_bytes(facts.shape, Dense(bits)),
            total * GRID_NOISE[bits],
            Dense(bits),
        )
        for bits in DENSE_BITS
    ]


def sparse_points(facts: MatrixFacts) -> list[Point]:
    """Pruning at every share measured, values in 4 bits."""
    total = facts.weight * float(facts.energies.sum())
    points = []
    for share, energy in facts.kept_energy:
        kept = max(1, round(share * facts.shape[0] * facts.shape[1]))
        size = facts.count * payload_bytes(facts.shape, Sparse(kept))
        error = total * (1 - energy + energy * GRID_NOISE[4])
        points.append(Point(size, error, Sparse(kept)))
    return points


def zero_point_of(facts: MatrixFacts) -> Point:
    """Storing nothing."""
    return Point(0, facts.weight * float(facts.energies.sum()), Zero())
