"""How good is a library? Routed answers against those of the right pack, and of the target alone.

Rows come under the name of the pack that should answer them, or under "target" where none should.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graftkit.evaluate import exact_match
from graftkit.library.live import LiveLibrary
from graftkit.library.memory import Mixture
from graftkit.route import TARGET, Router
from graftkit.rows import Row

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SkillScore:
    """The rows of one pack, or of none. Shares are 0 to 1, of rows answered word for word."""

    rows: int
    """Rows measured."""
    accuracy: float
    """Share of the rows that were routed to the right place."""
    routed: float
    """Exact match of the packs that the router chose."""
    oracle: float
    """Exact match of the right pack on every row."""
    target: float
    """Exact match of the target alone."""

    @property
    def regret(self) -> float:
        """What routing costs: oracle - routed."""
        return self.oracle - self.routed


@dataclass(frozen=True)
class LibraryScore:
    """All rows together."""

    skills: dict[str, SkillScore]
    """By the name that the rows came under."""
    confusion: dict[str, dict[str, int]]
    """Rows by that name, then by where they were routed."""
    milliseconds_per_prompt: float
    """Time that routing took."""

    @property
    def accuracy(self) -> float:
        """Share of all rows that were routed to the right place."""
        right = sum(counts.get(name, 0) for name, counts in self.confusion.items())
        return right / sum(score.rows for score in self.skills.values())

    @property
    def false_acceptance(self) -> float | None:
        """Share of the rows of no pack that a pack took; None without such rows."""
        foreign = self.skills.get(TARGET)
        return None if foreign is None else 1 - foreign.accuracy

    def mean(self, what: str) -> float | None:
        """Mean of `routed`, `oracle`, `target` or `regret` over the packs, each counted once."""
        values = [getattr(score, what) for name, score in self.skills.items() if name != TARGET]
        return sum(values) / len(values) if values else None

    def numbers(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "accuracy": self.accuracy,
            "false_acceptance": self.false_acceptance,
            **{what: self.mean(what) for what in ("routed", "oracle", "target", "regret")},
            "milliseconds_per_prompt": self.milliseconds_per_prompt,
            "skills": {
                name: asdict(score) | {"regret": score.regret}
                for name, score in self.skills.items()
            },
            "confusion": self.confusion,
        }


def score_library(
    live: LiveLibrary,
    router: Router,
    rows: Mapping[str, Sequence[Row]],
    mixtures: Mapping[str, Mixture],
    progress: Progress | None = None,
) -> LibraryScore:
    """Route every row, and answer it three ways.

    Args:
        mixtures: what each name stands for. Raises: RowsError as `exact_match`.
    """
    tell = progress or (lambda step, done, total: None)
    skills, confusion = {}, {}
    seconds, done, total = 0.0, 0, sum(map(len, rows.values()))
    for name, own in rows.items():
        tell("answering", done, total)
        started = time.perf_counter()
        chosen = [route.name for route in router.route([row.prompt for row in own])]
        seconds += time.perf_counter() - started
        confusion[name] = dict(Counter(chosen).most_common())
        skills[name] = _score(live, name, own, chosen, mixtures)
        done += len(own)
    tell("answering", total, total)
    return LibraryScore(skills, confusion, 1000 * seconds / total)


def _score(
    live: LiveLibrary,
    name: str,
    rows: Sequence[Row],
    chosen: Sequence[str],
    mixtures: Mapping[str, Mixture],
) -> SkillScore:
    matched = dict.fromkeys(("routed", "oracle", "target"), 0.0)
    for choice in sorted(set(chosen)):
        group = [row for row, where in zip(rows, chosen, strict=True) if where == choice]
        # A row that was routed right, or to the target, is not answered a second time.
        found = {who: 0.0 for who in (choice, name, TARGET)}
        for who in found:
            live.use(mixtures[who])
            reader = live.voice(mixtures[who]).tokenizer
            found[who] = exact_match(live.model, reader, group) * len(group)
        matched["routed"] += found[choice]
        matched["oracle"] += found[name]
        matched["target"] += found[TARGET]
    shares = {who: count / len(rows) for who, count in matched.items()}
    return SkillScore(len(rows), chosen.count(name) / len(rows), **shares)
