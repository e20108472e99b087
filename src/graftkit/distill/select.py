"""Which answers become SFT rows and preference pairs, and the cards that say where they came from.

As in FuseChat-3.0 (arXiv 2503.04222), an SFT row is the best answer of all sources. A pair is the
best and the worst answer of the *same* source, so that the styles and reward scales of different
sources do not matter, and its rewards differ by an amount inside a window. Mixed pairs are those of
WRPO (2412.03187).

The data card, the model card and the provenance of the pack are written from what was selected.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from graftkit.config import VERSION
from graftkit.distill.config import DistillConfig, ModelSource, Selection, Source
from graftkit.distill.records import ScoredAnswer
from graftkit.distill.sample import PromptSet, SourceSummary
from graftkit.errors import CheckpointError, RowsError, printable
from graftkit.models.text import context_length
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


Card = dict[str, Any]
"""Counts and settings, as JSON."""


def make_card(
    config: DistillConfig,
    prompts: PromptSet,
    sampled: Sequence[SourceSummary],
    scored: Sequence[ScoredAnswer],
    chosen: SelectedData,
) -> Card:
    """Counts of everything from prompts to pairs, and the settings behind them."""
    answers = {
        one.source: asdict(one)
        | _answer_counts([s for s in scored if s.answer.source == one.source])
        for one in sampled
    }
    return {
        "seed": config.seed,
        "target": config.target,
        "prompts": {
            "file": Path(config.prompts.file).name,
            "used": len(prompts.prompts),
            "dropped": prompts.dropped,
        },
        "answers": answers,
        "sft": {
            "rows": len(chosen.rows),
            "dropped": dict(chosen.dropped_rows),
        },
        "pairs": {"pairs": len(chosen.pairs), "dropped": dict(chosen.dropped_pairs)},
        "sources": [source_card(source) for source in config.sources],
        "scores": [score.model_dump(mode="json", exclude_none=True) for score in config.scores],
    }


def source_card(source: Source) -> Card:
    """A source by name, place, licence and sampling settings, without its API key's variable."""
    if source.kind == "answers":
        shown = {"name", "kind", "file", "licence"}
    else:
        hidden = {"key_env", "concurrency", "requests_per_minute", "timeout_seconds", "retries"}
        shown = set(type(source).model_fields) - hidden
    return source.model_dump(mode="json", exclude_none=True, include=shown)


def provenance(config: DistillConfig, card: Card) -> dict[str, str]:
    """Sources, data and settings in short lines, for the pack's manifest."""
    lines = {
        "made_by": f"graftkit {VERSION} distill",
        "prompts": f"{card['prompts']['file']}, {card['prompts']['used']}",
        "scores": ", ".join(score.kind for score in config.scores),
        "sft": f"{card['sft']['rows']} rows, {config.sft.epochs:g} epochs",
        "seed": str(config.seed),
    }
    if config.dpo:
        pairs = card["pairs"]["pairs"]
        lines["dpo"] = f"{pairs} pairs, {config.dpo.loss}, beta {config.dpo.beta:g}"
    if config.transfer:
        lines["transfer"] = f"{config.transfer.fusion}, kl {config.transfer.kl_weight:g}"
    for source in config.sources:
        lines[f"source {source.name}"] = _source_line(source)
    return lines


def licence(config: DistillConfig) -> str | None:
    """Licences of the sources' answers, joined; None where no source names one."""
    named = sorted({source.licence for source in config.sources if source.licence})
    return " AND ".join(named) or None


