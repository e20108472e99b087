"""Curves of frontier.py: KL over bytes, one panel for each skill."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from ledger import Record

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito first, then greys: told apart by marker and dash as well as by colour.
STYLES = {
    "auto, rows": ("#0072B2", "-", "o"),
    "auto, 4096 rows": ("#0072B2", ":", "*"),
    "auto, 1600 steps": ("#0072B2", ":", "P"),
    "auto, 4096 rows, 1600 steps": ("#0072B2", "-.", "*"),
    "auto": ("#56B4E9", "--", "o"),
    "auto, servable": ("#56B4E9", ":", "^"),
    "graftllm, rows": ("#D55E00", "-", "s"),
    "graftllm+embedding": ("#E69F00", "-", "s"),
    "deltacome-fixed": ("#CC79A7", "-", "v"),
    "deltacome-published": ("#CC79A7", ":", "v"),
    "prinmix": ("#009E73", "-", "^"),
    "bitdelta": ("#000000", "-", "X"),
    "svd": ("#777777", "--", "."),
    "pruning": ("#777777", ":", "d"),
    "mergekit-lora": ("#999999", "-.", "+"),
}
INK = "#222222"


def draw_frontier(lines: Sequence[Record], file: Path) -> None:
    """Draw every skill's panel into `file`; the band spans the draws of calibration rows."""
    skills = sorted({line["skill"] for line in lines})
    figure, panels = plt.subplots(
        1, len(skills), figsize=(4.6 * len(skills), 5.4), sharex=True, sharey=True, squeeze=False
    )
    handles: dict[str, object] = {}
    for axes, skill in zip(panels[0], skills, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="bytes on disk")
        axes.set_title(skill, color=INK, fontsize=13, loc="left")
        axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        for method, style in STYLES.items():
            own = [x for x in lines if (x["method"], x["skill"]) == (method, skill)]
            if own:
                handles[method] = _draw(axes, own, style)
    panels[0][0].set_ylabel("mean KL(tuned || packed), nats a token", color=INK)
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw(axes: object, own: Sequence[Record], style: tuple[str, str, str]) -> object:
    """One curve: means over draws, and a band from the lowest to the highest."""
    color, dash, marker = style
    groups: dict[str | None, list[Record]] = {}
    for line in own:
        groups.setdefault(line["budget"], []).append(line)
    points = []
    for group in groups.values():
        values = [max(line["kl_mean"], 1e-6) for line in group]
        size = sum(line["bytes"] for line in group) / len(group)
        points.append((size, sum(values) / len(values), min(values), max(values)))
    x, mean, low, high = zip(*sorted(points), strict=True)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)  # type: ignore[attr-defined]
    (drawn,) = axes.plot(  # type: ignore[attr-defined]
        x, mean, dash, color=color, marker=marker, markersize=5, linewidth=1.5
    )
    return drawn
