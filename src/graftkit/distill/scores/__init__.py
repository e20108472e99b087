"""Scores: what an answer is worth.

checks      exact, number, json: the same as the reference
code        the prompt's tests, run on the answer's code in two processes (sandbox.py)
reward      a reward model
judge       a grade from a model behind an endpoint
agreement   the source's other samples; its own likelihood
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from graftkit.distill.config import (
    AgreementScore,
    CodeRule,
    JudgeScore,
    LikelihoodScore,
    RewardScore,
    Score,
)
from graftkit.distill.records import Answer, Prompt

__all__ = ["Scorer", "Verdict", "finished", "open_scorer", "why_unusable"]

Verdict = float | str
"""A score, 1.0 for a rule that passes; or why the answer fails, "" where the name says it."""


class Scorer(Protocol):
    """Who judges; every kind of score is one of these."""

    costly: bool
    """Whether verdicts are worth keeping when the run is killed."""

    def score(
        self, answers: Sequence[Answer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """Verdicts on the finished answers, by place, in any order, without those in `done`.

        A verdict depends on `answers` and `prompts`, not on what is done.
        Raises: RowsError for a prompt without the reference or the tests that are needed;
            SourceError when a judge or the sandbox fails as a whole.
        """


def open_scorer(score: Score, where: Path) -> Scorer:
    """The scorer of one `[[scores]]` table; relative paths refer to `where`.

    Raises: ConfigError for a missing key or library, or a reward model with several labels;
        CheckpointError for a reward model that cannot be used; SourceError for a sandbox that
        does not work.
    """
    if isinstance(score, CodeRule):
        from graftkit.distill.scores.code import CodeTests

        return CodeTests(score)
    if isinstance(score, RewardScore):
        from graftkit.distill.scores.reward import RewardModel

        return RewardModel(score, where)
    if isinstance(score, JudgeScore):
        from graftkit.distill.scores.judge import Judge

        return Judge(score, where)
    if isinstance(score, AgreementScore | LikelihoodScore):
        from graftkit.distill.scores.agreement import Agreement, Likelihood

        return Agreement(score) if isinstance(score, AgreementScore) else Likelihood()
    from graftkit.distill.scores.checks import ReferenceCheck

    return ReferenceCheck(score)


def why_unusable(answer: Answer) -> str | None:
    """Why an answer cannot pass, whatever the scores: it is not whole, or there is none."""
    if answer.finish == "refused":
        return "refused"
    if answer.finish == "length":
        return "unfinished"
    return None if answer.text.strip() else "empty"


def finished(answers: Sequence[Answer]) -> Iterator[tuple[int, Answer]]:
    """The answers that scorers look at, with their places."""
    return ((i, answer) for i, answer in enumerate(answers) if why_unusable(answer) is None)
