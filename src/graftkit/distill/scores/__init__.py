"""Scores: what an answer is worth.

checks      exact, number, json: the same as the reference
code        the prompt's tests, run on the answer's code in two processes (sandbox.py)
reward      a reward model
judge       a grade from a model behind an endpoint
agreement   the source's other samples; its own likelihood
"""

import json
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from graftkit.distill.config import (
    AgreementScore,
    CodeRule,
    DistillConfig,
    ExactRule,
    Graded,
    JsonRule,
    JudgeScore,
    LikelihoodScore,
    NumberRule,
    RewardScore,
    Score,
)
from graftkit.distill.records import Answer, Journal, Prompt, Scored, read_lines, write_lines
from graftkit.errors import RowsError
from graftkit.progress import Progress, StepProgress

__all__ = ["Scorer", "Verdict", "finished", "open_scorer", "why_unusable"]

Verdict = float | str
"""A score, 1.0 for a rule that passes; or why the answer fails, "" where the name says it."""


UNJUDGED = "error: "
"""What a verdict begins with where the rule cannot judge the answer; the reason follows."""


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


def open_scorer(score: Score, config_folder: Path) -> Scorer:
    """The scorer of one `[[scores]]` table; paths are relative to `config_folder`.

    Raises: ConfigError for a missing key, library or bubblewrap, or a reward model with several
        labels; CheckpointError for a reward model that cannot be used; SourceError for a sandbox
        that does not start.
    """
    if isinstance(score, CodeRule):
        from graftkit.distill.scores.code import CodeTests

        return CodeTests(score)
    if isinstance(score, RewardScore):
        from graftkit.distill.scores.graders import RewardModel

        return RewardModel(score, config_folder)
    if isinstance(score, JudgeScore):
        from graftkit.distill.scores.graders import Judge

        return Judge(score, config_folder)
    if isinstance(score, AgreementScore | LikelihoodScore):
        from graftkit.distill.scores.checks import Agreement, Likelihood

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


KEY = ("prompt_id", "source", "sample")
SAMPLES, SCORES, PARTIAL = "samples.jsonl", "scores.jsonl", "scores.partial"
# Settings that change how fast verdicts come or what they weigh, not what they say.
PACE = {"weight", "key_env", "concurrency", "retries"}


def wants(config: DistillConfig) -> tuple[bool, bool]:
    """Whether the rules read `completion` and `tests` of the prompts file."""
    references = (ExactRule, NumberRule, JsonRule)
    return (
        any(isinstance(score, references) for score in config.scores),
        any(isinstance(score, CodeRule) for score in config.scores),
    )


def score_answers(
    config: DistillConfig,
    prompts: Sequence[Prompt],
    folder: Path,
    config_folder: Path,
    progress: Progress,
) -> Path:
    """Score every answer of `folder`/samples.jsonl into `folder`/scores.jsonl, in the same order.

    Verdicts that cost something are kept as they come; the same call after an interruption goes on
    there, and gives the same bytes.

    Args:
        config_folder: folder of the configuration, to which its paths are relative.
        progress: called with (step, done, total).
    Raises: RowsError for samples that do not belong to the prompts, or a prompt without what a rule
        compares with; ConfigError, CheckpointError and SourceError as the scorers; OutputError.
    """
    known = {prompt.id: prompt for prompt in prompts}
    answers = _read_answers(folder / SAMPLES)
    for answer in answers:
        prompt = known.get(answer.prompt_id)
        if prompt is None or prompt.text != answer.prompt:
            raise RowsError(
                f"{folder / SAMPLES}: it answers other prompts than the prompts file holds (first: "
                f"prompt {answer.prompt_id}); delete it and run again"
            )
    named = dict(zip(_names(config.scores), config.scores, strict=True))
    scorers = {name: open_scorer(score, config_folder) for name, score in named.items()}
    verdicts: dict[str, Mapping[int, Verdict]] = {}
    # What costs nothing comes first: it finds faults of the prompts file before a judge is paid.
    for name in sorted(scorers, key=lambda name: scorers[name].costly):
        step = partial(progress, f"scoring: {name}")
        scorer = scorers[name]
        if scorer.costly:
            journal = Journal(folder / PARTIAL / f"{name}.jsonl")
            verdicts[name] = _keep_scoring(scorer, named[name], answers, known, journal, step)
        else:
            verdicts[name] = dict(scorer.score(answers, known, ()))
    write_lines(
        folder / SCORES,
        (
            _record(_scored(answer, {n: v[i] for n, v in verdicts.items() if i in v}, named))
            for i, answer in enumerate(answers)
        ),
    )
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return folder / SCORES


