"""How packing spends its bytes: one precision for every lossy tensor, within the budget.

`plan_graftllm` is the paper's recipe. It searches a few hyperparameters that all layers share. The
bytes of every combination are known without encoding.

`fit_budget` is recipe auto: one water level for all tensors. Bytes and errors of entropy-coded
tensors are known only after encoding. So the level is found on expectations, the tensors are
encoded, the results correct the expectations, and the search repeats. The file fills its budget
from below.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

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
"""β: shares of an MLP delta's energy that its rank keeps."""
RANK_SHARES = tuple(np.geomspace(0.002, 1.0, 160))
"""r of attention, as shares of the largest full rank."""

Ladder = list[dict[int, RatePoint]]
"""Points of all tensors of one operator, by index, for each value of its hyperparameter."""

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
    """The paper's operators, with hyperparameters that fit the budget (GraftLLM section 3.2).

    All layers share α (share of entries kept) for embeddings and head, β (share of energy kept) for
    MLP, and r (rank) for attention. Of all combinations on a grid that fit, the one with the least
    expected error is taken. The proportions of the 8/4/2-bit tiers are searched too.

    Args:
        kinds, facts: of the lossy tensors, by index.
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
    # A first step that stores nothing: the smallest budgets allow no more.
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


def _pruned_ladder(facts: Mapping[int, MatrixFacts]) -> Ladder:
    """One step for each share of entries kept, after a first one that keeps nothing."""
    steps = [{name: zero_point_of(fact) for name, fact in facts.items()}]
    pruned = {name: sparse_points(fact) for name, fact in facts.items()}
    depth = min((len(points) for points in pruned.values()), default=0)
    steps += [{name: points[i] for name, points in pruned.items()} for i in range(depth)]
    return steps


def _by_rank(facts: MatrixFacts, rank: float, tiers: tuple[float, float, float]) -> RatePoint:
    """Attention: the same rank in every matrix, or a smaller matrix's full rank."""
    whole = min(max(1, round(rank)), MAX_RANK, *facts.shape)
    return _factors_or_dense(facts, split_tiers(whole, tiers))


def _by_energy(facts: MatrixFacts, share: float, tiers: tuple[float, float, float]) -> RatePoint:
    """MLP: the smallest rank that keeps `share` of the energy."""
    energy = np.cumsum(facts.energies)
    if energy[-1] <= 0:
        return zero_point_of(facts)
    rank = int(np.searchsorted(energy, share * energy[-1])) + 1
    rank = min(rank, MAX_RANK, *facts.shape)
    return _factors_or_dense(facts, split_tiers(rank, tiers))


def _factors_or_dense(facts: MatrixFacts, tiers: tuple[Tier, ...]) -> RatePoint:
    """Factors in these tiers, or the dense form where that takes fewer bytes and no more error.

    The k and v matrices of grouped-query attention have a flat spectrum: factors of a large rank
    take more bits than the matrix itself.
    """
    factors = tiers_point(facts, tiers)
    direct = [point for point in dense_points(facts) if point.nbytes <= factors.nbytes]
    better = [point for point in direct if point.error <= factors.error]
    if better:
        return min(better, key=lambda point: point.nbytes)
    widest = dense_points(facts)[len(DENSE_BITS) - 1]
    return widest if factors.nbytes > widest.nbytes else factors


def _best_combination(ladders: list[Ladder], budget_bytes: int) -> tuple[int, ...]:
    """Step of each ladder such that the summed error is least and the summed bytes fit."""
    bytes_of = [
        np.array([sum(p.nbytes for p in step.values()) for step in ladder]) for ladder in ladders
    ]
    errors = [
        np.array([sum(p.error for p in step.values()) for step in ladder]) for ladder in ladders
    ]
    total = bytes_of[0][:, None, None] + bytes_of[1][None, :, None] + bytes_of[2][None, None, :]
    error = errors[0][:, None, None] + errors[1][None, :, None] + errors[2][None, None, :]
    # The first steps store nothing, so something always fits. Of equal errors, the smallest file.
    score = np.where(total <= budget_bytes, error, np.inf)
    best = np.flatnonzero(score.reshape(-1) == score.min())
    smallest = best[np.argmin(total.reshape(-1)[best])]
    return tuple(int(i) for i in np.unravel_index(smallest, total.shape))


