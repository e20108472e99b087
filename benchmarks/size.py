"""Bytes against fidelity on the nursery: python benchmarks/size.py

Packs every skill with every recipe and budget, measures each pack on held-out test rows, and
writes the table and the curves of docs/benchmarks.md. Nothing is tuned on what is measured here.
"""

import argparse
import lzma
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from baselines.problem import remembering
from ledger import ROOT, Ledger
from size_report import write_report

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.errors import BudgetError
from graftkit.evaluate import exact_match, token_fidelity
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.packing import pack_delta
from graftkit.rows import Row, read_rows
from graftkit.skillpack import SkillPack

SKILLS = ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p")
BUDGETS = ("1%", "2%", "3%", "5%", "10%", "25%")
SERIES = ("auto", "auto+rows", "graftllm", "graftllm+rows", "lossless", "references")
ELSEWHERE_ROWS = 100  # of each other skill
CALIBRATION_ROWS = 800


@dataclass(frozen=True)
class Setting:
    """One line of the table. budget: None where the recipe has none."""

    skill: str
    recipe: str
    budget: str | None
    calibration: str | None
    rows: int


class SkillBench:
    """One skill: its tuned model, and the rows that everything is measured on."""

    def __init__(self, shared: Path, skill: str, rows: int, work: Path, ledger: Ledger):
        self.nursery, self.data = shared / "nursery", shared / "data" / "llm"
        self.skill, self.work, self.ledger = skill, work, ledger
        self.target_path, self.tuned_path = self.nursery / "target", self.nursery / skill
        self.rows = read_rows(self.data / skill / "test.jsonl")[:rows]
        others = [other for other in SKILLS if other != skill]
        share = min(rows, ELSEWHERE_ROWS)
        self.elsewhere: list[Row] = [
            row for other in others for row in read_rows(self.data / other / "test.jsonl")[:share]
        ]
        self.tokenizer = load_tokenizer(self.tuned_path)

    @cached_property
    def target(self) -> Any:
        """The live target, in float32; packs are attached to it and detached again."""
        return load_model(self.target_path, torch.float32)

    @cached_property
    def exact(self) -> dict[str, float]:
        """What target and tuned answer without a pack; `self.target` may carry one by now."""
        names = ("exact_match_target", "exact_match_tuned")
        known = self.ledger.find({"skill": self.skill, "rows": len(self.rows)})
        if known and all(name in known for name in names):
            return {name: known[name] for name in names}
        paths = {"target": self.target_path, "tuned": self.tuned_path}
        return {
            f"exact_match_{name}": exact_match(
                load_model(path, torch.float32), self.tokenizer, self.rows
            )
            for name, path in paths.items()
        }

    @cached_property
    def tuned(self) -> Any:
        """The live tuned model, in float32."""
        return remembering(load_model(self.tuned_path, torch.float32))

    def pack(self, setting: Setting) -> tuple[SkillPack, dict[str, Any]]:
        """The pack of one setting, and its bytes on disk and seconds. Raises: BudgetError."""
        file = self.work / "skill.skillpack"
        start, cpu = time.perf_counter(), time.process_time()
        pack = pack_delta(
            self.target_path,
            self.tuned_path,
            budget=setting.budget,
            recipe=setting.recipe,
            calibration=self.calibration_rows if setting.calibration else None,
        )
        pack.save(file)
        return pack, {
            "bytes": file.stat().st_size,
            "budget_bytes": pack.manifest.budget_bytes,
            "seconds": round(time.perf_counter() - start, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }

    @cached_property
    def calibration_rows(self) -> Path:
        """The first rows of the skill's training set, in a file of their own."""
        lines = (self.data / self.skill / "train.jsonl").read_bytes().split(b"\n")
        file = self.work / f"train-{self.skill}.jsonl"
        file.write_bytes(b"\n".join(lines[:CALIBRATION_ROWS]) + b"\n")
        return file

    def quality(self) -> dict[str, Any]:
        """Fidelity and exact matches of the live target as it is now."""
        exact = exact_match(self.target, self.tokenizer, self.rows)
        here = token_fidelity(self.tuned, self.target, self.tokenizer, self.rows)
        there = token_fidelity(self.tuned, self.target, self.tokenizer, self.elsewhere)
        base, goal = self.exact["exact_match_target"], self.exact["exact_match_tuned"]
        recovered = (exact - base) / (goal - base) if goal != base else None
        return {
            **asdict(here),
            **{f"elsewhere_{name}": value for name, value in asdict(there).items()},
            **self.exact,
            "exact_match": exact,
            "recovered": recovered,
        }

    def references(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Lines that anyone can compute: no pack at all, the tuned file, XOR and xz."""
        yield "target alone", {"bytes": 0, "seconds": 0.0, **self.quality()}
        files = {info.file for info in Checkpoint.open(self.tuned_path).tensors.values()}
        dense = sum(file.stat().st_size for file in files)
        yield "tuned, bf16", {"bytes": dense, "seconds": 0.0, **self._perfect()}
        start = time.perf_counter()
        nbytes = xor_xz_bytes(self.target_path, self.tuned_path)
        seconds = round(time.perf_counter() - start, 2)
        yield "XOR + xz", {"bytes": nbytes, "seconds": seconds, **self._perfect()}

    def _perfect(self) -> dict[str, Any]:
        """What bit-identical weights score by definition."""
        same = {"kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
        elsewhere = {f"elsewhere_{name}": value for name, value in same.items()}
        exact = self.exact["exact_match_tuned"]
        return {**same, **elsewhere, **self.exact, "exact_match": exact, "recovered": 1.0}


def xor_xz_bytes(target: Path, tuned: Path) -> int:
    """Bytes of xz -9 over the XOR of two bf16 checkpoints, high bytes first, then low bytes."""
    before, after = Checkpoint.open(target), Checkpoint.open(tuned)
    planes: tuple[list[bytes], list[bytes]] = ([], [])
    for name in sorted(after.tensors):
        words = (before.read(name).view(torch.int16) ^ after.read(name).view(torch.int16)).numpy()
        pairs = words.view("uint8").reshape(-1, 2)
        planes[0].append(pairs[:, 1].tobytes())
        planes[1].append(pairs[:, 0].tobytes())
    return len(lzma.compress(b"".join(planes[0] + planes[1]), preset=9))


def settings_of(skill: str, series: Sequence[str], budgets: Sequence[str], rows: int) -> list:
    """Every pack to make of one skill, small budgets first."""
    train = f"train[:{CALIBRATION_ROWS}]"
    lossy = [name for name in series if name.startswith(("auto", "graftllm"))]
    found = [
        Setting(skill, name.split("+")[0], budget, train if "+" in name else None, rows)
        for name in lossy
        for budget in budgets
    ]
    return found + [Setting(skill, "lossless", None, None, rows)] * ("lossless" in series)


def measure(bench: SkillBench, setting: Setting) -> dict[str, Any]:
    """Values of one line; a refused budget is a result too."""
    try:
        pack, made = bench.pack(setting)
    except BudgetError as error:
        return {"refused": str(error)}
    with attached(bench.target, pack):
        return {**made, **bench.quality()}


def run_skill(bench: SkillBench, ledger: Ledger, options: argparse.Namespace) -> None:
    """Measure what the ledger lacks of one skill."""
    for setting in settings_of(bench.skill, options.series, options.budgets, options.rows):
        if not ledger.has(asdict(setting)):
            ledger.add(asdict(setting), measure(bench, setting))
            _say(setting, ledger.records[-1])
    if "references" in options.series:
        lines = [
            Setting(bench.skill, name, None, None, options.rows)
            for name in ("target alone", "tuned, bf16", "XOR + xz")
        ]
        if not all(ledger.has(asdict(line)) for line in lines):
            for name, values in bench.references():
                key = Setting(bench.skill, name, None, None, options.rows)
                ledger.add(asdict(key), values)
                _say(key, values)


def _say(setting: Setting, values: Mapping[str, Any]) -> None:
    shown = {k: values.get(k) for k in ("bytes", "seconds", "kl_mean", "recovered")}
    name = " ".join(str(part) for part in asdict(setting).values() if part is not None)
    print(name, shown, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    shared = Path(os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="folder of nursery and data")
    parser.add_argument("--skills", nargs="+", choices=SKILLS, default=SKILLS)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=SERIES)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="as in pack: 5%%, 800KB")
    parser.add_argument("--rows", type=int, default=400, help="test rows to measure on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tables are written")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    ledger = Ledger(options.out / "size.jsonl", "size.py", arguments, options.fresh)
    with TemporaryDirectory(prefix="graftkit-size-") as work:
        for skill in options.skills:
            bench = SkillBench(options.shared, skill, options.rows, Path(work), ledger)
            run_skill(bench, ledger, options)
    write_report([r for r in ledger.records if r["rows"] == options.rows], options.docs)


if __name__ == "__main__":
    main(sys.argv[1:])
