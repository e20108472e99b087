"""KIF: merge skills one after another, unit by unit, weighted by how much each unit matters.

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
rows of the task (`fuse/importance.py`), or, without rows, of Δ², to which |Δ g| is proportional
where the gradient points along the delta. The paper trains each task from the merged model; a pack
may be trained from there or from the target, Δ_t is its distance from the target in both cases.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graftkit.errors import ConfigError
from graftkit.fuse.running import Running, Skill

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
class Kif(Running):
    """`total` is the merged delta; `statistics` are Ī by unit."""

    method: ClassVar[str] = "kif"

    def add(self, skill: Skill) -> None:
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

    def _fused(self, name: str, skill: Skill, share: float) -> Tensor:
        if name not in self.total:
            return skill.deltas[name] * share
        kept = self.total[name] * (1 - share)
        return kept.add_(skill.deltas[name], alpha=share) if name in skill.deltas else kept


def _importances(skill: Skill) -> dict[str, float]:
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
