"""The table of routing.py: which router finds the right pack, by the form of the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ledger import Record, Table, newest, provenance, publish, table

SHARES = {
    "right pack": "right",
    "wrong pack": "wrong",
    "target": "rejected",
    "foreign accepted": "accepted",
}
"""Column of the table: name in a record."""


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write the table of docs/benchmarks.md and docs/results/routing*.csv.

    The newest record of every router and form of prompt counts.
    """
    lines = newest(records, ("router", "form", "rows"))
    if not lines:
        return
    header = ("prompts", "router", *SHARES, "of the oracle's answers", "of a 64-token answer")
    rows = [
        [*_place(line), *_shares(line), _of_oracle(line), _relative_time(line)] for line in lines
    ]
    raw = {"routing-answers": _answers(lines), "routing-foreign": _foreign(lines)}
    publish(docs, "routing", f"{provenance(lines)}\n\n{table(header, rows)}", raw)


def _place(line: Record) -> list[str]:
    return [line["form"], line["router"]]


def _shares(line: Record) -> list[str]:
    return [f"{_mean(line[name]):.3f}" for name in SHARES.values()]


def _of_oracle(line: Record) -> str:
    """Exact match of the routed packs over that of the right packs; measured for one form only."""
    return f"{line['routed'] / line['oracle']:.3f}" if "oracle" in line else "–"


def _relative_time(line: Record) -> str:
    return f"{100 * line['route_ms'] / line['answer_ms']:.1f} %" if "route_ms" in line else "–"


def _answers(lines: Sequence[Record]) -> Table:
    """Answers and times, for the form of prompt in which they were measured."""
    header = (
        *("prompts", "router", "right pack or target", "exact match", "of the oracle's"),
        *("as when alone", "rejected and bit-identical to the target", "ms a prompt"),
    )
    return header, [_answer_row(line) for line in lines if "routed" in line]


def _answer_row(line: Record) -> list[str]:
    return [
        *_place(line),
        f"{_right(line):.3f}",
        f"{line['routed']:.3f}",
        _of_oracle(line),
        f"{line['as_alone']:.3f}",
        f"{line['rejected_bit_identical']} of {line['rejected_rows']}",
        f"{line['route_ms']:.1f}",
    ]


def _right(line: Record) -> float:
    """Mean over the skills and the foreign sets; of a foreign set the rows left to the target."""
    skills, foreign = line["right"].values(), line["accepted"].values()
    return mean([*skills, *(1 - share for share in foreign)])


def _foreign(lines: Sequence[Record]) -> Table:
    """Share of the foreign rows that a pack took, by data set."""
    sets = list(lines[0]["accepted"])
    rows = [[*_place(line), *(f"{line['accepted'][name]:.2f}" for name in sets)] for line in lines]
    return ("prompts", "router", *sets), rows


def _mean(shares: Mapping[str, float]) -> float:
    return mean(shares.values())
