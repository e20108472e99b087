"""Sources of answers: a model on this machine (`local`), an endpoint, or a file (here)."""

import json
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from graftkit.distill.config import AnswersSource, EndpointSource, Source
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.errors import ConfigError
from graftkit.rows import read_rows, rows_digest


@dataclass(frozen=True)
class Unit:
    """Work that is finished and stored as a whole: these samples of these prompts."""

    prompts: tuple[Prompt, ...]
    samples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts) * len(self.samples)


@dataclass(frozen=True)
class Reply:
    """The answers of one unit.

    Attributes:
        tokens_in: tokens of the prompts, once for each answer; 0 if unknown.
        tokens_out: tokens of the answers; 0 if unknown.
    """

    answers: tuple[SourceAnswer, ...]
    tokens_in: int = 0
    tokens_out: int = 0


Replies = Generator[tuple[int, Reply], None, None]
"""Number and reply of finished units, in any order. Close the generator to stop early."""


class SourceModel(Protocol):
    """What answers prompts; there is one for every kind of source."""

    @property
    def identity(self) -> str:
        """What determines the answers beside the settings, such as a file's digest."""

    def units(self, prompts: Sequence[Prompt]) -> list[Unit]:
        """All work in units; the same for the same prompts and settings."""

    def answer(self, units: Mapping[int, Unit]) -> Replies:
        """Answer units, given by number; each is returned when it is finished.

        The answers of a unit depend on its number, not on the other units of the call.
        Raises: SourceError or CheckpointError when the source fails as a whole. A prompt that
            cannot be answered gives a refused answer instead.
        """


def open_source(settings: Source, seed: int, config_folder: Path) -> SourceModel:
    """The source of one `[[sources]]` table. Paths are relative to `config_folder`.

    Raises: ConfigError for a missing key or library; CheckpointError for a model that cannot be
        used; RowsError for a file that cannot.
    """
    if isinstance(settings, AnswersSource):
        from graftkit.distill.sources import AnswersFile

        return AnswersFile(settings, config_folder)
    if isinstance(settings, EndpointSource):
        try:
            from graftkit.distill.sources.endpoint import EndpointModel
        except ImportError as error:
            raise ConfigError(
                f"source {settings.name}: the openai client is missing ({error}); "
                "pip install 'graftkit[distill]'"
            ) from error
        return EndpointModel(settings, seed)
    from graftkit.distill.sources.local import LocalModel

    return LocalModel(settings, seed, config_folder)


def derive_seed(*parts: int | str) -> int:
    """A seed from 0 to 2³¹ − 1 that depends on all parts."""
    digest = blake3(json.dumps(parts).encode()).digest(length=4)
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def refused(prompt: Prompt, source: str, sample: int, reason: str) -> SourceAnswer:
    """The record of a prompt that was not answered, and why."""
    return SourceAnswer(prompt.id, prompt.text, source, sample, "", 0, "refused", reason=reason)


class AnswersFile:
    """A file of answers, matched to the prompts by their text.

    Every line of a prompt is one of its samples, in the order of the file. Blanks at the ends of
    prompts and completions do not matter. The number of tokens is unknown, so 0.
    Raises: RowsError with file and line for a line that is no row, and for rows that are texts or
        conversations of several turns.
    """

    def __init__(self, settings: AnswersSource, config_folder: Path):
        self.settings = settings
        path = config_folder / settings.file
        self._texts: dict[str, list[str]] = defaultdict(list)
        for row in read_rows(path):
            prompt, completion = row.single_turn()
            self._texts[prompt.strip()].append(completion.strip())
        self.identity = rows_digest(path)

    def units(self, prompts: Sequence[Prompt]) -> list[Unit]:
        """One unit for the whole file."""
        return [Unit(tuple(prompts), (0,))]

    def answer(self, units: Mapping[int, Unit]) -> Replies:
        """All lines of every prompt; a prompt that the file lacks is refused."""
        for number, unit in units.items():
            answers = [answer for prompt in unit.prompts for answer in self._answers(prompt)]
            yield number, Reply(tuple(answers))

    def _answers(self, prompt: Prompt) -> list[SourceAnswer]:
        name, texts = self.settings.name, self._texts.get(prompt.text.strip(), [])
        if not texts:
            return [refused(prompt, name, 0, "no answer in the file")]
        return [
            SourceAnswer(prompt.id, prompt.text, name, sample, text, tokens=0, finish="stop")
            for sample, text in enumerate(texts)
        ]
