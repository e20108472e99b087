"""The demo's files, its results, and the story it prints.

The package brings one target, three skills and their rows. A tuned model is stored as a lossless
pack, not as a second checkpoint. data/NOTICE.md names the sources of the training data;
tools/make_demo_weights.py and tools/embed_demo.py made the rest.

The story is a line for each step, two tables, and how to go on. The results also go into demo.json.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftkit.checkpoint import Checkpoint
from graftkit.errors import GraftError, OutputError, printable
from graftkit.files import WorkFolder, replaced_file
from graftkit.fuse import merge_packs
from graftkit.rows import Row
from graftkit.skillpack import SkillPack

DATA = Path(__file__).parent / "data"
TARGET = DATA / "target"
NOTICE = DATA / "NOTICE.md"


@dataclass(frozen=True)
class DemoSkill:
    """One skill of the demo and its files."""

    name: str
    title: str
    """What the skill does, in a few words."""
    budget: str
    """Budget of the pack, as a share of the target's bytes."""
    shown: int
    """Index of the test row in the mixed batch."""
    attribution: str
    """Source and licence of the data, as in NOTICE.md."""

    @property
    def lossless(self) -> Path:
        """Pack that rebuilds the tuned model exactly."""
        return DATA / "tuned" / f"{self.name}.skillpack"

    @property
    def test_rows(self) -> Path:
        """200 rows that no training saw."""
        return DATA / "rows" / f"{self.name}.test.jsonl"

    @property
    def calibration_rows(self) -> Path:
        """256 rows of the training data."""
        return DATA / "rows" / f"{self.name}.calibration.jsonl"


# Exact match of tuned and of target + pack on the 200 test rows (one thread, float32):
#   clinc150_intent     .895   5 % .850
#   nl_regex            .875   5 % .865
#   snips_function_call .335   10 % .265, 15 % .300, 20 % .340
# The deltas are larger than those of large models: 1.27 M weights, all trained, at a high rate. So
# each skill gets the smallest of 5, 10, 15 and 20 % that keeps 90 % of its answers.
# `shown` is the first test row that the tuned model answers: a pack cannot do better than that.
SKILLS = (
    DemoSkill(
        "clinc150_intent",
        "name the intent of an utterance",
        budget="5%",
        shown=0,
        attribution="CLINC150 (Larson et al. 2019), clinc/oos-eval @828f8093932c, CC-BY-3.0",
    ),
    DemoSkill(
        "nl_regex",
        "turn a description into a regular expression",
        budget="5%",
        shown=1,
        attribution="NL-RX-Synth (Locascio et al. 2016), nicholaslocascio/deep-regex "
        "@096490db7f4b, MIT",
    ),
    DemoSkill(
        "snips_function_call",
        "turn a request into a function call",
        budget="20%",
        shown=0,
        attribution="Snips (Coucke et al. 2018), sonos/nlu-benchmark @b86ac7f15778, CC0-1.0",
    ),
)


