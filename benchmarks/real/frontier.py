"""Packs of every method and budget, and their scores, as stages.

Every method packs every fine-tune into a file no larger than the budget, a share of the target's
bytes. The file is read back, and the score is that of what was read. Published methods and packages
are those of `benchmarks/baselines`; what they may choose, they choose on calibration rows. A
trained LoRA adapter is a row of the same table: its file counts.
"""

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages import Setup, Stage
from tasks import CALIBRATION_ROWS, SKILLS, Pair, all_pairs, split_documents, split_rows, write_rows

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

BUDGETS = ("0.1%", "0.25%", "0.5%", "1%", "2%", "5%", "10%")
FEW_BUDGETS = ("1%", "5%", "10%")
SEEDS = (0, 1, 2)
SEEDED_BUDGETS = ("0.25%", "1%")
TEXT_ROW_CHARACTERS = 800
CHAT_FILE = "chat-answers.safetensors"

LOSSLESS = ("lossless", "XOR + zstd", "ZipNN", "weightscope", "z4ai")
BASELINES = ("svd", "deltacome-fixed", "graftllm, rows", "prinmix", "mergekit-lora")
ONE_SIZE = ("deltatensors", "bitdelta")  # have one size, the latter with room for the embedding
OWN = ("auto", "auto, rows", "graftllm, rows", "lossless")


@dataclass(frozen=True)
class Cell:
    """One file. budget: None for methods of one size; tag: names graftkit's version."""

    pair: Pair
    method: str
    budget: str | None = None
    seed: int = 0
    tag: str = ""

    @property
    def key(self) -> str:
        """The part of stage names that tells cells apart."""
        parts = [self.pair.name, self.method.replace(", ", "-").replace(" + ", "-")]
        parts += [self.budget] if self.budget else []
        parts += [f"s{self.seed}"] if self.seed else []
        parts += [self.tag] if self.tag and self.method in OWN else []
        return "-".join(parts)

    @property
    def pack(self) -> str:
        """The stage that writes the file: a folder of `packed` and `pack.json`."""
        return f"pack-{self.key}"


def first_cells(tag: str) -> Iterator[Cell]:
    """What graftkit itself makes of the three skills, quick ones first."""
    pairs = all_pairs()[: len(SKILLS)]
    for method, budgets in (("lossless", (None,)), ("auto", BUDGETS)):
        yield from (Cell(p, method, budget, tag=tag) for budget in budgets for p in pairs)
    for budget in ("1%", "0.25%", "0.5%"):
        yield from (Cell(p, "auto, rows", budget, tag=tag) for p in pairs)


def other_cells(tag: str) -> Iterator[Cell]:
    """Baselines, the other fine-tunes, further budgets and draws of rows."""
    pairs = all_pairs()
    skills, others = pairs[: len(SKILLS)], pairs[len(SKILLS) :]
    yield from (Cell(p, "deltatensors") for p in skills)
    yield from (Cell(p, m) for m in LOSSLESS[1:] for p in skills)
    for budget in FEW_BUDGETS:
        yield from (Cell(p, m, budget, tag=tag) for m in BASELINES for p in skills)
    yield from (Cell(p, "bitdelta", "10%") for p in skills)
    for pair in others:
        yield from (Cell(pair, method, tag=tag) for method in LOSSLESS)
        yield from (Cell(pair, "auto", budget, tag=tag) for budget in BUDGETS)
        yield from (Cell(pair, "auto, rows", b, tag=tag) for b in ("0.25%", "1%"))
        yield from (Cell(pair, m, b, tag=tag) for b in FEW_BUDGETS for m in BASELINES)
    rest = [budget for budget in BUDGETS if budget not in ("0.25%", "0.5%", "1%")]
    yield from (Cell(p, "auto, rows", budget, tag=tag) for budget in rest for p in skills)
    for seed in SEEDS[1:]:
        yield from (
            Cell(p, "auto, rows", budget, seed, tag) for budget in SEEDED_BUDGETS for p in skills
        )
    sparse = [budget for budget in BUDGETS if budget not in FEW_BUDGETS]
    yield from (Cell(p, m, b, tag=tag) for b in sparse for m in BASELINES for p in skills)