ROUNDS = 5
"""Encodings of all tensors, at most."""
GOOD_ENOUGH = 0.99
"""Share of the room that ends the search once it is filled."""
CLOSE = 1.3
"""Choices whose expected cost is within this factor of the best are encoded in the first round."""
_AIM = 0.997
_COARSEST = 1e5  # times the finest level of a tensor: all its codes are zero
_LEVEL_PRECISION = 1e-5
_NEARLY, _AIM_WITHIN = 0.9998, 0.9999  # shares of the bytes that a level is looked for
_FIRST_STEP = 1.1  # by which the next level is expected to differ from the last

Encode = Callable[[Mapping[int, Precision]], Mapping[int, tuple[int, float]]]
"""Encodes tensors at these precisions; returns bytes and relative squared error of each."""


class LevelSearch:
    """Expectations for every lossy tensor, by index, corrected by what was encoded.

    Attributes:
        facts: of tensors whose delta is not zero.
        corrections: bytes and error of the last encoding over those expected, by tensor and codec.
    """

    def __init__(self, facts: Mapping[int, MatrixFacts], servable: bool):
        self.facts, self.servable = facts, servable
        self.corrections: dict[tuple[int, str], tuple[float, float]] = {}
        self._last_level: float | None = None
        self._options: dict[tuple[int, float], list[CodingOption]] = {}

    def ranked(self, index: int, level: float) -> list[CodingOption]:
        """Choices for one tensor at a level, the least expected cost first."""
        corrected, level = [], self._useful_level(index, level)
        for choice in self._expected_options(index, level):
            nbytes, error = self.corrections.get((index, choice.precision.codec), (1.0, 1.0))
            corrected.append(
                replace(choice, nbytes=choice.nbytes * nbytes, error=choice.error * error)
            )
        return sorted(corrected, key=lambda choice: choice.cost(level))

    def best(self, level: float) -> dict[int, Precision]:
        """The best choice for every tensor."""
        return {i: self.ranked(i, level)[0].precision for i in self.facts}

    def smallest_level(self, goal: float) -> float:
        """The smallest level whose expected bytes stay within `goal`, or nearly all of it.

        Bytes are about a power of the level: a straight line through two levels on logarithmic
        scales meets the goal in a few steps. Where choices jump, the interval is halved instead.
        """
        low, high, below, above = self._bracket(goal)
        if below <= goal:
            high, above = low, below
        halve = False
        while high > low * (1 + _LEVEL_PRECISION) and not _NEARLY * goal <= above <= goal:
            share = 0.5
            if not halve and 0 < above < goal < below:
                share = math.log(below / (_AIM_WITHIN * goal)) / math.log(below / above)
            middle = low * (high / low) ** min(0.999, max(0.001, share))
            nbytes, width = self._expected_bytes(middle), math.log(high / low)
            if nbytes > goal:
                low, below = middle, nbytes
            else:
                high, above = middle, nbytes
            halve = not halve and math.log(high / low) > width / 2
        self._last_level = high
        return high

    def _bracket(self, goal: float) -> tuple[float, float, float, float]:
        """Two levels around the one for `goal`, close to the last one, and their bytes."""
        ends = [finest_level(facts) for facts in self.facts.values()]
        lowest, highest = min(ends), max(ends) * _COARSEST
        if self._last_level is None:
            low, high = lowest, highest
        else:
            low, high = self._last_level / _FIRST_STEP, self._last_level * _FIRST_STEP
        below, above = self._expected_bytes(low), self._expected_bytes(high)
        step = _FIRST_STEP
        while below <= goal and low > lowest:
            high, above, step = low, below, step * step
            low = max(lowest, low / step)
            below = self._expected_bytes(low)
        while above > goal and high < highest:
            low, below, step = high, above, step * step
            high = min(highest, high * step)
            above = self._expected_bytes(high)
        return low, high, below, above

    def _expected_bytes(self, level: float) -> float:
        return sum(self.ranked(i, level)[0].nbytes for i in self.facts)

    def close_choices(self, level: float) -> list[dict[int, Precision]]:
        """All choices that may turn out to be the best, grouped by codec."""
        close: dict[str, dict[int, Precision]] = {}
        for i in self.facts:
            ranked, own = self.ranked(i, level), self._useful_level(i, level)
            limit = CLOSE * ranked[0].cost(own)
            near = [choice.precision for choice in ranked if choice.cost(own) <= limit]
            if len(near) > 1:
                for precision in near:
                    close.setdefault(precision.codec, {})[i] = precision
        close.pop("zero", None)
        return [close[codec] for codec in sorted(close)]

    def correct(
        self,
        level: float,
        precisions: Mapping[int, Precision],
        results: Mapping[int, tuple[int, float]],
    ) -> None:
        """Correct the expectations by what `precisions` encode to at this level."""
        for i, precision in precisions.items():
            facts = self.facts[i]
            options = self._expected_options(i, self._useful_level(i, level))
            expected = {choice.precision.codec: choice for choice in options}
            choice = expected[precision.codec]
            if choice.nbytes > 0 and choice.error > 0:
                nbytes, distortion = results[i]
                error = distortion * facts.weight * float(facts.energies.sum())
                ratios = nbytes / choice.nbytes, error / choice.error
                self.corrections[i, precision.codec] = _limited(ratios[0]), _limited(ratios[1])

    def _expected_options(self, index: int, level: float) -> list[CodingOption]:
        """Choices for one tensor at a level, as expected without corrections."""
        key = index, level
        if key not in self._options:
            self._options[key] = coding_options(self.facts[index], level, self.servable)
        return self._options[key]

    def _useful_level(self, index: int, level: float) -> float:
        """The level, or the finest that this tensor's codecs can use."""
        return max(level, finest_level(self.facts[index]))


