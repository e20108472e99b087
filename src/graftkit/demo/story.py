"""The demo's results, and the story it prints: a line for each step, two tables, how to go on.

The results also go into demo.json.
"""

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftkit.demo.files import SKILLS, DemoFolder, DemoSkill
from graftkit.rows import Row
from graftkit.text import printable

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
