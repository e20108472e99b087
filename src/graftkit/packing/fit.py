"""One water level for all tensors, such that the pack meets its budget from below.

Bytes and errors of entropy-coded tensors are known only when they are coded. The level is found
on expectations, the tensors are coded, the expectations are corrected by what came out, and again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from graftkit.compress.allocate import MatrixFacts
from graftkit.compress.codecs import Precision, Zero
from graftkit.compress.water import Choice, choices, finest

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
class Fit:
    """The search for the level: what is known of every lossy tensor, by index."""

    facts: Mapping[int, MatrixFacts]
    servable: bool
    found: dict[tuple[int, str], tuple[float, float]] = field(default_factory=dict)
    """Bytes and error that came out over those expected, by tensor and codec."""

    def of_tensor(self, index: int, level: float) -> float:
        """The level, or the lowest of use to this tensor."""
        return max(level, finest(self.facts[index]))

    def ranked(self, index: int, level: float) -> list[Choice]:
        """Choices for one tensor, the best first, as far as is known."""
        corrected, level = [], self.of_tensor(index, level)
        for choice in choices(self.facts[index], level, self.servable):
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
        ends = [finest(facts) for facts in self.facts.values()]
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
            guess = {c.precision.codec: c for c in choices(facts, own, self.servable)}
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
        fit, used, goal = Fit(loud, servable), 0, _AIM * room
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
