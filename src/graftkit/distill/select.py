"""The stage `select`: which answers become SFT rows, and which make preference pairs.

As in FuseChat-3.0 (arXiv 2503.04222), an SFT row is the best answer of all sources. A pair is the
best and the worst answer of the *same* source, so that the styles and reward scales of different
sources do not matter, and its rewards differ by an amount inside a window. Mixed pairs are those of
WRPO (2412.03187).
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from graftkit.distill.config import Selection
from graftkit.distill.records import ScoredAnswer
from graftkit.errors import CheckpointError, RowsError
from graftkit.models.encoding import context_length
from graftkit.rows import Row, encode_row, write_messages

_Item = TypeVar("_Item")

RULES = ("exact", "number", "json", "code")
"""The names of rules; `failed` of an answer that is wrong begins with one of them."""

Fits = Callable[[ScoredAnswer], bool]
"""Whether prompt and answer are short enough for the target."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt. own: in mixed pairs, the target's own best answer."""

    chosen: ScoredAnswer
    rejected: ScoredAnswer
    own: ScoredAnswer | None = None

    @property
    def gap(self) -> float:
        """Difference of the rewards."""
        return self.chosen.reward - self.rejected.reward


@dataclass(frozen=True)
class SelectedData:
    """SFT rows and pairs. dropped_*: number of prompts without a row or a pair, by reason."""

    rows: tuple[ScoredAnswer, ...]
    pairs: tuple[PreferencePair, ...]
    dropped_rows: Counter[str]
    dropped_pairs: Counter[str]


def select(
    scored: Sequence[ScoredAnswer], settings: Selection, graded: bool, seed: int, fits: Fits
) -> SelectedData:
    """Choose rows and pairs, in the order of the prompts.

    Of equal rewards, the source that is listed first wins, then the earlier sample.

    Args:
        scored: all answers, by prompt, source and sample.
        graded: whether any score is a grade; otherwise the window of gaps does not apply.
        fits: answers for which it is false are dropped and counted.
    """
    by_prompt: dict[int, list[ScoredAnswer]] = {}
    for one in scored:
        by_prompt.setdefault(one.answer.prompt_id, []).append(one)
    for_rows, for_pairs = split_prompts(list(by_prompt), settings.sft_share, seed)
    rows: list[ScoredAnswer] = []
    pairs: list[PreferencePair] = []
    dropped_rows: Counter[str] = Counter()
    dropped_pairs: Counter[str] = Counter()
    for prompt, answers in by_prompt.items():
        fitting = [one for one in answers if fits(one)]
        if prompt in for_rows:
            _append_or_count(_best_row(fitting, answers, settings), rows, dropped_rows)
        if prompt in for_pairs:
            _append_or_count(_pair(fitting, settings, graded), pairs, dropped_pairs)
    return SelectedData(tuple(rows), tuple(pairs), dropped_rows, dropped_pairs)


