"""Tables of speed.py: one for docs/benchmarks.md, time and memory by step for docs/results/."""

from collections.abc import Sequence
from pathlib import Path

from ledger import Record, Table, newest, provenance, publish, table

SETTING = ("case", "recipe", "calibrated", "budget", "servable")
CASES = {"nursery": "nursery, 7.9 M", "qwen": "Qwen2.5-0.5B's shapes, 494 M, random weights"}
STEPS = ("reading", "calibrating", "exact tensors", "measuring", "compressing", "writing")
USES = {
    "load": "load_ms",
    "attach merged": "attach_merged_ms",
    "attach side": "attach_side_ms",
    "detach": "detach_merged_ms",
    "read tuned": "read_tuned_ms",
}
"""Columns of the page: name in a record; milliseconds of processor time."""


def memory_bound(largest: int) -> int:
    """Most bytes that packing may have resident: 1 GB and six times the largest tensor in fp32."""
    return 10**9 + 6 * 4 * largest


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write the table of docs/benchmarks.md and docs/results/speed-steps.csv.

    The newest record of every line counts, whatever commit it is from; the commits are named.
    """
    lines = newest(records, ("task", "workers", *SETTING))
    packs = [line for line in lines if line["task"] == "pack" and "seconds" in line]
    if not packs:
        return
    uses = {_setting(line): line for line in lines if line["task"] == "use"}
    header = (
        *("model", "pack", "workers", "CPU s", "peak RSS, MB", "of its bound", "bytes"),
        *(f"{name}, CPU ms" for name in USES),
    )
    rows = [_row(line, uses.get(_setting(line), {})) for line in packs]
    loads = [line["load_before"] for line in packs]
    busy = f"Load average when a measurement began: {min(loads):.1f} to {max(loads):.1f}."
    text = f"{provenance(lines)} {busy}\n\n{table(header, rows)}"
    publish(docs, "speed", text, {"speed-steps": _steps(packs)})


def _setting(line: Record) -> tuple[object, ...]:
    return tuple(line[name] for name in SETTING)


def _name(line: Record) -> str:
    extras = {"servable": line["servable"], "rows": line["calibrated"]}
    budget = "" if line["recipe"] == "lossless" else f" {line['budget']}"
    return ", ".join([line["recipe"] + budget, *(name for name, true in extras.items() if true)])


def _row(line: Record, use: Record) -> list[str]:
    return [
        CASES[line["case"]],
        _name(line),
        str(line["workers"]),
        f"{line['cpu_seconds']:.1f}",
        f"{line['peak_rss'] / 1e6:,.0f}",
        f"{line['peak_rss'] / memory_bound(line['largest']):.2f}",
        f"{line['bytes']:,}",
        *(_milliseconds(use.get(name)) for name in USES.values()),
    ]


def _steps(packs: Sequence[Record]) -> Table:
    """Wall seconds and peak memory up to the end of each step."""
    rows = [
        [
            *(line["case"], _name(line), str(line["workers"]), step),
            f"{line['stages'][step]:.2f}",
            f"{line['peaks'][step] / 1e6:.0f}",
        ]
        for line in packs
        for step in STEPS
        if line["stages"].get(step)
    ]
    return ("case", "pack", "workers", "step", "seconds", "peak RSS, MB"), rows


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
