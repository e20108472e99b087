"""Merge methods: a rule that makes one delta of several, and its settings. Pure maths.

    θ = θ_target + λ · rule(Δ_1 … Δ_T; w_1 … w_T)

A rule takes the deltas Δ_i of one tensor, all of one shape and float32, and a weight w_i > 0 for
each; task arithmetic also takes negative weights. It works on deltas, never on factors. Only its
rounding depends on the order of packs, and `fuse.merge` sorts them. sgn 0 = 0 agrees with no sign.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from blake3 import blake3
from pydantic import Field, ValidationError
from torch import Tensor

from graftkit.compress.entries import largest_entries
from graftkit.config import Settings
from graftkit.errors import ConfigError, nearest_name

PCB_TAIL = 1e-4  # share of entries clamped at both ends before PCB's min-max; the paper's code


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, Σ w_i Δ_i / Σ w_i (model soups, arXiv 2203.05482)."""
    return task_arithmetic(deltas, weights).div_(sum(weights))


def task_arithmetic(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, Σ w_i Δ_i (arXiv 2212.04089; GraftLLM eq. 10 and 11)."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim every delta to its largest entries, then `agreeing_mean` (arXiv 2306.01708).

    Args:
        density: share of a tensor's entries that stays, 0 < density <= 1.
    """
    return agreeing_mean([trim(delta, density) for delta in deltas], weights)


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, keys: Sequence[str]
) -> Tensor:
    """`drop`, then the weighted sum (arXiv 2311.03099)."""
    return task_arithmetic(_dropped(deltas, density, keys), weights)


def dare_ties(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, keys: Sequence[str]
) -> Tensor:
    """`drop` in place of TIES' trimming, then `agreeing_mean` (arXiv 2311.03099)."""
    return agreeing_mean(_dropped(deltas, density, keys), weights)


def sce(deltas: Sequence[Tensor], weights: Sequence[float], select: float) -> Tensor:
    """Select, calculate, erase, as in FuseChat's code (arXiv 2408.07990).

        M = mask of the entries of largest variance, the share `select` of those that vary
        e_i = mean((M Δ_i)²) / Σ_j mean((M Δ_j)²)
        E_i = [sgn Δ_i = sgn Σ_j w_j Δ_j]
        Δ = Σ w_i e_i E_i Δ_i / Σ w_i e_i E_i

    M decides only the energies e_i; all entries are merged. If the packs do not differ, M is all
    ones, so that equal packs give the same delta.
    """
    mask = _varying(deltas, select)
    energies = [float((delta * mask).double().square().sum()) for delta in deltas]
    if not any(energies):
        energies = [float(delta.double().square().sum()) for delta in deltas]
    total = sum(energies)
    if total == 0:
        return torch.zeros_like(deltas[0])
    shares = [w * energy / total for w, energy in zip(weights, energies, strict=True)]
    return agreeing_mean(deltas, shares, votes=weights)


def pcb(deltas: Sequence[Tensor], weights: Sequence[float], ratio: float) -> Tensor:
    """Parameter competition balancing, per tensor (arXiv 2410.02396 and its code).

        a_i = |Δ_i|, both tails of 1e-4 clamped;  m = min-max over the entries of one delta
        S_i = exp(T m(a_i)²) tanh(Δ_i ⊙ Σ_j Δ_j)
        c_i = m(max(S_i, the entry at the share `ratio` from the top))
        Δ = Σ w_i c_i sgn(Δ_i) a_i / Σ c_i

    Difference from the paper: its min-max runs over the whole model, where one outlier sets the
    scale of every tensor. Here it runs over the tensor.
    """
    together = task_arithmetic(deltas, [1.0] * len(deltas))
    merged, total = torch.zeros_like(together), torch.zeros_like(together)
    for delta, weight in zip(deltas, weights, strict=True):
        count = delta.numel()
        tail = int(PCB_TAIL * count)
        magnitude = delta.abs()
        magnitude.clamp_(_smallest(magnitude, tail), _smallest(magnitude, count - 1 - tail))
        score = _min_max(magnitude).square_().mul_(len(deltas)).exp_()
        score *= torch.tanh(delta * together)
        score.clamp_(min=_smallest(score, count - _share(count, ratio)))
        competition = _min_max(score)
        total += competition
        merged += competition.mul_(weight) * delta.sign() * magnitude
    return _divided(merged, total)


def agreeing_mean(
    deltas: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float] | None = None
) -> Tensor:
    """Mean over the packs of the elected sign, entry by entry.

        γ = sgn Σ v_i Δ_i,   Δ = Σ w_i [sgn Δ_i = γ] Δ_i / Σ w_i [sgn Δ_i = γ]

    Args:
        weights: w_i > 0. votes: v_i, default w_i.
    """
    elected = task_arithmetic(deltas, weights if votes is None else votes).sign_()
    merged, total = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = (delta * elected) > 0
        merged.add_(delta * agrees, alpha=weight)
        total.add_(agrees, alpha=weight)
    return _divided(merged, total)