@dataclass(frozen=True)
class DemoFolder:
    """The folder of a run. Its files are written and replaced there; others are left alone."""

    out: Path

    @property
    def target(self) -> Path:
        """Checkpoint of the target."""
        return self.out / "checkpoints" / "target"

    def tuned(self, skill: DemoSkill) -> Path:
        """Checkpoint of a tuned model."""
        return self.out / "checkpoints" / skill.name

    def pack(self, skill: DemoSkill) -> Path:
        """The pack that the demo makes."""
        return self.out / "packs" / f"{skill.name}.skillpack"

    def test_rows(self, skill: DemoSkill) -> Path:
        """Rows that a skill is measured on."""
        return self.out / "rows" / skill.test_rows.name

    def calibration_rows(self, skill: DemoSkill) -> Path:
        """Rows that a pack is calibrated on."""
        return self.out / "rows" / skill.calibration_rows.name

    @property
    def json(self) -> Path:
        """The result."""
        return self.out / "demo.json"

    def fill(self) -> None:
        """Copy the embedded target, rows and notice. Raises: OutputError."""
        with self.writing():
            for folder in (self.target, self.out / "packs", self.out / "rows"):
                folder.mkdir(parents=True, exist_ok=True)
            for file in TARGET.iterdir():
                shutil.copyfile(file, self.target / file.name)
            for skill in SKILLS:
                shutil.copyfile(skill.test_rows, self.test_rows(skill))
                shutil.copyfile(skill.calibration_rows, self.calibration_rows(skill))
            shutil.copyfile(NOTICE, self.out / NOTICE.name)

    def rebuild(self, skill: DemoSkill) -> None:
        """Make the tuned checkpoint, bit for bit, by merging the lossless pack into the target.

        Raises: GraftError when the result is not the checkpoint that was packed; OutputError.
        """
        pack = SkillPack.load(skill.lossless)
        tuned = self.tuned(skill)
        # A merge needs an empty folder; this one may hold files of an earlier run, or of a user.
        work = WorkFolder(self.out / "merge.partial")
        work.open_empty()
        try:
            with self.writing():
                merged = merge_packs(self.target, pack, work.path / skill.name)
                tuned.mkdir(exist_ok=True)
                for file in merged.iterdir():
                    os.replace(file, tuned / file.name)
        finally:
            work.remove()
        actual = Checkpoint.open(tuned).fingerprint()
        expected = pack.manifest.provenance["tuned_fingerprint"]
        if actual != expected:
            raise GraftError(
                f"{tuned}: rebuilt with fingerprint {actual[:16]}, but the tuned model had "
                f"{expected[:16]}; install graftkit again, and report this if it stays"
            )

    def write_json(self, text: str) -> None:
        """Write the result. Raises: OutputError."""
        with replaced_file(self.json) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError into an OutputError."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.out}: the demo cannot write there ({error.strerror or error}); free some "
                "space or choose another folder"
            ) from error


SHOWN_CHARACTERS = 64  # of a target's answer; it rambles on until it is stopped


@dataclass(frozen=True)
class SkillResult:
    """One skill: exact match (0 to 1) and bytes on disk."""

    skill: str
    target: float
    """Share of test rows that the target answers exactly."""
    tuned: float
    """The same for the tuned model."""
    packed: float
    """The same for target + pack."""
    recovered: float
    """(packed - target) / (tuned - target)."""
    budget: str
    """Budget of the pack, of the target's bytes."""
    tuned_bytes: int
    """Weights of the tuned checkpoint on disk."""
    pack_bytes: int
    """The pack on disk."""

    @property
    def ratio(self) -> float:
        """How many packs fit into the place of the tuned checkpoint."""
        return self.tuned_bytes / self.pack_bytes


@dataclass(frozen=True)
class MixedAnswer:
    """One row of the batch in which every row has its own pack."""

    skill: str
    prompt: str
    expected: str
    """The completion of the test row."""
    target: str
    """What the target says."""
    packed: str
    """What target + pack says."""


@dataclass(frozen=True)
class DemoResult:
    """The whole demo."""

    skills: tuple[SkillResult, ...]
    mixed_batch: tuple[MixedAnswer, ...]
    bytes_restored: bool
    """Whether the live target had the same bytes after every detach."""
    commands: tuple[str, ...]
    """Shell commands to go on with, on the files that the demo left."""

    @property
    def tuned_bytes(self) -> int:
        """Weights of all tuned checkpoints on disk."""
        return sum(skill.tuned_bytes for skill in self.skills)

    @property
    def pack_bytes(self) -> int:
        """All packs on disk."""
        return sum(skill.pack_bytes for skill in self.skills)

    @property
    def ratio(self) -> float:
        """Tuned bytes of all skills by pack bytes of all skills."""
        return self.tuned_bytes / self.pack_bytes

    def as_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        totals = {
            "tuned_bytes": self.tuned_bytes,
            "pack_bytes": self.pack_bytes,
            "ratio": self.ratio,
        }
        skills = [asdict(skill) | {"ratio": skill.ratio} for skill in self.skills]
        return {**asdict(self), "skills": skills, "totals": totals}


