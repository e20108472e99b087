"""Which answers become SFT rows, and which make pairs of a chosen and a rejected one.

As FuseChat-3.0 builds them (arXiv 2503.04222): the best answer over all sources for SFT; best and
worst of the *same* source for a pair, so that styles and reward scales of sources do not decide;
only pairs whose rewards differ by an amount inside a window. Mixed pairs are WRPO's (2412.03187).
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from graftkit.distill.config import Selection
from graftkit.distill.records import Scored
from graftkit.errors import CheckpointError, RowsError
from graftkit.models.encoding import context_length
from graftkit.rows import Row, encode_row

_Found = TypeVar("_Found")

RULES = ("exact", "number", "json", "code")
"""What `failed` begins with where an answer was judged and found wrong."""

Fits = Callable[[Scored], bool]
"""Whether prompt and answer fit into what the target is trained on."""


@dataclass(frozen=True)
class Pair:
    """chosen, rejected: answers to one prompt. own: the target's best, in mixed pairs."""

    chosen: Scored
    rejected: Scored
    own: Scored | None = None

    @property
    def gap(self) -> float:
        """Difference of the rewards."""
        return self.chosen.reward - self.rejected.reward


@dataclass(frozen=True)
class Selected:
    """What is trained on, by prompt; why prompts gave nothing, counted."""

    rows: tuple[Scored, ...]
    pairs: tuple[Pair, ...]
    dropped_rows: Counter[str]
    dropped_pairs: Counter[str]


def select(
    scored: Sequence[Scored], settings: Selection, graded: bool, seed: int, fits: Fits
) -> Selected:
    """Choose rows and pairs, in the order of the prompts.

    Ties go to the source that stands first, then to the earlier sample.

    Args:
        scored: all answers, by prompt, source and sample. graded: whether rewards are more than
            passing or not; without, the window of gaps does not apply.
        fits: answers for which it is false are dropped and counted.
    """
    by_prompt: dict[int, list[Scored]] = {}
    for one in scored:
        by_prompt.setdefault(one.answer.prompt_id, []).append(one)
    for_rows, for_pairs = split_prompts(list(by_prompt), settings.sft_share, seed)
    rows: list[Scored] = []
    pairs: list[Pair] = []
    dropped_rows: Counter[str] = Counter()
    dropped_pairs: Counter[str] = Counter()
    for prompt, answers in by_prompt.items():
        kept = [one for one in answers if fits(one)]
        if prompt in for_rows:
            row = _best_row(kept, answers, settings)
            _keep(row, rows, dropped_rows)
        if prompt in for_pairs:
            _keep(_pair(kept, settings, graded), pairs, dropped_pairs)
    return Selected(tuple(rows), tuple(pairs), dropped_rows, dropped_pairs)


