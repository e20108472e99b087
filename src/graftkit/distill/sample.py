"""The stage `sample`: every source answers every prompt. A killed run continues.

samples.jsonl                    one answer a line, ordered by prompt, source and sample
samples.summary.jsonl            counts, tokens and cost, one source a line
samples.partial/<source>.jsonl   finished units of an unfinished run
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from graftkit.distill.config import DistillConfig, EndpointSource, Prompts, Source
from graftkit.distill.records import Journal, Prompt, answer_record, read_lines, write_lines
from graftkit.distill.sources import SourceModel, Unit, open_source
from graftkit.errors import OutputError, RowsError
from graftkit.progress import Progress
from graftkit.rows import (
    prompt_of_record,
    read_records,
    row_of_record,
    sample_rows,
    text_field,
)

# Settings that do not change the answers of a source.
WITHOUT_EFFECT_ON_ANSWERS = {
    *("concurrency", "requests_per_minute", "timeout_seconds", "retries", "key_env"),
    *("price_per_million", "licence"),
}
MOST_REASONS = 10  # of refusals that are counted one by one; a server may word each differently


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run. dropped: number of rows of the file that are not used, by reason."""

    prompts: tuple[Prompt, ...]
    dropped: dict[str, int]


@dataclass(frozen=True)
class SourceSummary:
    """Counts of one source; a line of samples.summary.jsonl.

    Attributes:
        answers: number of answers, refused ones not counted.
        cut: number of answers that max_new_tokens cut.
        refused: number of prompts without an answer, by reason.
        tokens_in, tokens_out: tokens read and written; 0 if unknown.
        cost: by the prices in the settings, in their currency.
    """

    source: str
    answers: int
    cut: int
    refused: dict[str, int]
    tokens_in: int
    tokens_out: int
    cost: float


def read_prompts(
    config: Prompts, seed: int, needs_reference: bool, needs_tests: bool, config_folder: Path
) -> PromptSet:
    """Read the prompts of a file, or of a data set folder. The id of a prompt is its line, from 0,
    without blank lines. Of messages, the user's is the prompt and the assistant's the completion.

    Prompts that are blank, repeat an earlier one, or exceed the limit (chosen with the seed) are
    dropped and counted.

    Args:
        needs_reference, needs_tests: whether every row must have `completion` or `tests`.
        config_folder: folder of the configuration, to which its paths are relative.
    Raises: RowsError with file and line for a row that lacks a field, is a text or a conversation
        of several turns, and for no prompts at all.
    """
    dropped = {"empty": 0, "repeated": 0, "over the limit": 0}
    prompts: dict[str, Prompt] = {}
    for number, (record, origin) in enumerate(read_records(config_folder / config.file)):
        row = (row_of_record if needs_reference else prompt_of_record)(record, origin)
        text, reference = row.single_turn()
        prompt = Prompt(
            number,
            text,
            reference if needs_reference else None,
            text_field(record, "tests", origin) if needs_tests else None,
        )
        text = prompt.text.strip()
        if not text:
            dropped["empty"] += 1
        elif text in prompts:
            dropped["repeated"] += 1
        else:
            prompts[text] = prompt
    if not prompts:
        raise RowsError(
            f"{config_folder / config.file}: no prompts; expected one JSON object a line, "
            '{"prompt": "..."}'
        )
    chosen = list(prompts.values())
    if config.limit is not None:
        chosen = sample_rows(chosen, config.limit, seed, lambda prompt: 1)
    dropped["over the limit"] = len(prompts) - len(chosen)
    return PromptSet(tuple(chosen), dropped)


