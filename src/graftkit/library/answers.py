"""Answers of a library, and how good they are.

Rows of different packs are answered in one batch, in parts where memory is short.

A prompt that is given to several packs is answered in one of two ways:

deltas         one pass with the weighted sum of the deltas, W + Σ_i w_i ΔW_i
probabilities  one pass for each pack, p(token) = Σ_i w_i p_i(token); the rest of the weight is the
               target's. The copies of a row run in one batch and share the choice of each token.

The two are different models: logits are not linear in the weights.

`score_answers` compares routed answers with those of the right pack and of the target. Rows come
under the name of the pack that should answer them, or under "target" where no pack should.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from graftkit.attachment import Attachment
from graftkit.errors import AttachError, ConfigError
from graftkit.evaluate import BATCH_TOKENS, exact_match
from graftkit.library.live import EntryWeights, LiveLibrary
from graftkit.models.text import generate_greedy, pad_id
from graftkit.progress import Progress, silent
from graftkit.route import TARGET, Route, Router
from graftkit.rows import Row, batches_by_length
from graftkit.serve.style import GenerationStyle

MixMode = Literal["deltas", "probabilities"]
"""How several packs answer one prompt."""

RowWeights = Mapping[int | None, float]
"""Of one row, by the index of a pack, None for the target; at least 0, and 1 together."""

_SUM_TOLERANCE = 1e-5  # a float32 softmax over a few packs sums to 1 within this
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LibraryAnswer:
    """What a library says to one prompt.

    Attributes:
        text: greedy, without special tokens.
        route: the packs that answered; an empty one is the target alone.
        note: why nothing was generated; None where something was.
    """

    prompt: str
    text: str
    route: Route
    note: str | None = None


def unanswerable(live: LiveLibrary, ids: Sequence[int]) -> str | None:
    """Why a prompt of these tokens cannot be continued, None where it can."""
    if not ids:
        return "the prompt has no tokens, and a model needs one to start from"
    if live.context is not None and len(ids) >= live.context:
        return f"the prompt has {len(ids)} tokens, and the target reads {live.context} in all"
    return None


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt as the packs of its row read it.

    Attributes:
        ids: token ids, at least one and fewer than the context.
        mixture: packs and weights. style: how they generate. limit: most tokens of the answer.
    """

    ids: list[int]
    mixture: EntryWeights
    style: GenerationStyle
    limit: int


def prepare_prompt(
    live: LiveLibrary,
    prompt: str,
    mixture: EntryWeights,
    max_new_tokens: int,
    raw: bool,
    system: str | None,
) -> PreparedPrompt | str:
    """A prompt for the packs of its row, or why they cannot answer it.

    Args:
        max_new_tokens: longest answer; an answer also ends where the context does.
        raw: without a chat template. system: text of a system turn in the template.
    Raises: PackMismatchError for a skill of another chat template; RowsError where the template
        fails.
    """
    style = live.style(mixture).raw() if raw else live.style(mixture)
    if system is not None and style.template is None:
        return "the prompt is given raw, and a system text needs a chat template"
    ids = style.encode(prompt, system)
    note = unanswerable(live, ids)
    if note is not None:
        return note
    room = max_new_tokens if live.context is None else live.context - len(ids)
    return PreparedPrompt(ids, mixture, style, min(max_new_tokens, room))


def generate_texts(live: LiveLibrary, prompts: Sequence[PreparedPrompt], mix: MixMode) -> list[str]:
    """The greedy continuation of each prompt by the packs of its row.

    Raises: ConfigError where the packs of one row do not fit into memory; PackMismatchError,
        CorruptPackError for a pack that cannot be attached.
    """
    texts = [""] * len(prompts)
    for part in live.memory.parts([prompt.mixture for prompt in prompts]):
        for rows in _batches(part, prompts):
            answers = _generate_batch(live, [prompts[row] for row in rows], mix)
            for row, text in zip(rows, answers, strict=True):
                texts[row] = text
    return texts


def _batches(part: Sequence[int], prompts: Sequence[PreparedPrompt]) -> Iterator[list[int]]:
    """Rows of similar length that end alike: no answer is cut short for the sake of another row."""
    for ending in dict.fromkeys(sorted((_ending(prompts[row]) for row in part), key=str)):
        alike = [row for row in part if _ending(prompts[row]) == ending]
        lengths = [len(prompts[row].ids) + prompts[row].limit for row in alike]
        for batch in batches_by_length(lengths, BATCH_TOKENS):
            yield [alike[place] for place in batch]


def _ending(prompt: PreparedPrompt) -> tuple[int, tuple[int, ...], str]:
    """The most tokens of an answer, the tokens that end it, and the settings."""
    return prompt.limit, prompt.style.ends, prompt.style.settings


