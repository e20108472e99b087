"""What the demo found; the same goes into demo.json."""

from dataclasses import asdict, dataclass
from typing import Any


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
