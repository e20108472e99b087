"""The tables of routing.py: who finds the right pack, in which form of prompt, at what cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ledger import Record, newest, provenance, table, write_between

PLAIN = "as they are"


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write what `routing` says in docs/benchmarks.md; the newest record of every line counts."""
    lines = newest(records, ("router", "form", "rows"))
    if not lines:
        return
    plain = [line for line in lines if line["form"] == PLAIN]
    parts = [provenance(lines), _answers(plain), _forms(lines), _foreign(lines)]
    write_between(docs / "benchmarks.md", "routing", "\n\n".join(parts))


def _answers(lines: Sequence[Record]) -> str:
    header = (
        *("router", "right pack or target", "exact match", "of the oracle's", "as when alone"),
        *("rejected, bit-identical to the target", "ms a prompt", "of a 64-token answer"),
    )
    return table(header, [_answer_row(line) for line in lines])


def _answer_row(line: Record) -> list[str]:
    return [
        line["router"],
        f"{_right(line):.3f}",
        f"{line['routed']:.3f}",
        f"{line['routed'] / line['oracle']:.3f}",
        f"{line['as_alone']:.3f}",
        f"{line['rejected_bit_identical']} of {line['rejected_rows']}",
        f"{line['route_ms']:.1f}",
        f"{100 * line['route_ms'] / line['answer_ms']:.1f} %",
    ]


def _right(line: Record) -> float:
    """Of skills and foreign rows alike, every set of rows counted once."""
    skills, foreign = line["right"].values(), line["accepted"].values()
    return mean([*skills, *(1 - share for share in foreign)])


def _forms(lines: Sequence[Record]) -> str:
    header = ("prompts", "router", "right pack", "wrong pack", "target", "foreign accepted")
    return table(header, [_form_row(line) for line in lines])


def _form_row(line: Record) -> list[str]:
    shares = ("right", "wrong", "rejected", "accepted")
    return [line["form"], line["router"], *(f"{_mean(line[name]):.3f}" for name in shares)]


def _mean(shares: Mapping[str, float]) -> float:
    return mean(shares.values())


def _foreign(lines: Sequence[Record]) -> str:
    sets = list(lines[0]["accepted"])
    rows = [
        [line["form"], line["router"], *(f"{line['accepted'][name]:.2f}" for name in sets)]
        for line in lines
    ]
    return "Foreign rows that a pack took, by set:\n\n" + table(("prompts", "router", *sets), rows)
