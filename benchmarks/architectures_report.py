"""Tables of architectures.py: counts for docs/benchmarks.md, every cell for docs/results/."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ledger import Record, Table, newest, provenance, publish, table

CELLS = ("pack", "merge", "merged", "side", "rows", "generate", "one matrix", "export")
VERDICTS = ("right", "refused", "WRONG", "CRASH")
_MEANINGS = {
    "pack": "packed without loss",
    "merge": "merged: loaded by transformers bit for bit as the tuned model, same answers",
    "merged": "attached merged: answers as tuned, afterwards bit for bit the target",
    "side": "attached beside the model: answers as tuned",
    "rows": "rows 0 and 2 by the pack, row 1 by the target, and the reverse",
    "generate": "the same rows generating greedily, with their cache",
    "one matrix": "beside the model when only one matrix moved (two draws)",
    "export": "PEFT loads the adapter with the weights that the export names",
}
# Temporary folders, tensors and modules, classes, numbers: what differs within one reason.
_PARTICULARS = (
    (r"\S*architecture-\w+/?", ""),
    (r"\(\w+Error: [^)]*\)", "(…)"),
    (r"\b[\w-]+(?:\.[\w-]+){2,}\b|\[[\d, ]+\]|\b[A-Z]\w*(?:For|Model|LM)\w*", "…"),
    (r"\b[\w]+\.(?:weight|bias|\d+)\S*|\b\d[\d.]*%?", "…"),
)


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write the page's counts, results/architectures.csv and results/architectures-refused.csv."""
    lines = sorted(newest(records, ("type",)), key=lambda record: record["type"])
    header = ("model type", "class", "parameters", "inputs", *CELLS, "reasons")
    raw = {
        "architectures": (header, [_csv_row(record) for record in lines]),
        "architectures-refused": _reasons([record for record in lines if "cells" in record]),
    }
    publish(docs, "architectures", _summary(lines), raw)


def _csv_row(record: Record) -> list[str]:
    cells = record.get("cells")
    if cells is None:
        reason = record.get("unbuilt") or f"ended: {record['ended']}"
        verdict = "not built" if "unbuilt" in record else "CRASH"
        return [record["type"], "", "", "", verdict, *[""] * (len(CELLS) - 1), _plain(reason)]
    reasons = {
        _plain(cell["detail"]): None
        for cell in cells.values()
        if cell["verdict"] not in ("right", "–")
    }
    verdicts = [cells.get(name, {}).get("verdict", "") for name in CELLS]
    inputs = " ".join(record["inputs"])
    return [
        *(record["type"], record["class"], str(record["parameters"]), inputs),
        *verdicts,
        "; ".join(reasons),
    ]


def _summary(records: Sequence[Record]) -> str:
    if not records:
        return "Nothing is measured yet."
    built = [record for record in records if "cells" in record]
    unbuilt = [record for record in records if "unbuilt" in record]
    ended = [record for record in records if "ended" in record]
    parts = [
        provenance(records),
        f"{len(built)} of {len(records)} model types were built and checked; "
        f"{len(unbuilt)} were not built, {len(ended)} did not end within their limits.",
        _counts(built),
    ]
    for verdict in ("WRONG", "CRASH"):
        named = [
            f"{record['type']} ({name})"
            for record in built
            for name, cell in record["cells"].items()
            if cell["verdict"] == verdict
        ]
        if named:
            parts.append(f"{verdict}: {', '.join(named)}.")
    return "\n\n".join(parts)


def _counts(records: Sequence[Record]) -> str:
    rows = []
    for name in CELLS:
        verdicts = Counter(record["cells"].get(name, {}).get("verdict") for record in records)
        if any(verdicts[verdict] for verdict in VERDICTS):
            counts = [str(verdicts[verdict]) for verdict in VERDICTS]
            rows.append([f"*{name}*: {_MEANINGS[name]}", *counts])
    return table(["cell", *VERDICTS], rows)


def _reasons(records: Sequence[Record]) -> Table:
    """Reasons of refusals by cell, with the number of types; … stands for names and numbers."""
    types: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, cell in record["cells"].items():
            if cell["verdict"] == "refused":
                types.setdefault((name, _general(cell["detail"])), []).append(record["type"])
    rows = []
    for (name, reason), names in sorted(types.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        rows.append([reason, name, str(len(names)), shown])
    return ("reason", "cell", "types", "such as"), rows


def _general(reason: str) -> str:
    for pattern, replacement in _PARTICULARS:
        reason = re.sub(pattern, replacement, reason)
    return _plain(reason)[:140]


def _plain(text: str) -> str:
    """One line without folders of this machine, and without what Markdown reads as a column."""
    text = re.sub(r"\S*architecture-\w+/?", "", text)
    return " ".join(text.replace("|", "/").split())
