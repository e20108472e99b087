"""Merges that take one pack after another and never look back: what they need and what they keep.

Memory is bounded: one delta in float32, whatever the number of packs. The order of packs matters
by definition, so nothing here sorts them.

OPCM: merge models one after another, each without the directions that are taken already.

Orthogonal projection-based continual merging (arXiv 2501.09522; fusion_bench has its code):

    Δ'_t = Δ_t without what it shares with R_{t−1}             (`project_out`)
    R_t = R_{t−1} + Δ'_t,   R_1 = Δ_1
    Δ_merged = R_t · mean_i ‖Δ_i‖ / ‖R_t‖                      (norms over the whole delta)

The paper writes (λ_{t−1} Δ_merged,t−1 + Δ'_t) / λ_t; as λ_{t−1} Δ_merged,t−1 = R_{t−1}, the sum R
is all there is to keep.

KIF: merge skills one after another, unit by unit, weighted by how much each unit matters.

Knowledge identification and fusion (arXiv 2408.05200; code: WoodScene/TaSL). A skill unit is one
tensor of the target, its importance I(u) a number:

    Î_t = min-max of I_t over the units, vectors apart         (`normalized`)
    Δ_merged ← (1 − a) Δ_merged + a Δ_t,   a = e^{Î_t/τ} / (e^{Ī_{t−1}/τ} + e^{Î_t/τ})
    Ī_t = min-max of β Ī_{t−1} + (1 − β) Î_t,   Ī_1 = Î_1

What matters to one side only is nearly kept or nearly taken, what matters to both or to nobody is
averaged: the adaptive form of the paper's fusion, with the constants of its code.

Differences from the paper. Its units are the matrices A and B of a LoRA, merged apart, which puts
products of different skills into ΔW; ours are whole deltas. They include norms and biases, whose
entries move much more than those of matrices and would set the scale of all importances; so the two
have scales of their own. The paper's importance is the running mean of |w g| over the steps of
training, times that of its deviation; we have the trained delta, and take the mean of |Δ g| over
rows of the task (`fuse/search.py`), or, without rows, of Δ², to which |Δ g| is proportional
where the gradient points along the delta. The paper trains each task from the merged model; a pack
may be trained from there or from the target, Δ_t is its distance from the target in both cases.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from graftkit.compress.codecs import TensorLayout, assemble, matrices
from graftkit.errors import ConfigError


@dataclass(frozen=True)
class TaskDelta:
    """One pack, as a running merge takes it.

    Attributes:
        deltas: Δ of every tensor that the pack changes, float32; it may be decoded when asked for.
        layouts: how the weights of linear maps become (out, in) matrices. Embeddings, norms and
            biases are not among them.
        importances: how much each tensor matters for the task; None where nobody measured it.
    """

    deltas: Mapping[str, Tensor]
    layouts: Mapping[str, TensorLayout] = field(default_factory=dict)
    importances: Mapping[str, float] | None = None


@dataclass
class RunningMerge(ABC):
    """A merged delta and the numbers that the next pack will need.

    Attributes:
        total: running tensors by name, float32, shape of the target's; absent ones are zero.
        statistics: numbers by name.
    """

    method: ClassVar[str]
    """Name on the command line."""

    total: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def add(self, skill: TaskDelta) -> None:
        """Take one more pack."""

    @abstractmethod
    def delta(self, name: str) -> Tensor:
        """What the packs so far add to a tensor of the target; `name` is in `total`."""

    @abstractmethod
    def is_sound(self) -> bool:
        """Whether `statistics` are such that this class could have left behind."""


_SMALLEST, _LARGEST = 1e-15, 1e15  # entries whose squares float32 adds up
TAKEN_SHARE = 0.5
"""α: the share of Σσ whose directions are closed to later packs; 0.5 in paper and code."""


def project_out(delta: Tensor, merged: Tensor, share: float = TAKEN_SHARE) -> Tensor:
    """What a delta adds to a merged one.

        merged = U diag(σ) Vᵀ,   P = Uᵀ Δ V
        Δ' = Δ − U (M ⊙ P) Vᵀ,   M_ij = 1 where i = j, and where i, j ≤ s

    with s the number of largest σ that together stay within `share` of Σσ. So Δ' is orthogonal to
    `merged` and to each of its σ_i u_i v_iᵀ, and has nothing in the span of the first s.

    Differences from the code: it takes U and V of full size, (m, m) and (n, n), for the same
    result; and it also clears the diagonal where σ is 0, whose vectors are any. Here M ends at the
    rank of `merged`.

    Args:
        delta, merged: (out, in), float32; in float64 where squares vanish or overflow.
    """
    try:
        if merged.dtype == torch.float32 and not _computable(merged, delta):
            return project_out(delta.double(), merged.double(), share).float()
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    except RuntimeError:  # LinAlgError is one: LAPACK gave up
        if merged.dtype == torch.float64:
            raise
        return project_out(delta.double(), merged.double(), share).float()
    rank = int((S[:1] * max(merged.shape) * torch.finfo(S.dtype).eps < S).sum())
    if rank == 0:
        return delta
    U, S, Vh = U[:, :rank], S[:rank].double(), Vh[:rank]
    taken = int((S.cumsum(0) <= share * S.sum()).sum())
    shared = U.T @ delta @ Vh.T
    kept = shared.diagonal().clone()
    kept[:taken] = 0
    shared[taken:] = 0
    shared[:, taken:] = 0
    shared.diagonal().add_(kept)
    left: Tensor = delta - U @ shared @ Vh
    return left


def _computable(*matrices: Tensor) -> bool:
    """Whether float32 holds the squares of all entries."""
    peaks = [float(matrix.abs().max()) for matrix in matrices if matrix.numel()]
    return all(peak == 0 or _SMALLEST <= peak <= _LARGEST for peak in peaks)


@dataclass
class Opcm(RunningMerge):
    """`total` is R; `statistics` are how many packs it took and the two norms."""

    method: ClassVar[str] = "opcm"

    def add(self, skill: TaskDelta) -> None:
        """R ← R + Δ': projected for linear maps, the plain sum for everything else."""
        squares = 0.0
        for name in sorted(skill.deltas):
            delta = skill.deltas[name]
            squares += _square(delta)
            before = self.total.get(name)
            if before is not None:
                layout = skill.layouts.get(name)
                added = delta if layout is None else _projected(delta, before, layout)
                delta = before + added
            if not bool(delta.isfinite().all()):
                raise ConfigError(f"{name}: the sum of the packs is beyond what float32 holds")
            self.total[name] = delta
        count = self.statistics.get("packs", 0) + 1
        mean = self.statistics.get("mean_norm", 0.0)
        mean += (math.sqrt(squares) - mean) / count
        norm = math.sqrt(sum(_square(self.total[name]) for name in sorted(self.total)))
        self.statistics = {"packs": count, "mean_norm": mean, "norm": norm}

    def delta(self, name: str) -> Tensor:
        """R · mean ‖Δ‖ / ‖R‖."""
        norm = self.statistics["norm"]
        return self.total[name] * (self.statistics["mean_norm"] / norm if norm else 0.0)

    def is_sound(self) -> bool:
        """The three numbers, none negative."""
        known = self.statistics.keys() == {"packs", "mean_norm", "norm"}
        return known and all(value >= 0 for value in self.statistics.values())


