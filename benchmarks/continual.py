"""One skill after another: what is kept, and what it costs: python benchmarks/continual.py

Learns the nursery's four skills in three orders, by fine-tuning on, by merging under bounded
memory, by merging packs and with a library of packs, and measures all skills after each. Every
method has the same rows and steps. Writes the tables and the figure of docs/benchmarks.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from continual_report import write_report
from continual_states import Size, Skills, States
from continual_training import adapted_model
from ledger import Ledger, Record, command_line

from graftkit.attachment import attached
from graftkit.evaluate import exact_match
from graftkit.models import load_model
from graftkit.route import TARGET
from graftkit.route.centroid import CentroidRouter
from graftkit.route.nearest import read_key
from graftkit.rows import Row, read_rows
from graftkit.skillpack import SkillPack

ORDERS: tuple[Skills, ...] = (
    ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p"),
    ("cmudict_g2p", "inflect_spa", "nl_regex", "clinc150_intent"),
    ("inflect_spa", "clinc150_intent", "cmudict_g2p", "nl_regex"),
)
FULL = Size(
    steps=600,
    batch=24,
    code_steps=100,
    calibration_rows=256,
    search_rows=20,
    search_tries=40,
    test_rows=200,
)
QUICK = Size(
    steps=2,
    batch=4,
    code_steps=None,
    calibration_rows=24,
    search_rows=2,
    search_tries=3,
    test_rows=3,
)
QUICK_ORDERS: tuple[Skills, ...] = (("nl_regex", "clinc150_intent"),)
MERGES: dict[str, tuple[str, dict[str, Any]]] = {  # weights 1; settings as their papers give them
    "task arithmetic": ("task_arithmetic", {"scaling": 0.4}),
    "ties": ("ties", {}),
    "dare-ties": ("dare_ties", {}),
    "sce": ("sce", {}),
}


class Bench:
    """Scores of states: the share of test rows answered exactly, by skill."""

    def __init__(self, shared: Path, work: Path, size: Size, skills: Skills):
        self.states = States(shared, work, size)
        data = shared / "data" / "llm"
        self.tests = {
            skill: list(read_rows(data / skill / "test.jsonl")[: size.test_rows])
            for skill in skills
        }
        self._matched: dict[tuple[str, str, tuple[int, ...]], float] = {}

    def scores(self, model: Any) -> dict[str, float]:
        """Of one model on all skills."""
        tokenizer = self.states.live_target[1]
        return {skill: exact_match(model, tokenizer, rows) for skill, rows in self.tests.items()}

    def of_folder(self, folder: Path) -> Record:
        """Of a checkpoint, and the bytes of its weights."""
        size = (folder / "model.safetensors").stat().st_size
        return {"scores": self.scores(load_model(folder, torch.float32)), "bytes": size}

    def of_adapter(self, folder: Path) -> Record:
        """Of the target with an adapter."""
        size = (folder / "adapter_model.safetensors").stat().st_size
        return {"scores": self.scores(adapted_model(self.states.target, folder)), "bytes": size}

    def of_turn(self, folder: Path) -> Record:
        """Of what a rule with a memory made; the bytes are its memory's."""
        size = (folder / "state").stat().st_size
        return {**self.of_folder(folder / "model"), "bytes": size}

    def of_packs(self, learned: Skills, folder: Path) -> Record:
        """Of a merge; all packs have to stay for the next one."""
        return {**self.of_folder(folder), "bytes": self.library_bytes(learned)}

    def library_bytes(self, learned: Skills) -> int:
        """Bytes of the packs of these skills, router keys included."""
        return sum(self.states.pack_file(skill).stat().st_size for skill in learned)

    def of_library(self, learned: Skills, chosen: dict[str, list[str]]) -> Record:
        """Of packs, each test row answered with the pack of the name chosen for it."""
        scores, right = {}, []
        for skill, rows in self.tests.items():
            names = chosen[skill]
            right += [name == (skill if skill in learned else TARGET) for name in names]
            matched = sum(
                self._matches(name, skill, tuple(i for i, n in enumerate(names) if n == name))
                for name in sorted(set(names))
            )
            scores[skill] = matched / len(rows)
        routed = sum(right) / len(right)
        return {"scores": scores, "bytes": self.library_bytes(learned), "routed_right": routed}

    def _matches(self, name: str, skill: str, indices: tuple[int, ...]) -> float:
        """Rows of a skill that one pack, or the target, answers exactly."""
        key = (name, skill, indices)
        if key not in self._matched:
            rows = [self.tests[skill][index] for index in indices]
            self._matched[key] = len(rows) * self._share(name, rows)
        return self._matched[key]

    def _share(self, name: str, rows: Sequence[Row]) -> float:
        model, tokenizer = self.states.live_target
        if name == TARGET:
            return exact_match(model, tokenizer, rows)
        with attached(model, SkillPack.load(self.states.pack_file(name))):
            return exact_match(model, tokenizer, rows)