def cell_stages(setup: Setup, cells: Iterator[Cell]) -> Iterator[Stage]:
    """The pack of every cell, then its score; what the target knew for the packs of 1 %."""
    for cell in cells:
        needs = (cell.pair.target, cell.pair.tuned)
        yield Stage(cell.pack, lambda out, cell=cell: make_pack(setup, cell, out), needs)
        if cell.method not in LOSSLESS:
            yield _score_stage(setup, cell.pair, cell.key, cell.pack)
        if cell.budget == "1%" and cell.pair.name not in ("dpo", "text"):
            yield _knowledge_stage(setup, cell.pair, cell.key, cell.pack)


def reference_stages(setup: Setup, pair: Pair) -> Iterator[Stage]:
    """Hidden states of tuned, and the scores of target and tuned."""
    name, needs = _reference(pair), (pair.target, pair.tuned)
    yield Stage(name, lambda out: _write_reference(setup, pair, out), needs)
    for model in ("target", "tuned"):
        folder = getattr(pair, model)
        yield _score_stage(setup, pair, f"{pair.name}-{model}", folder)
        if pair.target == "target" and (model == "tuned" or pair.name == SKILLS[0].short):
            yield _knowledge_stage(setup, pair, f"{pair.name}-{model}", folder)


def chat_stage(setup: Setup) -> Stage:
    """The target's own answers to general questions."""

    def make(out: Path) -> None:
        from measure import LiveModel, write_chat_answers

        write_chat_answers(LiveModel(setup.work / "target"), out)

    return Stage(CHAT_FILE, make, ("target",))


def adapter_stages(setup: Setup, pair: Pair, adapter: str) -> Iterator[Stage]:
    """Score of a trained LoRA adapter, and what the target still knows with it."""
    yield _score_stage(setup, pair, adapter, adapter)
    yield _knowledge_stage(setup, pair, adapter, adapter)


