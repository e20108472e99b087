"""Pictures of the report, as SVG: the frontier and the course of training."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

SETTINGS: Any = {  # matplotlib types every key
    "svg.fonttype": "none",  # text stays text: class names in any script, and a smaller file
    "svg.hashsalt": "graftkit",  # the same result gives the same bytes
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}
PANELS = (
    ("bytes", "size of the float32 file, MB", 1e6),
    ("macs", "multiply-accumulates of one image, M", 1e6),
    ("p50_ms", "median latency of one image, ms", 1.0),
)
MARKERS = "osD^vP<>Xhp*"
SHORT_RANGE = 50.0  # highest cost by the lowest, below which more than powers of ten are named
OWN_COLOR, LINE_COLOR = "#2e7d32", "#8a8f98"


def frontier(methods: Mapping[str, Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy against bytes, multiply-accumulates and milliseconds.

    Args:
        methods: by name, the rootstock first: `test_accuracy`, `test_interval` and what it costs.
            One without a cost is left out of that panel.
        curve: points of the frozen probes, drawn as a line of their validation accuracy.
    Returns: a data URI.
    """
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, (cost, label, unit) in zip(panels, PANELS, strict=True):
            _draw_curve(axes, curve, cost, unit)
            for index, (name, numbers) in enumerate(methods.items()):
                if numbers.get(cost) and numbers.get("test_accuracy") is not None:
                    _draw_method(axes, index, name, numbers, numbers[cost] / unit)
            _scale(axes)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("accuracy, %")
        labelled: dict[str, Any] = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            labelled |= dict(zip(labels, handles, strict=True))
        figure.legend(
            list(labelled.values()),
            list(labelled),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        return _as_uri(figure)


def training_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Losses and validation accuracy by epoch. Returns: a data URI."""
    epochs = range(1, len(history) + 1)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
        for key, label, color in (
            ("train_loss", "training", LINE_COLOR),
            ("val_loss", "validation", OWN_COLOR),
        ):
            losses.plot(
                epochs, [epoch.get(key) for epoch in history], ".-", color=color, label=label
            )
        losses.set_ylabel("loss")
        losses.legend(frameon=False)
        shares = [100 * epoch["val_accuracy"] for epoch in history]
        accuracy.plot(epochs, shares, ".-", color=OWN_COLOR)
        accuracy.set_ylabel("validation accuracy, %")
        for axes in (losses, accuracy):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        return _as_uri(figure)


def _draw_curve(axes: Any, curve: Sequence[Mapping[str, Any]], cost: str, unit: float) -> None:
    points = sorted((p[cost] / unit, 100 * p["val_accuracy"]) for p in curve if p.get(cost))
    if points:
        label = "every cut, frozen (validation)"
        axes.plot(*zip(*points, strict=True), ".-", color=LINE_COLOR, lw=1, ms=3, label=label)


def _draw_method(axes: Any, index: int, name: str, numbers: Mapping[str, Any], cost: float) -> None:
    share = 100 * numbers["test_accuracy"]
    low, high = numbers.get("test_interval") or (numbers["test_accuracy"],) * 2
    axes.errorbar(
        [cost],
        [share],
        yerr=[[max(0.0, share - 100 * low)], [max(0.0, 100 * high - share)]],
        fmt=MARKERS[index % len(MARKERS)],
        color=OWN_COLOR if index == 0 else f"C{(index - 1) % 10}",
        ms=8 if index == 0 else 5,
        capsize=2,
        lw=1,
        label=name,
        zorder=3,
    )


def _scale(axes: Any) -> None:
    """A logarithmic axis with labels that are numbers, more of them on a short one."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low > SHORT_RANGE else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _as_uri(figure: Figure) -> str:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # The page's reader has fonts for what matplotlib's own lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
