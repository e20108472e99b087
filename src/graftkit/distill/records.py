"""Prompts, answers and scores, which the stages exchange as JSON Lines."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftkit.errors import OutputError, RowsError
from graftkit.files import replaced_file

Finish = Literal["stop", "length", "refused"]
"""stop: the answer is complete; length: it was cut; refused: there is none (see `reason`)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt. reference, tests: what the rules compare with, None if no rule needs it."""

    id: int
    text: str
    reference: str | None = None
    tests: str | None = None


@dataclass(frozen=True)
class SourceAnswer:
    """One answer of one source; a line of samples.jsonl.

    Attributes:
        prompt_id: line of the prompts file, from 0.
        sample: number of the answer among the source's answers to this prompt.
        text: without blanks at its ends.
        tokens: number of tokens, in the source's tokenizer; 0 if unknown.
        log_likelihood: mean log-probability of its tokens at temperature 1, nats; None if unknown.
        reason: why the source gave no answer.
    """

    prompt_id: int
    prompt: str
    source: str
    sample: int
    text: str
    tokens: int
    finish: Finish
    log_likelihood: float | None = None
    reason: str | None = None

    @property
    def key(self) -> tuple[int, str, int]:
        """What identifies the answer."""
        return self.prompt_id, self.source, self.sample


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer with its scores; a line of scores.jsonl.

    Attributes:
        passed: whether the answer is complete, has all grades and passes all rules.
        failed: the first rule that it fails, or why it could not be scored.
        reward: weighted sum of the grades.
        scores: the grades by name.
    """

    answer: SourceAnswer
    passed: bool
    failed: str | None
    reward: float
    scores: dict[str, float] = field(default_factory=dict)


def answer_record(answer: SourceAnswer) -> dict[str, Any]:
    """The answer as a JSON object, without what is None."""
    return {name: value for name, value in asdict(answer).items() if value is not None}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines; the file appears whole or not at all. Raises: OutputError."""
    with replaced_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read JSON Lines that a stage wrote. Raises: RowsError for a file that is damaged."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield _record(line, f"{path}:{number}")
    except OSError as error:
        raise RowsError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RowsError(f"{path}: not UTF-8 ({error}); delete the file and run again") from error


def _record(line: str, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowsError(f"{origin}: not JSON ({error}); delete the file and run again") from error
    if not isinstance(record, dict):
        raise RowsError(f"{origin}: not a JSON object; delete the file and run again")
    return record


class Journal:
    """Finished units of a long stage, as JSON Lines; an incomplete last line is dropped."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The finished units. An incomplete last line is removed from the file.

        Raises: OutputError for a file that is damaged elsewhere.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            records = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError) as error:
            raise OutputError(
                f"{self.path}: damaged ({error}); delete it to begin this stage anew"
            ) from error
        if not all(isinstance(record, dict) for record in records):
            raise OutputError(f"{self.path}: damaged; delete it to begin this stage anew")
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add one unit; it is on disk when this returns. Raises: OutputError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}); what is finished is kept, "
                "run the same command to go on"
            ) from error
