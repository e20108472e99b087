"""What the package carries along: one target, three skills, and their rows.

A tuned model is kept as a lossless pack, not as a second checkpoint. data/NOTICE.md says whose
data the models learned from; tools/make_demo_weights.py and tools/embed_demo.py made the rest.
"""

from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
TARGET = DATA / "target"
NOTICE = DATA / "NOTICE.md"


@dataclass(frozen=True)
class DemoSkill:
    """One skill: where its files lie and how it is shown."""

    name: str
    title: str
    """What the skill does, in a few words."""
    budget: str
    """Largest pack, of the target's bytes."""
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
"""A quarter of what `pack` does by itself: the demo must not take long."""

# Exact match of tuned and of target + pack on the 200 test rows (one thread, float32):
#   clinc150_intent     .895   5 % .850
#   nl_regex            .875   5 % .865
#   snips_function_call .335   10 % .265, 15 % .300, 20 % .340
# The deltas are larger than those of large models: 1.27 M weights, all trained, at a high rate. So
# each skill gets the smallest of 5, 10, 15 and 20 % that keeps 90 % of its answers.
# `shown` is the first test row that the tuned model answers: a pack brings back no more than that.
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
