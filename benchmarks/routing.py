"""Which router finds the right pack, and what that costs: python benchmarks/routing.py

A library of the nursery's four skills, one pack of 5 % each, answers test rows of all of them mixed
with rows of no skill. Every router is asked for every row; three forms of the prompts, for fixed
words such as "Utterance:" tell a skill at once. Writes the tables of docs/benchmarks.md.
"""

import argparse
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from base_text import pieces
from ledger import Ledger, Record, command_line
from routing_report import write_report

from graftkit.library import Library
from graftkit.models import load_model
from graftkit.pack import pack_delta
from graftkit.route import TARGET
from graftkit.rows import Row, read_rows

SKILLS = ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p")
BUDGET = "5%"
FOREIGN = (
    *("sms_spam", "scan_actions", "zh_pinyin", "addition_synth"),  # the target knows these
    *("snips_function_call", "gsm8k"),
)
SHOWN = ("sms_spam", "scan_actions", "zh_pinyin")  # foreign sets that the classifier learns from
ROUTERS = ("keys", "spectral", "classifier")
CALIBRATION_ROWS, KEY_PROMPTS = 1024, 200
CLASSIFIER_ROWS = slice(1024, 1084)  # of every training file: rows that no pack or key has seen
BASE_TEXTS, BASE_LENGTH = ("books-valid.txt.gz", "python-valid.txt.gz"), 200  # characters
ANSWER_TOKENS, TIMED_PROMPTS = 64, 20

Form = Callable[[str], str]


def without_fixed_words(prompt: str) -> str:
    """The middle of a prompt "Utterance: … Intent:"."""
    return prompt.partition(": ")[2].rpartition("\n")[0] or prompt


def in_one_template(prompt: str) -> str:
    """The same middle in words that all skills share."""
    return f"Question: {without_fixed_words(prompt)}\nAnswer:"


FORMS: dict[str, Form] = {
    "as they are": lambda prompt: prompt,
    "without fixed words": without_fixed_words,
    "in one template": in_one_template,
}


