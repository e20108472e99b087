"""Time and memory of packing and attaching: python benchmarks/speed.py [--quick]

Every measurement runs in a process of its own (speed_child.py). On Linux a child that is spawned
counts its parent's memory into its own peak, so this file imports neither torch nor graftkit.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ledger import ROOT, Ledger
from speed_report import write_report

CASES = ("nursery", "qwen")
RECIPES = ("auto", "graftllm", "lossless")
SKILL = "nl_regex"  # of the nursery; its rows calibrate every case
CALIBRATION_ROWS = 800
BUDGET = "5%"


@dataclass(frozen=True)
class Setting:
    """One measurement of packing."""

    case: str
    recipe: str
    calibrated: bool
    workers: int
    budget: str = BUDGET
    servable: bool = False


class SpeedBench:
    """Where the checkpoints of each case lie, and how a child is asked."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work = options, work
        self.nursery = options.shared / "nursery"

    def states(self, case: str) -> tuple[Path, Path]:
        """Target and tuned of one case, built where they are missing."""
        if case == "nursery":
            return self.nursery / "target", self.nursery / SKILL
        folder = self.work / case
        if not (folder / "built").is_file():
            spec = {"task": "build", "case": case, "folder": str(folder)}
            self.ask({**spec, "tokenizer": str(self.nursery / "target")})
            (folder / "built").touch()
        return folder / "target", folder / "tuned"

    def rows(self) -> Path:
        """The first training rows of the skill, in a file of their own."""
        file = self.work / "rows.jsonl"
        train = self.options.shared / "data" / "llm" / SKILL / "train.jsonl"
        file.write_bytes(b"\n".join(train.read_bytes().split(b"\n")[:CALIBRATION_ROWS]) + b"\n")
        return file

    def pack_file(self, setting: Setting) -> Path:
        """Where the pack of one setting is saved."""
        parts = (setting.case, setting.recipe, setting.calibrated, setting.budget)
        return self.work / f"{'-'.join(map(str, (*parts, setting.servable)))}.skillpack"

    def pack(self, setting: Setting) -> dict[str, Any]:
        """Time and memory of one `pack_delta`."""
        target, tuned = self.states(setting.case)
        return self.ask(
            {
                "task": "pack",
                "target": str(target),
                "tuned": str(tuned),
                "budget": None if setting.recipe == "lossless" else setting.budget,
                "recipe": setting.recipe,
                "servable": setting.servable,
                "rows": str(self.rows()) if setting.calibrated else None,
                "workers": setting.workers,
                "pack": str(self.pack_file(setting)),
            }
        )

    def use(self, setting: Setting) -> dict[str, Any]:
        """Times of opening and attaching the pack that `pack` saved."""
        target, tuned = self.states(setting.case)
        spec = {"task": "use", "target": str(target), "tuned": str(tuned)}
        pack, repeats = str(self.pack_file(setting)), self.options.repeats
        return self.ask({**spec, "pack": pack, "repeats": repeats})

    def ask(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The answer of one child; a child beyond the time limit answers that it was stopped."""
        command = [sys.executable, str(Path(__file__).with_name("speed_child.py"))]
        limit = 60 * self.options.limit_minutes
        try:
            run = subprocess.run(
                [*command, json.dumps(spec)], stdout=subprocess.PIPE, check=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"stopped_after_seconds": limit}
        answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return answer


def settings_of(case: str, options: argparse.Namespace) -> Iterator[Setting]:
    """Every pack of one case."""
    for recipe in options.recipes:
        with_rows = recipe != "lossless" and not options.data_free
        for calibrated in (False, True) if with_rows else (False,):
            for workers in options.workers:
                yield Setting(case, recipe, calibrated, workers)
    workers = max(options.workers)
    if case == "qwen" and "auto" in options.recipes:
        yield Setting(case, "auto", False, workers, budget="1%")
        yield Setting(case, "auto", False, workers, servable=True)


def run_case(bench: SpeedBench, ledger: Ledger, case: str) -> None:
    """Measure what the ledger lacks of one case."""
    for setting in settings_of(case, bench.options):
        key = {"task": "pack", **asdict(setting)}
        file = bench.pack_file(setting)
        if not ledger.has(key):
            ledger.add(key, bench.pack(setting))
            print(json.dumps(ledger.records[-1]), file=sys.stderr, flush=True)
        key = {**key, "task": "use", "workers": None}
        if file.is_file() and not ledger.has(key):
            ledger.add(key, bench.use(setting))
            print(json.dumps(ledger.records[-1]), file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    shared = Path(os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="folder of nursery and data")
    parser.add_argument("--quick", action="store_true", help="the nursery only")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--workers", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--data-free", action="store_true", help="nothing calibrated")
    parser.add_argument("--repeats", type=int, default=5, help="of every time in milliseconds")
    parser.add_argument("--limit-minutes", type=float, default=60.0, help="of one measurement")
    parser.add_argument("--work", type=Path, help="for large checkpoints; default temporary")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tables are written")
    parser.add_argument("--fresh", action="store_true", help="measure again what this commit has")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    ledger = Ledger(options.out / "speed.jsonl", "speed.py", arguments, options.fresh)
    with TemporaryDirectory(prefix="graftkit-speed-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = SpeedBench(options, work)
        for case in ("nursery",) if options.quick else options.cases:
            run_case(bench, ledger, case)
    write_report(ledger.records, options.docs)


if __name__ == "__main__":
    main(sys.argv[1:])
