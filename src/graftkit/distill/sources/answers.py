"""A file of answers that are there already, matched to the prompts by their text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from graftkit.distill.config import AnswersSource
from graftkit.distill.records import Answer, Prompt
from graftkit.distill.sources import Replies, Reply, Unit, refused
from graftkit.rows import read_rows, rows_digest


class AnswersFile:
    """Every line of a prompt is one of its samples, in the order of the file.

    Blanks at the ends of prompts and completions do not count. Tokens are unknown, and 0.
    Raises: RowsError with file and line for what is no row.
    """

    def __init__(self, settings: AnswersSource, where: Path):
        self.settings = settings
        path = where / settings.file
        self._texts: dict[str, list[str]] = defaultdict(list)
        for row in read_rows(path):
            self._texts[row.prompt.strip()].append(row.completion.strip())
        self.identity = rows_digest(path)

    def units(self, prompts: Sequence[Prompt]) -> list[Unit]:
        """One, for the whole file."""
        return [Unit(tuple(prompts), (0,))]

    def answer(self, units: Mapping[int, Unit]) -> Replies:
        """All lines of every prompt; a prompt that the file lacks is refused."""
        for number, unit in units.items():
            answers = [answer for prompt in unit.prompts for answer in self._answers(prompt)]
            yield number, Reply(tuple(answers))

    def _answers(self, prompt: Prompt) -> list[Answer]:
        name, texts = self.settings.name, self._texts.get(prompt.text.strip(), [])
        if not texts:
            return [refused(prompt, name, 0, "no answer in the file")]
        return [
            Answer(prompt.id, prompt.text, name, sample, text, tokens=0, finish="stop")
            for sample, text in enumerate(texts)
        ]
