"""The tables of families.py: families against packs of the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ledger import Record, newest, provenance, table, write_between

CASES = {
    "unrelated": "Three skills of the nursery, which have nothing in common:",
    "one ancestor": "Three made models with one ancestor:",
}


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write what `families` says in docs/benchmarks.md; the newest record of every line counts."""
    lines = newest(
        [record | {"text": str(sorted(record["settings"].items()))} for record in records],
        ("case", "method", "percent", "text"),
    )
    if not lines:
        return
    parts = [provenance(lines)]
    for case, title in CASES.items():
        some = [line for line in lines if line["case"] == case]
        if some:
            parts += [title, _table(some), _ends(some)]
    write_between(docs / "benchmarks.md", "families", "\n\n".join(part for part in parts if part))


def _table(lines: Sequence[Record]) -> str:
    header = ("three skills as", "budget", "bytes", "loss, mean", "error, mean", "seconds")
    measured = sorted((line for line in lines if "bytes" in line), key=lambda one: one["percent"])
    return table(header, [_row(line) for line in measured])


def _row(line: Record) -> list[str]:
    settings = "".join(f", {name} {value:.2f}" for name, value in line["settings"].items())
    return [
        line["method"] + settings,
        f"{line['percent']:g} %",
        f"{line['bytes']:,}",
        f"{mean(line['loss'].values()):.3f}",
        f"{mean(line['error'].values()):.3f}",
        f"{line['seconds']:.0f}",
    ]


def _ends(lines: Sequence[Record]) -> str:
    ends = [line for line in lines if line["method"] == "none"]
    if not ends:
        return ""
    target, tuned = (mean(ends[-1][who].values()) for who in ("target", "tuned"))
    return f"Loss of the target alone {target:.3f}, of the tuned models {tuned:.3f}."
