"""Tables of spectra.py: means over the layers, by fine-tune and by kind of module."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ledger import Record, Table, provenance, publish, table


def write_tables(measured: Record, docs: Path) -> None:
    """Write the table of docs/benchmarks.md, and one line a kind into docs/results/spectra-*.csv.

    Raises: ValueError when the page has no markers for spectra.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in measured["records"]:
        groups.setdefault((record["pair"], record["kind"]), []).append(record)
    matrices = {key: own for key, own in groups.items() if "views" in own[0]}
    for own in matrices.values():
        energy = sum(record["views"]["outputs"]["energy"] for record in own)
        pair = [r for r in measured["records"] if r["pair"] == own[0]["pair"] and "views" in r]
        own[0]["divergence"] = energy / sum(r["views"]["outputs"]["energy"] for r in pair)
    linear: dict[tuple[str, ...], list[Record]] = {}
    for (pair_name, kind), own in matrices.items():
        if not kind.startswith("embedding"):
            linear.setdefault((pair_name,), []).extend(own)
    raw = {
        "spectra-components": _rows(("fine-tune", "kind"), matrices, SPECTRA),
        "spectra-entries": _rows(("fine-tune", "kind"), groups, ENTRIES),
    }
    text = table(*_rows(("fine-tune",), linear, SUMMARY))
    publish(docs, "spectra", f"{provenance([measured])}\n\n{text}", raw)


def _rows(
    names: Sequence[str],
    groups: Mapping[Any, list[Record]],
    columns: Mapping[str, Callable[[Sequence[Record]], str]],
) -> Table:
    """One row for each group: its key, then every column's mean over the records."""
    rows = [[*key, *(write(own) for write in columns.values())] for key, own in groups.items()]
    return (*names, *columns), rows


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
SUMMARY = {
    **{f"{text}: 90 % (noise)": _rank(view) for view, text in NAMES.items()},
    "‖δ‖/‖W‖": _number("{:.2%}", "norm"),
    "equal words": _number("{:.1%}", "unchanged"),
    "low rank, bits": _bits("lowrank_bits"),
    "exact, bits": _number("{:.2f}", "exact_bits"),
}
"""Of docs/benchmarks.md: linear matrices only."""
