"""Tables of frontier.py: two for docs/benchmarks.md, the long ones for docs/results/."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from frontier_figure import draw_frontier
from ledger import Record, Table, newest, provenance, publish, table, write_between

KEY = ("method", "skill", "budget", "seed", "rows")
HARD_SKILL = "cmudict_g2p"
"""Its embedding moved far; means are also given without it."""

AUTO, REFERENCE = "auto, rows", "graftllm, rows"
OURS = (
    *("auto, 4096 rows, 1600 steps", "auto, 4096 rows", "auto, 1600 steps"),
    *("auto, rows", "auto", "auto, servable"),
)
EQUAL_AT = ("10%", "5%", "2.5%")
PAGE_BUDGETS = ("1%", "5%", "10%")
Point = tuple[float, float]


def write_report(records: Sequence[Record], docs: Path) -> None:
    """Write the two tables of docs/benchmarks.md, the figure, and docs/results/frontier-*.csv.

    The newest record of every line counts, whatever commit it is from; the commits are named.
    """
    lines = newest(records, KEY)
    if not lines:
        return
    lossy = [line for line in lines if "kl_mean" in line]
    if lossy:
        draw_frontier(lossy, docs / "figures" / "frontier.png")
    raw = {
        "frontier-means": _means(lossy),
        "frontier-skills": _kl_by_skill(lossy),
        "frontier-equal-bytes": _equal_bytes(lossy),
        "frontier-seconds": _seconds(lossy),
        "frontier-out-of-reach": _out_of_reach(lines),
        "frontier-lost": _lost(lossy),
    }
    publish(docs, "frontier", f"{provenance(lines)}\n\n{table(*_summary(lossy))}", raw)
    lossless = _lossless(lines)
    if lossless[1]:
        write_between(docs / "benchmarks.md", "lossless", table(*lossless))


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
    corners: list[Point] = []
    for point in sorted(points):
        if not corners or point[1] < corners[-1][1]:
            corners.append(point)
    return corners


def methods_of(lines: Sequence[Record]) -> list[str]:
    """Names in the order of the tables: ours first, then by name."""
    names = {line["method"] for line in lines}
    return [n for n in OURS if n in names] + sorted(names - set(OURS))


def budgets_of(lines: Sequence[Record]) -> list[str]:
    """Budgets of the lines, smallest first."""
    budgets = {line["budget"] for line in lines if line["budget"]}
    return sorted(budgets, key=lambda budget: float(budget.rstrip("%")))


def mean_over_seeds(lines: Sequence[Record], name: str) -> dict[tuple[str, str, str], float]:
    """The mean of a value over draws, by (method, skill, budget)."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        if line["budget"]:
            place = (line["method"], line["skill"], line["budget"])
            groups.setdefault(place, []).append(line[name])
    return {place: sum(values) / len(values) for place, values in groups.items()}


def _summary(lines: Sequence[Record]) -> Table:
    """The page's table: KL and recovered over all skills at PAGE_BUDGETS, and processor time."""
    budgets = [budget for budget in PAGE_BUDGETS if budget in budgets_of(lines)]
    skills = sorted({line["skill"] for line in lines})
    divergences = dict(_by_budget(lines, "kl_mean", skills, _geometric, budgets))
    kept = dict(_by_budget(lines, "recovered", skills, _arithmetic, budgets))
    seconds = {method: median for method, _, median, _ in _seconds(lines)[1]}
    rows = [
        [method, *divergences[method], *kept[method], seconds.get(method, "–")]
        for method in methods_of(lines)
        if any(cell != "–" for cell in divergences[method])
    ]
    header = [f"{what}, {budget}" for what in ("KL", "kept") for budget in budgets]
    return ("method", *header, "CPU s"), rows


def _means(lines: Sequence[Record]) -> Table:
    """Means over skills by measure, method and budget; in the domain also without HARD_SKILL."""
    skills, budgets = sorted({line["skill"] for line in lines}), budgets_of(lines)
    easy = [skill for skill in skills if skill != HARD_SKILL]
    rows = []
    for name, measure, mean, groups in (
        ("kl_mean", "KL", _geometric, (skills, easy)),
        ("recovered", "recovered", _arithmetic, (skills, easy)),
        ("elsewhere_kl_mean", "KL on other skills", _geometric, (skills,)),
        ("base_kl_mean", "KL on base text", _geometric, (skills,)),
    ):
        for chosen in groups:
            label = "all" if chosen is skills else f"without {HARD_SKILL}"
            for method, cells in _by_budget(lines, name, chosen, mean, budgets):
                rows.append([measure, label, method, *cells])
    return ("measure", "skills", "method", *budgets), rows


