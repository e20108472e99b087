"""Merge rules: the deltas of several packs become one, tensor by tensor. Pure maths.

Every rule takes the deltas Δ_i of one tensor (one shape, float32) and one weight w_i > 0 for each
(task arithmetic also takes negative ones), and acts on deltas, never on factors. A rule may depend
on the order of its packs only by rounding; `merging` hands them over in one order. sgn 0 = 0
agrees with nobody.

The merge methods by name, each with its settings.

θ = θ_target + λ · rule(Δ_1 … Δ_T; w_1 … w_T)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from graftkit.compress.entries import largest_entries
from graftkit.errors import ConfigError
from graftkit.text import nearest_name

PCB_TAIL = 1e-4  # share of entries clamped at both ends before PCB's min-max; code of the paper


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
    """Select, calculate, erase, as FuseChat's own code does (arXiv 2408.07990).

        M = the share `select` of the entries that vary between packs, those that vary most
        e_i = mean((M Δ_i)²) / Σ_j mean((M Δ_j)²)
        E_i = [sgn Δ_i = sgn Σ_j w_j Δ_j]
        Δ = Σ w_i e_i E_i Δ_i / Σ w_i e_i E_i

    M decides the energies e_i only; all entries are merged. Where the packs do not differ at all,
    M is everything, so that equal packs give themselves.
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

    The paper's min-max runs over the whole model, so that one outlier sets every tensor's scale;
    here it runs over the tensor.
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
    """Mean over the packs whose sign is the elected one, entry by entry.

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
    """Each entry stays with probability `density` and is divided by it, so that E = Δ.

    Args:
        key: names the draw (seed, pack and tensor): it depends on no other pack or tensor.
    """
    if density >= 1:
        return delta
    seed = int.from_bytes(blake3(key.encode()).digest(length=8), "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept, delta / density, 0.0)


def _dropped(deltas: Sequence[Tensor], density: float, keys: Sequence[str]) -> list[Tensor]:
    return [drop(delta, density, key) for delta, key in zip(deltas, keys, strict=True)]


def _varying(deltas: Sequence[Tensor], select: float) -> Tensor:
    """True at the share `select` of the entries that vary, those of the largest variance."""
    # float64, so that squares of small deltas do not vanish; distances from the first pack are
    # exactly zero where packs agree, those from a mean are not.
    sums = torch.zeros_like(deltas[0], dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for delta in deltas[1:]:
        apart = (delta - deltas[0]).double()
        sums += apart
        squares += apart.square_()
    variance = squares / len(deltas) - (sums / len(deltas)).square_()
    varying = int(variance.count_nonzero())
    if varying == 0:
        return torch.zeros_like(sums, dtype=torch.bool)
    return torch.from_numpy(largest_entries(variance, _share(varying, select))).reshape(sums.shape)


def _share(count: int, share: float) -> int:
    return max(1, int(share * count))


def _smallest(tensor: Tensor, rank: int) -> Tensor:
    """The entry with `rank` smaller ones."""
    return tensor.reshape(-1).kthvalue(rank + 1).values


def _min_max(tensor: Tensor) -> Tensor:
    """Stretched to 0..1; a tensor of one value becomes 1 where that is positive, else 0."""
    low, high = tensor.aminmax()
    if low == high:
        return (tensor > 0).float()
    return (tensor - low) / (high - low)


def _divided(merged: Tensor, total: Tensor) -> Tensor:
    """merged / total, and 0 where nobody takes part."""
    return merged / torch.where(total == 0, torch.ones_like(total), total)


LARGEST = 1e6
"""Weights and λ beyond this, on either side, are mistakes: float32 would overflow soon after."""

Share = Annotated[float, Field(gt=0, le=1)]
_Settings = TypeVar("_Settings", bound=BaseModel)


class Method(BaseModel, ABC):
    """A merge rule and its settings; weights are those of the packs that take part."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    averages: ClassVar[bool] = False
    """The result divides by the weights, so that only their proportions count."""

    scaling: Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)] = 1.0
    """λ: the merged delta is multiplied by it; 0 gives the target."""

    @abstractmethod
    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """The rule itself, without λ, for one tensor; `keys` name each pack's tensor."""

    def keeps(self, weight: float) -> bool:
        """Whether one pack of this weight is merged as it is."""
        return self.scaling == 1


