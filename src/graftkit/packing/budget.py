"""How the paper's recipe spends the bytes: one precision per tensor under the budget.

One water level for all tensors, such that the pack meets its budget from below.

Bytes and errors of entropy-coded tensors are known only when they are coded. The level is found
on expectations, the tensors are coded, the expectations are corrected by what came out, and again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from graftkit.compress.allocate import (
    DENSE_BITS,
    CodingOption,
    MatrixFacts,
    RatePoint,
    coding_options,
    dense_points,
    finest_level,
    sparse_points,
    tiers_point,
    zero_point_of,
)
from graftkit.compress.codecs import Precision, Zero
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
class BudgetPlan:
    """Precision of every lossy tensor by its index, their payload bytes and expected error."""

    precisions: Mapping[int, Precision]
    nbytes: int
    error: float


def plan_graftllm(
    kinds: Mapping[int, ModuleKind], facts: Mapping[int, MatrixFacts], budget_bytes: int
) -> BudgetPlan:
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
) -> dict[int, RatePoint]:
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


def _plan(facts: Mapping[int, MatrixFacts], points: Mapping[int, RatePoint]) -> BudgetPlan:
    return BudgetPlan(
        {i: points[i].precision for i in facts},
        sum(point.nbytes for point in points.values()),
        sum(point.error for point in points.values()),
    )


def _pruned_ladder(facts: Mapping[int, MatrixFacts]) -> list[dict[int, RatePoint]]:
    """One step per share kept, and a first one that keeps nothing."""
    steps = [{name: zero_point_of(fact) for name, fact in facts.items()}]
    pruned = {name: sparse_points(fact) for name, fact in facts.items()}
    depth = min((len(points) for points in pruned.values()), default=0)
    steps += [{name: points[i] for name, points in pruned.items()} for i in range(depth)]
    return steps


def _by_rank(facts: MatrixFacts, rank: float, tiers: tuple[float, float, float]) -> RatePoint:
    """Attention: the same rank in every matrix that has it."""
    kept = min(max(1, round(rank)), MAX_RANK, *facts.shape)
    return _never_dearer_than_direct(facts, split_tiers(kept, tiers))


def _by_energy(facts: MatrixFacts, share: float, tiers: tuple[float, float, float]) -> RatePoint:
    """MLP: the smallest rank that keeps `share` of the energy."""
    kept = np.cumsum(facts.energies)
    if kept[-1] <= 0:
        return zero_point_of(facts)
    rank = int(np.searchsorted(kept, share * kept[-1])) + 1
    rank = min(rank, MAX_RANK, *facts.shape)
    return _never_dearer_than_direct(facts, split_tiers(rank, tiers))


def _never_dearer_than_direct(facts: MatrixFacts, tiers: tuple[Tier, ...]) -> RatePoint:
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


def _best_combination(
    ladders: list[list[dict[int, RatePoint]]], budget_bytes: int
) -> tuple[int, ...]:
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


ROUNDS = 5
GOOD_ENOUGH = 0.99
"""Share of the room that must be used before no further round is made."""
CLOSE = 1.3
"""Choices whose expected cost is within this factor of the best are tried in the first round."""
_AIM = 0.997
_COARSEST = 1e5  # times the finest level of a tensor: all its codes are zero
_CLOSE_LEVELS = 1e-7  # a level is not searched more precisely

Encode = Callable[[Mapping[int, Precision]], Mapping[int, tuple[int, float]]]
"""Codes tensors at these precisions; says bytes and relative squared error of each."""


@dataclass
class LevelSearch:
    """The search for the level: what is known of every lossy tensor, by index."""

    facts: Mapping[int, MatrixFacts]
    servable: bool
    found: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)
    """Bytes and error that came out over those expected, by tensor and codec."""

    def of_tensor(self, index: int, level: float) -> float:
        """The level, or the lowest of use to this tensor."""
        return max(level, finest_level(self.facts[index]))

    def ranked(self, index: int, level: float) -> list[CodingOption]:
        """Choices for one tensor, the best first, as far as is known."""
        corrected, level = [], self.of_tensor(index, level)
        for choice in coding_options(self.facts[index], level, self.servable):
            nbytes, error = self.found.get((index, choice.precision.codec), (1.0, 1.0))
            corrected.append(
                replace(choice, nbytes=choice.nbytes * nbytes, error=choice.error * error)
            )
        return sorted(corrected, key=lambda choice: choice.cost(level))

    def precisions(self, level: float) -> dict[int, Precision]:
        """The best choice of every tensor."""
        return {i: self.ranked(i, level)[0].precision for i in self.facts}

    def level(self, goal: float) -> float:
        """Smallest level whose expected bytes stay within `goal`."""
        ends = [finest_level(facts) for facts in self.facts.values()]
        low, high = min(ends), max(ends) * _COARSEST
        while high > low * (1 + _CLOSE_LEVELS):
            middle = math.sqrt(low * high)
            if sum(self.ranked(i, middle)[0].nbytes for i in self.facts) > goal:
                low = middle
            else:
                high = middle
        return high

    def explore(self, level: float, encode: Encode) -> None:
        """Try every choice that may turn out to be the best."""
        close: dict[str, dict[int, Precision]] = {}
        for i in self.facts:
            ranked, own = self.ranked(i, level), self.of_tensor(i, level)
            limit = CLOSE * ranked[0].cost(own)
            near = [choice.precision for choice in ranked if choice.cost(own) <= limit]
            if len(near) > 1:
                for precision in near:
                    close.setdefault(precision.codec, {})[i] = precision
        close.pop("zero", None)
        for codec in sorted(close):
            self.learn(level, close[codec], encode(close[codec]))

    def learn(
        self,
        level: float,
        tried: Mapping[int, Precision],
        results: Mapping[int, tuple[int, float]],
    ) -> None:
        """Correct what is expected by what came out at this level."""
        for i, precision in tried.items():
            facts = self.facts[i]
            own = self.of_tensor(i, level)
            guess = {c.precision.codec: c for c in coding_options(facts, own, self.servable)}
            choice = guess[precision.codec]
            if choice.nbytes > 0 and choice.error > 0:
                nbytes, distortion = results[i]
                error = distortion * facts.weight * float(facts.energies.sum())
                ratios = nbytes / choice.nbytes, error / choice.error
                self.found[i, precision.codec] = _within(ratios[0]), _within(ratios[1])


def fit_budget(
    facts: Mapping[int, MatrixFacts], room: int, servable: bool, encode: Encode
) -> dict[int, Precision]:
    """Precisions whose coded bytes fill `room` as far as they can from below.

    The last call of `encode` is with exactly what is returned.
    """
    best: dict[int, Precision] = {i: Zero() for i in facts}
    loud = {i: f for i, f in facts.items() if f.weight > 0 and f.energies.any()}
    if loud:
        fit, used, goal = LevelSearch(loud, servable), 0, _AIM * room
        fit.explore(fit.level(goal), encode)
        for _ in range(ROUNDS):
            level = fit.level(goal)
            wanted = fit.precisions(level)
            results = encode(wanted)
            total = sum(nbytes for nbytes, _ in results.values())
            if used < total <= room:
                best, used = best | wanted, total
            if GOOD_ENOUGH * room <= total <= room:
                break
            fit.learn(level, wanted, results)
            if total > room:
                goal *= 0.997
    encode(best)
    return best


def _within(ratio: float) -> float:
    return min(4.0, max(0.25, ratio))
