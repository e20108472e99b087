"""Merge rules that take one pack after another: OPCM and KIF.

A rule keeps a running merge and a few numbers, whatever the number of packs: one delta in float32.
The result depends on the order of packs by definition, so nothing here sorts them.

OPCM, orthogonal projection-based continual merging (arXiv 2501.09522; code: fusion_bench):

    Δ'_t = Δ_t without what it shares with R_{t−1}             (`project_out`)
    R_t = R_{t−1} + Δ'_t,   R_1 = Δ_1
    Δ_merged = R_t · mean_i ‖Δ_i‖ / ‖R_t‖                      (norms over the whole delta)

The paper writes (λ_{t−1} Δ_merged,t−1 + Δ'_t) / λ_t. As λ_{t−1} Δ_merged,t−1 = R_{t−1}, only the
sum R has to be kept.

KIF, knowledge identification and fusion (arXiv 2408.05200; code: WoodScene/TaSL). A skill unit is
one tensor of the target; its importance I(u) is a number:

    Î_t = min-max of I_t over the units, vectors apart         (`normalized`)
    Δ_merged ← (1 − a) Δ_merged + a Δ_t,   a = e^{Î_t/τ} / (e^{Ī_{t−1}/τ} + e^{Î_t/τ})
    Ī_t = min-max of β Ī_{t−1} + (1 − β) Î_t,   Ī_1 = Î_1

A unit that matters to one side only is mostly taken from that side. A unit that matters to both or
to neither is averaged. This is the adaptive form of the paper's fusion, with the constants of its
code.

Differences of KIF from the paper:

- Its units are the matrices A and B of a LoRA, merged separately, which puts products of different
  skills into ΔW. Ours are whole deltas. They include norms and biases, whose entries move much more
  than those of matrices, so vectors and matrices are normalized separately.
- Its importance is the running mean of |w g| over the steps of training, times that of its
  deviation. We have only the trained delta. Our importance is the mean of |Δ g| over rows of the
  task (`fuse/search.py`), or without rows the mean of Δ², to which |Δ g| is proportional where the
  gradient is parallel to the delta.
- It trains each task from the merged model. A pack may be trained from the merged model or from the
  target; Δ_t is the distance from the target in both cases.
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
    """The delta of one pack.

    Attributes:
        deltas: Δ of every tensor that the pack changes, float32; the mapping may decode on access.
        layouts: how the weights of linear layers become (out, in) matrices; none for embeddings,
            norms and biases.
        importances: how much each tensor matters for the task; None if that was not measured.
    """

    deltas: Mapping[str, Tensor]
    layouts: Mapping[str, TensorLayout] = field(default_factory=dict)
    importances: Mapping[str, float] | None = None


@dataclass
class RunningMerge(ABC):
    """A merged delta, and the numbers that the next pack needs.

    Attributes:
        total: merged tensors by name, float32, in the target's shapes; absent ones are zero.
        statistics: the numbers, by name.
    """

    method: ClassVar[str]
    """Name on the command line."""

    total: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)

    @abstractmethod
    def add(self, task: TaskDelta) -> None:
        """Merge one more pack. Raises: ConfigError for values beyond what float32 holds."""

    @abstractmethod
    def delta(self, name: str) -> Tensor:
        """The merged delta of a tensor of the target; `name` is in `total`."""

    @abstractmethod
    def is_sound(self) -> bool:
        """Whether `statistics` are valid for this rule."""


_SMALLEST, _LARGEST = 1e-15, 1e15  # peaks of matrices whose squares float32 adds up
TAKEN_SHARE = 0.5
"""α: the share of Σσ whose directions later packs may not use; 0.5 in paper and code."""


def project_out(delta: Tensor, merged: Tensor, share: float = TAKEN_SHARE) -> Tensor:
    """The part of a delta that is orthogonal to a merged one.

        merged = U diag(σ) Vᵀ,   P = Uᵀ Δ V
        Δ' = Δ − U (M ⊙ P) Vᵀ,   M_ij = 1 where i = j, and where i, j ≤ s

    where s is the number of largest σ whose sum stays within `share` of Σσ. So Δ' is orthogonal to
    `merged` and to each of its σ_i u_i v_iᵀ, and has no part in the span of the first s.

    Differences from the authors' code: it uses U and V of full size, (m, m) and (n, n), for the
    same result. It also clears the diagonal where σ is 0, for which U and V are arbitrary. Here M
    ends at the rank of `merged`.

    Args:
        delta, merged: (out, in), float32; computed in float64 where squares vanish or overflow.
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
    diagonal = shared.diagonal().clone()
    diagonal[:taken] = 0
    shared[taken:] = 0
    shared[:, taken:] = 0
    shared.diagonal().add_(diagonal)
    rest: Tensor = delta - U @ shared @ Vh
    return rest


