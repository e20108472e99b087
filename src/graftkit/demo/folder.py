"""The demo's folder: what it writes and replaces there; other files are left alone."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftkit.checkpoint import Checkpoint
from graftkit.demo.embedded import NOTICE, SKILLS, TARGET, DemoSkill
from graftkit.errors import GraftError, OutputError
from graftkit.files import WorkFolder, replaced_file
from graftkit.fuse import merge_packs
from graftkit.skillpack import SkillPack


@dataclass(frozen=True)
class DemoFolder:
    """Paths below OUT."""

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
        """Merge the lossless pack into the target: the tuned checkpoint, bit for bit.

        Raises: GraftError when the result is not the checkpoint that was packed; OutputError.
        """
        pack = SkillPack.load(skill.lossless)
        tuned = self.tuned(skill)
        # A merge wants an empty folder; an earlier run, or somebody, may have left files in this.
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
        found = Checkpoint.open(tuned).fingerprint()
        expected = pack.manifest.provenance["tuned_fingerprint"]
        if found != expected:
            raise GraftError(
                f"{tuned}: rebuilt with fingerprint {found[:16]}, but the tuned model had "
                f"{expected[:16]}; install graftkit again, and report this if it stays"
            )

    def write_json(self, text: str) -> None:
        """Write the result. Raises: OutputError."""
        with replaced_file(self.json) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Say in one line what the disk refuses."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.out}: the demo cannot write there ({error.strerror or error}); free some "
                "space or choose another folder"
            ) from error