def split_prompts(
    prompts: Sequence[int], share: float | Literal["all"], seed: int
) -> tuple[Collection[int], Collection[int]]:
    """Prompts for SFT and prompts for pairs: a seeded part and the rest, or all for both."""
    if share == "all":
        return frozenset(prompts), frozenset(prompts)
    generator = random.Random(seed)
    # random() is promised to stay the same between Python versions, shuffle() is not.
    keys = [generator.random() for _ in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    first = {prompts[index] for index in order[: round(share * len(prompts))]}
    return first, set(prompts) - first


def _keep(found: _Found | str, into: list[_Found], dropped: Counter[str]) -> None:
    if isinstance(found, str):
        dropped[found] += 1
    else:
        into.append(found)


def _best_row(
    answers: Sequence[Scored], offered: Sequence[Scored], settings: Selection
) -> Scored | str:
    passing = [one for one in answers if one.passed]
    if not passing:
        return "too long" if any(one.passed for one in offered) else _commonest_failure(offered)
    best = _best(passing)
    if settings.least_reward is not None and best.reward < settings.least_reward:
        return "reward too low"
    return best


def _pair(answers: Sequence[Scored], settings: Selection, graded: bool) -> Pair | str:
    """The pair of one prompt: of the source whose pair has the best chosen answer."""
    sources = list(dict.fromkeys(one.answer.source for one in answers))
    if settings.pairs == "mixed":
        found = [_mixed(answers, settings)]
    else:
        own = {s: [one for one in answers if one.answer.source == s] for s in sources}
        make = _checked if settings.pairs == "checked" else _best_worst
        found = [make(own[source]) for source in sources]
    window = settings.gap if graded else (-float("inf"), float("inf"))
    pairs = [_in_window(pair, window) for pair in found]
    whole = [pair for pair in pairs if isinstance(pair, Pair)]
    if whole:
        return max(whole, key=lambda pair: pair.chosen.reward)
    reasons = [pair for pair in pairs if isinstance(pair, str)]
    return reasons[0] if reasons else "no answer"


def _best_worst(answers: Sequence[Scored]) -> Pair | str:
    passing = [one for one in answers if one.passed]
    if not passing:
        return _commonest_failure(answers)
    return _of(_best(passing), _worst(passing))


def _checked(answers: Sequence[Scored]) -> Pair | str:
    passing = [one for one in answers if one.passed]
    failing = [one for one in answers if _fails_a_rule(one)]
    if not passing:
        return "all fail"
    return _of(_best(passing), _worst(failing)) if failing else "all pass"


def _mixed(answers: Sequence[Scored], settings: Selection) -> Pair | str:
    own = [one for one in answers if one.answer.source == settings.target_source]
    theirs = [one for one in answers if one.answer.source != settings.target_source and one.passed]
    passing = [one for one in own if one.passed]
    if not theirs:
        return "no source passes"
    if not passing:
        return "the target has no answer"
    usable = [one for one in own if one.passed or _fails_a_rule(one)]
    pair = _of(_best(theirs), _worst(usable))
    if isinstance(pair, str):
        return pair
    return Pair(pair.chosen, pair.rejected, _best(passing))


def _of(chosen: Scored, rejected: Scored) -> Pair | str:
    if chosen.answer.text == rejected.answer.text:
        return "all alike"
    return Pair(chosen, rejected)


def _in_window(pair: Pair | str, window: tuple[float, float]) -> Pair | str:
    if isinstance(pair, str):
        return pair
    if pair.gap < window[0]:
        return "gap too small"
    return "gap too large" if pair.gap > window[1] else pair


def _fails_a_rule(one: Scored) -> bool:
    """Whole and wrong: what is cut, empty or without a grade teaches nothing when rejected."""
    return not one.passed and (one.failed or "").startswith(RULES)


def _best(answers: Sequence[Scored]) -> Scored:
    return max(answers, key=lambda one: one.reward)


def _worst(answers: Sequence[Scored]) -> Scored:
    return min(reversed(answers), key=lambda one: one.reward)


def _commonest_failure(answers: Iterable[Scored]) -> str:
    reasons = Counter(one.failed or "failed" for one in answers)
    return f"no answer passes ({reasons.most_common(1)[0][0]})" if reasons else "no answer"


class Template:
    """Plain text, or turns of a chat in the target's own template.

    Args:
        model: the target, without weights; says how much it reads. limit: most tokens of a row.
    Raises: CheckpointError for a chat with a tokenizer that has no chat template.
    """

    def __init__(self, tokenizer: Any, model: Any, chat: bool, limit: int):
        self.tokenizer, self.chat = tokenizer, chat
        self.limit = min(limit, context_length(model) or limit)
        if chat and not tokenizer.chat_template:
            raise CheckpointError(
                "prompts.chat is on, but the target's tokenizer has no chat template; use an "
                "instruct model, or turn it off"
            )
        self._end = self._end_of_turn() if chat else ""

    def row(self, prompt: str, answer: str) -> Row:
        """What the target reads and what it should say; an EOS is added by whoever encodes it."""
        if not self.chat:
            return Row(prompt, " " + answer)
        return Row(self._turn(prompt), answer + self._end)

    def fits(self, scored: Scored) -> bool:
        """Whether a row is short enough."""
        try:
            encode_row(self.tokenizer, self.row(*_texts(scored)), self.limit)
        except RowsError:
            return False
        return True

    def _turn(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        # The tokenizer adds its own BOS when the row is encoded.
        bos = self.tokenizer.bos_token
        adds = bos and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds else text

    def _end_of_turn(self) -> str:
        """What the template puts behind an answer, such as <end_of_turn>, where it is no EOS."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False)
        end = text.rpartition("ANSWER")[2].strip()
        eos = self.tokenizer.eos_token
        return end.partition(eos)[0] if eos else end


def _texts(scored: Scored) -> tuple[str, str]:
    return scored.answer.prompt, scored.answer.text