def _projected(delta: Tensor, merged: Tensor, layout: TensorLayout) -> Tensor:
    pairs = zip(matrices(delta, layout), matrices(merged, layout), strict=True)
    return assemble([project_out(*pair) for pair in pairs], tuple(delta.shape), layout)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


RETENTION = 0.7
"""β: weight of earlier tasks in the accumulated importance; code of the paper."""
TEMPERATURE = 0.25
"""τ: how sharply importances decide; code of the paper."""


def normalized(importances: Mapping[str, float], vectors: Collection[str]) -> dict[str, float]:
    """Stretched to 0..1, vectors among themselves and all other units among themselves.

    Importances that are all equal become 1 where positive, else 0.
    """
    among = {name: value for name, value in importances.items() if name in vectors}
    others = {name: value for name, value in importances.items() if name not in vectors}
    return _stretched(among) | _stretched(others)


def new_share(before: float, new: float) -> float:
    """a above, of importances 0..1."""
    return 1 / (1 + math.exp((before - new) / TEMPERATURE))


def energy(delta: Tensor) -> float:
    """Importance of a unit without rows: mean of Δ²."""
    return float(delta.double().square().mean()) if delta.numel() else 0.0


@dataclass
class Kif(RunningMerge):
    """`total` is the merged delta; `statistics` are Ī by unit."""

    method: ClassVar[str] = "kif"

    def add(self, skill: TaskDelta) -> None:
        """Fuse every unit; the first pack is taken as it is."""
        if not self.total:
            self.total = {name: skill.deltas[name] for name in sorted(skill.deltas)}
            self.statistics = _importances(skill)
            return
        new = _importances(skill)
        names = sorted(self.total.keys() | skill.deltas.keys())
        mixed = {}
        for name in names:
            before, now = self.statistics.get(name, 0.0), new.get(name, 0.0)
            fused = self._fused(name, skill, new_share(before, now))
            if not bool(fused.isfinite().all()):
                raise ConfigError(f"{name}: the mean of the packs is beyond what float32 holds")
            self.total[name] = fused
            mixed[name] = RETENTION * before + (1 - RETENTION) * now
        vectors = {name for name, tensor in self.total.items() if tensor.dim() < 2}
        self.statistics = normalized(mixed, vectors)

    def delta(self, name: str) -> Tensor:
        """The merged delta itself."""
        return self.total[name]

    def is_sound(self) -> bool:
        """One importance for every unit, 0 to 1."""
        known = self.statistics.keys() == self.total.keys()
        return known and all(0 <= value <= 1 for value in self.statistics.values())

    def _fused(self, name: str, skill: TaskDelta, share: float) -> Tensor:
        if name not in self.total:
            return skill.deltas[name] * share
        kept = self.total[name] * (1 - share)
        return kept.add_(skill.deltas[name], alpha=share) if name in skill.deltas else kept


def _importances(skill: TaskDelta) -> dict[str, float]:
    given, found, vectors = skill.importances, {}, set()
    for name in sorted(skill.deltas):
        delta = skill.deltas[name]
        found[name] = energy(delta) if given is None else given.get(name, 0.0)
        if delta.dim() < 2:
            vectors.add(name)
    return normalized(found, vectors)


def _stretched(importances: Mapping[str, float]) -> dict[str, float]:
    if not importances:
        return {}
    low, high = min(importances.values()), max(importances.values())
    if low == high:
        return dict.fromkeys(importances, float(high > 0))
    return {name: (value - low) / (high - low) for name, value in importances.items()}