def trim(delta: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, zeros elsewhere; ⌊density · numel⌋ stay, at least one.

    Of equal entries the first stay.
    """
    count = delta.numel()
    if density >= 1 or count == 0:
        return delta
    mask = torch.from_numpy(largest_entries(delta, _share(count, density)))
    return delta * mask.reshape(delta.shape)


def drop(delta: Tensor, density: float, key: str) -> Tensor:
    """Each entry stays with probability `density` and is divided by it, so that the mean is Δ.

    Args:
        key: seeds the draw; it names seed, pack and tensor.
    """
    if density >= 1:
        return delta
    seed = int.from_bytes(blake3(key.encode()).digest(length=8), "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    stays = torch.rand(delta.shape, generator=generator) < density
    return torch.where(stays, delta / density, 0.0)


def _dropped(deltas: Sequence[Tensor], density: float, keys: Sequence[str]) -> list[Tensor]:
    return [drop(delta, density, key) for delta, key in zip(deltas, keys, strict=True)]


def _varying(deltas: Sequence[Tensor], select: float) -> Tensor:
    """True at the share `select` of the entries that vary, those of the largest variance."""
    # In float64, so that squares of small deltas do not vanish. Distances are from the first pack:
    # they are exactly zero where packs agree, and those from a mean are not.
    sums = torch.zeros_like(deltas[0], dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for delta in deltas[1:]:
        distance = (delta - deltas[0]).double()
        sums += distance
        squares += distance.square_()
    variance = squares / len(deltas) - (sums / len(deltas)).square_()
    varying = int(variance.count_nonzero())
    if varying == 0:
        return torch.zeros_like(sums, dtype=torch.bool)
    return torch.from_numpy(largest_entries(variance, _share(varying, select))).reshape(sums.shape)


def _share(count: int, share: float) -> int:
    return max(1, int(share * count))


def _smallest(tensor: Tensor, rank: int) -> Tensor:
    """The entry of this rank, 0 for the smallest."""
    return tensor.reshape(-1).kthvalue(rank + 1).values


def _min_max(tensor: Tensor) -> Tensor:
    """Scaled to 0..1; a tensor of one value becomes 1 if it is positive, else 0."""
    low, high = tensor.aminmax()
    if low == high:
        return (tensor > 0).float()
    return (tensor - low) / (high - low)


def _divided(merged: Tensor, total: Tensor) -> Tensor:
    """merged / total, and 0 where no pack takes part."""
    return merged / torch.where(total == 0, torch.ones_like(total), total)


LARGEST = 1e6
"""Largest magnitude of weights and of λ: float32 would overflow soon beyond it."""

Share = Annotated[float, Field(gt=0, le=1)]


class Method(Settings, ABC):
    """A merge rule and its settings."""

    averages: ClassVar[bool] = False
    """The result divides by the weights, so that only their proportions count."""

    scaling: Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)] = 1.0
    """λ, which multiplies the merged delta; 0 gives the target."""

    @abstractmethod
    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """The rule for one tensor, without λ.

        Args:
            keys: name the tensor of each pack, and seed the draws of rules that draw at random.
        """

    def keeps(self, weight: float) -> bool:
        """Whether a single pack of this weight stays as it is."""
        return self.scaling == 1


class Linear(Method):
    """Weighted mean of the deltas."""

    averages: ClassVar[bool] = True

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `linear`."""
        return linear(deltas, weights)


class TaskArithmetic(Method):
    """Weighted sum of the deltas."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `task_arithmetic`."""
        return task_arithmetic(deltas, weights)

    def keeps(self, weight: float) -> bool:
        """For weight 1 and λ 1."""
        return super().keeps(weight) and weight == 1


class Ties(Method):
    """Trim, elect signs, take the mean of the entries that agree."""

    averages: ClassVar[bool] = True

    density: Share = 0.2
    """Share of every tensor's entries that stays; 0.2 as in the paper."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `ties`."""
        return ties(deltas, weights, self.density)

    def keeps(self, weight: float) -> bool:
        """For density 1 and λ 1."""
        return super().keeps(weight) and self.density == 1


class Dare(Method):
    """Drop entries at random and rescale, then the weighted sum."""

    density: Share = 0.5
    """Probability that an entry stays."""
    seed: int = 0
    """Seed of the draw."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `dare`."""
        return dare(deltas, weights, self.density, self._draws(keys))

    def keeps(self, weight: float) -> bool:
        """For density 1, weight 1 and λ 1."""
        return super().keeps(weight) and self.density == 1 and weight == 1

    def _draws(self, keys: Sequence[str]) -> list[str]:
        return [f"{self.seed}/{key}" for key in keys]


class DareTies(Dare):
    """Drop entries at random and rescale, elect signs, take the mean of the entries that agree."""

    averages: ClassVar[bool] = True

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `dare_ties`."""
        return dare_ties(deltas, weights, self.density, self._draws(keys))

    def keeps(self, weight: float) -> bool:
        """For density 1 and λ 1."""
        return self.scaling == 1 and self.density == 1


class Sce(Method):
    """Weigh packs by their energy where they differ, take the mean of the entries that agree."""

    averages: ClassVar[bool] = True

    select: Share = 0.1
    """Share of the varying entries that decides the weights; 0.1 as in FuseChat's code."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `sce`."""
        return sce(deltas, weights, self.select)


class Pcb(Method):
    """Parameter competition: entries compete by size and by agreement between packs."""

    ratio: Share = 0.1
    """Share of every tensor's entries that wins; 0.05 to 0.1 in the paper."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Merge with `pcb`."""
        return pcb(deltas, weights, self.ratio)

    def keeps(self, weight: float) -> bool:
        """Never: a single pack loses most of its entries too."""
        return False


METHODS: dict[str, type[Method]] = {
    "linear": Linear,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "dare_ties": DareTies,
    "sce": Sce,
    "pcb": Pcb,
}
"""Every merge method by its name."""
IN_TURN = ("opcm", "kif")
"""Methods that take one pack after another and keep a state (`graftkit.fuse.sequential`)."""


def find_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of this name with these settings.

    Raises: ConfigError for an unknown name or setting, with the nearest known one, or for a value
        out of range.
    """
    if name in IN_TURN:
        raise ConfigError(
            f"{name} takes packs in turn, without weights or settings; use merge_in_turn or "
            "fuse_in_turn"
        )
    if name not in METHODS:
        methods = [*METHODS, *IN_TURN]
        hint = nearest_name(name, methods)
        raise ConfigError(f"method {name!r} is unknown{hint}; choose one of {', '.join(methods)}")
    kind, names = METHODS[name], list(METHODS[name].model_fields)
    for key in settings:
        if key not in names:
            known = ", ".join(names) or "none"
            raise ConfigError(
                f"{name} has no setting {key!r}{nearest_name(key, names)}; its settings: {known}"
            )
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{name}: {first['loc'][0]} is {first['input']!r}; {first['msg'][:1].lower()}"
            f"{first['msg'][1:]}"
        ) from error


def check_weights(method: Method, weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight per pack, default 1 each. Raises: ConfigError."""
    if count == 0:
        raise ConfigError("no packs to merge; name at least one")
    try:
        result = [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"weights hold something that is no number of float64 ({error}); give one per pack"
        ) from error
    if len(result) != count:
        raise ConfigError(f"{len(result)} weights for {count} packs; give one weight per pack")
    if not all(abs(weight) <= LARGEST for weight in result):  # NaN is not
        raise ConfigError(
            f"weights {result} are too large or no numbers; give numbers from {-LARGEST:g} to "
            f"{LARGEST:g}"
        )
    if method.averages and (min(result) < 0 or max(result) == 0):
        raise ConfigError(
            f"weights {result} have no mean; give weights of at least 0, one of them above, or "
            "use task_arithmetic, which adds and takes away"
        )
    return result
