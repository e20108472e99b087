"""Small multiples of spectra.py: cumulative energy over components, one column per fine-tune."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from ledger import Record

mpl.use("Agg")
from matplotlib import pyplot as plt

VIEWS = {
    "plain": "δ",
    "inputs": "δ H$^{½}$",
    "outputs": "G$^{½}$ δ H$^{½}$",
}
# Okabe and Ito's colors; attention dashed, so that it is told apart in grey as well.
STYLES = {
    "q": ("#56B4E9", "--"),
    "k": ("#0072B2", "--"),
    "v": ("#009E73", "--"),
    "o": ("#CC79A7", "--"),
    "gate": ("#E69F00", "-"),
    "up": ("#D55E00", "-"),
    "down": ("#222222", "-"),
    "embedding, read": ("#8a8a8a", "-."),
    "embedding, head": ("#8a8a8a", ":"),
}
GRID = np.geomspace(1 / 384, 1, 200)  # shares of the components


def draw_spectra(records: Sequence[Record], file: Path) -> None:
    """Draw every pair of `records`, a panel for each view."""
    matrices = [record for record in records if "views" in record]
    pairs = list(dict.fromkeys(record["pair"] for record in matrices))
    figure, panels = plt.subplots(
        len(VIEWS), len(pairs), figsize=(3.1 * len(pairs), 8.4), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for column, pair in enumerate(pairs):
        for axes, view in zip(panels[:, column], VIEWS, strict=True):
            _panel(axes, [record for record in matrices if record["pair"] == pair], view)
        panels[0][column].set_title(pair, fontsize=12, loc="left")
        panels[-1][column].set_xlabel("share of the components")
    for axes, text in zip(panels[:, 0], VIEWS.values(), strict=True):
        axes.set_ylabel(f"share of the energy of {text}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels), frameon=False, handlelength=2.4
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90, metadata={"Software": None})
    plt.close(figure)


def _panel(axes: Any, records: Sequence[Record], view: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.1, 1], ["1 %", "10 %", "100 %"])
    axes.set_yticks([0, 0.5, 0.9, 1], ["0", "50 %", "90 %", "100 %"])
    axes.set_ylim(0, 1.02)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for kind, (color, dash) in STYLES.items():
        curves = [_curve(r["views"][view]["values"]) for r in records if r["kind"] == kind]
        if curves:
            axes.plot(GRID, np.mean(curves, 0), dash, color=color, linewidth=1.6, label=kind)
    noise = [_curve(r["views"][view]["white_values"]) for r in records if r["kind"] == "up"]
    if noise:
        axes.fill_between(
            GRID, np.mean(noise, 0), color="#e9e9e9", linewidth=0, zorder=0,
            label="white noise as up",
        )  # fmt: skip


def _curve(values: Sequence[float]) -> Any:
    """Cumulative share of the energy at the shares of GRID; between components it is a line."""
    energy = np.cumsum(np.square(values))
    places = np.arange(len(values) + 1) / len(values)
    return np.interp(GRID, places, np.concatenate([[0], energy / energy[-1]]))
