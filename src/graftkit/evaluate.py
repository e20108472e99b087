"""Measures of a pack: its distance from the tuned model, its answers, and forgetting.

Fidelity is KL(tuned || target + pack) per token of the completions, teacher-forced. Quality is the
share of rows whose greedy generation is exactly the completion.

Forgetting is measured over tasks that are learned one after another: R[t][j] is the score on task j
after task t, b_j the score of the untouched target; the T tasks are counted from 1 in the order of
learning, and all scores have one scale. The definitions are those of Lopez-Paz and Ranzato (arXiv
1706.08840), who call the average ACC.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from graftkit.attachment import attached
from graftkit.attachment.configuration import tuned_tokenizer
from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, CheckpointMismatchError, ConfigError, RowsError
from graftkit.models.loading import class_name, load_model
from graftkit.models.text import (
    context_length,
    end_tokens,
    generate_greedy,
    pad_id,
    scored_tokens,
    tokens_with_logits,
    usable_tokenizer,
    vocabulary_size,
)
from graftkit.progress import StepProgress, silent
from graftkit.rows import (
    EncodedRow,
    Row,
    batches_by_length,
    chat_template,
    check_answerable,
    encode_row,
    pad_batch,
)
from graftkit.skillpack import SkillPack

BATCH_TOKENS = 2_048  # padded tokens of one batch; on a CPU 8,192 are a quarter slower (caches)
SLACK_TOKENS = 8  # generated beyond the completion's own tokens: other tokens may spell one text


@dataclass(frozen=True)
class TokenFidelity:
    """Distance of one model from another over the tokens of rows."""

    kl_mean: float
    """Mean KL divergence per token, nats."""
    kl_p99: float
    """99th percentile of the KL divergence per token, nats."""
    top1_agreement: float
    """Share of tokens with the same most likely token in both models."""
    tokens: int
    """Tokens measured."""


@dataclass(frozen=True)
class Comparison:
    """Target, tuned and target + pack on the same rows; exact matches are None for encoders, and
    for rows of plain text, which have no answers."""

    kl_mean: float
    """Mean KL(tuned || target + pack) per scored token, nats."""
    kl_p99: float
    """99th percentile of that divergence, nats."""
    top1_agreement: float
    """Share of scored tokens with the same most likely token in both."""
    exact_match_target: float | None
    """Share of rows whose greedy generation by the target is the completion."""
    exact_match_tuned: float | None
    """The same for tuned."""
    exact_match_packed: float | None
    """The same for target + pack."""
    recovered: float | None
    """(packed - target) / (tuned - target) of the exact matches; None where tuned equals target."""
    tokens: int
    """Scored tokens measured, EOS included (all tokens for an encoder)."""
    rows: int
    """Rows measured."""


def compare(
    target: str | Path | Checkpoint,
    tuned: str | Path | Checkpoint,
    pack: str | Path | SkillPack,
    rows: Sequence[Row],
    progress: StepProgress | None = None,
) -> Comparison:
    """Measure target, tuned and target + pack on rows.

    All three compute in float32, so that the rounding of activations does not count as distance;
    the weights of target + pack are rounded to their dtype on disk, as they are when served. Two
    models are in memory together: 8 bytes a parameter.

    Raises: CheckpointError, PackFormatError, PackMismatchError, AttachError; RowsError where a row
        does not fit the model.
    """
    target, tuned = _opened(target), _opened(tuned)
    names = class_name(target), class_name(tuned)
    if names[0] != names[1]:
        raise CheckpointMismatchError(
            f"{tuned.path}: a {names[1]}, and the target is a {names[0]}; answers are compared of "
            "two models of one class"
        )
    pack = pack if isinstance(pack, SkillPack) else SkillPack.load(pack)
    tokenizer, target_tokenizer = usable_tokenizer(tuned), usable_tokenizer(target)
    own = tuned_tokenizer(target, pack)
    model: Any = load_model(target, torch.float32)
    has_answers = model.can_generate() and all(row.format != "text" for row in rows)
    stages = 4 if has_answers else 1
    report_all = progress or silent

    def report(stage: int) -> StepProgress:
        return lambda done, total: report_all(stage * total + done, stages * total)

    def answers(model: Any, own: Any, stage: int) -> float | None:
        return exact_match(model, own, rows, report(stage)) if stages > 1 else None

    reads_rows = True
    if any(row.format == "messages" for row in rows) and not chat_template(target_tokenizer):
        # A base model is asked in the template that tuned has, unless that has tokens it lacks.
        target_tokenizer, reads_rows = tokenizer, len(tokenizer) <= vocabulary_size(model)
    before = answers(model, target_tokenizer, 0) if reads_rows else None
    tuned_model: Any = load_model(tuned, torch.float32)
    goal = answers(tuned_model, tokenizer, 1)
    with attached(model, pack):
        after = answers(model, own, 2)
        fidelity = token_fidelity(tuned_model, model, tokenizer, rows, report(stages - 1))
    return Comparison(
        **asdict(fidelity),
        exact_match_target=before,
        exact_match_tuned=goal,
        exact_match_packed=after,
        recovered=_recovered(before, goal, after),
        rows=len(rows),
    )


def token_fidelity(
    tuned: Any,
    packed: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    progress: StepProgress | None = None,
) -> TokenFidelity:
    """Distance of `packed` from `tuned`, two live models, over the same teacher-forced tokens.

        KL = Σ_v p(v) (log p(v) - log q(v)),   p of tuned, q of packed, log-softmax in float32

    Causal models are measured where they predict a scored token (of a completion, of the assistant,
    of a text, or EOS), encoders at every token.

    Raises: RowsError for a row that is too long or starts from nothing; CheckpointError where the
        models differ in vocabulary or give logits that are not finite.
    """
    limit = context_length(tuned)
    encoded = [encode_row(tokenizer, row, limit) for row in rows]
    if tuned.can_generate():
        _check_prompts(rows, encoded)
    divergences, agreed = [np.empty(0)], 0
    done = 0
    tokens = tokens_with_logits(tuned, BATCH_TOKENS)
    for batch in batches_by_length(list(map(len, encoded)), tokens):
        ids, mask = pad_batch([encoded[index].ids for index in batch], pad_id(tokenizer))
        scored = scored_tokens(tuned, [encoded[index] for index in batch], mask)
        p, q = (_log_probabilities(model, ids, mask, scored) for model in (tuned, packed))
        divergence, same = _divergence(p, q)
        divergences.append(divergence)
        agreed += same
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return _fidelity(np.concatenate(divergences), agreed)


def exact_match(
    model: Any, tokenizer: Any, rows: Sequence[Row], progress: StepProgress | None = None
) -> float:
    """Share of rows (0 to 1) whose greedy generation is the completion, blanks around it ignored.

    Of a conversation it is the assistant's last turn. Generation stops at EOS. A model without EOS
    cannot stop, so of its text only as many lines count as the completion has.

    Raises: RowsError for a row that is too long or starts from nothing, and for a text, which has
        no completion.
    """
    if not rows:
        raise RowsError("no rows; an exact match is a share of at least one row")
    for row in rows:
        check_answerable(row)
    limit = context_length(model)
    encoded = [encode_row(tokenizer, row, limit) for row in rows]
    _check_prompts(rows, encoded)
    lengths = [len(row) + SLACK_TOKENS for row in encoded]
    matched = done = 0
    stops = end_tokens(model.generation_config, tokenizer)
    for batch in batches_by_length(lengths, BATCH_TOKENS):
        chosen = [_question(tokenizer, rows[index], encoded[index]) for index in batch]
        matched += sum(_match_rows(model, tokenizer, chosen, stops, limit))
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return matched / len(rows)


def _opened(reference: str | Path | Checkpoint) -> Checkpoint:
    return reference if isinstance(reference, Checkpoint) else Checkpoint.open(reference)


def _recovered(target: float | None, tuned: float | None, packed: float | None) -> float | None:
    if target is None or tuned is None or packed is None or tuned == target:
        return None
    return (packed - target) / (tuned - target)


def _check_prompts(rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> None:
    for row, tokens in zip(rows, encoded, strict=True):
        if tokens.start == 0 and row.format != "text":
            raise RowsError(
                f"{row.origin}: the prompt has no tokens, and a model needs one to start from; "
                "give the row a prompt"
            )


def _fidelity(divergences: np.ndarray, agreed: int) -> TokenFidelity:
    if not divergences.size:
        raise RowsError("no row has a token to measure; give the rows completions with text")
    return TokenFidelity(
        kl_mean=float(divergences.mean()),
        kl_p99=float(np.quantile(divergences, 0.99)),
        top1_agreement=agreed / divergences.size,
        tokens=divergences.size,
    )


def _log_probabilities(model: Any, ids: Tensor, mask: Tensor, scored: Tensor) -> Tensor:
    """log p of every next token at the scored positions, (n, vocab) float32."""
    options = {}
    # Prompts come first and padding last, so the positions to score are among the last ones.
    first = int(scored.any(dim=0).int().argmax())
    if "logits_to_keep" in signature(model.forward).parameters:
        options["logits_to_keep"] = ids.shape[1] - first
    if "use_cache" in signature(model.forward).parameters:
        options["use_cache"] = False
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, **options)
    if "logits" not in output or output["logits"].dim() != 3:
        raise CheckpointError(
            f"{type(model).__name__} gives no logits over a vocabulary for each token; expected a "
            "causal or masked language model"
        )
    logits = output["logits"][:, -(ids.shape[1] - first) :]
    chosen = torch.log_softmax(logits[scored[:, first:]].float(), dim=-1)
    if chosen.isnan().any():
        raise CheckpointError(
            f"{type(model).__name__}: the logits are not finite on the rows; check the weights"
        )
    return chosen


def _divergence(p: Tensor, q: Tensor) -> tuple[np.ndarray, int]:
    """KL(p || q) per token from log probabilities (n, vocab), and how many tops agree."""
    if p.shape != q.shape:
        raise CheckpointMismatchError(
            f"tuned predicts {p.shape[1]} tokens, the other model {q.shape[1]}; expected one "
            "vocabulary"
        )
    same = int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    # A token that tuned never gives counts nothing, also where both logits are -inf.
    parts = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    # Rounding can leave a sum of -1e-8 where the two are almost equal.
    divergence = parts.sum(dim=-1).clamp_min(0)
    return divergence.double().numpy(), same


@dataclass(frozen=True)
class _Question:
    """What is generated from, and what should come.

    Attributes:
        prompt: token ids. tokens: length of the expected answer. answer: its text.
    """

    prompt: list[int]
    tokens: int
    answer: str


def _question(tokenizer: Any, row: Row, encoded: EncodedRow) -> _Question:
    first, end = encoded.answer
    answer = row.completion
    if row.format == "messages":  # tool calls are written by the template
        answer = tokenizer.decode(encoded.ids[first:end], skip_special_tokens=True)
    return _Question(encoded.ids[:first], end - first, answer)


class _Answers:
    """Compares generated ids with the completions of one batch; also ends hopeless generations."""

    def __init__(self, tokenizer: Any, completions: Sequence[str], start: int, stops: bool):
        self.tokenizer = tokenizer
        self.expected = [completion.strip() for completion in completions]
        self.start = start  # width of the padded prompts
        self.stops = stops

    def __call__(self, ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Rows of which no continuation can become the completion: a StoppingCriteria."""
        pairs = zip(self.texts(ids[:, self.start :]), self.expected, strict=True)
        # A character of several tokens reads as U+FFFD until its last byte is there.
        return torch.tensor([not goal.startswith(text.rstrip("\ufffd")) for text, goal in pairs])

    def matches(self, generated: Tensor) -> list[bool]:
        """Whether the new tokens of each row spell its completion."""
        texts = self.texts(generated)
        return [text == goal for text, goal in zip(texts, self.expected, strict=True)]

    def texts(self, generated: Tensor) -> list[str]:
        """What was generated, without blanks around it; without EOS only the lines that count."""
        texts = self.tokenizer.batch_decode(
            generated, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [self._trim(text, goal) for text, goal in zip(texts, self.expected, strict=True)]

    def _trim(self, text: str, goal: str) -> str:
        text = text.strip()
        return text if self.stops else "\n".join(text.split("\n")[: goal.count("\n") + 1]).strip()


def _match_rows(
    model: Any,
    tokenizer: Any,
    batch: Sequence[_Question],
    stops: list[int],
    limit: int | None,
) -> list[bool]:
    """Whether greedy generation answers each row."""
    width = max(len(question.prompt) for question in batch)
    longest = max(question.tokens for question in batch)
    room = longest + SLACK_TOKENS if limit is None else limit - width
    if room < longest and len(batch) > 1:
        # Together a long prompt and a long completion would leave the context; alone they fit.
        return [
            match for row in batch for match in _match_rows(model, tokenizer, [row], stops, limit)
        ]
    answers = _Answers(tokenizer, [question.answer for question in batch], width, bool(stops))
    generated = generate_greedy(
        model,
        [question.prompt for question in batch],
        min(longest + SLACK_TOKENS, room),
        eos_token_id=stops or None,
        pad_token_id=pad_id(tokenizer),
        # Without the model's own penalties, so that every model is measured alike.
        settings=_plain_settings(),
        stopping_criteria=[answers],
    )
    return answers.matches(generated)


def _plain_settings() -> Any:
    config: Any = GenerationConfig  # its constructor carries no types
    return config(use_cache=True)


@dataclass(frozen=True)
class Course:
    """Scores of T tasks that are learned one after another, and the bytes on disk.

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
        """FWT, (1/(T−1)) Σ_{j>1} (R[j−1][j] − b_j): the effect of earlier tasks on the next one.

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
