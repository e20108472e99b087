"""The tables of vision.py: rootstocks and baselines, what they cost, and features taken apart."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from ledger import Record, newest, provenance, table, write_between

from graftkit.vision.report import headline
from graftkit.vision.training import file_stem

HEADER = ("", "parameters", "trunk", "bytes", "MMAC", "ms", "val", "val loss", "test", "95 %")


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write what was measured into docs/benchmarks.md; the newest record of every run counts."""
    for line in newest(records, ("run",)):
        text = f"{SHOWN.get(line['run'], _run)(line)}\n\n{provenance([line])}"
        write_between(docs / "benchmarks.md", f"vision-{file_stem(line['run'])}", text)


def _run(line: Record) -> str:
    rows = [_row("**rootstock**", line), *(_row(n, b) for n, b in line["baselines"].items())]
    int8 = line["int8"]
    told = (
        f"**{line['run']}** ({line['rule']}, {line['scion'][-1]['layer']} is the last layer; "
        f"{line['seconds']:,.0f} s). int8: {line['int8_bytes']:,} bytes, val "
        f"{int8['val_accuracy']:.4f}, test {int8['test_accuracy']:.4f}, {int8['p50_ms']:.2f} ms."
    )
    draws = line.get("draws")
    if draws:
        told += (
            f" Test accuracy over {len(draws)} draws of training and validation images: mean "
            f"{mean(draws):.4f}, standard deviation {stdev(draws):.4f}."
        )
    header, *paper = headline(line)
    return f"{told}\n\n{table(HEADER, rows)}\n\nAs the paper tells it:\n\n{table(header, paper)}"


def _row(name: str, found: Record) -> list[str]:
    low, high = found["test_interval"]
    return [
        name,
        f"{found['parameters']:,}",
        f"{found['trunk_parameters']:,}",
        f"{found['bytes']:,}",
        f"{found['macs'] / 1e6:.1f}",
        f"{found['p50_ms']:.2f}",
        f"{found['val_accuracy']:.4f}",
        f"{found['val_loss']:.3f}",
        f"{found['test_accuracy']:.4f}",
        f"{low:.3f} to {high:.3f}",
    ]


def _margin(line: Record) -> str:
    """Several orders of fine-tuning, and the lead over all of them."""
    orders = range(len(next(iter(line["lines"].values()))))
    names = [f"{split}, order {order}" for order in orders for split in SPLITS]
    rows = []
    for name, found in line["lines"].items():
        numbers = [f"{one[split]:.4f}" for one in found for split in SPLITS]
        average = mean(one["test"] for one in found)
        rows.append([name, f"{found[0]['bytes']:,}", *numbers, f"{average:.4f}"])
    low, high = line["lead_interval"]
    told = (
        f"Fine-tuned in {len(orders)} orders of the images, the rootstock leads by "
        f"{100 * line['lead']:.1f} points of test accuracy, 95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f} (paired over test images):"
    )
    return f"{told}\n\n{table(('', 'bytes', *names, 'test, mean'), rows)}"


def _apart(line: Record) -> str:
    """Accuracies by cut and pooling, one column for each number of views."""
    views = list(dict.fromkeys(row["views"] for row in line["lines"]))
    names = [f"{split}, {count} view{'s' * (count != '1')}" for count in views for split in SPLITS]
    found = {(r["cut"], r["pooled"], r["views"]): r for r in line["lines"]}
    rows = []
    for cut, pooled in dict.fromkeys((row["cut"], row["pooled"]) for row in line["lines"]):
        cells = [found[cut, pooled, count] for count in views]
        numbers = [f"{cell[split]:.4f}" for cell in cells for split in SPLITS]
        rows.append([f"layers 0 to {cut - 1}, {pooled}", f"{cells[0]['features']:,}", *numbers])
    return "Frozen features, a linear head:\n\n" + table(("", "features", *names), rows)


SPLITS = ("val", "test")
SHOWN = {"margin": _margin, "features": _apart}
