"""Tables of frontier.py: read from records, written into the page."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from frontier_figure import draw_frontier
from ledger import Record, newest, provenance, table, write_between

KEY = ("method", "skill", "budget", "seed", "rows")
HARD_SKILL = "cmudict_g2p"
"""Its embedding moved far; means are also given without it."""

AUTO, REFERENCE = "auto, rows", "graftllm, rows"
OURS = (
    *("auto, 4096 rows, 1600 steps", "auto, 4096 rows", "auto, 1600 steps"),
    *("auto, rows", "auto", "auto, servable"),
)
EQUAL_AT = ("10%", "5%", "2.5%")
Point = tuple[float, float]


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write everything that `frontier` says in docs/benchmarks.md, and its figure.

    The newest record of every line counts, whatever commit it is from; the commits are named.
    """
    lines = newest(records, KEY)
    if not lines:
        return
    lossy = [line for line in lines if "kl_mean" in line]
    if lossy:
        draw_frontier(lossy, docs / "figures" / "frontier.png")
    parts = [
        provenance(lines),
        *_frontier_tables(lossy),
        _equal_text(lossy),
        _elsewhere_text(lossy),
        _seed_text(lossy),
        _lossless_text(lines),
        _times_text(lossy),
        _refused_text(lines),
        _losses_text(lossy),
    ]
    write_between(docs / "benchmarks.md", "frontier", "\n\n".join(part for part in parts if part))


def bytes_at(points: Iterable[Point], goal: float) -> float | None:
    """Bytes at which the frontier of (bytes, KL) reaches the KL `goal`.

    Both axes logarithmic, straight lines between neighbours that were measured: a convex hull
    would promise what no file reached. None where the goal is never reached, or where the
    smallest file is below it already.
    """
    corners = frontier([point for point in points if point[1] > 0])
    for (x0, y0), (x1, y1) in pairwise(corners):
        if y0 >= goal >= y1:
            share = math.log(y0 / goal) / math.log(y0 / y1)
            return math.exp((1 - share) * math.log(x0) + share * math.log(x1))
    return None


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no smaller file beats, falling from left to right."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def methods_of(lines: Sequence[Record]) -> list[str]:
    """Names in the order of the tables: ours first, then by name."""
    found = {line["method"] for line in lines}
    return [n for n in OURS if n in found] + sorted(found - set(OURS))


def budgets_of(lines: Sequence[Record]) -> list[str]:
    """Budgets of the lines, smallest first."""
    found = {line["budget"] for line in lines if line["budget"]}
    return sorted(found, key=lambda budget: float(budget.rstrip("%")))


def mean_over_seeds(lines: Sequence[Record], name: str) -> dict[tuple[str, str, str], float]:
    """The mean of a value over draws, by (method, skill, budget)."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        if line["budget"]:
            place = (line["method"], line["skill"], line["budget"])
            groups.setdefault(place, []).append(line[name])
    return {place: sum(values) / len(values) for place, values in groups.items()}


def _frontier_tables(lines: Sequence[Record]) -> list[str]:
    """KL and recovered by method and budget, over all skills and without the hard one."""
    parts = []
    skills = sorted({line["skill"] for line in lines})
    easy = [skill for skill in skills if skill != HARD_SKILL]
    for chosen, label in ((skills, "all skills"), (easy, f"without {HARD_SKILL}")):
        for name, mean, title in (
            ("kl_mean", _geometric, "KL(tuned || packed), geometric mean"),
            ("recovered", _arithmetic, "Recovered, mean"),
        ):
            body = _by_budget(lines, name, chosen, mean)
            if body:
                parts.append(f"{title}, {label} ({', '.join(chosen)}):\n\n{body}")
    return parts


def _by_budget(
    lines: Sequence[Record], name: str, skills: Sequence[str], mean: Callable[[list[float]], float]
) -> str:
    values = mean_over_seeds(lines, name)
    budgets, rows = budgets_of(lines), []
    for method in methods_of(lines):
        row = [method]
        for budget in budgets:
            found = [values[method, s, budget] for s in skills if (method, s, budget) in values]
            # A mean over fewer skills must not look like one over all.
            part = "" if len(found) == len(skills) else f" ({len(found)} of {len(skills)})"
            row.append(number(mean(found)) + part if found else "–")
        rows.append(row)
    return table(["method", *budgets], rows) if rows and skills else ""


def curve(lines: Sequence[Record], method: str, skill: str, name: str = "kl_mean") -> list[Point]:
    """(bytes, value) of a method on a skill, means over draws, its own operating point too."""
    groups: dict[str | None, list[Record]] = {}
    for line in lines:
        if (line["method"], line["skill"]) == (method, skill):
            groups.setdefault(line["budget"], []).append(line)
    points = [
        (_arithmetic([x["bytes"] for x in own]), _arithmetic([x[name] for x in own]))
        for own in groups.values()
    ]
    return sorted(points)


def _equal_text(lines: Sequence[Record]) -> str:
    """Bytes that auto needs for the KL of others, as shares of theirs."""
    if AUTO not in methods_of(lines):
        return ""
    parts = []
    for title, goals in (
        (f"of {REFERENCE}", (REFERENCE,)),
        ("of graftllm given our embedding codec", ("graftllm+embedding",)),
        ("of the best other method at each point", None),
    ):
        rows = []
        for skill in sorted({line["skill"] for line in lines}):
            cells = [_equal_cell(lines, skill, budget, goals) for budget in EQUAL_AT]
            rows.append([skill, *cells])
        parts.append(
            f"Bytes that {AUTO} needs for the KL {title}, as a share of that file's bytes:\n\n"
            + table(["skill", *EQUAL_AT], rows)
        )
    note = (
        "Read between the files of auto that were measured, straight in log bytes and log KL; "
        "< where its smallest file is better already, > where its largest is worse."
    )
    return "\n\n".join([*parts, note])


def _equal_cell(
    lines: Sequence[Record], skill: str, budget: str, methods: Sequence[str] | None
) -> str:
    names = methods or [m for m in methods_of(lines) if m not in OURS]
    found = [
        line for line in lines
        if line["method"] in names and (line["skill"], line["budget"]) == (skill, budget)
    ]  # fmt: skip
    groups = {m: [x for x in found if x["method"] == m] for m in {x["method"] for x in found}}
    means = {m: _arithmetic([x["kl_mean"] for x in own]) for m, own in groups.items()}
    own = curve(lines, AUTO, skill)
    if not means or not own:
        return "–"
    best = min(means, key=lambda m: means[m])
    theirs = _arithmetic([x["bytes"] for x in groups[best]])
    label = "" if methods else f" ({best})"
    needed = bytes_at(own, means[best])
    if needed is not None:
        return f"{needed / theirs:.2f}{label}"
    smallest, largest = own[0], own[-1]
    sign, point = ("<", smallest) if smallest[1] < means[best] else (">", largest)
    return f"{sign} {point[0] / theirs:.2f}{label}"


def _elsewhere_text(lines: Sequence[Record]) -> str:
    """KL outside the skill's domain at equal budgets."""
    skills, parts = sorted({line["skill"] for line in lines}), []
    for name, what in (
        ("elsewhere_kl_mean", "test rows of the other three skills"),
        ("base_kl_mean", "base text"),
    ):
        body = _by_budget(lines, name, skills, _geometric)
        if body:
            parts.append(f"KL out of domain, {what}, geometric mean over the skills:\n\n{body}")
    return "\n\n".join(parts)


