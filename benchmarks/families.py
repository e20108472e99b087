"""Do families of packs pay? python benchmarks/families.py

EMR, TALL and Twin-Merging as files against separate packs of the same bytes, on three skills of the
nursery that have nothing in common, and on three made models with one ancestor. Everything is made
from lossless packs, without calibration rows. Writes the tables of docs/benchmarks.md.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families_report import write_report
from ledger import Ledger, Record, command_line
from safetensors.torch import save_file
from torch import Tensor

from graftkit.attachment.check import LiveTarget
from graftkit.delta import Checkpoint
from graftkit.fuse.family_making import make_family
from graftkit.fuse.search import answering_model, loss_batches, summed_loss
from graftkit.models.encoding import encode_rows, pad_id, usable_tokenizer
from graftkit.packing import pack_delta
from graftkit.rows import Row, read_rows
from graftkit.skillpack import SkillPack

SKILLS = ("clinc150_intent", "nl_regex", "inflect_spa")
ROWS = 40
OWN_RANK, OWN_NORM = 8, 0.3  # of what made models do not share; its norm relative to the rest's

Read = Callable[[str, Tensor], Tensor]
"""A skill's tensor, by name and the target's values."""


@dataclass(frozen=True)
class Line:
    """What is measured: packs (method packs) or a family, at a budget for all skills together."""

    method: str
    percent: float
    settings: Mapping[str, float]


THIRD = {"scaling": 1 / 3}
LINES = {
    "unrelated": (
        Line("packs", 15, {}),
        Line("twin", 15, {}),
        Line("packs", 30, {}),
        Line("twin", 30, {}),
        Line("emr", 30, {}),
        Line("tall", 30, {}),
    ),
    "one ancestor": (
        Line("packs", 6, {}),
        Line("twin", 6, {}),
        Line("packs", 24, {}),
        Line("twin", 24, {}),
        Line("emr", 24, {}),
        Line("tall", 24, THIRD),
    ),
}


class Loss:
    """Nats per completion token of the target with some tensors put in."""

    def __init__(self, target: Checkpoint):
        self.target, self.model = target, answering_model(target)
        self.live, self.tokenizer = LiveTarget(self.model), usable_tokenizer(target)

    @torch.no_grad()
    def __call__(self, read: Read, rows: Sequence[Row]) -> float:
        """The loss of the rows' completions; `read` gives every tensor."""
        for name in self.target.tensors:
            view = self.live.find(name)
            if view is not None:
                self.live.live(view).copy_(read(name, self.target.read(name)))
        encoded = encode_rows(self.tokenizer, rows, sys.maxsize, 0, self.model, "rows")
        total, count = 0.0, 0
        for batch in loss_batches(self.model, encoded):
            some = [encoded[index] for index in batch]
            found, scored = summed_loss(self.model, some, pad_id(self.tokenizer))
            total, count = total + float(found), count + scored
        return total / count