def fit_budget(
    facts: Mapping[int, MatrixFacts],
    room: int,
    servable: bool,
    encode: Encode,
    estimate: Encode | None = None,
) -> dict[int, Precision]:
    """Precisions whose encoded bytes fill `room` from below, as far as possible.

    The last call of `encode` is with what is returned.

    Args:
        facts: of every lossy tensor, by index. room: bytes.
        estimate: what `encode` returns, or nearly, for less work; the search asks it instead.
    """
    allowed = room
    while True:
        best = _search_precisions(facts, allowed, servable, estimate or encode)
        total = sum(nbytes for nbytes, _ in encode(best).values())
        if total <= room:
            return best
        allowed = allowed * room // total


def _search_precisions(
    facts: Mapping[int, MatrixFacts], room: int, servable: bool, measure: Encode
) -> dict[int, Precision]:
    """Precisions whose measured bytes fill `room` from below, as far as possible."""
    best: dict[int, Precision] = {i: Zero() for i in facts}
    nonzero = {i: f for i, f in facts.items() if f.weight > 0 and f.energies.any()}
    if not nonzero:
        return best
    search, used, goal = LevelSearch(nonzero, servable), 0, _AIM * room
    level = search.smallest_level(goal)
    for precisions in search.close_choices(level):
        search.correct(level, precisions, measure(precisions))
    for _ in range(ROUNDS):
        level = search.smallest_level(goal)
        precisions = search.best(level)
        results = measure(precisions)
        total = sum(nbytes for nbytes, _ in results.values())
        if used < total <= room:
            best, used = best | precisions, total
        if GOOD_ENOUGH * room <= total <= room:
            break
        search.correct(level, precisions, results)
        if total > room:
            goal *= 0.997
    return best


def _limited(ratio: float) -> float:
    """A correction within a factor of 4."""
    return min(4.0, max(0.25, ratio))
