"""Every published method against graftkit at equal bytes: python benchmarks/frontier.py

Packs every skill of the nursery with every method, budget and draw of calibration rows, measures
the files on held-out test rows, and writes the tables and the figure of docs/benchmarks.md. What a
method may choose, it chooses on calibration rows. Baselines are measured again when their sources
change, graftkit's own rows at every commit.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from base_text import pieces
from baselines.graftkit_packs import many_rows
from baselines.problem import Pair, Problem
from baselines.protocol import UnreachableError
from baselines.registry import LOSSLESS, LOSSY, OWN, Packer, digest, packer
from frontier_report import write_report
from ledger import Ledger, Record, command_line

from graftkit.evaluate import exact_match, token_fidelity
from graftkit.rows import Row, read_rows

SKILLS = ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p")
BUDGETS = ("0.25%", "0.5%", "1%", "2.5%", "5%", "10%", "25%")
SEEDS = (0, 1, 2)
CALIBRATION_ROWS, MANY_ROWS = 256, 4096
ELSEWHERE_SHARE = 4  # rows of each other skill: the skill's own rows over this
BASE_TEXTS = ("books-valid.txt.gz", "python-valid.txt.gz")
BASE_ROWS = 12  # of each base text
BASE_PROMPT, BASE_LENGTH = 60, 300  # characters

OWN_POINT = ("bitdelta",)  # has one size; measured there too


class SkillBench:
    """One skill: its pair of models, and the rows that everything is measured on."""

    def __init__(self, shared: Path, skill: str, rows: int):
        self.skill, self.data = skill, shared / "data" / "llm"
        self.pair = Pair(shared / "nursery" / "target", shared / "nursery" / skill)
        self.rows = read_rows(self.data / skill / "test.jsonl")[:rows]
        others = [other for other in SKILLS if other != skill]
        share = max(1, rows // ELSEWHERE_SHARE)
        self.elsewhere = [
            row for other in others for row in read_rows(self.data / other / "test.jsonl")[:share]
        ]
        self.base = list(base_rows(self.data / "base"))

    def problem(self, seed: int, work: Path) -> Problem:
        """The calibration rows of one draw, also as files."""
        lines = (self.data / self.skill / "train.jsonl").read_text(encoding="utf-8").splitlines()
        file = work / f"train-{self.skill}-{seed}.jsonl"
        for name, count in ((file, CALIBRATION_ROWS), (many_rows(file), MANY_ROWS)):
            chosen = random.Random(seed).sample(lines, count)
            name.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        return Problem(self.pair, read_rows(file), seed, file)

    @cached_property
    def exact(self) -> dict[str, float]:
        """What target and tuned answer."""
        pair, rows = self.pair, self.rows
        with pair.holding({}) as target:
            before = exact_match(target, pair.tokenizer, rows)
        with pair.holding(pair.after) as tuned:
            return {
                "exact_match_target": before,
                "exact_match_tuned": exact_match(tuned, pair.tokenizer, rows),
            }

    def quality(self, state: dict[str, Any]) -> dict[str, Any]:
        """Fidelity in and out of the skill's domain, and exact matches."""
        pair, values = self.pair, {}
        with pair.holding(state) as model:
            exact = exact_match(model, pair.tokenizer, self.rows)
            for prefix, rows in {
                "": self.rows,
                "elsewhere_": self.elsewhere,
                "base_": self.base,
            }.items():
                fidelity = asdict(token_fidelity(pair.tuned, model, pair.tokenizer, rows))
                values |= {prefix + name: value for name, value in fidelity.items()}
        before, goal = self.exact["exact_match_target"], self.exact["exact_match_tuned"]
        recovered = (exact - before) / (goal - before)
        return {**values, **self.exact, "exact_match": exact, "recovered": recovered}


def base_rows(folder: Path) -> Iterator[Row]:
    """Pieces of text that no skill was trained on."""
    for name in BASE_TEXTS:
        for piece, origin in pieces(folder / name, BASE_ROWS, BASE_LENGTH):
            yield Row(piece[:BASE_PROMPT], piece[BASE_PROMPT:], origin)


