"""Forgetting: what is kept of tasks that were learned one after another. Pure numbers.

R[t][j] is the score on task j after task t, b_j the score of the untouched target; T tasks are
counted from 1 in the order of learning. Scores of all tasks have one scale. The definitions are
those of Lopez-Paz and Ranzato (arXiv 1706.08840), who call the average ACC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from graftkit.errors import ConfigError


@dataclass(frozen=True)
class Course:
    """T tasks learned in one order, and what they cost on disk.

    Attributes:
        tasks: names in the order of learning.
        scores: R, (T, T); row t is measured after task t, also on tasks that come later.
        before: b, (T,).
        disk_bytes: (T,), bytes of everything that must be kept after each task.
    Raises: ConfigError where sizes differ, a score is not finite or nothing was learned.
    """

    tasks: Sequence[str]
    scores: Sequence[Sequence[float]]
    before: Sequence[float]
    disk_bytes: Sequence[int]

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if count == 0:
            raise ConfigError("the course has no tasks; give at least one")
        lengths = [len(self.scores), len(self.before), len(self.disk_bytes)]
        lengths += [len(row) for row in self.scores]
        if any(length != count for length in lengths):
            raise ConfigError(
                f"{count} tasks, but scores, target's scores and bytes have {lengths} entries; "
                f"give a {count} x {count} table of scores and {count} of the others"
            )
        values = [*self.before, *(value for row in self.scores for value in row)]
        if not all(math.isfinite(value) for value in values):
            raise ConfigError("a score is not finite; measure every task after every task")

    @property
    def average(self) -> float:
        """AP, (1/T) Σ_j R[T][j]: the average performance at the end."""
        return fmean(self.scores[-1])

    @property
    def backward_transfer(self) -> float | None:
        """BWT, (1/(T−1)) Σ_{j<T} (R[T][j] − R[j][j]); below 0 is forgetting.

        None for one task. Some papers divide by T.
        """
        last = self.scores[-1]
        return _mean([last[j] - self.scores[j][j] for j in range(len(last) - 1)])

    @property
    def forward_transfer(self) -> float | None:
        """FWT, (1/(T−1)) Σ_{j>1} (R[j−1][j] − b_j): what earlier tasks did for the next one.

        None for one task. Some papers leave b_j out.
        """
        steps = range(1, len(self.tasks))
        return _mean([self.scores[j - 1][j] - self.before[j] for j in steps])

    @property
    def gains(self) -> tuple[float, ...]:
        """R[T][j] − b_j of every task."""
        return tuple(end - b for end, b in zip(self.scores[-1], self.before, strict=True))

    def numbers(self) -> dict[str, Any]:
        """Every metric by its short name, and the bytes on disk at the end."""
        return {
            "ap": self.average,
            "bwt": self.backward_transfer,
            "fwt": self.forward_transfer,
            "gain": fmean(self.gains),
            "bytes": self.disk_bytes[-1],
        }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
