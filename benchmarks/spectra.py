"""Spectra of deltas, plain and as a layer's inputs and outputs see them: benchmarks/spectra.py

For every matrix of the nursery's fine-tunes, and of a DPO fine-tune where benchmarks/dpo_tune.py
has made one. Writes benchmarks/out/spectra.json, docs/figures/spectra.png, the table of
docs/benchmarks.md and docs/results/spectra-*.csv.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from dpo_tune import SKILL
from ledger import ROOT, Record, commit, machine, published_command
from spectra_figure import draw_spectra
from spectra_measures import (
    ERRORS,
    common_shift,
    dense_rates,
    entries_of,
    lowrank_rate,
    shape_of,
    singular_values,
    spikes_of,
    white_noise,
    words_of,
)
from spectra_report import write_tables
from spectra_statistics import LOOKUP, Statistics, measure_statistics
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.models.architecture import ModuleKind, TensorRole, tensor_roles
from graftkit.models.calibration import HEAD
from graftkit.rows import read_rows

CALIBRATION_ROWS = 256


class Pair(NamedTuple):
    """A target, a tuned model, and the skill whose rows are shown to it."""

    name: str
    target: Path
    tuned: Path
    skill: str


def pairs_of(shared: Path, out: Path) -> list[Pair]:
    """The nursery's four fine-tunes, and what dpo_tune.py has left in `out`."""
    nursery = shared / "nursery"
    skills = ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p")
    actual = [Pair(name, nursery / "target", nursery / name, name) for name in skills]
    dpo = {"DPO": "dpo", "DPO, float32": "dpo_float32"}
    made = [Pair(name, nursery / SKILL, out / at, SKILL) for name, at in dpo.items()]
    return actual + [pair for pair in made if (pair.tuned / "config.json").is_file()]


def measure_pair(pair: Pair, rows_file: Path) -> Iterator[Record]:
    """One record for every matrix (the embedding gives two: as it is read, and as the head)."""
    target, tuned = Checkpoint.open(pair.target), Checkpoint.open(pair.tuned)
    roles = tensor_roles(tuned)
    linear = [role for role in roles.values() if role.linear and role.kind != ModuleKind.HEAD]
    rows = read_rows(rows_file)[:CALIBRATION_ROWS]
    statistics = measure_statistics(tuned, rows, [role.module for role in linear])
    for role in roles.values():
        before, after = target.read(role.name), tuned.read(role.name)
        delta = after.float() - before.float()
        record = {"pair": pair.name, "tensor": role.name, "shape": list(delta.shape)}
        record |= {"norm": float(delta.double().norm() / before.double().norm())}
        if before.dtype == after.dtype == torch.bfloat16:
            record |= words_of(before, after)
        if role.kind == ModuleKind.NORM:
            yield {**record, "kind": "norm"}
        elif role.linear or role.kind == ModuleKind.EMBEDDING:
            record |= {"entries": entries_of(delta)}
            for kind, views in _views(role, delta, statistics):
                yield {**record, "kind": kind, "views": views}


def _views(
    role: TensorRole, delta: Tensor, measured: Statistics
) -> Iterator[tuple[str, dict[str, Record]]]:
    """Kind of module and its spectra."""
    if role.kind != ModuleKind.EMBEDDING:
        inputs, outputs = measured.inputs[role.module], measured.outputs[role.module]
        yield role.module.rpartition(".")[2].removesuffix("_proj"), _spectra(delta, inputs, outputs)
        return
    # A lookup is a linear layer of one-hot inputs, y = δᵀ x, whose H is a diagonal of counts.
    read = measured.counts > 0
    often = torch.diag(measured.counts[read].double().sqrt())
    yield "embedding, read", _spectra(delta[read].T, often, measured.outputs[LOOKUP])
    views = _spectra(delta, measured.inputs[HEAD], measured.outputs[HEAD])
    views["inputs"]["common_shift"] = common_shift(delta, measured.inputs[HEAD])
    yield "embedding, head", views


def _spectra(delta: Tensor, inputs: Tensor, outputs: Tensor) -> dict[str, Record]:
    """The three spectra of one matrix, each with that of white noise seen the same way."""
    shape = (delta.shape[0], delta.shape[1])
    noise = white_noise(shape)
    views = {}
    for view, roots in (
        ("plain", ()),
        ("inputs", (inputs,)),
        ("outputs", (inputs, outputs)),
    ):
        values, white = singular_values(delta, *roots), singular_values(noise, *roots)
        record = {**shape_of(values), "white": shape_of(white), **spikes_of(values, white)}
        record["energy"] = float(values.square().sum())
        record |= {"values": _rounded(values), "white_values": _rounded(white)}
        record["lowrank_bits"] = [lowrank_rate(values, shape, error) for error in ERRORS]
        if view != "outputs":
            covariance = roots[0] @ roots[0].T if roots else None
            record["dense_bits"] = dense_rates(delta, covariance)
        views[view] = record
    return views


def _rounded(values: Tensor) -> list[float]:
    """Relative to the largest, in four digits: the file stays small."""
    return [float(f"{value:.4g}") for value in (values / values[0]).tolist()]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    shared = Path(os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="folder of nursery and data")
    parser.add_argument("--pairs", nargs="+", help="only these, by name")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tables are written")
    parser.add_argument("--redraw", action="store_true", help="from spectra.json, nothing measured")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    file = options.out / "spectra.json"
    if not options.redraw:
        records: list[Record] = []
        for pair in pairs_of(options.shared, options.out):
            if options.pairs is None or pair.name in options.pairs:
                train = options.shared / "data" / "llm" / pair.skill / "train.jsonl"
                records += measure_pair(pair, train)
                print(pair.name, file=sys.stderr, flush=True)
        stamp = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "command": published_command("spectra.py", arguments),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**stamp, "records": records}), encoding="utf-8")
    measured = json.loads(file.read_text(encoding="utf-8"))
    draw_spectra(measured["records"], options.docs / "figures" / "spectra.png")
    write_tables(measured, options.docs)


if __name__ == "__main__":
    main(sys.argv[1:])
