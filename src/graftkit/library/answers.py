"""Answers of a library: rows of different packs in one batch, in parts where memory is short.

How good is a library? Routed answers against those of the right pack, and of the target alone.

Rows come under the name of the pack that should answer them, or under "target" where none should.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graftkit.evaluate import BATCH_TOKENS, exact_match
from graftkit.library.live import GenerationStyle, LiveLibrary, PackWeights
from graftkit.models.encoding import pad_id
from graftkit.progress import Progress, silent
from graftkit.route import TARGET, Route, Router
from graftkit.route.averaging import generate_averaged
from graftkit.rows import Row, batches_by_length, pad_batch

MixMode = Literal["deltas", "probabilities"]
"""How several packs answer one prompt: Σ w ΔW in one pass, or Σ w p(token) over one pass each."""

_ROUNDING = 1e-6


@dataclass(frozen=True)
class LibraryAnswer:
    """What a library says to one prompt.

    Attributes:
        text: greedy, without special tokens.
        route: the packs that answered; none of them is the target alone.
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


def generate_texts(
    live: LiveLibrary,
    prompts: Sequence[list[int]],
    mixtures: Sequence[PackWeights],
    mix: MixMode,
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt by the packs of its row.

    Args:
        prompts: tokens, at least one each and fewer than the context. mixtures: one for each.
        max_new_tokens: an answer also ends where the context does.
    Raises: ConfigError where the packs of one row do not fit into memory; as `Attachment.add`.
    """
    texts = [""] * len(prompts)
    limits = [_room(live, ids, max_new_tokens) for ids in prompts]
    voices = [live.voice(mixture) for mixture in mixtures]
    for part in live.memory.parts(mixtures):
        for rows in _batches(part, prompts, list(zip(limits, voices, strict=True))):
            chosen = [prompts[row] for row in rows], [mixtures[row] for row in rows]
            found = _generate(live, *chosen, mix, limits[rows[0]])
            for row, text in zip(rows, found, strict=True):
                texts[row] = text
    return texts


def _batches(
    part: Sequence[int], prompts: Sequence[list[int]], ends: Sequence[tuple[int, GenerationStyle]]
) -> Iterator[list[int]]:
    """Rows of similar length; an answer must not be cut short for the sake of another row.

    Args:
        ends: of each row, the most tokens of its answer, and what else decides when it ends.
    """
    for end in dict.fromkeys(sorted((ends[row] for row in part), key=_end_order)):
        alike = [row for row in part if ends[row] == end]
        lengths = [len(prompts[row]) + end[0] for row in alike]
        for batch in batches_by_length(lengths, BATCH_TOKENS):
            yield [alike[place] for place in batch]


def _end_order(end: tuple[int, GenerationStyle]) -> tuple[int, str, str]:
    return end[0], str(end[1].end), end[1].settings


def _room(live: LiveLibrary, ids: Sequence[int], max_new_tokens: int) -> int:
    if live.context is None:
        return max_new_tokens
    return min(max_new_tokens, live.context - len(ids))


def _generate(
    live: LiveLibrary,
    prompts: Sequence[list[int]],
    mixtures: Sequence[PackWeights],
    mix: MixMode,
    max_new_tokens: int,
) -> list[str]:
    ids, mask = pad_batch(prompts, pad_id(live.tokenizer), left=True)
    ids, mask = ids.to(live.model.device), mask.to(live.model.device)
    voices = [live.voice(mixture) for mixture in mixtures]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": pad_id(live.tokenizer),
        "eos_token_id": voices[0].end,
    }
    own, live.model.generation_config = live.model.generation_config, voices[0].generation
    try:
        if mix == "deltas":
            live.memory.route(mixtures)
            output = live.model.generate(ids, attention_mask=mask, **options)
        else:
            shares = [_with_target(live, mixture) for mixture in mixtures]
            output = generate_averaged(live.model, live.attachment, ids, mask, shares, **options)
    finally:
        live.model.generation_config = own
    written = output[:, ids.shape[1] :]
    return [
        str(voice.tokenizer.decode(row, skip_special_tokens=True))
        for voice, row in zip(voices, written, strict=True)
    ]


def _with_target(live: LiveLibrary, mixture: PackWeights) -> dict[int | None, float]:
    """Shares of 1: what the packs leave is the target's."""
    shares: dict[int | None, float] = {
        live.memory.index(entry): weight for entry, weight in mixture.items()
    }
    rest = 1 - sum(shares.values())
    # Weights that sum to 1 but for rounding leave nothing to the target.
    return shares | {None: rest} if rest > _ROUNDING else shares


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
    mixtures: Mapping[str, PackWeights],
    progress: Progress | None = None,
) -> LibraryScore:
    """Route every row, and answer it three ways.

    Args:
        mixtures: what each name stands for. Raises: RowsError as `exact_match`.
    """
    tell = progress or silent
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
    mixtures: Mapping[str, PackWeights],
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