def make_pack(setup: Setup, cell: Cell, out: Path) -> None:
    """Write the file of a cell, and what it took. A budget out of reach is a result too."""
    import torch
    from baselines.problem import Pair as Tensors
    from baselines.protocol import UnreachableError
    from baselines.registry import packer

    out.mkdir()
    file, method = out / "packed", packer(cell.method, setup.work)
    tensors = Tensors(setup.work / cell.pair.target, setup.work / cell.pair.tuned)
    size = None
    if cell.budget is not None:
        size = int(float(cell.budget.rstrip("%")) / 100 * tensors.side.nbytes)
    record: dict[str, Any] = {**_names(cell), "budget_bytes": size, "sources": source_digest()}
    with TemporaryDirectory() as folder:
        problem = _problem(setup, cell, tensors, Path(folder))
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        try:
            record["choice"] = method.pack(problem, file, size)
        except UnreachableError as error:
            file.unlink(missing_ok=True)
            _write(out / "pack.json", {**record, "refused": str(error)})
            return
    record |= {
        "bytes": file.stat().st_size,
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": sum(os.times()[:4]) - cpu,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if size is not None and record["bytes"] > size:
        raise AssertionError(f"{cell.key}: {record['bytes']:,} bytes, budget {size:,}")
    if cell.method in LOSSLESS:
        state = method.unpack(tensors, file)
        record["restored"] = state.keys() == tensors.after.keys() and all(
            torch.equal(state[name], tensor) for name, tensor in tensors.after.items()
        )
        if not record["restored"]:
            raise AssertionError(f"{cell.key}: what was read back is not the tuned model")
    _write(out / "pack.json", record)


def source_digest() -> str:
    """A digest of graftkit's sources: packs of other sources are not those of this version."""
    found = blake2b(digest_size=4)
    folder = ROOT / "src" / "graftkit"
    for file in sorted(folder.rglob("*.py")):
        if file.relative_to(folder).parts[0] in ("compress", "packing", "skillpack", "pack.py"):
            found.update(file.read_bytes())
    return found.hexdigest()


def _problem(setup: Setup, cell: Cell, tensors: Any, folder: Path) -> Any:
    """A draw of calibration rows, also as a file."""
    from baselines.problem import Problem

    from graftkit.rows import read_rows

    draw = random.Random(cell.seed)
    if cell.pair.skill is None:
        pieces = [
            text[start : start + TEXT_ROW_CHARACTERS]
            for text in split_documents(setup.data)[0]
            for start in range(0, len(text) - TEXT_ROW_CHARACTERS, TEXT_ROW_CHARACTERS)
        ]
        rows = [{"text": piece} for piece in draw.sample(pieces, CALIBRATION_ROWS)]
    else:
        rows = draw.sample(split_rows(setup.data, cell.pair.skill).train, CALIBRATION_ROWS)
    file = folder / "rows.jsonl"
    write_rows(file, rows)
    return Problem(tensors, read_rows(file), cell.seed, file)


def _score_stage(setup: Setup, pair: Pair, key: str, source: str) -> Stage:
    def score(live: Any, state: Any) -> dict[str, Any]:
        from measure import measure

        reference = setup.work / _reference(pair)
        return measure(live, pair, setup.work / pair.tuned, reference, state, setup.data)

    make = partial(_measure_source, setup, pair, source, score)
    return Stage(f"score-{key}.json", make, (pair.tuned, _reference(pair), source))


def _knowledge_stage(setup: Setup, pair: Pair, key: str, source: str) -> Stage:
    def test(live: Any, state: Any) -> dict[str, Any]:
        from measure import knowledge

        return knowledge(live, setup.work / CHAT_FILE, state, setup.data)

    make = partial(_measure_source, setup, pair, source, test)
    return Stage(f"knowledge-{key}.json", make, (CHAT_FILE, source))


def _measure_source(
    setup: Setup, pair: Pair, source: str, measure: Callable[[Any, Any], dict[str, Any]], out: Path
) -> None:
    """Write what `measure` says of a source, or why the source could not be made."""
    from measure import LiveModel

    if (refused := _refusal(setup.work / source)) is not None:
        _write(out, {"refused": refused})
        return
    live = LiveModel(setup.work / pair.target)
    result = measure(live, _state(setup, pair, live, source))
    _write(out, {"pair": pair.name, "source": source, **result})


def _state(setup: Setup, pair: Pair, live: Any, source: str) -> Any:
    """The tensors of an adapter, a checkpoint or a pack of any method."""
    from baselines.problem import Pair as Tensors
    from baselines.registry import packer
    from measure import read_state

    folder = setup.work / source
    if not (folder / "pack.json").is_file():
        return read_state(live, folder)
    method = json.loads((folder / "pack.json").read_text())["method"]
    tensors = Tensors(setup.work / pair.target, setup.work / pair.tuned)
    return packer(method, setup.work).unpack(tensors, folder / "packed")


def _write_reference(setup: Setup, pair: Pair, out: Path) -> None:
    from measure import LiveModel, write_reference

    live = LiveModel(setup.work / pair.target)
    write_reference(live, pair, setup.work / pair.tuned, setup.data, out)


def _reference(pair: Pair) -> str:
    return f"reference-{pair.name}.safetensors"


def _refusal(folder: Path) -> str | None:
    file = folder / "pack.json"
    return json.loads(file.read_text()).get("refused") if file.is_file() else None


def _names(cell: Cell) -> dict[str, Any]:
    return {
        "pair": cell.pair.name,
        "method": cell.method,
        "budget": cell.budget,
        "seed": cell.seed,
        "tag": cell.tag,
    }


def _write(file: Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
