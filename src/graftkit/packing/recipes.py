"""How the paper's recipe spends the bytes: one precision per tensor under the budget."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graftkit.compress.allocate import (
    DENSE_BITS,
    MatrixFacts,
    Point,
    dense_points,
    sparse_points,
    tiers_point,
    zero_point_of,
)
from graftkit.compress.codecs import Precision
from graftkit.compress.lowrank import MAX_RANK, TIER_SHARES, Tier, split_tiers
from graftkit.models.architecture import ModuleKind

ENERGY_SHARES = tuple(1 - np.geomspace(0.7, 1e-5, 160))
"""β: share of an MLP delta's energy that its rank must keep."""
RANK_SHARES = tuple(np.geomspace(0.002, 1.0, 160))
"""r of attention as a share of the largest full rank; a smaller matrix keeps at most its own."""

_OPERATORS = {
    ModuleKind.EMBEDDING: "pruned",
    ModuleKind.HEAD: "pruned",
    ModuleKind.ATTENTION: "attention",
}


@dataclass(frozen=True)
class Plan:
    """Precision of every lossy tensor by its index, their payload bytes and expected error."""

    precisions: Mapping[int, Precision]
    nbytes: int
    error: float


def plan_graftllm(
    kinds: Mapping[int, ModuleKind], facts: Mapping[int, MatrixFacts], budget_bytes: int
) -> Plan:
    """The paper's operators, their hyperparameters found under the budget.

    α (share of entries kept) for embeddings and head, β (share of energy kept) for MLP, r (rank)
    for attention, each the same in every layer (GraftLLM section 3.2). All combinations on a grid
    are costed; the one with the least expected error that fits wins. The proportions of the
    8/4/2-bit tiers are searched too.
    """
    groups: dict[str, dict[int, MatrixFacts]] = {"pruned": {}, "attention": {}, "mlp": {}}
    for name, fact in facts.items():
        groups[_OPERATORS.get(kinds[name], "mlp")][name] = fact
    plans = [_plan(facts, _cheapest_error(groups, shares, budget_bytes)) for shares in TIER_SHARES]
    return min(plans, key=lambda plan: plan.error)


def _cheapest_error(
    groups: Mapping[str, Mapping[int, MatrixFacts]],
    shares: tuple[float, float, float],
    budget_bytes: int,
) -> dict[int, Point]:
    """The best α, r and β with tiers in these proportions."""
    attention = groups["attention"].items()
    mlp = groups["mlp"].items()
    full = max((min(fact.shape) for _, fact in attention), default=0)
    ladders = [
        _pruned_ladder(groups["pruned"]),
        [{i: _by_rank(f, share * full, shares) for i, f in attention} for share in RANK_SHARES],
        [{i: _by_energy(f, energy, shares) for i, f in mlp} for energy in ENERGY_SHARES],
    ]
    # Nothing at all must stay possible, or a small budget could not be met.
    ladders[1].insert(0, {i: zero_point_of(fact) for i, fact in attention})
    ladders[2].insert(0, {i: zero_point_of(fact) for i, fact in mlp})
    best = _best_combination(ladders, budget_bytes)
    return {
        i: point
        for ladder, step in zip(ladders, best, strict=True)
        for i, point in ladder[step].items()
    }


def _plan(facts: Mapping[int, MatrixFacts], points: Mapping[int, Point]) -> Plan:
    return Plan(
        {i: points[i].precision for i in facts},
        sum(point.nbytes for point in points.values()),
        sum(point.error for point in points.values()),
    )


def _pruned_ladder(facts: Mapping[int, MatrixFacts]) -> list[dict[int, Point]]:
    """One step per share kept, and a first one that keeps nothing."""
    steps = [{name: zero_point_of(fact) for name, fact in facts.items()}]
    pruned = {name: sparse_points(fact) for name, fact in facts.items()}
    depth = min((len(points) for points in pruned.values()), default=0)
    steps += [{name: points[i] for name, points in pruned.items()} for i in range(depth)]
    return steps


def _by_rank(facts: MatrixFacts, rank: float, tiers: tuple[float, float, float]) -> Point:
    """Attention: the same rank in every matrix that has it."""
    kept = min(max(1, round(rank)), MAX_RANK, *facts.shape)
    return _never_dearer_than_direct(facts, split_tiers(kept, tiers))


def _by_energy(facts: MatrixFacts, share: float, tiers: tuple[float, float, float]) -> Point:
    """MLP: the smallest rank that keeps `share` of the energy."""
    kept = np.cumsum(facts.energies)
    if kept[-1] <= 0:
        return zero_point_of(facts)
    rank = int(np.searchsorted(kept, share * kept[-1])) + 1
    rank = min(rank, MAX_RANK, *facts.shape)
    return _never_dearer_than_direct(facts, split_tiers(rank, tiers))


def _never_dearer_than_direct(facts: MatrixFacts, tiers: tuple[Tier, ...]) -> Point:
    """Factors in these tiers, or the direct form where that is cheaper and no worse.

    The k and v matrices of grouped-query attention are so flat that factors of a large rank cost
    more bits than the matrix itself.
    """
    factors = tiers_point(facts, tiers)
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
