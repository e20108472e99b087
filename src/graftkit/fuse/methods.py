"""The merge methods by name, each with its settings.

θ = θ_target + λ · rule(Δ_1 … Δ_T; w_1 … w_T)
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from graftkit.errors import ConfigError
from graftkit.fuse import rules

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
        return rules.linear(deltas, weights)


class TaskArithmetic(Method):
    """Weighted sum of the deltas."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """Σ w Δ."""
        return rules.task_arithmetic(deltas, weights)

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
        return rules.ties(deltas, weights, self.density)

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
        return rules.dare(deltas, weights, self.density, self._draws(keys))

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
        return rules.dare_ties(deltas, weights, self.density, self._draws(keys))

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
        return rules.sce(deltas, weights, self.select)


class Pcb(Method):
    """Entries compete by size and by agreement with the others."""

    ratio: Share = 0.1
    """Share of every tensor's entries that wins; 0.05 to 0.1 in the paper."""

    def merge(
        self, deltas: Sequence[Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """`rules.pcb`."""
        return rules.pcb(deltas, weights, self.ratio)

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
"""Methods that take packs one after another and keep a memory (`graftkit.fuse.in_turn`)."""


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
        raise ConfigError(
            f"method {name!r} is unknown{nearest(name, known)}; choose one of {', '.join(known)}"
        )
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
                f"{name} has no setting {key!r}{nearest(key, known)}; its settings: {told}"
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


def nearest(name: str, known: Sequence[str]) -> str:
    """What was probably meant, to be added to a sentence; nothing where no name is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