class Bench:
    """The library, made once, and rows by the pack that should answer them."""

    def __init__(self, shared: Path, work: Path, rows: int, foreign: int):
        self.shared, self.work, self.data = shared, work, shared / "data" / "llm"
        self.tests = {skill: self.rows(skill, "test", slice(rows)) for skill in SKILLS}
        self.foreign = {name: self.rows(name, "test", slice(foreign)) for name in FOREIGN}
        for name in BASE_TEXTS:
            cut = pieces(self.data / "base" / name, foreign, BASE_LENGTH)
            self.foreign[name.partition("-")[0]] = [Row(piece, "", where) for piece, where in cut]

    def rows(self, name: str, part: str, some: slice) -> list[Row]:
        """Rows of a data set."""
        return list(read_rows(self.data / name / f"{part}.jsonl")[some])

    def pack_file(self, skill: str) -> Path:
        """A calibrated pack."""
        file = self.work / "packs" / f"{skill}.skillpack"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = file.with_suffix(".jsonl")
            lines = (self.data / skill / "train.jsonl").read_text(encoding="utf-8").splitlines()
            rows.write_text("\n".join(lines[:CALIBRATION_ROWS]) + "\n", encoding="utf-8")
            nursery = self.shared / "nursery"
            pack = pack_delta(nursery / "target", nursery / skill, budget=BUDGET, calibration=rows)
            pack.save(file)
        return file

    def library(self, form: str) -> Library:
        """The library whose keys, and classifier, know prompts of that form."""
        folder = self.work / form.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        library = Library.init(folder, self.shared / "nursery" / "target")
        for skill in SKILLS:
            rows = self.rows(skill, "train", slice(KEY_PROMPTS))
            prompts = [FORMS[form](row.prompt) for row in rows]
            library.add(self.pack_file(skill), skill, prompts)
        held_out = {skill: self.rows(skill, "train", CLASSIFIER_ROWS) for skill in SKILLS}
        held_out[TARGET] = [row for n in SHOWN for row in self.rows(n, "train", CLASSIFIER_ROWS)]
        library.train_router({name: formed(rows, form) for name, rows in held_out.items()})
        return library

    def routed(self, library: Library, router: Any, form: str) -> Record:
        """Where the rows of every skill and of every foreign set go."""
        right, wrong, rejected = {}, {}, {}
        for skill, rows in self.tests.items():
            names = routes(library, router, formed(rows, form))
            right[skill] = names.count(skill) / len(names)
            rejected[skill] = names.count(TARGET) / len(names)
            wrong[skill] = sum(name not in (skill, TARGET) for name in names) / len(names)
        accepted = {
            name: 1 - routes(library, router, formed(rows, form)).count(TARGET) / len(rows)
            for name, rows in self.foreign.items()
        }
        return {"right": right, "wrong": wrong, "rejected": rejected, "accepted": accepted}

    def mixed(self, library: Library, router: Any) -> float:
        """Rows of all skills and no skill in one shuffled call: those routed as when alone."""
        rows = [row for some in (*self.tests.values(), *self.foreign.values()) for row in some[:25]]
        random.Random(0).shuffle(rows)
        together = routes(library, router, rows)
        alone = [routes(library, router, [row])[0] for row in rows]
        return sum(map(str.__eq__, together, alone)) / len(rows)

    def answered(self, library: Library, router: Any) -> Record:
        """Exact match of routed packs, of the right ones and of the target."""
        score = library.evaluate(self.tests, router)
        return {what: score.mean(what) for what in ("routed", "oracle", "target")}

    def untouched(self, library: Library, router: Any) -> Record:
        """Foreign rows that the router rejects: is the library's output the bare target's?"""
        bare = load_model(library.checkpoint())
        same = count = 0
        for rows in self.foreign.values():
            for row in rows[:10]:
                (route,) = library.route([row.prompt], router)
                if route.weights:
                    continue
                library.live.use(library.mixture(route))
                ids = torch.tensor(library.live.encode([row.prompt]))
                with torch.no_grad():
                    same += torch.equal(library.live.model(ids).logits, bare(ids).logits)
                count += 1
        return {"rejected_rows": count, "rejected_bit_identical": same}

    def cost(self, library: Library, router: Any) -> Record:
        """Medians over prompts, one at a time: routing against an answer of ANSWER_TOKENS."""
        routing, answering = [], []
        model = library.live.model
        for index in range(TIMED_PROMPTS):
            rows = self.tests[SKILLS[index % len(SKILLS)]]
            prompt = rows[index].prompt
            library.route([prompt], router)  # caches are warm in both
            routing.append(_seconds(lambda prompt=prompt: library.route([prompt], router)))
            library.live.use({})
            ids = torch.tensor(library.live.encode([prompt]))
            answering.append(_seconds(lambda ids=ids: _answer(model, ids)))
        return {
            "route_ms": 1000 * statistics.median(routing),
            "answer_ms": 1000 * statistics.median(answering),
        }


def formed(rows: Sequence[Row], form: str) -> list[Row]:
    """Rows with their prompts in another form."""
    return [replace(row, prompt=FORMS[form](row.prompt)) for row in rows]


def routes(library: Library, router: Any, rows: Sequence[Row]) -> list[str]:
    """The pack of every row, or the target."""
    return [actual.name for actual in library.route([row.prompt for row in rows], router)]


def _answer(model: Any, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS}
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def run(options: argparse.Namespace, ledger: Ledger) -> None:
    """Measure what the ledger lacks."""
    bench = Bench(options.shared, options.out / "routing", options.rows, options.foreign)
    for form in FORMS:
        keys = {
            router: {"router": router, "form": form, "rows": options.rows} for router in ROUTERS
        }
        missing = [router for router in ROUTERS if not ledger.has(keys[router])]
        if not missing:
            continue
        library = bench.library(form)
        for router in missing:
            measured = bench.routed(library, router, form)
            if form == "as they are":
                measured |= {"as_alone": bench.mixed(library, router)}
                measured |= bench.answered(library, router)
                measured |= bench.untouched(library, router)
                measured |= bench.cost(library, router)
            ledger.add(keys[router], measured)
            print(form, router, measured, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=300, help="test rows of every skill")
    parser.add_argument("--foreign", type=int, default=100, help="rows of every foreign set")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    ledger = Ledger(options.out / "routing.jsonl", "routing.py", given, options.fresh)
    if not options.report_only:
        run(options, ledger)
    write_report(ledger.records, options.docs)


if __name__ == "__main__":
    main()
