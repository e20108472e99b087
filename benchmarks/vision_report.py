"""Tables of vision.py: one for docs/benchmarks.md, every network for docs/results/."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

from ledger import Record, Table, newest, provenance, publish, table

WHOLE_RUN = "fine-tuned, 0.6 MiB"
"""The page shows all networks of this run; of the others the rootstock and PAIR."""
ROOTSTOCK, PAIR = "rootstock", "paper's scion"
HEADER = ("run", "network", "bytes", "MMAC", "ms", "val", "test", "95 %")
SPLITS = ("val", "test")


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write what was measured; the newest record of every run counts."""
    lines = newest(records, ("run",))
    runs = [line for line in lines if "baselines" in line]
    if not runs:
        return
    rows = [_row(run["run"], name, network) for run in runs for name, network in _shown(run)]
    parts = [provenance(lines), table(HEADER, rows)]
    raw = {"vision-networks": _networks(runs), "vision-int8": _int8(runs)}
    for line in lines:
        if line["run"] == "margin":
            parts.append(_lead(line))
            raw["vision-orders"] = _orders(line)
        elif line["run"] == "features":
            raw["vision-features"] = _features(line)
    publish(docs, "vision", "\n\n".join(parts), raw)


def _all(run: Record) -> Iterator[tuple[str, Record]]:
    yield ROOTSTOCK, run
    yield from run["baselines"].items()


def _shown(run: Record) -> list[tuple[str, Record]]:
    return [x for x in _all(run) if run["run"] == WHOLE_RUN or x[0] in (ROOTSTOCK, PAIR)]


def _row(run: str, name: str, network: Record) -> list[str]:
    low, high = network["test_interval"]
    return [
        run,
        f"**{name}**" if name == ROOTSTOCK else name,
        f"{network['bytes']:,}",
        f"{network['macs'] / 1e6:.1f}",
        f"{network['p50_ms']:.2f}",
        f"{network['val_accuracy']:.4f}",
        f"{network['test_accuracy']:.4f}",
        f"{low:.3f} to {high:.3f}",
    ]


def _networks(runs: Sequence[Record]) -> Table:
    """Every network of every run, with its parameters and losses."""
    header = (
        *("run", "network", "parameters", "trunk parameters", "bytes", "multiply-accumulates, M"),
        *("p50, ms", "val accuracy", "val loss", "test accuracy", "95 % from", "95 % to"),
    )
    rows = [
        [
            *(run["run"], name, str(network["parameters"]), str(network["trunk_parameters"])),
            *(str(network["bytes"]), f"{network['macs'] / 1e6:.1f}", f"{network['p50_ms']:.2f}"),
            *(f"{network['val_accuracy']:.4f}", f"{network['val_loss']:.3f}"),
            f"{network['test_accuracy']:.4f}",
            *(f"{end:.3f}" for end in network["test_interval"]),
        ]
        for run in runs
        for name, network in _all(run)
    ]
    return header, rows


def _int8(runs: Sequence[Record]) -> Table:
    """The int8 file of every rootstock; accuracy over other draws of the images; seconds."""
    header = (
        *("run", "choice", "last layer", "int8 bytes", "val", "test", "p50, ms"),
        *("draws, mean", "draws, standard deviation", "seconds"),
    )
    rows = []
    for run in runs:
        int8, draws = run["int8"], run.get("draws") or []
        spread = [f"{mean(draws):.4f}", f"{stdev(draws):.4f}"] if draws else ["–", "–"]
        values = [f"{int8[name]:.4f}" for name in ("val_accuracy", "test_accuracy")]
        place = [run["run"], run["rule"], run["scion"][-1]["layer"], str(run["int8_bytes"])]
        rows.append([*place, *values, f"{int8['p50_ms']:.2f}", *spread, f"{run['seconds']:.0f}"])
    return header, rows


def _lead(line: Record) -> str:
    """The lead of the rootstock over several orders of fine-tuning."""
    low, high = line["lead_interval"]
    orders = len(next(iter(line["lines"].values())))
    return (
        f"Fine-tuned in {orders} orders of the images, the rootstock leads the {PAIR} by "
        f"{100 * line['lead']:.1f} points of test accuracy, 95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} (paired over test images)."
    )


def _orders(line: Record) -> Table:
    """Accuracies by order of fine-tuning."""
    orders = range(len(next(iter(line["lines"].values()))))
    names = [f"{split}, order {order}" for order in orders for split in SPLITS]
    rows = []
    for name, measured in line["lines"].items():
        numbers = [f"{one[split]:.4f}" for one in measured for split in SPLITS]
        average = mean(one["test"] for one in measured)
        rows.append([name, str(measured[0]["bytes"]), *numbers, f"{average:.4f}"])
    return ("network", "bytes", *names, "test, mean"), rows


def _features(line: Record) -> Table:
    """Frozen features and a linear head, by cut and pooling; columns for each number of views."""
    views = list(dict.fromkeys(row["views"] for row in line["lines"]))
    names = [f"{split}, {count} view{'s' * (count != '1')}" for count in views for split in SPLITS]
    cells = {(r["cut"], r["pooled"], r["views"]): r for r in line["lines"]}
    rows = []
    for cut, pooled in dict.fromkeys((row["cut"], row["pooled"]) for row in line["lines"]):
        own = [cells[cut, pooled, count] for count in views]
        numbers = [f"{cell[split]:.4f}" for cell in own for split in SPLITS]
        rows.append([f"layers 0 to {cut - 1}, {pooled}", str(own[0]["features"]), *numbers])
    return ("features", "number", *names), rows
