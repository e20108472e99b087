"""A family of packs: every skill from the shared part and its own (docs/family-format.md)."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from torch import Tensor

from graftkit.delta import Checkpoint
from graftkit.errors import ConfigError, CorruptPackError, FamilyError
from graftkit.files import writing
from graftkit.fuse.family_file import FamilyParts, Masks, Member, read_family
from graftkit.fuse.merging import Progress
from graftkit.fuse.packing import joined_licences
from graftkit.packing import pack_delta
from graftkit.sharded import write_checkpoint
from graftkit.skillpack import SkillPack
from graftkit.skillpack.files import decode_file


class Family:
    """Skills of one target that share a part; opened from a file, nothing is decoded before use."""

    def __init__(self, path: Path, parts: FamilyParts):
        self.path = path
        self.manifest = parts.manifest
        self._parts = parts
        self._members = {skill.name: skill for skill in parts.manifest.skills}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file; everything is checked. Raises: FamilyError."""
        return cls(Path(path), read_family(Path(path)))

    @property
    def skills(self) -> tuple[str, ...]:
        """Names of the skills, in the order of the packs."""
        return tuple(self._members)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._parts.nbytes

    def check_target(self, target: Checkpoint) -> None:
        """Refuse everything but the family's own target. Raises: PackMismatchError."""
        self._parts.shared.check_target(target.read, set(target.tensors), str(target.path))

    def delta(self, skill: str, name: str, before: Tensor) -> Tensor:
        """What one skill adds to a tensor of the target, float32.

            Δ̂ = s M ⊙ τ̂  (emr, tall),   Δ̂ = τ̂ + the skill's rest  (twin)

        Args:
            name: any tensor of the target. before: its values there.
        Raises: ConfigError for an unknown skill; PackMismatchError for an unknown tensor or
            another shape; FamilyError where a part cannot be decoded.
        """
        self.member(skill)
        private = self._parts.private[skill]
        try:
            shared = self._parts.shared.delta(name, before)
            if isinstance(private, Masks):
                return private.apply(name, shared)
            return shared.add_(private.delta(name, before))
        except CorruptPackError as error:
            raise FamilyError(f"{self.path}: {skill}, {name}: {error}") from error

    def tensor(self, skill: str, name: str, before: Tensor) -> Tensor:
        """The skill's tensor: target plus delta, summed in float32 and rounded to its dtype.

        Raises: as `delta`.
        """
        if not before.is_floating_point():
            return before
        return self.delta(skill, name, before).add_(before).to(before.dtype)

    def pack(
        self,
        skill: str,
        target: str | Path | Checkpoint,
        progress: Progress | None = None,
        work_dir: Path | None = None,
    ) -> SkillPack:
        """One skill as a lossless pack, which gives `tensor` of every tensor bit for bit.

        The skill's checkpoint is on disk while this runs, in `work_dir` or a temporary folder. The
        pack has no router key: `library add` makes one from prompts.

        Raises: as `delta`; PackMismatchError for another target.
        """
        member = self.member(skill)
        checkpoint = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
        self.check_target(checkpoint)
        report = progress or (lambda step, done, total: None)
        names = list(checkpoint.tensors)
        with TemporaryDirectory(prefix="graftkit-", dir=work_dir) as folder:
            tuned = Path(folder) / skill
            with writing(tuned):
                write_checkpoint(
                    tuned,
                    names,
                    lambda name: self.tensor(skill, name, checkpoint.read(name)),
                    checkpoint.side_files() | self._side_files(member, checkpoint),
                    lambda done: report("unfolding", done, len(names)),
                )
            return pack_delta(
                target.path if isinstance(target, Checkpoint) else target,
                tuned,
                recipe="lossless",
                licence=joined_licences([one.licence for one in self.manifest.skills]),
                provenance=self._provenance(member),
                progress=progress,
            )

    def member(self, skill: str) -> Member:
        """What the manifest says of a skill. Raises: ConfigError for an unknown name."""
        if skill not in self._members:
            raise ConfigError(
                f"{self.path}: no skill {skill!r} here; it holds {', '.join(self.skills)}"
            )
        return self._members[skill]

    def summary(self) -> dict[str, Any]:
        """The numbers of the file: bytes of the shared part and of every private one."""
        return {
            "bytes": self.nbytes,
            "ratio": self.nbytes / max(1, self.manifest.target.bytes),
            "shared_bytes": self._parts.shared.pack_bytes,
            "skills": [
                skill.model_dump(mode="json") | {"bytes": self._private_bytes(skill.name)}
                for skill in self.manifest.skills
            ],
            "manifest": self.manifest.model_dump(mode="json", exclude={"skills"}),
        }

    def _private_bytes(self, skill: str) -> int:
        private = self._parts.private[skill]
        own = private.nbytes if isinstance(private, Masks) else private.pack_bytes
        return own + sum(map(len, self._parts.files[skill].values()))

    def _side_files(self, member: Member, target: Checkpoint) -> dict[str, bytes]:
        """Files that differ from the target's. Raises: PackMismatchError, FamilyError."""
        payloads = self._parts.files[member.name]
        try:
            files = self._parts.shared.side_files(target)
            for record in member.files:
                payload = payloads.get(record.name, memoryview(b""))
                files[record.name] = decode_file(record, payload, target.side_file(record.name))
        except CorruptPackError as error:
            raise FamilyError(f"{self.path}: {member.name}: {error}") from error
        return files

    def _provenance(self, member: Member) -> dict[str, str]:
        manifest = self.manifest
        settings = [f"{name}={value:g}" for name, value in sorted(manifest.settings.items())]
        others = [skill.name for skill in manifest.skills if skill is not member]
        return {
            "family": " ".join([manifest.method, *settings]),
            "pack": f"{member.tuned.name} ({member.pack_blake3[:16]})",
            "shares with": ", ".join(others),
        }