class Linear(Method):
    """Weighted mean of the deltas."""

    averages: ClassVar[bool] = True

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Σ w Δ / Σ w."""
        return linear(deltas, weights)


class TaskArithmetic(Method):
    """Weighted sum of the deltas."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Σ w Δ."""
        return task_arithmetic(deltas, weights)

    def keeps(self, weight: float) -> bool:
        """Weight 1 and λ 1."""
        return super().keeps(weight) and weight == 1


class Ties(Method):
    """Trim, elect signs, mean of those that agree."""

    averages: ClassVar[bool] = True

    density: Share = 0.2
    """Share of every tensor's entries that stays; 0.2 as in the paper."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """`rules.ties`."""
        return ties(deltas, weights, self.density)

    def keeps(self, weight: float) -> bool:
        """Density 1 and λ 1."""
        return super().keeps(weight) and self.density == 1


class Dare(Method):
    """Drop at random and rescale, then the weighted sum."""

    density: Share = 0.5
    """Probability that an entry stays."""
    seed: int = 0
    """Seed of the draw."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """`rules.dare`."""
        return dare(deltas, weights, self.density, self._draws(keys))

    def keeps(self, weight: float) -> bool:
        """Density 1, weight 1 and λ 1."""
        return super().keeps(weight) and self.density == 1 and weight == 1

    def _draws(self, keys: Sequence[str]) -> list[str]:
        return [f"{self.seed}/{key}" for key in keys]


class DareTies(Dare):
    """Drop at random and rescale, then elect signs, mean of those that agree."""

    averages: ClassVar[bool] = True

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """`rules.dare_ties`."""
        return dare_ties(deltas, weights, self.density, self._draws(keys))

    def keeps(self, weight: float) -> bool:
        """Density 1 and λ 1."""
        return self.scaling == 1 and self.density == 1


class Sce(Method):
    """Weights from where the packs differ, mean of those that agree in sign."""

    averages: ClassVar[bool] = True

    select: Share = 0.1
    """Share of the entries that vary which decides the weights; 0.1 as FuseChat ships it."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """`rules.sce`."""
        return sce(deltas, weights, self.select)


class Pcb(Method):
    """Entries compete by size and by agreement with the others."""

    ratio: Share = 0.1
    """Share of every tensor's entries that wins; 0.05 to 0.1 in the paper."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """`rules.pcb`."""
        return pcb(deltas, weights, self.ratio)

    def keeps(self, weight: float) -> bool:
        """Never: a lone pack loses most of its entries too."""
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
"""Methods that take packs one after another and keep a memory (`graftkit.fuse.sequential`)."""


def find_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of this name with these settings.

    Raises: ConfigError for an unknown name or setting, with the nearest, or a value out of range.
    """
    if name in IN_TURN:
        raise ConfigError(
            f"{name} takes packs in turn, without weights or settings; use merge_in_turn or "
            "fuse_in_turn"
        )
    if name not in METHODS:
        known = [*METHODS, *IN_TURN]
        hint = nearest_name(name, known)
        raise ConfigError(f"method {name!r} is unknown{hint}; choose one of {', '.join(known)}")
    return checked_settings(name, METHODS[name], settings)


def checked_settings(name: str, kind: type[_Settings], settings: Mapping[str, Any]) -> _Settings:
    """The settings of the method `name`, as a `kind`.

    Raises: ConfigError for an unknown setting, with the nearest, or a value out of range.
    """
    known = list(kind.model_fields)
    for key in settings:
        if key not in known:
            told = ", ".join(known) or "none"
            raise ConfigError(
                f"{name} has no setting {key!r}{nearest_name(key, known)}; its settings: {told}"
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
