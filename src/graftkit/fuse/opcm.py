"""OPCM: merge models one after another, each without the directions that are taken already.

Orthogonal projection-based continual merging (arXiv 2501.09522; fusion_bench has its code):

    Δ'_t = Δ_t without what it shares with R_{t−1}             (`project_out`)
    R_t = R_{t−1} + Δ'_t,   R_1 = Δ_1
    Δ_merged = R_t · mean_i ‖Δ_i‖ / ‖R_t‖                      (norms over the whole delta)

The paper writes (λ_{t−1} Δ_merged,t−1 + Δ'_t) / λ_t; as λ_{t−1} Δ_merged,t−1 = R_{t−1}, the sum R
is all there is to keep.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graftkit.compress.codecs import Layout, assemble, matrices
from graftkit.errors import ConfigError
from graftkit.fuse.running import Running, Skill

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
class Opcm(Running):
    """`total` is R; `statistics` are how many packs it took and the two norms."""

    method: ClassVar[str] = "opcm"

    def add(self, skill: Skill) -> None:
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


def _projected(delta: Tensor, merged: Tensor, layout: Layout) -> Tensor:
    pairs = zip(matrices(delta, layout), matrices(merged, layout), strict=True)
    return assemble([project_out(*pair) for pair in pairs], tuple(delta.shape), layout)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
