"""The tables and the figure of continual.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from ledger import Record, Table, newest, provenance, publish, table

from graftkit.evaluate import Course

mpl.use("Agg")
from matplotlib import pyplot as plt

KEY = ("way", "learned", "steps")
COLORS = ("#D55E00", "#E69F00", "#CC79A7", "#882255", "#009E73", "#777777")
LIBRARY_COLOR, INK = "#0072B2", "#222222"

Order = tuple[str, ...]


def write_report(
    records: Sequence[Record],
    orders: Sequence[Order],
    steps: int,
    ordered: Mapping[str, bool],
    docs: Path,
) -> None:
    """Write the table of docs/benchmarks.md, its figure, and docs/results/continual-orders.csv.

    Args:
        ordered: by method, in the order of the table: whether its states are named in the order of
            learning, or sorted.
    """
    lines = [line for line in newest(records, KEY) if line["steps"] == steps]
    states = {(line["way"], line["learned"]): line for line in lines}
    if ("target", "") not in states:
        return
    courses = {way: _courses(way, states, orders, ordered[way]) for way in ordered}
    courses = {way: runs for way, runs in courses.items() if runs}
    parts = [provenance(lines), _table(courses, states, orders)]
    if courses:
        _draw(courses, docs / "figures" / "continual.png")
        parts.append("![Exact match on the skills learned so far](figures/continual.png)")
    raw = {"continual-orders": _by_order(courses, orders)}
    publish(docs, "continual", "\n\n".join(parts), raw)


def _courses(
    way: str, states: Mapping[tuple[str, str], Record], orders: Sequence[Order], ordered: bool
) -> list[Course]:
    """One course for every order; none unless all their states are measured."""
    before = states["target", ""]["scores"]
    courses = []
    for order in orders:
        prefixes = [order[: length + 1] for length in range(len(order))]
        names = ["+".join(part if ordered else sorted(part)) for part in prefixes]
        lines = [states.get((way, name)) for name in names]
        if None in lines:
            return []
        rows = [[line["scores"][task] for task in order] for line in lines if line]
        sizes = [line["bytes"] for line in lines if line]
        courses.append(Course(order, rows, [before[task] for task in order], sizes))
    return courses


def _table(
    courses: Mapping[str, list[Course]],
    states: Mapping[tuple[str, str], Record],
    orders: Sequence[Order],
) -> str:
    header = ("method", "AP", "lowest to highest", "BWT", "FWT", "MB on disk", "rows routed right")
    rows = []
    for way, runs in courses.items():
        routed = _routed_right(way, states, orders[0])
        ends = [course.average for course in runs]
        rows.append(
            [
                way,
                f"{fmean(ends):.3f}",
                f"{min(ends):.3f} to {max(ends):.3f}",
                _spread([course.backward_transfer for course in runs]),
                _spread([course.forward_transfer for course in runs]),
                f"{fmean(course.disk_bytes[-1] for course in runs) / 1e6:.1f}",
                "–" if routed is None else f"{100 * routed:.1f} %",
            ]
        )
    joint = states.get(("joint training", "+".join(sorted(orders[0]))))
    if joint is not None:
        average = fmean(joint["scores"].values())
        size = f"{joint['bytes'] / 1e6:.1f}"
        rows.append(["joint training", f"{average:.3f}", "–", "–", "–", size, "–"])
    return table(header, rows)


def _routed_right(
    way: str, states: Mapping[tuple[str, str], Record], skills: Order
) -> float | None:
    """Of the library with all packs."""
    line = states.get((way, "+".join(sorted(skills))), {})
    return line.get("routed_right")


def _by_order(courses: Mapping[str, list[Course]], orders: Sequence[Order]) -> Table:
    header = ("AP, BWT", *(" → ".join(order) for order in orders))
    rows = [
        [way, *(f"{course.average:.3f}, {_signed(course.backward_transfer)}" for course in runs)]
        for way, runs in courses.items()
    ]
    return header, rows


def _spread(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    spread = "" if len(numbers) == 1 else f" ({_signed(min(numbers))} to {_signed(max(numbers))})"
    return _signed(fmean(numbers)) + spread


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _draw(courses: Mapping[str, list[Course]], file: Path) -> None:
    """Mean score on the skills learned so far, after each; the mean over orders."""
    figure, axes = plt.subplots(figsize=(8, 4.8))
    for index, (way, runs) in enumerate(courses.items()):
        count = len(runs[0].tasks)
        means = [fmean(fmean(course.scores[t][: t + 1]) for course in runs) for t in range(count)]
        library = way.startswith("library")
        axes.plot(
            range(1, count + 1),
            means,
            color=LIBRARY_COLOR if library else COLORS[index % len(COLORS)],
            linestyle=("-", "--")[index // len(COLORS) % 2],
            linewidth=2 if library else 1.2,
            marker="o",
            markersize=4,
            label=way,
        )
    axes.set_xlabel("skills learned", color=INK)
    axes.set_ylabel("exact match, mean of the skills learned", color=INK)
    axes.set_xticks(range(1, max(len(runs[0].tasks) for runs in courses.values()) + 1))
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
