"""Sources: who answers the prompts.

local      a causal language model, run here
endpoint   a model behind an OpenAI-compatible endpoint
answers    a file of answers that are there already
"""

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

__all__ = ["Replies", "Reply", "SourceModel", "Unit", "derive_seed", "open_source", "refused"]


@dataclass(frozen=True)
class Unit:
    """Work that is finished, and kept, as a whole: these samples of these prompts."""

    prompts: tuple[Prompt, ...]
    samples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts) * len(self.samples)


@dataclass(frozen=True)
class Reply:
    """What came of one unit.

    Attributes:
        tokens_in, tokens_out: read and written, prompts once for each answer; 0: nobody counted.
    """

    answers: tuple[SourceAnswer, ...]
    tokens_in: int = 0
    tokens_out: int = 0


Replies = Generator[tuple[int, Reply], None, None]
"""Finished units by number, in any order; close it to leave early."""


class SourceModel(Protocol):
    """Who answers; every kind of source is one of these."""

    @property
    def identity(self) -> str:
        """What decides the answers and is not in the settings, such as a file's digest."""

    def units(self, prompts: Sequence[Prompt]) -> list[Unit]:
        """The whole work in pieces; the same for the same prompts and settings."""

    def answer(self, units: Mapping[int, Unit]) -> Replies:
        """Work on units by number; each comes back when it is finished.

        The answers of a unit depend on its number, not on which others are asked for.
        Raises: SourceError or CheckpointError when the source fails as a whole. What one prompt
            does wrong is a refused answer.
        """


def open_source(settings: Source, seed: int, config_folder: Path) -> SourceModel:
    """The source of one `[[sources]]` table; paths are relative to `config_folder`.

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
    """A seed from 0 to 2³¹ − 1 for one draw among many; any other parts give another."""
    digest = blake3(json.dumps(parts).encode()).digest(length=4)
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def refused(prompt: Prompt, source: str, sample: int, reason: str) -> SourceAnswer:
    """An answer that there is none, and why."""
    return SourceAnswer(prompt.id, prompt.text, source, sample, "", 0, "refused", reason=reason)


class AnswersFile:
    """Every line of a prompt is one of its samples, in the order of the file.

    Blanks at the ends of prompts and completions do not count. Tokens are unknown, and 0.
    Raises: RowsError with file and line for what is no row.
    """

    def __init__(self, settings: AnswersSource, config_folder: Path):
        self.settings = settings
        path = config_folder / settings.file
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

    def _answers(self, prompt: Prompt) -> list[SourceAnswer]:
        name, texts = self.settings.name, self._texts.get(prompt.text.strip(), [])
        if not texts:
            return [refused(prompt, name, 0, "no answer in the file")]
        return [
            SourceAnswer(prompt.id, prompt.text, name, sample, text, tokens=0, finish="stop")
            for sample, text in enumerate(texts)
        ]