def _generate_batch(
    live: LiveLibrary, prompts: Sequence[PreparedPrompt], mix: MixMode
) -> list[str]:
    ids, mixtures = [prompt.ids for prompt in prompts], [prompt.mixture for prompt in prompts]
    style, limit = prompts[0].style, prompts[0].limit
    options: dict[str, Any] = {
        "eos_token_id": list(style.ends) or None,
        "pad_token_id": pad_id(live.tokenizer),
        "settings": style.generation,
    }
    if mix == "deltas":
        live.memory.route(mixtures)
        output = generate_greedy(live.model, ids, limit, **options)
    else:
        weights = [_with_target(live, mixture) for mixture in mixtures]
        output = generate_averaged(live.attachment, ids, weights, limit, **options)
    return [
        str(prompt.style.tokenizer.decode(row, skip_special_tokens=True))
        for prompt, row in zip(prompts, output, strict=True)
    ]


def _with_target(live: LiveLibrary, mixture: EntryWeights) -> dict[int | None, float]:
    """Weights that sum to 1: what the packs leave is the target's."""
    weights: dict[int | None, float] = {
        live.memory.index(entry): weight for entry, weight in mixture.items()
    }
    rest = 1 - sum(weights.values())
    # Weights that sum to 1 but for rounding leave nothing to the target.
    return weights | {None: rest} if rest > _ROUNDING else weights


def generate_averaged(
    attachment: Attachment,
    prompts: Sequence[list[int]],
    weights: Sequence[RowWeights],
    max_new_tokens: int,
    **options: Any,
) -> Tensor:
    """Continue prompts by the most likely token of Σ_i w_i p_i at each step.

    Args:
        attachment: in side mode; it stays routed to the copies of these rows.
        prompts: token ids. weights: of the packs of every row.
        options: of `generate_greedy`.
    Returns: the new tokens, (rows, longest continuation).
    Raises: ConfigError for weights that do not sum to 1; AttachError for an index without a pack,
        for packs that are merged, and for beam search.
    """
    copies = RowCopies.of(weights)
    attachment.route(copies.packs)
    output = generate_greedy(
        attachment.model,
        [prompts[row] for row in copies.rows],
        max_new_tokens,
        logits_processor=LogitsProcessorList([_SharedToken(copies)]),
        **options,
    )
    firsts = [copies.rows.index(row) for row in range(len(copies.counts))]
    return output[firsts]


@dataclass(frozen=True)
class RowCopies:
    """The rows of a batch, each repeated for every pack that it uses.

    Attributes:
        packs: of every copy. rows: its row. log_weights: the logarithm of its weight.
        counts: copies of every row; they stand one behind the other.
    """

    packs: list[int | None]
    rows: list[int]
    log_weights: list[float]
    counts: list[int]

    @classmethod
    def of(cls, weights: Sequence[RowWeights]) -> "RowCopies":
        """Copies for the weights above 0 of every row.

        Raises: ConfigError where there are no rows, or the weights of one do not sum to 1.
        """
        if not weights:
            raise ConfigError("no rows to average for; give one row of weights for each prompt")
        used = [_check_weights(row, place) for place, row in enumerate(weights)]
        return cls(
            packs=[pack for row in used for pack in row],
            rows=[place for place, row in enumerate(used) for _ in row],
            log_weights=[math.log(weight) for row in used for weight in row.values()],
            counts=[len(row) for row in used],
        )

    def average(self, logits: Tensor) -> Tensor:
        """log Σ_i w_i softmax(logits_i) of every row, as log-sum-exp: (copies, ...) -> (rows, ...).

        Raises: AttachError when there are not as many logits as copies.
        """
        if len(logits) != len(self.rows):
            raise AttachError(
                f"{len(logits)} sequences are in the batch for {len(self.rows)} copies of rows; "
                "beam search cannot share the choice of a token"
            )
        weights = torch.tensor(self.log_weights, device=logits.device)
        log_p = logits.float().log_softmax(dim=-1)
        log_p += weights.reshape(-1, *[1] * (logits.dim() - 1))
        return torch.stack([row.logsumexp(dim=0) for row in torch.split(log_p, self.counts)])


def _check_weights(weights: RowWeights, row: int) -> dict[int | None, float]:
    total = sum(weights.values())
    in_range = all(weight >= 0 for weight in weights.values())
    if not in_range or not abs(total - 1) <= _SUM_TOLERANCE:
        raise ConfigError(
            f"the weights of row {row} are {dict(weights)}, together {total:g}; "
            "expected shares of at least 0 that sum to 1, the target's under None"
        )
    return {pack: weight for pack, weight in weights.items() if weight}


class _SharedToken(LogitsProcessor):
    """Chooses one token for all copies of a row, and leaves `generate` no other."""

    def __init__(self, copies: RowCopies):
        self._copies = copies

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (copies, vocabulary) that are 0 for the choice and -∞ for all other tokens."""
        tokens = self._copies.average(scores).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[self._copies.rows], 0.0)


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
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `accuracy` (Wilson 1927)."""
        n, p, z = self.rows, self.accuracy, 1.96
        middle = p + z * z / (2 * n)
        reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)

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
                name: asdict(score) | {"regret": score.regret, "interval": score.interval}
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
