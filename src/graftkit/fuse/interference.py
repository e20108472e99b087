"""Interference between packs: how similar and how contrary two deltas are, tensor by tensor.

The measures are ratios of sums over entries. The sums are stored, so that tensors add up to module
kinds and to whole packs. `draw_interference` makes a picture of every pair and every tensor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.compress.entries import largest_entries
from graftkit.errors import ConfigError, printable
from graftkit.files import replaced_file
from graftkit.fuse.merge import open_merge
from graftkit.progress import Progress
from graftkit.skillpack import SkillPack

TOP_SHARE = 0.1
"""Share of a tensor's entries that count as its largest. Unrelated packs share a tenth of them."""


@dataclass(frozen=True)
class Interference:
    """Sums over the entries a, b of two deltas; x + y are the sums over two tensors together."""

    dot: float = 0.0
    """Σ a b."""
    squares_a: float = 0.0
    """Σ a²."""
    squares_b: float = 0.0
    """Σ b²."""
    both: int = 0
    """Entries that both packs change."""
    conflicts: int = 0
    """Entries that the packs change in opposite directions."""
    magnitude: float = 0.0
    """Σ |a b|."""
    top: int = 0
    """Largest entries, in the pack that has fewer of them."""
    shared_top: int = 0
    """Entries that are among the largest of both packs."""

    def __add__(self, other: "Interference") -> "Interference":
        names = [field.name for field in fields(self)]
        return Interference(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def cosine(self) -> float | None:
        """Σ a b / √(Σ a² Σ b²), -1 to 1; None where a pack changes nothing."""
        return _ratio(self.dot, (self.squares_a * self.squares_b) ** 0.5)

    @property
    def sign_conflicts(self) -> float | None:
        """conflicts / both: of the entries that both packs change, those of opposite signs."""
        return _ratio(self.conflicts, self.both)

    @property
    def weighted_conflicts(self) -> float | None:
        """The same share, with each entry weighted by |a b|; 1/2 for unrelated packs."""
        return _ratio((self.magnitude - self.dot) / 2, self.magnitude)

    @property
    def top_overlap(self) -> float | None:
        """Share of the largest entries that both packs have; 0.1 for unrelated packs."""
        return _ratio(self.shared_top, self.top)

    def numbers(self) -> dict[str, float | None]:
        """The four measures by name."""
        return {
            "cosine": self.cosine,
            "sign_conflicts": self.sign_conflicts,
            "weighted_conflicts": self.weighted_conflicts,
            "top_overlap": self.top_overlap,
        }


@dataclass(frozen=True)
class PackPair:
    """The interference of two packs.

    Attributes:
        first, second: indices of the packs.
        tensors: by name, only those that a pack changes. kinds: their module kinds.
    """

    first: int
    second: int
    tensors: dict[str, Interference]
    kinds: Mapping[str, str]

    @property
    def total(self) -> Interference:
        """Over all tensors."""
        return sum(self.tensors.values(), Interference())

    def by_kind(self) -> dict[str, Interference]:
        """Over the tensors of each module kind."""
        sums: dict[str, Interference] = {}
        for name, interference in self.tensors.items():
            kind = self.kinds[name]
            sums[kind] = sums.get(kind, Interference()) + interference
        return dict(sorted(sums.items()))


def compare_deltas(a: Tensor, b: Tensor) -> Interference:
    """The sums for two deltas of one tensor, float32, one shape."""
    product = a.double() * b.double()
    tops = [_top(delta) for delta in (a, b)]
    return Interference(
        dot=float(product.sum()),
        squares_a=float(a.double().square().sum()),
        squares_b=float(b.double().square().sum()),
        both=int(product.count_nonzero()),
        conflicts=int((product < 0).sum()),
        magnitude=float(product.abs().sum()),
        top=int(min(top.sum() for top in tops)),
        shared_top=int((tops[0] & tops[1]).sum()),
    )


def measure_interference(
    target: str | Path | Checkpoint,
    packs: Sequence[str | Path | SkillPack],
    progress: Progress | None = None,
) -> list[PackPair]:
    """The interference of every pair of packs of one target.

    In memory is one tensor of every pack.

    Raises: PackMismatchError for a pack of another target, or one that changes shapes, adds
        tensors or changes the tokenizer; ConfigError for fewer than two packs.
    """
    if len(packs) < 2:
        raise ConfigError(f"{len(packs)} pack has nobody to compare with; name at least two")
    merge = open_merge(target, list(packs), None, "task_arithmetic", None)
    merge.check_addable()
    opened = merge.packs
    kinds = {record.name: record.kind for record in opened[0].manifest.tensors}
    pairs = [PackPair(i, j, {}, kinds) for i, j in combinations(range(len(opened)), 2)]
    names = list(filter(merge.changes, merge.names))
    for done, name in enumerate(names):
        if progress is not None:
            progress("comparing packs", done, len(names))
        before = merge.target.read(name)
        deltas = [pack.delta(name, before) for pack in opened]
        for pair in pairs:
            pair.tensors[name] = compare_deltas(deltas[pair.first], deltas[pair.second])
    return pairs


def _top(delta: Tensor) -> Tensor:
    """Flat mask of the largest entries that are not zero."""
    mask = largest_entries(delta, max(1, int(TOP_SHARE * delta.numel())))
    return torch.from_numpy(mask) & (delta.reshape(-1) != 0)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


_MEASURES = {  # attribute: title, lowest and highest colour
    "cosine": ("cosine", -1.0, 1.0),
    "weighted_conflicts": ("sign conflicts, weighted", 0.0, 1.0),
    "top_overlap": ("overlap of the largest 10 %", 0.0, 1.0),
}
_ROW_INCHES, _LABELLED_ROWS = 0.16, 80  # more modules than this are drawn without their names


def draw_interference(pairs: Sequence[PackPair], names: Sequence[str], file: Path) -> None:
    """Write a PNG: for each measure a matrix of packs by packs, and the cosine of every tensor.

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


def _draw_square(axes: Any, pairs: Sequence[PackPair], names: Sequence[str], measure: str) -> None:
    title, low, high = _MEASURES[measure]
    # The diagonal, a pack with itself, stays blank.
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


def _draw_modules(axes: Any, pairs: Sequence[PackPair], names: Sequence[str]) -> None:
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


def _value(interference: Interference, measure: str) -> float:
    """The measure; NaN, which is drawn blank, where a pack changes nothing."""
    value = getattr(interference, measure)
    return math.nan if value is None else value