def _by_budget(
    lines: Sequence[Record],
    name: str,
    skills: Sequence[str],
    mean: Callable[[list[float]], float],
    budgets: Sequence[str],
) -> list[tuple[str, list[str]]]:
    """For every method, a cell for each budget; `(3 of 4)` where not every skill is measured."""
    values, rows = mean_over_seeds(lines, name), []
    for method in methods_of(lines) if skills else ():
        cells = []
        for budget in budgets:
            numbers = [values[method, s, budget] for s in skills if (method, s, budget) in values]
            # A mean over fewer skills must not look like one over all.
            part = "" if len(numbers) == len(skills) else f" ({len(numbers)} of {len(skills)})"
            cells.append(number(mean(numbers)) + part if numbers else "–")
        rows.append((method, cells))
    return rows


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


def _equal_bytes(lines: Sequence[Record]) -> Table:
    """Bytes that auto needs for the KL of another file, as a share of that file's bytes.

    Read between the files of auto that were measured, straight in log bytes and log KL; < where
    its smallest file is better already, > where its largest is worse.
    """
    if AUTO not in methods_of(lines):
        return (), []
    rows = []
    for title, goals in (
        (REFERENCE, (REFERENCE,)),
        ("graftllm+embedding", ("graftllm+embedding",)),
        ("best other method", None),
    ):
        for skill in sorted({line["skill"] for line in lines}):
            cells = [_equal_cell(lines, skill, budget, goals) for budget in EQUAL_AT]
            rows.append([title, skill, *cells])
    return ("equal KL with", "skill", *EQUAL_AT), rows


def _equal_cell(
    lines: Sequence[Record], skill: str, budget: str, methods: Sequence[str] | None
) -> str:
    names = methods or [m for m in methods_of(lines) if m not in OURS]
    rivals = [
        line for line in lines
        if line["method"] in names and (line["skill"], line["budget"]) == (skill, budget)
    ]  # fmt: skip
    groups = {m: [x for x in rivals if x["method"] == m] for m in {x["method"] for x in rivals}}
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


def _kl_by_skill(lines: Sequence[Record]) -> Table:
    """Lowest and highest KL over the draws of calibration rows, by skill and method."""
    budgets, rows = budgets_of(lines), []
    for skill in sorted({line["skill"] for line in lines}):
        for method in methods_of(lines):
            own = [x for x in lines if (x["method"], x["skill"]) == (method, skill)]
            cells = [_spread([x["kl_mean"] for x in own if x["budget"] == b]) for b in budgets]
            rows.append([skill, method, str(len({x["seed"] for x in own})), *cells])
    return ("skill", "method", "draws", *budgets), rows


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _lossless(lines: Sequence[Record]) -> Table:
    """Bytes of every lossless form, restored and compared bit by bit."""
    files = [line for line in lines if "restored" in line]
    skills = sorted({line["skill"] for line in files})
    rows = []
    for method in sorted({line["method"] for line in files}):
        own = {line["skill"]: line for line in files if line["method"] == method}
        rows.append([method, *(_lossless_cell(own.get(skill)) for skill in skills)])
    return ("bytes of one file", *skills), rows


def _lossless_cell(line: Record | None) -> str:
    if line is None:
        return "–"
    return f"{line['bytes']:,}" + ("" if line["restored"] else " NOT RESTORED")


def _seconds(lines: Sequence[Record]) -> Table:
    """Processor seconds to make a file, choices on calibration rows included."""
    rows = []
    for method in methods_of(lines):
        own = [line for line in lines if line["method"] == method and line["budget"]]
        if own:
            seconds = sorted(line["cpu_seconds"] for line in own)
            rows.append([method, *(f"{seconds[i]:.1f}" for i in (0, len(seconds) // 2, -1))])
    return ("method", "least", "median", "most"), rows


def _out_of_reach(lines: Sequence[Record]) -> Table:
    """Budgets that a method cannot reach."""
    refusals: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        if "refused" in line:
            refusals.setdefault((line["method"], line["budget"]), set()).add(line["skill"])
    rows = [[*place, " ".join(sorted(skills))] for place, skills in sorted(refusals.items())]
    return ("method", "budget", "skills"), rows


def _lost(lines: Sequence[Record]) -> Table:
    """Every case where auto loses, by KL in and out of domain and by exact matches."""
    if AUTO not in methods_of(lines):
        return (), []
    rows = []
    for name, measure, worse in (
        ("kl_mean", "KL", 1),
        ("elsewhere_kl_mean", "KL on other skills", 1),
        ("base_kl_mean", "KL on base text", 1),
        ("recovered", "recovered", -1),
    ):
        values = mean_over_seeds(lines, name)
        for (method, skill, budget), value in sorted(values.items()):
            own = values.get((AUTO, skill, budget))
            if method != AUTO and own is not None and worse * (own - value) > 0:
                rows.append([measure, skill, budget, number(own), method, number(value)])
    return ("measure", "skill", "budget", AUTO, "better method", "its value"), rows


def number(value: float) -> str:
    """Two significant digits below 1, two decimals above."""
    return "0" if value == 0 else f"{value:.2g}" if abs(value) < 1 else f"{value:.2f}"


def _arithmetic(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _geometric(values: Sequence[float]) -> float:
    # KL spans four orders of magnitude: an arithmetic mean would show the worst skill only.
    return math.exp(_arithmetic([math.log(max(value, 1e-9)) for value in values]))
