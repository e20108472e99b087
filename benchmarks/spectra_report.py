"""Tables of spectra.py: means over the layers, one line for each kind of module."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ledger import Record, provenance, table, write_between

VIEWS = ("plain", "inputs", "outputs")


def write_tables(found: Record, page: Path) -> None:
    """Write the tables between the markers of `page`; print them where it has none."""
    text = "\n\n".join([provenance([found]), *_tables(found["records"])])
    if page.is_file() and "<!-- spectra:begin -->" in page.read_text(encoding="utf-8"):
        write_between(page, "spectra", text)
    else:
        print(text)
        print(f"{page.name}: no markers for spectra, nothing written", file=sys.stderr)


def _tables(records: Sequence[Record]) -> list[str]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["pair"], record["kind"]), []).append(record)
    matrices = {key: own for key, own in groups.items() if "views" in own[0]}
    for own in matrices.values():
        energy = sum(record["views"]["outputs"]["energy"] for record in own)
        pair = [r for r in records if r["pair"] == own[0]["pair"] and "views" in r]
        own[0]["divergence"] = energy / sum(r["views"]["outputs"]["energy"] for r in pair)
    return [
        "Components for 90 % of the energy, in per cent of all, and in brackets the same for white "
        "noise; energy in the first 1 % of the components; a of the power law k^-a:",
        _table(matrices, SPECTRA),
        "Entries, and bits per parameter at the Gaussian limit for a relative error of 10 % and "
        "1 % in the outputs (exact: entropy of the change of the bf16 words). Common shift: share "
        "of δH½ that moves all logits alike, which a softmax does not see. Divergence: share of "
        "the energy of all G½δH½, so about of the KL divergence that leaving the deltas out costs:",
        _table(groups, ENTRIES),
    ]


def _table(
    groups: dict[tuple[str, str], list[Record]],
    columns: dict[str, Callable[[Sequence[Record]], str]],
) -> str:
    rows = [
        [pair, kind, *(write(own) for write in columns.values())]
        for (pair, kind), own in groups.items()
    ]
    return table(("fine-tune", "kind", *columns), rows)


def _mean(records: Sequence[Record], *path: Any) -> float | None:
    """Mean of the value at `path`, None where the records have none."""
    values = []
    for record in records:
        value: Any = record
        for step in path:
            if isinstance(value, dict) and step not in value:
                return None
            value = value[step]
        values.append(value)
    return sum(values) / len(values)


def _number(form: str, *path: Any) -> Callable[[Sequence[Record]], str]:
    def write(records: Sequence[Record]) -> str:
        value = _mean(records, *path)
        return "–" if value is None else form.format(value)

    return write


def _rank(view: str) -> Callable[[Sequence[Record]], str]:
    def write(records: Sequence[Record]) -> str:
        own, white = (
            _mean(records, "views", view, *path) for path in (("rank90",), ("white", "rank90"))
        )
        return f"{own:.1%} ({white:.1%})".replace("%", "")

    return write


def _bits(name: str, view: str = "inputs") -> Callable[[Sequence[Record]], str]:
    def write(records: Sequence[Record]) -> str:
        values = [_mean(records, "views", view, name, place) for place in (0, 1)]
        return "–" if None in values else " / ".join(f"{value:.2f}" for value in values)

    return write


NAMES = {"plain": "δ", "inputs": "δH½", "outputs": "G½δH½"}
SPECTRA = {
    **{f"{text}: 90 %": _rank(view) for view, text in NAMES.items()},
    **{f"{text}: top 1 %": _number("{:.0%}", "views", v, "top1") for v, text in NAMES.items()},
    **{f"{text}: a": _number("{:.2f}", "views", v, "decay") for v, text in NAMES.items()},
    "above the bulk": _number("{:.0f}", "views", "plain", "spikes"),
    "their energy": _number("{:.0%}", "views", "plain", "spike_energy"),
}
ENTRIES = {
    "‖δ‖/‖W‖": _number("{:.2%}", "norm"),
    "equal words": _number("{:.1%}", "unchanged"),
    "rows at rest": _number("{:.0%}", "entries", "still_rows"),
    "kurtosis": _number("{:.1f}", "entries", "kurtosis"),
    "largest 1 % of entries": _number("{:.0%}", "entries", "largest1"),
    "10 % of rows": _number("{:.0%}", "entries", "row10"),
    "10 % of columns": _number("{:.0%}", "entries", "column10"),
    "divergence": lambda own: f"{own[0]['divergence']:.1%}" if "divergence" in own[0] else "–",
    "common shift": _number("{:.0%}", "views", "inputs", "common_shift"),
    "low rank, bits": _bits("lowrank_bits"),
    "low rank by G, bits": _bits("lowrank_bits", "outputs"),
    "dense, bits": _bits("dense_bits"),
    "exact, bits": _number("{:.2f}", "exact_bits"),
}
