"""Throughput of rows of many packs against the target alone: python benchmarks/serve.py

Sixteen rows over the nursery's four packs generate in one engine; the same rows of the target
alone, and packs merged and swapped for each request, are measured beside them in turn, so that
other work on the machine slows all of them alike. Writes a table of docs/serving.md.
"""

import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, Record, command_line, newest, provenance, table, write_between

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.models.loading import load_model
from graftkit.models.text import generate_greedy, usable_tokenizer
from graftkit.pack import pack_delta
from graftkit.serve.engine import Engine, GenerationRequest
from graftkit.serve.sampling import SamplingSettings
from graftkit.skillpack import SkillPack

SKILLS = ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p")
BUDGETS = ("1%", "5%")
ROWS, TOKENS, SWAPPED_ROWS = 16, 48, 4
PROMPT = list(range(5, 21))
HEADER = ("packs", "target tok/s", "packs tok/s", "ratio", "swapped tok/s", "pack bytes in memory")


def packs_of(shared: Path, folder: Path, budget: str) -> dict[str, SkillPack]:
    """Data-free packs of the four skills, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    packs = {}
    for skill in SKILLS:
        file = folder / f"{skill}-{budget}.skillpack"
        if not file.exists():
            nursery = shared / "nursery"
            pack_delta(nursery / "target", nursery / skill, budget=budget).save(file)
        packs[skill] = SkillPack.load(file)
    return packs


def engine_rate(engine: Engine, names: Sequence[str | None]) -> float:
    """Tokens a second of one row for each pack, None for the target; no row ends early."""
    ended = threading.Semaphore(0)

    def deliver(part: Any) -> None:
        if part.finish is not None:
            ended.release()

    started = time.perf_counter()
    for name in names:
        with engine.lease({} if name is None else {name: 1.0}) as lease:
            endless = replace(lease, style=replace(lease.style, ends=()))
            engine.submit(GenerationRequest(endless, PROMPT, SamplingSettings(TOKENS)), deliver)
    for _ in names:
        ended.acquire()
    return len(names) * TOKENS / (time.perf_counter() - started)


def swapped_rate(model: Any, packs: dict[str, SkillPack]) -> float:
    """Tokens a second where each request merges its pack, runs alone, and takes it off."""
    started = time.perf_counter()
    for place in range(SWAPPED_ROWS):
        with attached(model, packs[SKILLS[place % len(SKILLS)]], mode="merged"):
            generate_greedy(model, [PROMPT], TOKENS, eos_token_id=None, pad_token_id=0)
    return SWAPPED_ROWS * TOKENS / (time.perf_counter() - started)


def measure(shared: Path, packs: dict[str, SkillPack], repeats: int) -> dict[str, Any]:
    """Medians over rounds that measure everything in turn."""
    checkpoint = Checkpoint.open(shared / "nursery" / "target")
    alone: Any = load_model(checkpoint)
    rates: dict[str, list[float]] = {"target": [], "packs": [], "swapped": []}
    with Engine(load_model(checkpoint), usable_tokenizer(checkpoint), checkpoint) as engine:
        for name, pack in packs.items():
            engine.load(name, pack)
        mixed = [SKILLS[place % len(SKILLS)] for place in range(ROWS)]
        engine_rate(engine, mixed)
        for _ in range(repeats):
            rates["target"].append(engine_rate(engine, [None] * ROWS))
            rates["packs"].append(engine_rate(engine, mixed))
            rates["swapped"].append(swapped_rate(alone, packs))
        nbytes = sum(pack.nbytes for pack in engine.packs.values())
    ratio = statistics.median(
        packs / target for packs, target in zip(rates["packs"], rates["target"], strict=True)
    )
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {**medians, "ratio": ratio, "nbytes": nbytes, "rates": rates}


def row_of(record: Record) -> list[str]:
    """One line of the table."""
    rates = [f"{record[name]:,.0f}" for name in ("target", "packs")]
    last = f"{record['swapped']:,.0f}", f"{record['nbytes']:,}"
    return [f"4 of {record['budget']}", *rates, f"{record['ratio']:.2f}", *last]


def main() -> None:
    """Measure and write the table."""
    parser = command_line(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ledger = Ledger(options.out / "serve.jsonl", "serve.py", sys.argv[1:], options.fresh)
    for budget in BUDGETS:
        if options.report_only or ledger.has({"budget": budget}):
            continue
        packs = packs_of(options.shared, options.out / "serve-packs", budget)
        values = measure(options.shared, packs, options.repeats)
        print(budget, {name: value for name, value in values.items() if name != "rates"})
        ledger.add({"budget": budget}, values)
    records = newest(ledger.records, ["budget"])
    rows = [row_of(record) for record in records]
    text = f"{provenance(records)}\n\n{table(HEADER, rows)}"
    write_between(options.docs / "serving.md", "serve", text)


if __name__ == "__main__":
    main()
