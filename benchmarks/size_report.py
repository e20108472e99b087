"""Tables and curves of size.py: read from records, written into the page."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from ledger import Record, newest, provenance, table, write_between
from size_figure import draw_curves

KEY = ("skill", "recipe", "budget", "calibration")
TARGETS = {"5%": 0.99, "1%": 0.95}
"""Share of tuned's exact matches that a pack of this budget should recover."""

_HEADER = (
    "pack", "budget", "bytes", "s", "CPU s", "KL", "KL p99", "top-1", "KL else", "p99 else",
    "top-1 else", "exact", "recovered",
)  # fmt: skip


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write everything that `size` says in docs/benchmarks.md, and its figure.

    The newest record of every line counts, whatever commit it is from; the commits are named.
    """
    lines = sorted(newest(records, KEY), key=lambda line: line["skill"])
    if not lines:
        return
    figure = docs / "figures" / "size.png"
    draw_curves(lines, figure)
    parts = [provenance(lines), _recovered_text(lines), _equal_text(lines), _losses(lines)]
    for skill in dict.fromkeys(line["skill"] for line in lines):
        parts.append(f"#### {skill}\n\n{_skill_table([x for x in lines if x['skill'] == skill])}")
    write_between(docs / "benchmarks.md", "size", "\n\n".join(part for part in parts if part))


def series_name(line: Record) -> str:
    """What the tables and curves call a line."""
    return f"{line['recipe']}, rows" if line["calibration"] else str(line["recipe"])


def bytes_at(curve: Iterable[tuple[float, float]], goal: float) -> float | None:
    """Bytes at which a curve of (bytes, KL) reaches the KL `goal`, between points log-linear.

    None where the curve does not reach it, or is below it from its first point on.
    """
    points = sorted(curve)
    for (bytes_0, kl_0), (bytes_1, kl_1) in pairwise(points):
        if kl_0 >= goal >= kl_1 > 0:
            share = math.log(kl_0 / goal) / math.log(kl_0 / kl_1) if kl_0 > kl_1 else 0.0
            return math.exp((1 - share) * math.log(bytes_0) + share * math.log(bytes_1))
    return None


def _skill_table(lines: Sequence[Record]) -> str:
    return table(_HEADER, [_row(line) for line in sorted(lines, key=_order)])


def _order(line: Record) -> tuple[bool, str, float]:
    reference = line["budget"] is None
    return reference, "" if reference else series_name(line), line.get("budget_bytes") or 0.0


def _row(line: Record) -> list[str]:
    head = [series_name(line), line["budget"] or "–"]
    if "refused" in line:
        return [*head, "refused", *["–"] * (len(_HEADER) - 3)]
    recovered = line["recovered"]
    return [
        *head,
        f"{line['bytes']:,}",
        *(f"{line[name]:.1f}" if line.get(name) else "–" for name in ("seconds", "cpu_seconds")),
        *(_number(line[name]) for name in ("kl_mean", "kl_p99")),
        f"{line['top1_agreement']:.3f}",
        *(_number(line[f"elsewhere_{name}"]) for name in ("kl_mean", "kl_p99")),
        f"{line['elsewhere_top1_agreement']:.3f}",
        f"{line['exact_match']:.3f}",
        "–" if recovered is None else f"{recovered:.3f}",
    ]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 1 else f"{value:.2f}"


def _lossy(lines: Sequence[Record]) -> list[Record]:
    return [line for line in lines if line["budget"] and "refused" not in line]


def _budgets(lines: Sequence[Record]) -> list[str]:
    """Budgets in the table, smallest first."""
    found = {line["budget"]: line["budget_bytes"] for line in _lossy(lines)}
    return sorted(found, key=lambda budget: found[budget])


def _recovered_text(lines: Sequence[Record]) -> str:
    """Recovered share by series and budget: mean over the skills and the worst of them."""
    budgets = _budgets(lines)
    skills = len({line["skill"] for line in lines})
    rows = []
    for series in sorted({series_name(line) for line in _lossy(lines)}):
        row = [series]
        for budget in budgets:
            values = [
                line["recovered"]
                for line in _lossy(lines)
                if series_name(line) == series and line["budget"] == budget
            ]
            values = [value for value in values if value is not None]
            mean = f"{sum(values) / len(values):.3f} ({min(values):.3f})" if values else "–"
            # A mean of other skills than in the next column must not look like one of the same.
            row.append(mean if len(values) in (0, skills) else f"{mean}, {len(values)} of {skills}")
        rows.append(row)
    title = "Recovered, mean over the skills (worst skill):"
    return f"{title}\n\n{table(['pack', *budgets], rows)}" if rows else ""


def _equal_text(lines: Sequence[Record]) -> str:
    """How many bytes auto needs for the KL of graftllm, by skill and graftllm's budget."""
    budgets = _budgets(lines)
    rows = []
    for skill in dict.fromkeys(line["skill"] for line in lines):
        for rows_used in (True, False):
            found = [
                x for x in _lossy(lines)
                if x["skill"] == skill and bool(x["calibration"]) == rows_used
            ]  # fmt: skip
            auto = [(x["bytes"], x["kl_mean"]) for x in found if x["recipe"] == "auto"]
            ours = {x["budget"]: x for x in found if x["recipe"] == "graftllm"}
            if auto and ours:
                cells = [_share(auto, ours.get(budget)) for budget in budgets]
                rows.append([f"{skill}, {'rows' if rows_used else 'data-free'}", *cells])
    title = (
        "Bytes that auto needs for the in-domain KL of graftllm at each budget, as a share of "
        "graftllm's bytes (goal: at most 0.33; < where auto's smallest pack is better already, "
        "> where its largest is worse):"
    )
    return f"{title}\n\n{table(['skill', *budgets], rows)}" if rows else ""


def _share(auto: Sequence[tuple[float, float]], other: Record | None) -> str:
    if other is None:
        return "–"
    needed = bytes_at(auto, other["kl_mean"])
    if needed is not None:
        return f"{needed / other['bytes']:.2f}"
    smallest, best = min(auto), max(auto)
    if smallest[1] < other["kl_mean"]:
        return f"< {smallest[0] / other['bytes']:.2f}"
    return f"> {best[0] / other['bytes']:.2f}"


def _losses(lines: Sequence[Record]) -> str:
    """Where auto misses what the design asks for, one plain sentence each."""
    found = []
    for budget, goal in TARGETS.items():
        chosen = [
            line
            for line in _lossy(lines)
            if (line["recipe"], line["budget"]) == ("auto", budget) and line["calibration"]
        ]
        missed = [line for line in chosen if (line["recovered"] or 0.0) < goal]
        if missed:
            values = ", ".join(f"{line['skill']} {line['recovered']:.3f}" for line in missed)
            found.append(
                f"- auto with rows at {budget} misses recovered >= {goal} on {len(missed)} of "
                f"{len(chosen)} skills: {values}."
            )
    for line in lines:
        if "refused" in line:
            found.append(f"- {line['skill']}, {series_name(line)}: {line['refused']}.")
    return "Missed goals:\n\n" + "\n".join(found) if found else ""
