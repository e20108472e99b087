"""Which precision for which matrix: expected error against exact bytes, under a file budget.

Errors are energies of the layer's output, E‖(δ − δ̂)x‖², estimated from the spectrum of the
delta and the noise of the grids; bytes are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graftkit.compress.codecs import (
    Dense,
    LowRankTiers,
    Precision,
    Shape,
    Sparse,
    Zero,
    payload_bytes,
)
from graftkit.compress.lowrank import MAX_RANK, Tier

# Mean squared error of a min-max grid with groups of 128 on unit Gaussian weights, by bits;
# measured by tests/compress/test_allocate.py.
GRID_NOISE = {2: 0.255, 3: 0.047, 4: 0.0103, 5: 0.0024, 6: 0.00058, 8: 3.6e-5}
DENSE_BITS = (2, 3, 4, 5, 6, 8)
FACTOR_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MatrixFacts:
    """What allocation knows of one tensor (a stack counts once, energies summed over it).

    shape: (out, in) of one matrix; count: matrices in the stack.
    energies: E‖s_k u_k v_kᵀ x‖² of every singular component, descending, float64.
    norms: s_k² = ‖s_k u_k v_kᵀ‖² of the same components; equal to energies without calibration.
    gain: what error feedback leaves of white rounding noise in the output, in (0, 1].
    kept_energy: for prunable tensors, ((share kept, share of energy kept), ...), else empty.
    weight: sensitivity, 1 / E‖W x‖², so that errors of different modules can be added.
    """

    shape: Shape
    count: int
    energies: np.ndarray
    norms: np.ndarray
    gain: float
    kept_energy: tuple[tuple[float, float], ...]
    weight: float


@dataclass(frozen=True)
class Point:
    """One choice for one tensor: exact payload bytes and expected weighted error."""

    nbytes: int
    error: float
    precision: Precision


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


def waterfilled_tiers(facts: MatrixFacts, slope: float) -> tuple[Tier, ...]:
    """Bits per component that minimize energy · noise + slope · bytes, as tiers.

    Each singular component costs bits · (out + in) / 8 bytes; its bits fall with its energy.
    """
    cost = slope * sum(facts.shape) / 8
    limit = min(min(facts.shape), MAX_RANK)
    menu = (0, *FACTOR_BITS)
    columns = [_component_errors(facts, bits, slice(limit)) for bits in FACTOR_BITS]
    errors = np.stack([facts.energies[:limit], *columns], axis=1) * facts.weight / facts.count
    # 16 bits of scale per group of 128 and a zero point: an eighth of a bit and a little more.
    rate = np.array([0.0, *(bits + (16 + bits) / 128 for bits in FACTOR_BITS)])
    # Tiers run from high to low bits, so a component never takes more than the one before it.
    choice = np.minimum.accumulate(np.argmin(errors + cost * rate, axis=1))
    counts = [int((choice == i).sum()) for i in range(len(menu))]
    return tuple(Tier(menu[i], counts[i]) for i in reversed(range(1, len(menu))) if counts[i] > 0)


def candidate_points(facts: MatrixFacts, steps: int = 48) -> list[Point]:
    """Every sound choice for one tensor: nothing, pruned, factored, direct."""
    points = [zero_point_of(facts), *dense_points(facts), *sparse_points(facts)]
    top = float(facts.energies[0]) * facts.weight if facts.energies.size else 0.0
    if top > 0:
        scale = 8 / sum(facts.shape)
        seen = set()
        for slope in np.geomspace(top * scale, top * scale * 1e-7, steps):
            tiers = waterfilled_tiers(facts, float(slope))
            if tiers and tiers not in seen:
                seen.add(tiers)
                points.append(tiers_point(facts, tiers))
    return points


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Points on the lower convex hull of error over bytes, bytes rising and error falling."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.error)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def allocate(hulls: Sequence[Sequence[Point]], budget_bytes: int) -> list[Point]:
    """One point per tensor with the least total error within `budget_bytes` of payload.

    Steps along the hulls are taken in the order of error saved per byte, which is what one
    Lagrange multiplier for all tensors does; a step that no longer fits is passed over and
    smaller ones may still be taken. Every hull starts with a point of no bytes.
    """
    chosen = [0] * len(hulls)
    spent = sum(hull[0].nbytes for hull in hulls)
    steps = [
        (_slope(hull[i], hull[i + 1]), tensor, i)
        for tensor, hull in enumerate(hulls)
        for i in range(len(hull) - 1)
    ]
    for _, tensor, i in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = hulls[tensor][i + 1].nbytes - hulls[tensor][i].nbytes
        if chosen[tensor] == i and spent + cost <= budget_bytes:
            chosen[tensor] = i + 1
            spent += cost
    return [hull[i] for hull, i in zip(hulls, chosen, strict=True)]


def _slope(first: Point, second: Point) -> float:
    """Error saved per byte between two points."""
    return (first.error - second.error) / max(1, second.nbytes - first.nbytes)