def by_oracle(bench: Bench, learned: Skills) -> Record:
    """A library that is told the skill."""
    names = {skill: skill if skill in learned else TARGET for skill in bench.tests}
    chosen = {skill: [names[skill]] * len(rows) for skill, rows in bench.tests.items()}
    return bench.of_library(learned, chosen)


def by_centroid(bench: Bench, learned: Skills) -> Record:
    """A library that decides for itself, row by row."""
    packs = {skill: SkillPack.load(bench.states.pack_file(skill)) for skill in learned}
    keys = {skill: read_key(pack) for skill, pack in packs.items()}
    router = CentroidRouter(*bench.states.live_target, keys)
    chosen = {
        skill: [route.name for route in router.route([row.prompt for row in rows])]
        for skill, rows in bench.tests.items()
    }
    return bench.of_library(learned, chosen)


@dataclass(frozen=True)
class Way:
    """A method: what it has after learning skills.

    Attributes:
        ordered: whether the order in which it learned them matters.
        at_once: it learns all skills together or none: there is no state in between.
    """

    measure: Callable[[Bench, Skills], Record]
    ordered: bool = True
    at_once: bool = False


def _merge(method: str, settings: dict[str, Any]) -> Way:
    def measure(bench: Bench, learned: Skills) -> Record:
        return bench.of_packs(learned, bench.states.merged(method, settings, learned))

    return Way(measure, ordered=False)


WAYS: dict[str, Way] = {
    "full fine-tuning": Way(lambda b, s: b.of_folder(b.states.tuned(s))),
    "lora": Way(lambda b, s: b.of_adapter(b.states.adapter(s))),
    "kif, trained on": Way(lambda b, s: b.of_turn(b.states.turn("kif", s, trained_on=True))),
    "kif": Way(lambda b, s: b.of_turn(b.states.turn("kif", s))),
    "opcm": Way(lambda b, s: b.of_turn(b.states.turn("opcm", s))),
    **{name: _merge(*merge) for name, merge in MERGES.items()},
    "task arithmetic, searched": Way(
        lambda b, s: b.of_packs(s, b.states.searched(s)), ordered=False
    ),
    "library, oracle": Way(by_oracle, ordered=False),
    "library, centroid": Way(by_centroid, ordered=False),
    "joint training": Way(lambda b, s: b.of_folder(b.states.joint(s)), False, at_once=True),
}


def todo(ways: Sequence[str], orders: Sequence[Skills]) -> list[tuple[str, Skills]]:
    """Every method with every state that some order passes through, each state once."""
    states: dict[tuple[str, Skills], None] = {("target", ()): None}
    for name in ways:
        for order in orders:
            lengths = [len(order)] if WAYS[name].at_once else range(1, len(order) + 1)
            for length in lengths:
                states[(name, state_key(name, order[:length]))] = None
    return list(states)


def state_key(name: str, learned: Skills) -> Skills:
    """The skills that name a state, sorted where their order does not matter."""
    return learned if WAYS[name].ordered else tuple(sorted(learned))


def run(options: argparse.Namespace, ledger: Ledger) -> None:
    """Measure what the ledger lacks."""
    bench = Bench(options.shared, options.work, options.size, tuple(sorted(options.orders[0])))
    for name, learned in todo(options.ways, options.orders):
        key = {"way": name, "learned": "+".join(learned), "steps": options.size.steps}
        if ledger.has(key):
            continue
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        if name == "target":
            measured: Record = {"scores": bench.scores(bench.states.live_target[0]), "bytes": 0}
        else:
            measured = WAYS[name].measure(bench, learned)
        measured["seconds"] = round(time.perf_counter() - start, 1)
        measured["cpu_seconds"] = round(sum(os.times()[:4]) - cpu, 1)
        ledger.add(key, measured)
        print(name, key["learned"], measured["scores"], file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS))
    parser.add_argument("--quick", action="store_true", help="two skills, a few rows and steps")
    options = parser.parse_args(arguments)
    options.size = QUICK if options.quick else FULL
    options.orders = QUICK_ORDERS if options.quick else ORDERS
    options.work = options.out / "continual" / str(options.size.steps)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the report."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    ledger = Ledger(options.out / "continual.jsonl", "continual.py", given, options.fresh)
    if not options.report_only:
        run(options, ledger)
    ordered = {name: way.ordered for name, way in WAYS.items()}
    write_report(ledger.records, options.orders, options.size.steps, ordered, options.docs)


if __name__ == "__main__":
    main()