def sample_answers(
    config: DistillConfig,
    prompts: Sequence[Prompt],
    folder: Path,
    config_folder: Path,
    progress: Progress,
) -> Path:
    """Let every source answer every prompt; write samples.jsonl into `folder`, and return its path.

    The same configuration and prompts give the same bytes, also after a killed run, if the sources
    give the same answer for the same seed.

    Args:
        config_folder: folder of the configuration, to which its paths are relative.
    Raises: ConfigError, CheckpointError or RowsError for a source that cannot be opened;
        SourceError for one that fails later; OutputError.
    """
    partial = folder / "samples.partial"
    records: list[dict[str, Any]] = []
    summaries = []
    for settings in config.sources:
        units = _answer_all(settings, config.seed, prompts, partial, config_folder, progress)
        summaries.append(_summary(settings, units))
        records += [answer for unit in units for answer in unit["answers"]]
    order = {settings.name: place for place, settings in enumerate(config.sources)}
    records.sort(key=lambda each: (each["prompt_id"], order[each["source"]], each["sample"]))
    write_lines(folder / "samples.summary.jsonl", map(asdict, summaries))
    path = folder / "samples.jsonl"
    write_lines(path, records)
    shutil.rmtree(partial, ignore_errors=True)
    return path


def read_summaries(folder: Path) -> tuple[SourceSummary, ...]:
    """The counts that `sample_answers` wrote. Raises: RowsError."""
    return tuple(SourceSummary(**line) for line in read_lines(folder / "samples.summary.jsonl"))


def _answer_all(
    settings: Source,
    seed: int,
    prompts: Sequence[Prompt],
    partial: Path,
    config_folder: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """All units of one source, in their order; those in its journal are not answered again."""
    source = open_source(settings, seed, config_folder)
    journal = Journal(partial / f"{settings.name}.jsonl")
    units = dict(enumerate(source.units(prompts)))
    finished = _read_journal(journal, _digest(settings, seed, source, units.values()))
    step, total = f"sample {settings.name}", sum(map(len, units.values()))
    done = sum(len(units[number]) for number in finished)
    progress(step, done, total)
    todo = {number: unit for number, unit in units.items() if number not in finished}
    with closing(source.answer(todo)) as replies:
        for number, reply in replies:
            finished[number] = {
                "unit": number,
                "tokens_in": reply.tokens_in,
                "tokens_out": reply.tokens_out,
                "answers": [answer_record(answer) for answer in reply.answers],
            }
            journal.append(finished[number])
            done += len(units[number])
            progress(step, done, total)
    return [finished[number] for number in units]


def _digest(settings: Source, seed: int, source: SourceModel, units: Iterable[Unit]) -> str:
    """A digest of everything that determines a source's answers."""
    decisive = {
        "settings": settings.model_dump(exclude=WITHOUT_EFFECT_ON_ANSWERS),
        "identity": source.identity,
        "seed": seed,
        "units": [
            (unit.samples, [(prompt.id, prompt.text) for prompt in unit.prompts]) for unit in units
        ],
    }
    return blake3(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _read_journal(journal: Journal, digest: str) -> dict[int, dict[str, Any]]:
    """The units of a journal, by number. A new journal begins with the digest.

    Raises: OutputError for a journal of other settings, whose answers may have cost money.
    """
    records = journal.read()
    if not records:
        journal.append({"digest": digest})
        return {}
    if records[0] != {"digest": digest}:
        raise OutputError(
            f"{journal.path}: unfinished answers of other settings, prompts or seed; restore "
            "those and run again, or delete the file to begin anew"
        )
    return {record["unit"]: record for record in records[1:]}


def _summary(settings: Source, units: Sequence[dict[str, Any]]) -> SourceSummary:
    answers = [answer for unit in units for answer in unit["answers"]]
    finishes = Counter(answer["finish"] for answer in answers)
    tokens_in, tokens_out = (
        sum(unit[key] for unit in units) for key in ("tokens_in", "tokens_out")
    )
    prices = settings.price_per_million if isinstance(settings, EndpointSource) else (0.0, 0.0)
    return SourceSummary(
        settings.name,
        answers=finishes["stop"] + finishes["length"],
        cut=finishes["length"],
        refused=_reasons(answer["reason"] for answer in answers if "reason" in answer),
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        cost=(tokens_in * prices[0] + tokens_out * prices[1]) / 1e6,
    )


def _reasons(reasons: Iterable[str]) -> dict[str, int]:
    """The commonest reasons with their counts; all others as one."""
    counts = Counter(reasons)
    most = dict(counts.most_common(MOST_REASONS))
    others = counts.total() - sum(most.values())
    return {**most, "other reasons": others} if others else most
