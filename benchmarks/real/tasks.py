"""Models, rows and texts of the real benchmark: which rows train, choose and measure which model.

Training rows are the first of a seeded shuffle of `train.jsonl`, validation rows are the next ones,
and test rows are the first of `test.jsonl`. No row has two roles. Settings are chosen on validation
rows; test rows are read for the final numbers only.

Imports neither torch nor transformers: `run.py --list` stays quick.
"""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BATCH_ROWS = 24
"""Rows of one training step."""

MAX_TOKENS = 512  # of a row in training
FULL_RATE = 1e-4
"""Learning rate of the full fine-tunes."""

DPO_RATE, DPO_STEPS = 5e-6, 60
TEXT_RATE, TEXT_STEPS = 1e-4, 180
VALIDATION_ROWS = 200
TEST_ROWS = 300
CALIBRATION_ROWS = 256
_BLOCK_BATCHES = 16  # batches that are formed together, from rows of like length
_SEPARATOR = "<|endoftext|>"

Row = dict[str, str]
"""{"prompt": …, "completion": …}"""


@dataclass(frozen=True)
class Skill:
    """A task that the target does not know. row_count: rows that a training sees."""

    name: str
    row_count: int
    new_tokens: int
    """The longest completion that is generated, in tokens."""

    @property
    def short(self) -> str:
        """The name in the names of stages."""
        return self.name.split("_")[0]


SKILLS = (
    Skill("clinc150_intent", 4_320, 16),
    Skill("nl_regex", 4_320, 80),
    # The shared pack of this skill was trained on so many rows.
    Skill("snips_function_call", 3_600, 128),
)


@dataclass(frozen=True)
class Pair:
    """A target and what was tuned from it, by the names of the stages that make them."""

    name: str
    target: str
    tuned: str
    skill: Skill | None
    """What rows it is measured on; None: the documents of continued pre-training."""


def full_name(skill: Skill) -> str:
    """The stage of a skill's full fine-tune."""
    return f"full-{skill.short}-{skill.row_count}rows-{FULL_RATE:g}"


def all_pairs() -> list[Pair]:
    """A full fine-tune a skill, DPO on top of the last one, and continued pre-training."""
    pairs = [Pair(skill.short, "target", full_name(skill), skill) for skill in SKILLS]
    parent = pairs[-1]
    dpo = f"dpo-{parent.name}-{DPO_STEPS}steps-{DPO_RATE:g}"
    text = f"text-techdoc-{TEXT_STEPS}steps-{TEXT_RATE:g}"
    return [
        *pairs,
        Pair("dpo", parent.tuned, dpo, parent.skill),
        Pair("text", "target", text, None),
    ]


@dataclass(frozen=True)
class Split:
    """The rows of a skill by role. unused: rows of nothing else, for preference pairs."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    unused: list[Row]

    @property
    def calibration(self) -> list[Row]:
        """Rows that a calibrated pack is made with: the first of the training rows."""
        return self.train[:CALIBRATION_ROWS]


def skill_named(name: str) -> Skill:
    """The skill of a full or short name. Raises: KeyError."""
    for skill in SKILLS:
        if name in (skill.name, skill.short):
            return skill
    raise KeyError(name)


def read_rows(file: Path) -> list[Row]:
    """Every row of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def split_rows(data: Path, skill: Skill) -> Split:
    """The rows of `skill` in the folder `data` (`SKILL/train.jsonl`, `SKILL/test.jsonl`)."""
    rows = read_rows(data / skill.name / "train.jsonl")
    random.Random(0).shuffle(rows)
    train, rest = rows[: skill.row_count], rows[skill.row_count :]
    test = read_rows(data / skill.name / "test.jsonl")
    return Split(train, rest[:VALIDATION_ROWS], test[:TEST_ROWS], rest[VALIDATION_ROWS:])


def batches_of_rows(rows: Sequence[Row], seed: int = 0) -> Iterator[list[Row]]:
    """Batches of BATCH_ROWS rows of like length, in random order within blocks.

    Rows are in random order already; `seed` changes the order of batches alone.
    """
    generator = random.Random(seed)
    for start in range(0, len(rows), BATCH_ROWS * _BLOCK_BATCHES):
        block = sorted(
            rows[start : start + BATCH_ROWS * _BLOCK_BATCHES],
            key=lambda row: len(row["prompt"]) + len(row["completion"]),
        )
        count = len(block) // BATCH_ROWS
        batches = [block[i * BATCH_ROWS : (i + 1) * BATCH_ROWS] for i in range(count)]
        generator.shuffle(batches)
        yield from batches


def read_documents(file: Path) -> list[str]:
    """The documents of a gzip text, in the order of the file."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return [part.strip() for part in stream.read().split(_SEPARATOR) if part.strip()]


def split_documents(data: Path) -> tuple[list[str], list[str]]:
    """Documents of continued pre-training (a book on Rust), and every tenth, which is held out."""
    documents = read_documents(data / "base" / "techdoc-train.txt.gz")
    train = [text for index, text in enumerate(documents) if index % 10]
    return train, documents[::10]
