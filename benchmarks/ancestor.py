"""Do skills with one ancestor belong in packs against it? python benchmarks/ancestor.py

Three models share most of their delta: target + the delta of one skill + a random delta of low rank
each. They are packed against the target, and against their ancestor, which is a pack of the target
itself; both ways get the same bytes in all. Writes a table of docs/benchmarks.md.
"""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from ledger import Ledger, Record, command_line, newest, provenance, publish, table
from safetensors.torch import save_file

import graftkit as gk
from graftkit.checkpoint import Checkpoint
from graftkit.rows import read_rows

SKILL = "clinc150_intent"
MODELS, ROWS = 3, 40
OWN_RANK, OWN_NORM = 8, 0.3  # of each model's own delta; its norm relative to the shared one


class Split(NamedTuple):
    """Budgets in per cent of the target: of the ancestor's pack, and of each model's."""

    ancestor: float
    model: float


SPLITS = (Split(0, 2), Split(5.4, 0.2), Split(0, 8), Split(22.5, 0.5))
"""Without an ancestor's pack the models are packed against the target."""


def make_model(target: Checkpoint, tuned: Checkpoint, folder: Path, seed: int) -> None:
    """Save target + (tuned − target) + a random delta of OWN_RANK in every matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in target.side_files():
        shutil.copyfile(target.path / name, folder / name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tuned.read(name) for name in target.tensors}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            shared = tensor.float() - target.read(name).float()
            left = torch.randn(tensor.shape[0], OWN_RANK, generator=generator)
            own = left @ torch.randn(OWN_RANK, tensor.shape[1], generator=generator)
            own *= OWN_NORM * shared.norm() / own.norm()
            tensors[name] = (tensor.float() + own).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def measure(shared: Path, work: Path, split: Split) -> Record:
    """Bytes of all packs of a split, and the mean KL(tuned || packed) of the models."""
    base, total = shared / "nursery" / "target", 0
    rows = list(read_rows(shared / "data" / "llm" / SKILL / "test.jsonl")[:ROWS])
    if split.ancestor:
        pack = gk.pack_delta(base, shared / "nursery" / SKILL, budget=f"{split.ancestor}%")
        base, total = work / f"ancestor-{split.ancestor}", pack.pack_bytes
        shutil.rmtree(base, ignore_errors=True)
        gk.merge_packs(shared / "nursery" / "target", pack, base)
    divergences = []
    for seed in range(MODELS):
        pack = gk.pack_delta(base, work / f"model-{seed}", budget=f"{split.model}%")
        total += pack.pack_bytes
        divergences.append(gk.compare(base, work / f"model-{seed}", pack, rows).kl_mean)
    return {"bytes": total, "kl_mean": statistics.fmean(divergences)}


def write_report(records: Sequence[Record], docs: Path) -> None:
    """One line for every split that was measured."""
    lines = newest(records, ("ancestor", "model"))
    body = [
        [_name(line), f"{line['bytes']:,}", f"{line['kl_mean']:.2g}"]
        for line in sorted(lines, key=lambda line: (line["bytes"] // 2_000_000, -line["kl_mean"]))
    ]
    text = table(("three models as", "bytes", "KL, mean"), body)
    publish(docs, "ancestor", f"{provenance(lines)}\n\n{text}", {})


def _name(line: Record) -> str:
    if not line["ancestor"]:
        return f"packs of {line['model']:g} % against the target"
    return (
        f"a pack of {line['ancestor']:g} % of the ancestor, packs of {line['model']:g} % against it"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then write the report."""
    options = command_line(__doc__).parse_args(arguments)
    torch.set_num_threads(options.threads)
    ledger = Ledger(options.out / "ancestor.jsonl", "ancestor.py", arguments or (), options.fresh)
    work = options.out / "ancestor"
    target = Checkpoint.open(options.shared / "nursery" / "target")
    tuned = Checkpoint.open(options.shared / "nursery" / SKILL)
    for seed in range(MODELS):
        if not (work / f"model-{seed}" / "model.safetensors").exists():
            make_model(target, tuned, work / f"model-{seed}", seed)
    for split in SPLITS:
        if not options.report_only and not ledger.has(split._asdict()):
            ledger.add(split._asdict(), measure(options.shared, work, split))
    write_report(ledger.records, options.docs)


if __name__ == "__main__":
    main()
