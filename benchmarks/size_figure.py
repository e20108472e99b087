"""Curves of size.py: KL and recovered over bytes, one column of panels per skill."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from ledger import Record

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito: told apart with every common colour blindness, and by the dashes in grey.
STYLES = {
    ("auto", True): ("auto, rows", "#0072B2", "-", "o"),
    ("auto", False): ("auto", "#56B4E9", "--", "o"),
    ("graftllm", True): ("graftllm, rows", "#D55E00", "-", "s"),
    ("graftllm", False): ("graftllm", "#E69F00", "--", "s"),
}
EXACT = {"lossless": "lossless", "XOR + xz": "XOR + xz", "tuned, bf16": "tuned file"}
INK, FAINT = "#222222", "#8a8a8a"
BYTES_SHOWN = (1.2e4, 2.6e7)  # from 1 % of the nursery's target, names to its left, to the whole
LABEL_GAP = 0.06  # of the panel's height: one line of text


def draw_curves(lines: Sequence[Record], file: Path) -> None:
    """Draw the figure of all skills in `lines` into `file`."""
    skills = list(dict.fromkeys(line["skill"] for line in lines))
    figure, panels = plt.subplots(
        2, len(skills), figsize=(4.4 * len(skills), 8.6), sharex=True, sharey="row", squeeze=False
    )
    named: list[Any] = []
    for column, skill in enumerate(skills):
        own = [line for line in lines if line["skill"] == skill and "refused" not in line]
        labels = [
            _panel(panels[row][column], own, name)
            for row, name in enumerate(("kl_mean", "recovered"))
        ]
        named += zip(panels[:, column], labels, strict=True)
        panels[0][column].set_title(skill, color=INK, fontsize=13, loc="left")
        panels[1][column].set_xlabel("pack on disk", color=INK)
    panels[0][0].set_ylabel("mean KL(tuned || target + pack), nats a token", color=INK)
    panels[1][0].set_ylabel("recovered share of tuned's exact matches", color=INK)
    figure.tight_layout()
    # Only now are the limits of every panel known, which the places of the names depend on.
    for axes, labels in named:
        _name_curves(axes, labels)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panel(axes: Any, lines: Sequence[Record], name: str) -> list[Any]:
    """Draw one panel. Returns: name, color and points of each curve."""
    axes.set_xscale("log")
    axes.set_xlim(*BYTES_SHOWN)
    axes.set_xticks([1e5, 1e6, 1e7], ["100 KB", "1 MB", "10 MB"])
    if name == "kl_mean":
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.04, 1.08)
        axes.axhline(1.0, color=FAINT, linewidth=0.8)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    labels = []
    for (recipe, rows), (text, color, dash, marker) in STYLES.items():
        points = sorted(
            (line["bytes"], line[name])
            for line in lines
            if line["recipe"] == recipe and line["budget"] and bool(line["calibration"]) == rows
            if line[name] is not None
        )
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, dash, color=color, marker=marker, markersize=4.5, linewidth=1.8)
            labels.append((text, color, points))
    _exact_lines(axes, lines)
    return labels


def _exact_lines(axes: Any, lines: Sequence[Record]) -> None:
    """Vertical lines where a lossless form lies: its KL is 0 and has no place on a log axis."""
    for line in lines:
        if line["recipe"] in EXACT:
            axes.axvline(line["bytes"], color=FAINT, linewidth=1, linestyle=":")
            side = "right" if line["recipe"] == "lossless" else "left"
            axes.text(
                line["bytes"], 0.3, EXACT[line["recipe"]], rotation=90, fontsize=9, va="bottom",
                color="#555555", ha=side, transform=axes.get_xaxis_transform(),
            )  # fmt: skip


def _name_curves(axes: Any, labels: Sequence[tuple[str, str, list[tuple[float, float]]]]) -> None:
    """Write each curve's name left of its first point, moved apart where they would touch."""
    places = []
    for text, color, points in labels:
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(points[0]))
        places.append([min(max(y, 0.03), 0.97), x, text, color])
    places.sort()
    for lower, upper in pairwise(places):
        upper[0] = max(upper[0], lower[0] + LABEL_GAP)
    excess = max(0.0, places[-1][0] - 0.98) if places else 0.0
    for y, x, text, color in places:
        axes.text(
            x - 0.025, y - excess, text, color=color, fontsize=10, fontweight="bold",
            ha="right", va="center", transform=axes.transAxes,
        )  # fmt: skip