def split_prompts(
    prompts: Sequence[int], share: float | Literal["all"], seed: int
) -> tuple[Collection[int], Collection[int]]:
    """Prompts for SFT and prompts for pairs: a random part and the rest, or all for both."""
    if share == "all":
        return frozenset(prompts), frozenset(prompts)
    generator = random.Random(seed)
    # random() gives the same numbers in every Python version; shuffle() may not.
    keys = [generator.random() for _ in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    first = {prompts[index] for index in order[: round(share * len(prompts))]}
    return first, set(prompts) - first


def _append_or_count(item: _Item | str, items: list[_Item], dropped: Counter[str]) -> None:
    """Append an item; count a string, which is the reason why there is none."""
    if isinstance(item, str):
        dropped[item] += 1
    else:
        items.append(item)


def _best_row(
    fitting: Sequence[ScoredAnswer], answers: Sequence[ScoredAnswer], settings: Selection
) -> ScoredAnswer | str:
    passing = [one for one in fitting if one.passed]
    if not passing:
        return "too long" if any(one.passed for one in answers) else _commonest_failure(answers)
    best = _best(passing)
    if settings.least_reward is not None and best.reward < settings.least_reward:
        return "reward too low"
    return best


def _pair(
    answers: Sequence[ScoredAnswer], settings: Selection, graded: bool
) -> PreferencePair | str:
    """The pair of one prompt: of the pairs of all sources, the one with the best chosen answer."""
    sources = list(dict.fromkeys(one.answer.source for one in answers))
    if settings.pairs == "mixed":
        made = [_mixed(answers, settings)]
    else:
        own = {s: [one for one in answers if one.answer.source == s] for s in sources}
        make = _checked if settings.pairs == "checked" else _best_worst
        made = [make(own[source]) for source in sources]
    window = settings.gap if graded else (-float("inf"), float("inf"))
    pairs = [_in_window(pair, window) for pair in made]
    whole = [pair for pair in pairs if isinstance(pair, PreferencePair)]
    if whole:
        return max(whole, key=lambda pair: pair.chosen.reward)
    reasons = [pair for pair in pairs if isinstance(pair, str)]
    return reasons[0] if reasons else "no answer"


def _best_worst(answers: Sequence[ScoredAnswer]) -> PreferencePair | str:
    passing = [one for one in answers if one.passed]
    if not passing:
        return _commonest_failure(answers)
    return _make_pair(_best(passing), _worst(passing))


def _checked(answers: Sequence[ScoredAnswer]) -> PreferencePair | str:
    passing = [one for one in answers if one.passed]
    failing = [one for one in answers if _fails_a_rule(one)]
    if not passing:
        return "all fail"
    return _make_pair(_best(passing), _worst(failing)) if failing else "all pass"


def _mixed(answers: Sequence[ScoredAnswer], settings: Selection) -> PreferencePair | str:
    own = [one for one in answers if one.answer.source == settings.target_source]
    theirs = [one for one in answers if one.answer.source != settings.target_source and one.passed]
    passing = [one for one in own if one.passed]
    if not theirs:
        return "no source passes"
    if not passing:
        return "the target has no answer"
    usable = [one for one in own if one.passed or _fails_a_rule(one)]
    pair = _make_pair(_best(theirs), _worst(usable))
    if isinstance(pair, str):
        return pair
    return PreferencePair(pair.chosen, pair.rejected, _best(passing))


def _make_pair(chosen: ScoredAnswer, rejected: ScoredAnswer) -> PreferencePair | str:
    if chosen.answer.text == rejected.answer.text:
        return "all alike"
    return PreferencePair(chosen, rejected)


def _in_window(pair: PreferencePair | str, window: tuple[float, float]) -> PreferencePair | str:
    if isinstance(pair, str):
        return pair
    if pair.gap < window[0]:
        return "gap too small"
    return "gap too large" if pair.gap > window[1] else pair


def _fails_a_rule(one: ScoredAnswer) -> bool:
    """Whether the answer is complete and wrong: only such answers are worth rejecting."""
    return not one.passed and (one.failed or "").startswith(RULES)


def _best(answers: Sequence[ScoredAnswer]) -> ScoredAnswer:
    return max(answers, key=lambda one: one.reward)


def _worst(answers: Sequence[ScoredAnswer]) -> ScoredAnswer:
    return min(reversed(answers), key=lambda one: one.reward)


def _commonest_failure(answers: Iterable[ScoredAnswer]) -> str:
    reasons = Counter(one.failed or "failed" for one in answers)
    return f"no answer passes ({reasons.most_common(1)[0][0]})" if reasons else "no answer"


class Template:
    """Prompts and answers as text for the target: plain, or turns of a chat in its own template.

    Args:
        model: the target, without weights; its context length limits a row.
        chat: whether to use the chat template.
        limit: largest number of tokens of a row.
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
        """What the target reads and what it should answer. The EOS is added by `encode_row`."""
        if not self.chat:
            return Row(prompt, " " + answer)
        return Row(self._turn(prompt), answer + self._end)

    def fits(self, scored: ScoredAnswer) -> bool:
        """Whether a row is short enough."""
        row = self.row(*_texts(scored))
        try:
            encode_row(self.tokenizer, row, self.limit)
        except RowsError:
            return False
        return True

    def _turn(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        text = write_messages(self.tokenizer, turns, None, "the prompt", reply=True)
        # The tokenizer adds its own BOS when the row is encoded.
        bos = self.tokenizer.bos_token
        adds = bos and self.tokenizer.encode("")[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds else text

    def _end_of_turn(self) -> str:
        """What the template writes after an answer, such as <end_of_turn>, unless it is the EOS."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        text = write_messages(self.tokenizer, turns, None, "the target's answer", reply=False)
        end = text.rpartition("ANSWER")[2].strip()
        eos = self.tokenizer.eos_token
        return end.partition(eos)[0] if eos else end


def _texts(scored: ScoredAnswer) -> tuple[str, str]:
    return scored.answer.prompt, scored.answer.text