class Story:
    """Prints the steps in their order."""

    def __init__(self, console: Console):
        self.console = console
        self.steps = 0

    def step(self, title: str, line: str) -> None:
        """Begin a step: its title and one line of explanation."""
        self.steps += 1
        self.console.print()
        self.console.print(Text(f"{self.steps}. {title}", style="bold"))
        self.say(line)

    def say(self, line: str, *, wrap: bool = True) -> None:
        """One line, as it is; what is there to be copied is not wrapped, and keeps its breaks."""
        text = printable(line, keep="" if wrap else "\n")
        self.console.print(text, markup=False, highlight=False, soft_wrap=not wrap)

    def table(self, results: tuple[SkillResult, ...], rows: int) -> None:
        """Numbers of every skill."""
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
        table.caption = f"exact match on {rows} test rows a skill, greedy; MB on disk"
        table.add_column("skill", no_wrap=True)
        for heading in ("target", "tuned", "+ pack", "kept", "budget", "tuned", "pack", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        for result in results:
            table.add_row(
                result.skill,
                *(f"{share:.3f}" for share in (result.target, result.tuned, result.packed)),
                f"{result.recovered:.0%}",
                result.budget,
                *(_megabytes(size) for size in (result.tuned_bytes, result.pack_bytes)),
                f"{result.ratio:.1f}×",
            )
        self.console.print(table)

    def mixed(self, answers: tuple[MixedAnswer, ...]) -> None:
        """Prompt, target's answer and answer with the pack, row by row."""
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_lines=True)
        for heading, ratio in (("prompt", 4), ("target", 3), ("with its pack", 5)):
            table.add_column(heading, ratio=ratio, overflow="fold")
        table.add_column("right")
        for answer in answers:
            right = answer.packed == answer.expected
            packed = Text(printable(answer.packed), style="green" if right else "yellow")
            # One line each: a prompt ends with a line feed and a word such as "Intent:".
            prompt = Text(printable(" ".join(answer.prompt.split())))
            table.add_row(
                prompt, Text(printable(_clipped(answer.target))), packed, "yes" if right else "no"
            )
        self.console.print(table)

    def explore(self, result: DemoResult, folder: DemoFolder) -> None:
        """What is there now, and commands to go on with."""
        self.console.print()
        self.console.print(Text("Explore", style="bold"))
        self.say(
            f"{len(result.skills)} skills in {_megabytes(result.pack_bytes)} MB of packs instead "
            f"of {_megabytes(result.tuned_bytes)} MB of checkpoints ({result.ratio:.1f}×). "
            f"Everything is in {folder.out}, the numbers in {folder.json}. Go on with:"
        )
        self.console.print()
        for command in result.commands:
            self.say(command, wrap=False)
        self.console.print()
        self.say("On a real chat model: make demo-real")


def explore_commands(folder: DemoFolder, skill: DemoSkill, row: Row) -> tuple[str, ...]:
    """Commands on the files of one skill, ready for a shell; the last one makes a new file."""
    target, tuned, pack = folder.target, folder.tuned(skill), folder.pack(skill)
    calibration = folder.calibration_rows(skill)
    own = folder.out / "packs" / f"{skill.name}-5.skillpack"
    arguments: tuple[tuple[str | object, ...], ...] = (
        ("inspect", pack),
        ("verify", pack, "--target", target),
        ("generate", target, "--prompt", row.prompt),
        ("generate", target, "--pack", pack, "--prompt", row.prompt),
        ("compare", target, tuned, pack, "--rows", folder.test_rows(skill)),
        ("pack", target, tuned, "--budget", "5%", "--calibration", calibration, "-o", own),
    )
    return tuple(shlex.join(["graftkit", *map(str, words)]) for words in arguments)


def budgets_line() -> str:
    """Why the budgets are what they are."""
    budgets = ", ".join(f"{skill.name} {skill.budget}" for skill in SKILLS)
    return (
        f"Budgets, of the target's bytes: {budgets}. Each skill gets the smallest of 5, "
        "10, 15 and 20% that kept 90% of its answers."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