def read_scored(folder: Path) -> list[Scored]:
    """Answers with their scores. Raises: RowsError where the two files do not belong together."""
    answers, records = _read_answers(folder / SAMPLES), list(read_lines(folder / SCORES))
    if [_key(answer) for answer in answers] != [
        {name: record.get(name) for name in KEY} for record in records
    ]:
        raise RowsError(
            f"{folder / SCORES}: not the scores of the {SAMPLES} beside it; delete it and run again"
        )
    return [
        Scored(answer, record["passed"], record["failed"], record["reward"], record["scores"])
        for answer, record in zip(answers, records, strict=True)
    ]


def _read_answers(path: Path) -> list[Answer]:
    try:
        return [Answer(**record) for record in read_lines(path)]
    except TypeError as error:
        raise RowsError(f"{path}: no answers ({error}); delete it and run again") from error


def _names(scores: Sequence[Score]) -> list[str]:
    """The kinds, numbered from their second use on: reward, reward_2."""
    kinds = [score.kind for score in scores]
    uses = [kinds[: place + 1].count(kind) for place, kind in enumerate(kinds)]
    return [f"{kind}_{use}" if use > 1 else kind for kind, use in zip(kinds, uses, strict=True)]


def _keep_scoring(
    scorer: Scorer,
    score: Score,
    answers: Sequence[Answer],
    prompts: Mapping[int, Prompt],
    journal: Journal,
    progress: StepProgress,
) -> dict[int, Verdict]:
    """Verdicts by place, each kept on disk; a text that several samples share is scored once."""
    places: dict[tuple[int, str], list[int]] = {}
    for index, answer in finished(answers):
        places.setdefault((answer.prompt_id, answer.text), []).append(index)
    distinct = [answers[same[0]] for same in places.values()]
    done = _continued(journal, _digest(score, distinct, prompts))
    progress(len(done), len(distinct))
    for index, verdict in scorer.score(distinct, prompts, frozenset(done)):
        journal.append({"answer": index, "verdict": verdict})
        done[index] = verdict
        progress(len(done), len(distinct))
    return {place: done[i] for i, same in enumerate(places.values()) for place in same}


def _digest(score: Score, answers: Sequence[Answer], prompts: Mapping[int, Prompt]) -> str:
    """Of everything that decides the verdicts."""
    ignored = PACE | {"timeout_seconds"} if isinstance(score, JudgeScore) else PACE
    said = score.model_dump(mode="json", exclude=ignored)
    asked = [(answer.prompt, prompts[answer.prompt_id].tests, answer.text) for answer in answers]
    return blake3(json.dumps([said, asked]).encode()).hexdigest()


def _continued(journal: Journal, digest: str) -> dict[int, Verdict]:
    """What an interrupted run of the same work left; a journal of other work is thrown away."""
    begin, *lines = journal.read() or [{}]
    if begin == {"digest": digest}:
        return {line["answer"]: line["verdict"] for line in lines}
    journal.path.unlink(missing_ok=True)
    journal.append({"digest": digest})
    return {}


def _scored(answer: Answer, verdicts: Mapping[str, Verdict], named: Mapping[str, Score]) -> Scored:
    """One answer's verdicts together.

    `failed` is what could not be graded before a rule that failed; without all of its grades an
    answer has no reward. Where there are rules only, the reward says whether they pass.
    """
    unusable = why_unusable(answer)
    if unusable is not None:
        return Scored(answer, False, unusable, 0.0)
    grades = {name: score for name, score in named.items() if isinstance(score, Graded)}
    scores = {n: v for n, v in verdicts.items() if n in grades and not isinstance(v, str)}
    reasons = {n: v for n in named if isinstance(v := verdicts[n], str)}
    # First grades that are missing, then rules that failed, then rules that could not judge.
    order = sorted(reasons, key=lambda n: (n not in grades, reasons[n].startswith(UNJUDGED)))
    failed = [_failure(name, reasons[name]) for name in order]
    reward = 0.0 if failed else 1.0
    if grades:
        whole = len(scores) == len(grades)
        reward = sum(grades[n].weight * scores[n] for n in grades) if whole else 0.0
    in_order = {name: scores[name] for name in grades if name in scores}
    return Scored(answer, not failed, failed[0] if failed else None, reward, in_order)


def _failure(name: str, reason: str) -> str:
    if reason.startswith(UNJUDGED):
        return f"{UNJUDGED}{name}: {reason.removeprefix(UNJUDGED)}"
    return f"{name}: {reason}" if reason else name


def _record(scored: Scored) -> dict[str, Any]:
    return {
        **_key(scored.answer),
        "passed": scored.passed,
        "failed": scored.failed,
        "reward": scored.reward,
        "scores": scored.scores,
    }


def _key(answer: Answer) -> dict[str, Any]:
    return dict(zip(KEY, answer.key, strict=True))