def _computable(*matrices: Tensor) -> bool:
    """Whether float32 holds the squares of all entries."""
    peaks = [float(matrix.abs().max()) for matrix in matrices if matrix.numel()]
    return all(peak == 0 or _SMALLEST <= peak <= _LARGEST for peak in peaks)


@dataclass
class Opcm(RunningMerge):
    """`total` is R; `statistics` are the number of packs, mean ‖Δ‖ and ‖R‖."""

    method: ClassVar[str] = "opcm"

    def add(self, task: TaskDelta) -> None:
        """R ← R + Δ' for linear layers, R ← R + Δ for every other tensor."""
        squares = 0.0
        for name in sorted(task.deltas):
            delta = task.deltas[name]
            squares += _square(delta)
            before = self.total.get(name)
            if before is not None:
                layout = task.layouts.get(name)
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
        """Three numbers, none negative."""
        complete = self.statistics.keys() == {"packs", "mean_norm", "norm"}
        return complete and all(value >= 0 for value in self.statistics.values())


def _projected(delta: Tensor, merged: Tensor, layout: TensorLayout) -> Tensor:
    pairs = zip(matrices(delta, layout), matrices(merged, layout), strict=True)
    return assemble([project_out(*pair) for pair in pairs], tuple(delta.shape), layout)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


RETENTION = 0.7
"""β: weight of earlier tasks in the accumulated importance, as in the paper's code."""
TEMPERATURE = 0.25
"""τ: temperature of the softmax of importances, as in the paper's code."""


def normalized(importances: Mapping[str, float], vectors: Collection[str]) -> dict[str, float]:
    """Importances scaled to 0..1, vectors and other units separately.

    Importances that are all equal become 1 if they are positive, else 0.
    """
    of_vectors = {name: value for name, value in importances.items() if name in vectors}
    of_others = {name: value for name, value in importances.items() if name not in vectors}
    return _min_max(of_vectors) | _min_max(of_others)


def new_share(before: float, new: float) -> float:
    """a of the module's docstring: the share of the new pack. before, new: importances, 0..1."""
    return 1 / (1 + math.exp((before - new) / TEMPERATURE))


def energy(delta: Tensor) -> float:
    """Importance of a unit without rows: the mean of Δ²."""
    return float(delta.double().square().mean()) if delta.numel() else 0.0


@dataclass
class Kif(RunningMerge):
    """`total` is the merged delta; `statistics` are Ī by unit."""

    method: ClassVar[str] = "kif"

    def add(self, task: TaskDelta) -> None:
        """Fuse every unit; the first pack is taken as it is."""
        if not self.total:
            self.total = {name: task.deltas[name] for name in sorted(task.deltas)}
            self.statistics = _importances(task)
            return
        new = _importances(task)
        names = sorted(self.total.keys() | task.deltas.keys())
        mixed = {}
        for name in names:
            before, now = self.statistics.get(name, 0.0), new.get(name, 0.0)
            fused = self._fused(name, task, new_share(before, now))
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
        """One importance for every unit, from 0 to 1."""
        complete = self.statistics.keys() == self.total.keys()
        return complete and all(0 <= value <= 1 for value in self.statistics.values())

    def _fused(self, name: str, task: TaskDelta, share: float) -> Tensor:
        """(1 − share) · total + share · Δ of one unit, either of which may be absent."""
        if name not in self.total:
            return task.deltas[name] * share
        fused = self.total[name] * (1 - share)
        return fused.add_(task.deltas[name], alpha=share) if name in task.deltas else fused


def _importances(task: TaskDelta) -> dict[str, float]:
    """Î of every unit of a pack, measured or by energy."""
    measured, importances, vectors = task.importances, {}, set()
    for name in sorted(task.deltas):
        delta = task.deltas[name]
        importances[name] = energy(delta) if measured is None else measured.get(name, 0.0)
        if delta.dim() < 2:
            vectors.add(name)
    return normalized(importances, vectors)


def _min_max(importances: Mapping[str, float]) -> dict[str, float]:
    if not importances:
        return {}
    low, high = min(importances.values()), max(importances.values())
    if low == high:
        return dict.fromkeys(importances, float(high > 0))
    return {name: (value - low) / (high - low) for name, value in importances.items()}
