"""Tables of the real benchmark as CSV, and its figure, from what the stages have left.

What is not measured yet is missing from the tables; nothing is measured here. A pack that other
sources of graftkit made is marked as old.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from frontier import LOSSLESS, OWN, ROOT, source_digest
from tasks import SKILLS, all_pairs

sys.path.append(str(ROOT / "benchmarks"))
from ledger import write_csv

Record = dict[str, Any]

TARGETS = (
    # method, budget in per cent, share of the gain that is to be recovered
    ("auto, rows", "1%", 0.99),
    ("auto, rows", "0.5%", 0.97),
    ("auto, rows", "0.25%", 0.93),
    ("auto", "5%", 0.99),
    ("auto", "1%", 0.90),
)
DISTANCES = ("own", "books", "python")
STYLES = {
    "auto, rows": ("#0072B2", "-", "o"),
    "auto": ("#56B4E9", "--", "o"),
    "LoRA, trained": ("#D55E00", "-", "D"),
    "graftllm, rows": ("#E69F00", "-", "s"),
    "deltacome-fixed": ("#CC79A7", "-", "v"),
    "prinmix": ("#009E73", "-", "^"),
    "mergekit-lora": ("#999999", "-.", "+"),
    "svd": ("#777777", "--", "."),
    "deltatensors": ("#000000", "-", "X"),
    "bitdelta": ("#000000", "-", "P"),
}
INK = "#222222"


def write_report(work: Path, docs: Path) -> list[Path]:
    """Write every table that has rows, and the figure. Returns: the files."""
    lines = [*pack_lines(work), *adapter_lines(work)]
    size = (work / "target" / "model.safetensors").stat().st_size
    for line in lines:
        line["share"] = 100 * line["bytes"] / size if "bytes" in line else None
    tables = {
        "models": model_table(work),
        "frontier": frontier_table(lines),
        "lossless": lossless_table(lines),
        "equal-accuracy": equal_accuracy_table(lines),
        "reach": reach_table(lines),
        "knowledge": knowledge_table(work, lines),
        "lora-rates": rate_table(work),
    }
    written = []
    for name, (header, rows) in tables.items():
        if rows:
            file = docs / "results" / "real" / f"{name}.csv"
            write_csv(file, header, rows)
            written.append(file)
    scored = [line for line in lines if line.get("recovered") is not None]
    if scored:
        file = docs / "figures" / "real-frontier.png"
        draw(scored, file)
        written.append(file)
    return written


def pack_lines(work: Path) -> list[Record]:
    """Every pack: what it took, its score where there is one, and whether it is old."""
    sources, lines = source_digest(), []
    for file in sorted(work.glob("pack-*/pack.json")):
        record = read(file)
        key = file.parent.name.removeprefix("pack-")
        score = read(work / f"score-{key}.json")
        old = record["method"] in OWN and record["sources"] != sources
        lines.append({**record, **_scores(work, record["pair"], score), "key": key, "old": old})
    return lines


def adapter_lines(work: Path) -> list[Record]:
    """Every trained LoRA adapter that has a score, as if it were a pack."""
    lines = []
    for file in sorted(work.glob("lora-*/training.json")):
        record, key = read(file), file.parent.name
        score = read(work / f"score-{key}.json")
        if not score:
            continue
        lines.append({
            "method": "LoRA, trained", "pair": score["pair"], "budget": f"rank {record['rank']}",
            "seed": record["seed"], "tag": "", "key": key, "rate": record["rate"], "old": False,
            "bytes": (file.parent / "adapter_model.safetensors").stat().st_size,
            "cpu_seconds": record["cpu_seconds"], "peak_bytes": record["peak_bytes"],
            **_scores(work, score["pair"], score),
        })  # fmt: skip
    return lines


def model_table(work: Path) -> tuple[Sequence[str], list[list[str]]]:
    """Target and tuned of every pair: exact matches, loss of text, distance of the two."""
    rows = []
    for pair in all_pairs():
        target, tuned = (read(work / f"score-{pair.name}-{m}.json") for m in ("target", "tuned"))
        if not (target and tuned):
            continue
        log = read(work / pair.tuned / "training.json")
        values = [target.get("exact_match"), tuned.get("exact_match")]
        values += [target.get("loss"), tuned.get("loss")]
        values += [target[name]["kl_mean"] for name in DISTANCES]
        rows.append([pair.name, *map(_number, [*values, log.get("cpu_seconds")])])
    header = ("pair", "target exact", "tuned exact", "target loss", "tuned loss")
    distances = tuple(f"KL(tuned | target) {name}" for name in DISTANCES)
    return (*header, *distances, "training CPU s"), rows


def frontier_table(lines: Iterable[Record]) -> tuple[Sequence[str], list[list[str]]]:
    """One row a file, refusals too."""
    header = (
        *("pair", "method", "budget", "seed", "version", "bytes", "share %", "recovered", "exact"),
        *("KL", "KL p99", "top 1", "KL books", "KL python", "loss", "CPU s", "peak MB", "refused"),
    )
    rows = []
    for line in lines:
        if line["method"] in LOSSLESS:
            continue
        own = line.get("own", {})
        values = [line.get("bytes"), line.get("share"), line.get("recovered"), line.get("exact")]
        values += [own.get("kl_mean"), own.get("kl_p99"), own.get("top1")]
        values += [line.get(name, {}).get("kl_mean") for name in DISTANCES[1:]]
        values += [line.get("loss"), line.get("cpu_seconds"), _megabytes(line.get("peak_bytes"))]
        names = [line["pair"], line["method"], line["budget"] or "", str(line["seed"])]
        rows.append([*names, _version(line), *map(_number, values), line.get("refused", "")])
    return header, sorted(rows)


def lossless_table(lines: Iterable[Record]) -> tuple[Sequence[str], list[list[str]]]:
    """Bytes of files that were restored bit for bit."""
    header = ("pair", "method", "version", "bytes", "share %", "CPU s", "peak MB")
    rows = []
    for line in lines:
        if line["method"] in LOSSLESS and line.get("restored"):
            values = [line["bytes"], line["share"], line["cpu_seconds"]]
            values += [_megabytes(line["peak_bytes"])]
            names = [line["pair"], line["method"], _version(line)]
            rows.append([*names, *map(_number, values)])
    return header, sorted(rows)


def equal_accuracy_table(lines: Sequence[Record]) -> tuple[Sequence[str], list[list[str]]]:
    """Bytes of our smallest pack that is as accurate as a trained adapter, against its bytes."""
    header = (
        "pair",
        "adapter",
        "adapter bytes",
        "exact",
        "method",
        "bytes",
        "exact of pack",
        "ratio",
    )
    rows = []
    for adapter in lines:
        if adapter["method"] != "LoRA, trained":
            continue
        for method in ("auto, rows", "auto"):
            packs = [
                line for line in lines
                if (line["pair"], line["method"]) == (adapter["pair"], method)
                and line.get("exact") is not None and line["exact"] >= adapter["exact"]
            ]  # fmt: skip
            best = min(packs, key=lambda line: line["bytes"], default=None)
            found = [best["bytes"], best["exact"], adapter["bytes"] / best["bytes"]] if best else []
            values = [
                adapter["bytes"],
                adapter["exact"],
                method,
                *found,
                *[None] * (3 - len(found)),
            ]
            rows.append([adapter["pair"], adapter["budget"], *map(_number, values)])
    return header, rows


def reach_table(lines: Sequence[Record]) -> tuple[Sequence[str], list[list[str]]]:
    """What is to be reached, and the mean over the skills of what is."""
    skills = {skill.short for skill in SKILLS}
    header = ("method", "budget", "version", "to recover", "recovered", "skills", "reached")
    rows = []
    for method, budget, goal in TARGETS:
        own = [x for x in lines if (x["method"], x["budget"]) == (method, budget)]
        for version in sorted({_version(line) for line in own}):
            same = [x for x in own if _version(x) == version and x.get("recovered") is not None]
            by_skill = {
                skill: fmean(x["recovered"] for x in same if x["pair"] == skill)
                for skill in sorted(skills.intersection(x["pair"] for x in same))
            }
            if by_skill:
                mean = fmean(by_skill.values())
                cells = [_number(goal), _number(mean), str(len(by_skill))]
                reached = "yes" if mean >= goal and len(by_skill) == len(skills) else "no"
                rows.append([method, budget, version, *cells, reached])
    return header, rows


def knowledge_table(work: Path, lines: Iterable[Record]) -> tuple[Sequence[str], list[list[str]]]:
    """What the target knew before, in every state that was asked."""
    measures = ("chat_right", "chat_kl", "spam_auc", "gsm8k_loss")
    names = {line["key"]: (line["method"], str(line["budget"])) for line in lines}
    rows = []
    for file in sorted(work.glob("knowledge-*.json")):
        record, key = read(file), file.stem.removeprefix("knowledge-")
        if measures[0] in record:
            method, budget = names.get(key, (key.split("-")[-1], ""))
            values = [record[name] for name in measures]
            rows.append([record["pair"], method, budget, *map(_number, values)])
    return ("pair", "method", "budget", *measures), sorted(rows)


def rate_table(work: Path) -> tuple[Sequence[str], list[list[str]]]:
    """How the learning rate of LoRA was chosen, on validation rows."""
    choice = read(work / "lora-rate.json")
    scores = choice.get("scores", {})
    rows = [
        [rate, _number(score["loss"]), _number(score["exact_match"]),
         "chosen" if float(rate) == choice["rate"] else ""]
        for rate, score in scores.items()
    ]  # fmt: skip
    return ("rate", "validation loss", "validation exact", ""), rows


def draw(lines: Sequence[Record], file: Path) -> None:
    """The share of the gain that files keep, over their bytes: one panel a skill."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    skills = [skill.short for skill in SKILLS]
    figure, panels = plt.subplots(1, len(skills), figsize=(14, 5), sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axes, skill in zip(panels, skills, strict=True):
        axes.set(xscale="log", xlabel="bytes on disk", ylim=(-0.05, 1.1))
        axes.set_title(skill, color=INK, fontsize=13, loc="left")
        axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        for method, (color, dash, marker) in STYLES.items():
            own = [x for x in lines if (x["method"], x["pair"]) == (method, skill)]
            points = sorted((x["bytes"], x["recovered"]) for x in own)
            if points:
                style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5}
                handles[method] = axes.plot(*zip(*points, strict=True), dash, **style)[0]
    panels[0].set_ylabel("recovered share of the gain in exact matches", color=INK)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def read(file: Path) -> Record:
    """The object of a JSON file; empty where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _scores(work: Path, pair_name: str, score: Record) -> Record:
    """A score with the share of the gain that it keeps."""
    pair = next(pair for pair in all_pairs() if pair.name == pair_name)
    target, tuned = (read(work / f"score-{pair.name}-{m}.json") for m in ("target", "tuned"))
    result: Record = {name: score[name] for name in (*DISTANCES, "loss") if name in score}
    exact = score.get("exact_match")
    result["exact"] = exact
    ends = [target.get("exact_match"), tuned.get("exact_match")]
    if None not in (exact, *ends) and ends[0] != ends[1]:
        result["recovered"] = (exact - ends[0]) / (ends[1] - ends[0])
    return result


def _version(line: Record) -> str:
    return f"{line['tag']}{' (old)' if line['old'] else ''}" if line["method"] in OWN else ""


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return str(value)
