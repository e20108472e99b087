"""Scores of the text alone: comparison with a reference, self-agreement, and likelihood."""

import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from graftkit.distill.config import AgreementScore, ExactRule, JsonRule, NumberRule
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.distill.scores import Verdict, finished
from graftkit.errors import RowsError

FINAL = "####"  # what GSM8K writes before the result

_UNSIGNED = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)
# A sign behind a word, a digit or a bracket is an operator: 10-3 ends with 3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+−])?[$€£¥]?(?P<terms>{_UNSIGNED}(?:[ ]?/[ ]?{_UNSIGNED})*)"
    r"(?P<percent>[ ]?\\?%)?"
)
_FENCED = re.compile(r"```[A-Za-z0-9]*[ \t]*\n(.*?)\n?```", re.DOTALL)


class ReferenceCheck:
    """A rule that compares with the reference of the prompt."""

    costly = False

    def __init__(self, rule: ExactRule | NumberRule | JsonRule):
        self.rule = rule

    def score(
        self, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """1.0, or why not. Raises: RowsError for a reference that nothing can be compared with."""
        for index, answer in finished(answers):
            if index not in done:
                yield index, self._check(answer.text, prompts[answer.prompt_id])

    def _check(self, text: str, prompt: Prompt) -> Verdict:
        reference = prompt.reference
        if reference is None:
            _refuse_reference(prompt, f"a completion to compare with (rule {self.rule.kind})")
        if isinstance(self.rule, NumberRule):
            expected = find_number(reference)
            if expected is None:
                _refuse_reference(prompt, "a number in the completion")
            number = find_number(text)
            if number is None:
                return "no number"
            return 1.0 if same_number(number, expected, self.rule.tolerance) else ""
        if isinstance(self.rule, JsonRule):
            value, expected_value = json_form(text), json_form(reference)
            if expected_value is None:
                _refuse_reference(prompt, "a JSON value as the completion")
            if value is None:
                return "no JSON"
            return 1.0 if value == expected_value else ""
        return 1.0 if text.strip() == reference.strip() else ""


def _refuse_reference(prompt: Prompt, expected: str) -> NoReturn:
    found = "none" if prompt.reference is None else repr(prompt.reference[:60])
    raise RowsError(
        f"prompt {prompt.id} (from 0): reference {found}; expected {expected}; correct the "
        "prompts file, or leave the rule out"
    )


class Number(NamedTuple):
    """A number in a text. value: finite; 0.25 for 25%. percent: whether it is written as such."""

    value: float
    percent: bool


def find_number(text: str) -> Number | None:
    """The first number after the last ####; without that mark, the last number of the text.

    Reads signs, thousands separators (1,234), decimals, exponents, fractions (3/4), currency
    signs and percent. Returns: None where there is none, or it is not finite.
    """
    _, mark, final = text.rpartition(FINAL)
    matches = list(_NUMBER.finditer(final))
    return _parse_number(matches[0 if mark else -1]) if matches else None


def same_number(one: Number, other: Number, tolerance: float) -> bool:
    """Whether two numbers are equal up to a relative difference.

    If only one of them is a percentage, 25% equals 0.25 and also 25.
    """
    if math.isclose(one.value, other.value, rel_tol=tolerance):
        return True
    written = [number.value * 100 if number.percent else number.value for number in (one, other)]
    return one.percent != other.percent and math.isclose(*written, rel_tol=tolerance)


def _parse_number(match: re.Match[str]) -> Number | None:
    terms = [float(term.replace(",", "")) for term in match["terms"].split("/")]
    value = terms[-1]  # more than one slash is a date
    if len(terms) == 2:
        value = terms[0] / terms[1] if terms[1] else math.nan
    percent = match["percent"] is not None
    value = -value if match["sign"] in ("-", "−") else value
    value = value / 100 if percent else value
    return Number(value, percent) if math.isfinite(value) else None


def json_form(text: str) -> str | None:
    """A canonical form of a JSON value, the same for equal values; None for what is no JSON.

    The order of keys does not matter; 1 equals 1.0, but not true. One code fence around the value
    is removed. Infinite numbers, NaN, keys that occur twice, and too deep nesting are no JSON.
    """
    text = text.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(
            fenced[1] if fenced else text,
            parse_constant=_refuse_constant,
            object_pairs_hook=_object,
        )
        return _write_json(value)
    except (ValueError, RecursionError):
        return None


def _write_json(value: Any) -> str:
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)}:{_write_json(value[key])}" for key in sorted(value))
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_write_json, value)) + "]"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number beyond double precision")
        return str(int(value)) if value.is_integer() else repr(value)
    return json.dumps(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


class Agreement:
    """Self-consistency (arXiv 2203.11171): the share of a source's other answers that are the same.

    Answers that are missing, cut or empty, or have no number or JSON value where that is compared,
    agree with none. A single answer has 0.
    """

    costly = False

    def __init__(self, settings: AgreementScore):
        self.settings = settings

    def score(
        self, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """From 0 to 1; `answers` are all of the source's."""
        forms = {index: self._form(answer.text) for index, answer in finished(answers)}
        samples = Counter((answer.prompt_id, answer.source) for answer in answers)
        alike = Counter(
            (answers[i].prompt_id, answers[i].source, form) for i, form in forms.items()
        )
        for index, form in forms.items():
            group = answers[index].prompt_id, answers[index].source
            others = samples[group] - 1
            if index not in done:
                yield index, (alike[*group, form] - 1) / others if others and form else 0.0

    def _form(self, text: str) -> str | None:
        """A form that is equal for answers that agree; None for an answer without a value."""
        if self.settings.of == "number":
            number = find_number(text)
            return None if number is None else repr(number.value + 0.0)  # -0.0 is 0.0
        return json_form(text) if self.settings.of == "json" else " ".join(text.split())


class Likelihood:
    """Mean log-probability of the answer's tokens under its own source, nats."""

    costly = False

    def score(
        self, answers: Sequence[SourceAnswer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """As sampled; "unknown" for endpoints and files, which do not give it."""
        for index, answer in finished(answers):
            if index not in done:
                value = answer.log_likelihood
                yield index, "unknown" if value is None else value
