"""The demo's files: what the package brings along, and the folder that a run fills.

The package brings one target, three skills and their rows. A tuned model is stored as a lossless
pack, not as a second checkpoint. data/NOTICE.md names the sources of the training data;
tools/make_demo_weights.py and tools/embed_demo.py made the rest.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftkit.checkpoint import Checkpoint
from graftkit.errors import GraftError, OutputError
from graftkit.files import WorkFolder, replaced_file
from graftkit.fuse import merge_packs
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


TRAIN_STEPS = 100
"""A quarter of the default of `pack`, to keep the demo short."""

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
