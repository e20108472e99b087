"""How a recipe spends the bytes: one precision per tensor under the budget."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graftkit.compress.allocate import (
    DENSE_BITS,
    MatrixFacts,
    Point,
    allocate,
    candidate_points,
    dense_points,
    lower_hull,
    sparse_points,
    tiers_point,
    zero_point_of,
)
from graftkit.compress.codecs import Precision
from graftkit.compress.lowrank import MAX_RANK, split_tiers
from graftkit.models.architecture import ModuleKind

ENERGY_SHARES = tuple(1 - np.geomspace(0.7, 1e-5, 64))
"""β: share of an MLP delta's energy that its rank must keep."""
RANK_SHARES = tuple(np.geomspace(0.002, 1.0, 64))
"""r of attention as a share of min(out, in): a rank that follows the shape (GQA)."""

_OPERATORS = {
    ModuleKind.EMBEDDING: "pruned",
    ModuleKind.HEAD: "pruned",
    ModuleKind.ATTENTION: "attention",
}


@dataclass(frozen=True)
class Plan:
    """Precision of every lossy tensor by its index, and the payload bytes they take together."""

    precisions: Mapping[int, Precision]
    nbytes: int


def plan_auto(facts: Mapping[int, MatrixFacts], budget_bytes: int) -> Plan:
    """The least expected error in `budget_bytes` of payload, any codec for any tensor."""
    hulls = [lower_hull(candidate_points(fact)) for fact in facts.values()]
    return _plan(facts, allocate(hulls, budget_bytes))


def plan_graftllm(
    kinds: Mapping[int, ModuleKind], facts: Mapping[int, MatrixFacts], budget_bytes: int
) -> Plan:
    """The paper's operators, their hyperparameters found under the budget.

    α (share of entries kept) for embeddings and head, β (share of energy kept) for MLP, r (rank)
    for attention, each the same in every layer (GraftLLM section 3.2). All combinations on a grid
    are costed; the one with the least expected error that fits wins.
    """
    groups: dict[str, dict[int, MatrixFacts]] = {"pruned": {}, "attention": {}, "mlp": {}}
    for name, fact in facts.items():
        groups[_OPERATORS.get(kinds[name], "mlp")][name] = fact
    ladders = [
        _pruned_ladder(groups["pruned"]),
        [{n: _by_rank(f, share) for n, f in groups["attention"].items()} for share in RANK_SHARES],
        [{n: _by_energy(f, share) for n, f in groups["mlp"].items()} for share in ENERGY_SHARES],
    ]
    # Nothing at all must stay possible, or a small budget could not be met.
    for ladder, group in zip(ladders[1:], ("attention", "mlp"), strict=True):
        ladder.insert(0, {name: zero_point_of(fact) for name, fact in groups[group].items()})
    best = _best_combination(ladders, budget_bytes)
    points = {
        name: point
        for ladder, i in zip(ladders, best, strict=True)
        for name, point in ladder[i].items()
    }
    return _plan(facts, [points[name] for name in facts])


def _plan(facts: Mapping[int, MatrixFacts], points: list[Point]) -> Plan:
    precisions = {n: point.precision for n, point in zip(facts, points, strict=True)}
    return Plan(precisions, sum(point.nbytes for point in points))


def _pruned_ladder(facts: Mapping[int, MatrixFacts]) -> list[dict[int, Point]]:
    """One step per share kept, and a first one that keeps nothing."""
    steps = [{name: zero_point_of(fact) for name, fact in facts.items()}]
    pruned = {name: sparse_points(fact) for name, fact in facts.items()}
    depth = min((len(points) for points in pruned.values()), default=0)
    steps += [{name: points[i] for name, points in pruned.items()} for i in range(depth)]
    return steps


def _by_rank(facts: MatrixFacts, share: float) -> Point:
    """Attention: a fixed share of the full rank."""
    rank = max(1, round(share * min(facts.shape)))
    return _never_dearer_than_direct(facts, rank)


def _by_energy(facts: MatrixFacts, share: float) -> Point:
    """MLP: the smallest rank that keeps `share` of the energy."""
    kept = np.cumsum(facts.energies)
    if kept[-1] <= 0:
        return zero_point_of(facts)
    rank = int(np.searchsorted(kept, share * kept[-1])) + 1
    return _never_dearer_than_direct(facts, min(rank, min(facts.shape)))


def _never_dearer_than_direct(facts: MatrixFacts, rank: int) -> Point:
    """Factors at this rank, or the direct form where that is cheaper and no worse.

    The k and v matrices of grouped-query attention are so flat that factors of a large rank cost
    more bits than the matrix itself.
    """
    factors = tiers_point(facts, split_tiers(min(rank, MAX_RANK)))
    direct = [point for point in dense_points(facts) if point.nbytes <= factors.nbytes]
    better = [point for point in direct if point.error <= factors.error]
    if better:
        return min(better, key=lambda point: point.nbytes)
    widest = dense_points(facts)[len(DENSE_BITS) - 1]
    return widest if factors.nbytes > widest.nbytes else factors


def _best_combination(ladders: list[list[dict[int, Point]]], budget_bytes: int) -> tuple[int, ...]:
    """Index into each ladder with the least summed error among the sums of bytes that fit."""
    bytes_of = [
        np.array([sum(p.nbytes for p in step.values()) for step in ladder]) for ladder in ladders
    ]
    errors = [
        np.array([sum(p.error for p in step.values()) for step in ladder]) for ladder in ladders
    ]
    total = bytes_of[0][:, None, None] + bytes_of[1][None, :, None] + bytes_of[2][None, None, :]
    error = errors[0][:, None, None] + errors[1][None, :, None] + errors[2][None, None, :]
    # Storing nothing always fits. Among equal errors the smallest file.
    score = np.where(total <= budget_bytes, error, np.inf)
    best = np.flatnonzero(score.reshape(-1) == score.min())
    smallest = best[np.argmin(total.reshape(-1)[best])]
    return tuple(int(i) for i in np.unravel_index(smallest, total.shape))