class Bench:
    """The target, its tuned models of both cases as lossless packs, and rows."""

    def __init__(self, shared: Path, work: Path):
        self.shared, self.work = shared, work
        self.target = Checkpoint.open(shared / "nursery" / "target")
        self.loss = Loss(self.target)
        work.mkdir(parents=True, exist_ok=True)

    def models(self, case: str) -> dict[str, Path]:
        """Tuned models by name."""
        if case == "unrelated":
            return {skill: self.shared / "nursery" / skill for skill in SKILLS}
        return {f"own-{seed}": self._made(seed) for seed in range(3)}

    def rows(self, case: str, name: str) -> list[Row]:
        """Test rows of a tuned model; those of one ancestor are still to answer its rows."""
        skill = name if case == "unrelated" else SKILLS[0]
        return list(read_rows(self.shared / "data" / "llm" / skill / "test.jsonl")[:ROWS])

    def exact(self, name: str, tuned: Path) -> Path:
        """A lossless pack."""
        file = self.work / f"{name}.skillpack"
        if not file.exists():
            pack_delta(self.target.path, tuned, recipe="lossless").save(file)
        return file

    def measured(self, case: str, line: Line) -> Record:
        """Bytes, seconds, and per skill the loss and the error of the delta."""
        models = self.models(case)
        files = [self.exact(name, path) for name, path in models.items()]
        started = time.perf_counter()
        if line.method == "packs":
            each = f"{line.percent / len(models):.4f}%"
            found = self._packs(models, each)
        else:
            found = self._family(case, line, files, list(models))
        seconds = time.perf_counter() - started
        losses, errors = {}, {}
        for name, file in zip(models, files, strict=True):
            read = found[1][name]
            losses[name] = self.loss(read, self.rows(case, name))
            errors[name] = self._error(read, SkillPack.load(file))
        return {
            **{"bytes": found[0], "seconds": seconds, "loss": losses, "error": errors},
            "budget_bytes": int(self.target.nbytes * line.percent / 100),
        }

    def ends(self, case: str) -> Record:
        """Losses of the target alone, and of the tuned models."""
        target, tuned = {}, {}
        for name, path in self.models(case).items():
            rows, checkpoint = self.rows(case, name), Checkpoint.open(path)
            target[name] = self.loss(lambda name, before: before, rows)
            tuned[name] = self.loss(lambda name, _, model=checkpoint: model.read(name), rows)
        return {"target": target, "tuned": tuned}

    def _packs(self, models: Mapping[str, Path], each: str) -> tuple[int, dict[str, Read]]:
        packs = {
            name: pack_delta(self.target.path, path, budget=each) for name, path in models.items()
        }
        return sum(pack.pack_bytes for pack in packs.values()), {
            name: lambda tensor, before, pack=pack: pack.rebuild(tensor, lambda _: before)
            for name, pack in packs.items()
        }

    def _family(
        self, case: str, line: Line, files: list[Path], names: list[str]
    ) -> tuple[int, dict[str, Read]]:
        file = self.work / f"{case.replace(' ', '-')}-{line.method}-{line.percent:g}.skillfamily"
        budget, settings = f"{line.percent:g}%", dict(line.settings)
        file.unlink(missing_ok=True)
        family = make_family(self.target.path, files, file, line.method, settings, budget, names)
        return family.nbytes, {
            name: lambda tensor, before, name=name: family.tensor(name, tensor, before)
            for name in names
        }

    def _error(self, read: Read, exact: SkillPack) -> float:
        """Relative Frobenius error of the whole delta."""
        missed = whole = 0.0
        for name in self.target.tensors:
            before = self.target.read(name)
            delta = exact.delta(name, before)
            found = read(name, before).float() - before.float()
            missed += float((found - delta).square().sum(dtype=torch.float64))
            whole += float(delta.square().sum(dtype=torch.float64))
        return float((missed / whole) ** 0.5)

    def _made(self, seed: int) -> Path:
        """Target, the first skill's delta, and a random one of low rank of its own."""
        folder = self.work / f"own-{seed}"
        if (folder / "model.safetensors").exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        ancestor = Checkpoint.open(self.shared / "nursery" / SKILLS[0])
        for name in self.target.side_files():
            shutil.copyfile(self.target.path / name, folder / name)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name in self.target.tensors:
            tuned = ancestor.read(name)
            if tuned.dim() == 2:
                common = tuned.float() - self.target.read(name).float()
                left = torch.randn(tuned.shape[0], OWN_RANK, generator=generator)
                own = left @ torch.randn(OWN_RANK, tuned.shape[1], generator=generator)
                own *= OWN_NORM * common.norm() / own.norm()
                tuned = (tuned.float() + own).to(tuned.dtype)
            tensors[name] = tuned
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder


def run(options: argparse.Namespace, ledger: Ledger) -> None:
    """Measure what the ledger lacks."""
    bench = Bench(options.shared, options.out / "families")
    for case in options.cases:
        for line in (None, *LINES[case]):
            key: dict[str, Any] = {"case": case, "method": "none", "percent": 0, "settings": {}}
            if line is not None:
                key |= {"method": line.method, "percent": line.percent}
                key |= {"settings": dict(line.settings)}
            if not ledger.has(key):
                found = bench.ends(case) if line is None else bench.measured(case, line)
                ledger.add(key, found)
                print(key, found, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(LINES), default=list(LINES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else list(arguments)
    ledger = Ledger(options.out / "families.jsonl", "families.py", given, options.fresh)
    if not options.report_only:
        run(options, ledger)
    write_report(ledger.records, options.docs)


if __name__ == "__main__":
    main()