def measure(
    bench: SkillBench, problem: Problem, method: Packer, budget: str | None, work: Path
) -> Record:
    """One file: made, weighed, read back and compared. A budget out of reach is a result too."""
    size = None if budget is None else int(float(budget.rstrip("%")) / 100 * bench.pair.side.nbytes)
    file = work / "packed"
    start, cpu = time.perf_counter(), _cpu_seconds()
    try:
        choice = method.pack(problem, file, size)
    except UnreachableError as error:
        return {"refused": str(error), "budget_bytes": size}
    made = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(_cpu_seconds() - cpu, 2),
        "bytes": file.stat().st_size,
        "budget_bytes": size,
        "choice": choice,
    }
    if size is not None and made["bytes"] > size:
        raise AssertionError(f"{method.name}: {made['bytes']:,} bytes, budget {size:,}")
    start = time.perf_counter()
    state = method.unpack(bench.pair, file)
    made["unpack_seconds"] = round(time.perf_counter() - start, 2)
    if method.name in LOSSLESS:
        wrong = [name for name in state if not torch.equal(state[name], bench.pair.after[name])]
        return {**made, "restored": not wrong and state.keys() == bench.pair.after.keys()}
    return {**made, **bench.quality(state)}


def is_measured(ledger: Ledger, key: Record, own: bool) -> bool:
    """Whether the ledger has this line: of this commit for graftkit, of these sources otherwise."""
    if own:
        return ledger.has(key)
    same = (r for r in ledger.records if all(r.get(k) == v for k, v in key.items()))
    return not ledger.fresh and any(same)


def run(options: argparse.Namespace, ledger: Ledger) -> None:
    """Measure what the ledger lacks; the first draw of everything comes first."""
    for seed in options.seeds:
        for skill in options.skills:
            todo = list(_missing(options, ledger, skill, seed))
            if not todo:
                continue
            bench = SkillBench(options.shared, skill, options.rows)
            with TemporaryDirectory() as folder:
                work = Path(folder)
                problem = bench.problem(seed, work)
                for method, budget, key in todo:
                    measured = measure(bench, problem, method, budget, work)
                    ledger.add(key, measured)
                    print(_line(key, measured), file=sys.stderr, flush=True)


def _missing(
    options: argparse.Namespace, ledger: Ledger, skill: str, seed: int
) -> Iterator[tuple[Packer, str | None, Record]]:
    for name in options.methods:
        method = packer(name, options.out)
        if not method.seeded and seed != options.seeds[0]:
            continue
        budgets: list[str | None] = [None] if name in LOSSLESS else list(options.budgets)
        if name in OWN_POINT:
            budgets.insert(0, None)
        for budget in budgets:
            key = {
                "method": name,
                "skill": skill,
                "budget": budget,
                "seed": seed,
                "rows": options.rows,
                "sources": digest(name),
            }
            if not is_measured(ledger, key, method.own):
                yield method, budget, key


def _line(key: Record, measured: Record) -> str:
    head = f"{key['seed']} {key['skill']} {key['method']} {key['budget'] or '–'}"
    if "refused" in measured:
        return f"{head}: {measured['refused']}"
    shown = {n: measured[n] for n in ("bytes", "seconds", "kl_mean", "recovered") if n in measured}
    return f"{head}: {json.dumps(shown)}"


def _cpu_seconds() -> float:
    """Processor time of this process and of those it started."""
    return sum(os.times()[:4])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    every = (*LOSSLESS, *LOSSY, *OWN)
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    parser.add_argument("--skills", nargs="+", default=SKILLS, choices=SKILLS)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rows", type=int, default=200, help="test rows of the skill")
    parser.add_argument("--quick", action="store_true", help="one draw, three budgets")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.budgets = options.seeds[:1], ("1%", "5%", "10%")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the report."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    ledger = Ledger(options.out / "frontier.jsonl", "frontier.py", given, options.fresh)
    if not options.report_only:
        run(options, ledger)
    write_report(ledger.records, options.docs)


if __name__ == "__main__":
    main()
