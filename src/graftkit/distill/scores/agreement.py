"""Scores that need nothing but the answers: agreement of a source with itself, likelihood."""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence

from graftkit.distill.config import AgreementScore
from graftkit.distill.records import Answer, Prompt
from graftkit.distill.scores import Verdict, finished
from graftkit.distill.scores.checks import find_number, json_form


class Agreement:
    """Share of the source's other samples for the prompt that give the same answer (2203.11171).

    Samples that are refused, cut or empty, and those without a number or JSON value where that is
    compared, agree with none. A single sample has 0.
    """

    costly = False

    def __init__(self, settings: AgreementScore):
        self.settings = settings

    def score(
        self, answers: Sequence[Answer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """From 0 to 1; `answers` are all of the source's."""
        said = {index: self._form(answer.text) for index, answer in finished(answers)}
        samples = Counter((answer.prompt_id, answer.source) for answer in answers)
        alike = Counter((answers[i].prompt_id, answers[i].source, form) for i, form in said.items())
        for index, form in said.items():
            group = answers[index].prompt_id, answers[index].source
            others = samples[group] - 1
            if index not in done:
                yield index, (alike[*group, form] - 1) / others if others and form else 0.0

    def _form(self, text: str) -> str | None:
        """What is equal for answers that say the same; None: nothing is said."""
        if self.settings.of == "number":
            number = find_number(text)
            return None if number is None else repr(number.value + 0.0)  # -0.0 is 0.0
        return json_form(text) if self.settings.of == "json" else " ".join(text.split())


class Likelihood:
    """Mean log-probability of the answer's tokens under its own source, nats."""

    costly = False

    def score(
        self, answers: Sequence[Answer], prompts: Mapping[int, Prompt], done: Container[int]
    ) -> Iterator[tuple[int, Verdict]]:
        """As the source said; endpoints and files do not say it."""
        for index, answer in finished(answers):
            if index not in done:
                value = answer.log_likelihood
                yield index, "unknown" if value is None else value
