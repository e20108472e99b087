"""The stage `score`: what every answer is worth, and whether it may be trained on.

code      the prompt's tests on the answer's code, inside bubblewrap; referee runs there
graders   rules, agreement of a source with itself, likelihood, reward models, judges
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
from graftkit.distill.records import (
    Journal,
    Prompt,
    ScoredAnswer,
    SourceAnswer,
    read_lines,
    write_lines,
)
from graftkit.errors import RowsError
from graftkit.progress import Progress, StepProgress

Verdict = float | str
"""A number, 1.0 for a rule that passes; or why the answer fails, "" for no other reason."""


UNJUDGED = "error: "
"""What a verdict begins with where the rule cannot judge the answer; the reason follows."""


class Scorer(Protocol):
    """What scores answers; there is one for every kind of score."""

    costly: bool
    """Whether verdicts are stored at once, for a run that is killed."""

    def score(
        self, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """Index and verdict of every finished answer, in any order, without the indices in `done`.

        A verdict depends on `answers` and `prompts`, not on `done`.
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
        from graftkit.distill.scores.graders import Agreement, Likelihood

        return Agreement(score) if isinstance(score, AgreementScore) else Likelihood()
    from graftkit.distill.scores.graders import ReferenceCheck

    return ReferenceCheck(score)


def why_unusable(answer: SourceAnswer) -> str | None:
    """Why an answer cannot pass, whatever its scores: it is missing, cut or empty. Else None."""
    if answer.finish == "refused":
        return "refused"
    if answer.finish == "length":
        return "unfinished"
    return None if answer.text.strip() else "empty"


def finished(answers: Sequence[SourceAnswer]) -> Iterator[tuple[int, SourceAnswer]]:
    """Index and answer of all answers that are scored."""
    return ((i, answer) for i, answer in enumerate(answers) if why_unusable(answer) is None)


KEY = ("prompt_id", "source", "sample")
SAMPLES, SCORES, PARTIAL = "samples.jsonl", "scores.jsonl", "scores.partial"
# Settings that do not change a verdict.
WITHOUT_EFFECT_ON_VERDICTS = {"weight", "key_env", "concurrency", "retries"}