def data_card(card: Card) -> str:
    """The data card as Markdown."""
    prompts, sft, pairs = card["prompts"], card["sft"], card["pairs"]
    answers = list(card["answers"].items())
    parts = [
        "# Data card",
        f"Prompts: `{prompts['file']}`, {prompts['used']:,} used. Seed {card['seed']}.",
        _dropped("Prompts left out", prompts["dropped"]),
        "## Answers",
        _table(
            ("source", "answers", "passed", "mean reward", "tokens read", "tokens written", "cost"),
            [
                (
                    *(name, a["answers"], a["passed"], f"{a['mean_reward']:.3f}"),
                    *(a["tokens_in"], a["tokens_out"], f"{a['cost']:.2f}"),
                )
                for name, a in answers
            ],
        ),
        *(
            _dropped(f"{name}: refused", _quoted(a["refused"]))
            for name, a in card["answers"].items()
        ),
        *(_dropped(f"{name}: did not pass", a["failed"]) for name, a in card["answers"].items()),
        "## Rows for SFT",
        f"{sft['rows']:,} rows.",
        _dropped("Prompts that gave none", sft["dropped"]),
        "## Pairs",
        f"{pairs['pairs']:,} pairs.",
        _dropped("Prompts that gave none", pairs["dropped"]),
        "## Sources",
        *(_settings(source) for source in card["sources"]),
        "## Scores",
        *(_settings(score) for score in card["scores"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(config: DistillConfig, card: Card, losses: Mapping[str, Card]) -> str:
    """The README of the tuned model and its pack, with front matter for the Hub."""
    target = _public(config.target)
    front = ["---", f"base_model: {_yaml(target)}", "library_name: transformers"]
    licences = licence(config)
    front += [f"license_name: {_yaml(licences)}", "license: other"] if licences else []
    front += ["tags: [graftkit, sft" + (", dpo]" if config.dpo else "]"), "---"]
    lines = [f"- {key}: {value}" for key, value in provenance(config, card).items()]
    curves = [
        f"- {stage}: loss {loss['first']:.4f} at the first step, {loss['last']:.4f} at the last, "
        f"{loss['steps']} steps"
        for stage, loss in losses.items()
    ]
    body = [
        f"# A skill for {Path(target).name}",
        f"`{target}` trained on answers of {_names(config)}. The delta is "
        "`skill.skillpack`; the whole model is `tuned/`.",
        "## Where it comes from",
        "\n".join(lines),
        "## Training",
        "\n".join(curves),
        "Counts, drops and sampling settings: `data_card.md`. The answers' licence is that of "
        "their sources; the target's own licence holds as well.",
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"


def _answer_counts(scored: Sequence[ScoredAnswer]) -> dict[str, Any]:
    passed = [one for one in scored if one.passed]
    rewards = [one.reward for one in passed]
    return {
        "passed": len(passed),
        "mean_reward": sum(rewards) / len(rewards) if rewards else 0.0,
        "failed": dict(Counter(one.failed for one in scored if one.failed)),
    }


def _names(config: DistillConfig) -> str:
    return ", ".join(source.name for source in config.sources)


def _source_line(source: Source) -> str:
    if source.kind == "answers":
        return Path(source.file).name
    name = Path(source.model).name if isinstance(source, ModelSource) else source.model
    drawn = f"T {source.temperature:g}, p {source.top_p:g}"
    return f"{name}, {source.samples} samples, {drawn}"


def _quoted(counts: Mapping[str, int]) -> dict[str, int]:
    """Reasons in a server's words, quoted so that they are no markup of the card."""
    return {f"`{printable(why).replace('`', chr(39))}`": count for why, count in counts.items()}


def _dropped(title: str, counts: Mapping[str, int]) -> str:
    present = {reason: count for reason, count in counts.items() if count}
    if not present:
        return ""
    ordered = sorted(present.items(), key=lambda item: (-item[1], item[0]))
    return f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in ordered) + "."


def _settings(values: Mapping[str, Any]) -> str:
    name = values.get("name", values["kind"])
    rest = {key: value for key, value in values.items() if key not in ("name", "kind")}
    text = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"**{name}** ({values['kind']}): {text or 'no settings'}."


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _public(reference: str) -> str:
    """A Hub id as it is; of a local directory the name only, because its path is private."""
    return Path(reference).name if reference.startswith((".", "/", "~")) else reference


def _yaml(text: str | None) -> str:
    return '"' + printable(str(text)).replace("\\", "\\\\").replace('"', '\\"') + '"'
