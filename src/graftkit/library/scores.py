"""How good are a library's answers? Routed answers against those of the right pack and the target.

Rows come under the name of the pack that should answer them, or under "target" where no pack
should.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graftkit.evaluate import exact_match
from graftkit.library.live import EntryWeights, LiveLibrary
from graftkit.progress import Progress, silent
from graftkit.route import TARGET, Router
from graftkit.rows import Row


@dataclass(frozen=True)
class SkillScore:
    """Scores on the rows of one pack, or of none.

    An exact match is the share of rows (0 to 1) that are answered word for word.
    """

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
    """Scores of a library on the rows of all packs."""

    skills: dict[str, SkillScore]
    """By the name that the rows came under."""
    confusion: dict[str, dict[str, int]]
    """Rows by that name, then by where they were routed."""
    milliseconds_per_prompt: float
    """Mean time of routing one prompt."""

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

    def mean(self, score: str) -> float | None:
        """Mean of `routed`, `oracle`, `target` or `regret` over the packs, unweighted."""
        values = [getattr(own, score) for name, own in self.skills.items() if name != TARGET]
        return sum(values) / len(values) if values else None

    def numbers(self) -> dict[str, Any]:
        """Everything by name."""
        return {
            "accuracy": self.accuracy,
            "false_acceptance": self.false_acceptance,
            **{score: self.mean(score) for score in ("routed", "oracle", "target", "regret")},
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
    mixtures: Mapping[str, EntryWeights],
    progress: Progress | None = None,
) -> LibraryScore:
    """Route every row, and answer it with the routed pack, the right pack and the target.

    Args:
        rows: by the name of the pack that should answer them.
        mixtures: the packs that each name stands for.
    Raises: RowsError for a row that is too long or has an empty prompt.
    """
    report = progress or silent
    skills, confusion = {}, {}
    seconds, done, total = 0.0, 0, sum(map(len, rows.values()))
    for name, own in rows.items():
        report("answering", done, total)
        started = time.perf_counter()
        chosen = [route.name for route in router.route([row.prompt for row in own])]
        seconds += time.perf_counter() - started
        confusion[name] = dict(Counter(chosen).most_common())
        skills[name] = _score(live, name, own, chosen, mixtures)
        done += len(own)
    report("answering", total, total)
    return LibraryScore(skills, confusion, 1000 * seconds / total)


def _score(
    live: LiveLibrary,
    name: str,
    rows: Sequence[Row],
    chosen: Sequence[str],
    mixtures: Mapping[str, EntryWeights],
) -> SkillScore:
    matched = dict.fromkeys(("routed", "oracle", "target"), 0.0)
    for choice in sorted(set(chosen)):
        group = [row for row, where in zip(rows, chosen, strict=True) if where == choice]
        # A row that was routed right, or to the target, is not answered a second time.
        counts = {pack: 0.0 for pack in (choice, name, TARGET)}
        for pack in counts:
            live.use(mixtures[pack])
            tokenizer = live.style(mixtures[pack]).tokenizer
            counts[pack] = exact_match(live.model, tokenizer, group) * len(group)
        matched["routed"] += counts[choice]
        matched["oracle"] += counts[name]
        matched["target"] += counts[TARGET]
    shares = {score: count / len(rows) for score, count in matched.items()}
    return SkillScore(len(rows), chosen.count(name) / len(rows), **shares)