def needed_fields(config: DistillConfig) -> tuple[bool, bool]:
    """Whether the rules need `completion`, and whether they need `tests`, in the prompts file."""
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

    Costly verdicts are stored as they come. After an interruption the same call continues there,
    and gives the same bytes.

    Args:
        config_folder: folder of the configuration, to which its paths are relative.
        progress: called with (step, done, total).
    Raises: RowsError for samples of other prompts, or a prompt without what a rule compares with;
        ConfigError, CheckpointError or SourceError for a scorer that fails; OutputError.
    """
    prompts_by_id = {prompt.id: prompt for prompt in prompts}
    answers = _read_answers(folder / SAMPLES)
    for answer in answers:
        prompt = prompts_by_id.get(answer.prompt_id)
        if prompt is None or prompt.text != answer.prompt:
            raise RowsError(
                f"{folder / SAMPLES}: it answers other prompts than the prompts file holds (first: "
                f"prompt {answer.prompt_id}); delete it and run again"
            )
    named = dict(zip(_names(config.scores), config.scores, strict=True))
    scorers = {name: open_scorer(score, config_folder) for name, score in named.items()}
    verdicts: dict[str, Mapping[int, Verdict]] = {}
    # Cheap scores come first: they detect faults of the prompts file before a judge is paid.
    for name in sorted(scorers, key=lambda name: scorers[name].costly):
        step = partial(progress, f"scoring: {name}")
        scorer = scorers[name]
        if scorer.costly:
            journal = Journal(folder / PARTIAL / f"{name}.jsonl")
            verdicts[name] = _score_with_journal(
                scorer, named[name], answers, prompts_by_id, journal, step
            )
        else:
            verdicts[name] = dict(scorer.score(answers, prompts_by_id, ()))
    write_lines(
        folder / SCORES,
        (
            _record(_combine(answer, {n: v[i] for n, v in verdicts.items() if i in v}, named))
            for i, answer in enumerate(answers)
        ),
    )
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return folder / SCORES


def read_scored(folder: Path) -> list[ScoredAnswer]:
    """Answers with their scores. Raises: RowsError where the two files do not belong together."""
    answers, records = _read_answers(folder / SAMPLES), list(read_lines(folder / SCORES))
    if [_key(answer) for answer in answers] != [
        {name: record.get(name) for name in KEY} for record in records
    ]:
        raise RowsError(
            f"{folder / SCORES}: not the scores of the {SAMPLES} beside it; delete it and run again"
        )
    return [
        ScoredAnswer(answer, record["passed"], record["failed"], record["reward"], record["scores"])
        for answer, record in zip(answers, records, strict=True)
    ]


def _read_answers(path: Path) -> list[SourceAnswer]:
    try:
        return [SourceAnswer(**record) for record in read_lines(path)]
    except TypeError as error:
        raise RowsError(f"{path}: no answers ({error}); delete it and run again") from error


def _names(scores: Sequence[Score]) -> list[str]:
    """The kinds, numbered from their second use on: reward, reward_2."""
    kinds = [score.kind for score in scores]
    uses = [kinds[: place + 1].count(kind) for place, kind in enumerate(kinds)]
    return [f"{kind}_{use}" if use > 1 else kind for kind, use in zip(kinds, uses, strict=True)]


def _score_with_journal(
    scorer: Scorer,
    score: Score,
    answers: Sequence[SourceAnswer],
    prompts: Mapping[int, Prompt],
    journal: Journal,
    progress: StepProgress,
) -> dict[int, Verdict]:
    """Verdicts by index, each stored at once; a text that several samples share is scored once."""
    places: dict[tuple[int, str], list[int]] = {}
    for index, answer in finished(answers):
        places.setdefault((answer.prompt_id, answer.text), []).append(index)
    distinct = [answers[same[0]] for same in places.values()]
    done = _read_journal(journal, _digest(score, distinct, prompts))
    progress(len(done), len(distinct))
    for index, verdict in scorer.score(distinct, prompts, frozenset(done)):
        journal.append({"answer": index, "verdict": verdict})
        done[index] = verdict
        progress(len(done), len(distinct))
    return {place: done[i] for i, same in enumerate(places.values()) for place in same}


def _digest(score: Score, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt]) -> str:
    """A digest of everything that determines the verdicts."""
    ignored = (
        WITHOUT_EFFECT_ON_VERDICTS | {"timeout_seconds"}
        if isinstance(score, JudgeScore)
        else WITHOUT_EFFECT_ON_VERDICTS
    )
    settings = score.model_dump(mode="json", exclude=ignored)
    texts = [(answer.prompt, prompts[answer.prompt_id].tests, answer.text) for answer in answers]
    return blake3(json.dumps([settings, texts]).encode()).hexdigest()


def _read_journal(journal: Journal, digest: str) -> dict[int, Verdict]:
    """Verdicts of an interrupted run with the same digest; another journal is deleted."""
    begin, *lines = journal.read() or [{}]
    if begin == {"digest": digest}:
        return {line["answer"]: line["verdict"] for line in lines}
    journal.path.unlink(missing_ok=True)
    journal.append({"digest": digest})
    return {}


def _combine(
    answer: SourceAnswer, verdicts: Mapping[str, Verdict], named: Mapping[str, Score]
) -> ScoredAnswer:
    """One answer with all of its verdicts.

    `failed` names a missing grade before a failed rule. An answer without all of its grades has the
    reward 0. Without any grades in the settings, the reward is 1 if all rules pass, else 0.
    """
    unusable = why_unusable(answer)
    if unusable is not None:
        return ScoredAnswer(answer, False, unusable, 0.0)
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
    return ScoredAnswer(answer, not failed, failed[0] if failed else None, reward, in_order)


def _failure(name: str, reason: str) -> str:
    if reason.startswith(UNJUDGED):
        return f"{UNJUDGED}{name}: {reason.removeprefix(UNJUDGED)}"
    return f"{name}: {reason}" if reason else name


def _record(scored: ScoredAnswer) -> dict[str, Any]:
    return {
        **_key(scored.answer),
        "passed": scored.passed,
        "failed": scored.failed,
        "reward": scored.reward,
        "scores": scored.scores,
    }


def _key(answer: SourceAnswer) -> dict[str, Any]:
    return dict(zip(KEY, answer.key, strict=True))
