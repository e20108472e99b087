"""The picture of `interference`: packs against packs, and modules against pairs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftkit.errors import ConfigError
from graftkit.files import replaced_file
from graftkit.fuse.interference import Interference, Pair
from graftkit.text import printable

_MEASURES = {  # attribute: title, lowest and highest colour
    "cosine": ("cosine", -1.0, 1.0),
    "weighted_conflicts": ("sign conflicts, weighted", 0.0, 1.0),
    "top_overlap": ("overlap of the largest 10 %", 0.0, 1.0),
}
_ROW_INCHES, _LABELLED_ROWS = 0.16, 80  # more modules than this are drawn without their names


def draw_interference(pairs: Sequence[Pair], names: Sequence[str], file: Path) -> None:
    """Write a PNG: one square per measure, packs by packs, and the cosine of every tensor.

    Args:
        names: of the packs, in the order of their indices.
    Raises: ConfigError without matplotlib; OutputError.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--figure needs matplotlib, which is not here; pip install 'graftkit[report]', or "
            "leave --figure out"
        ) from error
    rows, names = len(pairs[0].tensors), [printable(name) for name in names]
    with rc_context({"text.parse_math": False}):  # a name may hold dollar signs
        size = 12, max(4.0, 1 + _ROW_INCHES * min(rows, 2 * _LABELLED_ROWS))
        figure: Any = Figure(figsize=size)
        figure.set_layout_engine("constrained")
        squares, modules = figure.subfigures(1, 2, width_ratios=(1, 2))
        for axes, measure in zip(squares.subplots(len(_MEASURES), 1), _MEASURES, strict=True):
            _draw_square(axes, pairs, names, measure)
        _draw_modules(modules.subplots(), pairs, names)
        with replaced_file(file) as partial:
            figure.savefig(partial, format="png", dpi=120)


def _draw_square(axes: Any, pairs: Sequence[Pair], names: Sequence[str], measure: str) -> None:
    title, low, high = _MEASURES[measure]
    # What a pack has in common with itself says nothing and stays blank.
    values = [[math.nan] * len(names) for _ in names]
    for pair in pairs:
        values[pair.first][pair.second] = values[pair.second][pair.first] = _value(
            pair.total, measure
        )
    axes.imshow(values, vmin=low, vmax=high, cmap="RdBu_r" if low < 0 else "Reds")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            text = "" if math.isnan(value) else f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7)
    axes.set_title(title, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)


def _draw_modules(axes: Any, pairs: Sequence[Pair], names: Sequence[str]) -> None:
    tensors = list(pairs[0].tensors)
    titles = [printable(name) for name in tensors]
    values = [[_value(pair.tensors[name], "cosine") for pair in pairs] for name in tensors]
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    axes.set_title("cosine by tensor", fontsize=8)
    labels = [f"{names[pair.first]}\n{names[pair.second]}" for pair in pairs]
    axes.set_xticks(range(len(pairs)), labels, rotation=30, ha="right", fontsize=6)
    shown = len(tensors) <= _LABELLED_ROWS
    axes.set_yticks(range(len(tensors)) if shown else [], titles if shown else [], fontsize=6)


def _value(found: Interference, measure: str) -> float:
    """NaN, which stays blank, where a pack changes nothing."""
    value = getattr(found, measure)
    return math.nan if value is None else value