def _seed_text(lines: Sequence[Record]) -> str:
    """How far the draws of calibration rows spread: lowest and highest KL, by skill."""
    parts, budgets = [], budgets_of(lines)
    for skill in sorted({line["skill"] for line in lines}):
        rows = []
        for method in methods_of(lines):
            own = [x for x in lines if (x["method"], x["skill"]) == (method, skill)]
            cells = [_spread([x["kl_mean"] for x in own if x["budget"] == b]) for b in budgets]
            rows.append([f"{method} ({len({x['seed'] for x in own})})", *cells])
        parts.append(f"{skill}:\n\n{table(['method (draws)', *budgets], rows)}")
    title = "KL by skill, lowest and highest over the draws of calibration rows."
    return "\n\n".join([title, *parts]) if parts else ""


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _lossless_text(lines: Sequence[Record]) -> str:
    """Bytes of every lossless form, restored and compared bit by bit."""
    found = [line for line in lines if "restored" in line]
    skills = sorted({line["skill"] for line in found})
    rows = []
    for method in sorted({line["method"] for line in found}):
        own = {line["skill"]: line for line in found if line["method"] == method}
        cells = [_lossless_cell(own.get(skill)) for skill in skills]
        rows.append([method, *cells])
    title = "Lossless, bytes of one file (every one restored bit for bit, or marked):"
    return f"{title}\n\n{table(['form', *skills], rows)}" if rows else ""


def _lossless_cell(line: Record | None) -> str:
    if line is None:
        return "–"
    return f"{line['bytes']:,}" + ("" if line["restored"] else " NOT RESTORED")


def _times_text(lines: Sequence[Record]) -> str:
    rows = []
    for method in methods_of(lines):
        own = [line for line in lines if line["method"] == method and line["budget"]]
        if own:
            seconds = sorted(line["cpu_seconds"] for line in own)
            rows.append([method, *(f"{seconds[i]:.1f}" for i in (0, len(seconds) // 2, -1))])
    title = "Processor seconds to make a file, choices on calibration rows included:"
    return f"{title}\n\n{table(['method', 'least', 'median', 'most'], rows)}" if rows else ""


def _refused_text(lines: Sequence[Record]) -> str:
    """Which budgets a method cannot reach."""
    found: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        if "refused" in line:
            found.setdefault((line["method"], line["budget"]), set()).add(line["skill"])
    rows = [f"- {m} at {b}: {', '.join(sorted(s))}" for (m, b), s in sorted(found.items())]
    return "Out of reach:\n\n" + "\n".join(rows) if rows else ""


def _losses_text(lines: Sequence[Record]) -> str:
    """Every case where auto loses, by KL in and out of domain and by exact matches."""
    if AUTO not in methods_of(lines):
        return ""
    found = []
    for name, what, worse in (
        ("kl_mean", "KL", 1),
        ("elsewhere_kl_mean", "KL on other skills", 1),
        ("base_kl_mean", "KL on base text", 1),
        ("recovered", "recovered", -1),
    ):
        values = mean_over_seeds(lines, name)
        for (method, skill, budget), value in sorted(values.items()):
            own = values.get((AUTO, skill, budget))
            if method != AUTO and own is not None and worse * (own - value) > 0:
                found.append(
                    f"- {skill} at {budget}, {what}: {AUTO} {number(own)}, {method} {number(value)}"
                )
    title = f"Cases where {AUTO} loses at an equal budget ({len(found)}):"
    return f"{title}\n\n" + "\n".join(found) if found else f"{title} none."


def number(value: float) -> str:
    """Two significant digits below 1, two decimals above."""
    return "0" if value == 0 else f"{value:.2g}" if abs(value) < 1 else f"{value:.2f}"


def _arithmetic(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _geometric(values: Sequence[float]) -> float:
    # KL spans four orders of magnitude: an arithmetic mean would show the worst skill only.
    return math.exp(_arithmetic([math.log(max(value, 1e-9)) for value in values]))
