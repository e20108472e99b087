"""The methods of families by name, each with its settings."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from graftkit.errors import ConfigError
from graftkit.fuse.families import emr_private, emr_shared, tall_private
from graftkit.fuse.methods import LARGEST, checked_settings, nearest
from graftkit.fuse.rules import task_arithmetic

Scaling = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


class FamilyMethod(BaseModel, ABC):
    """What the skills of a family share, and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @abstractmethod
    def shared(self, deltas: Sequence[Tensor]) -> Tensor:
        """τ of one tensor, before it is coded."""


class MaskMethod(FamilyMethod, ABC):
    """The private part of a skill is a mask over the shared one, and a scale."""

    @abstractmethod
    def private(self, delta: Tensor, shared: Tensor) -> tuple[Tensor, float]:
        """M and s of one tensor and skill, for the shared part as a reader has it."""


class Emr(MaskMethod):
    """EMR-Merging: elect, mask and rescale."""

    def shared(self, deltas: Sequence[Tensor]) -> Tensor:
        """`families.emr_shared`."""
        return emr_shared(deltas)

    def private(self, delta: Tensor, shared: Tensor) -> tuple[Tensor, float]:
        """`families.emr_private`."""
        return emr_private(delta, shared)


class Tall(MaskMethod):
    """TALL masks over a scaled sum of the deltas."""

    scaling: Scaling = 1.0
    """The shared part is the sum of the deltas, times this."""
    threshold: Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)] = 0.4
    """An entry is kept where the delta is above threshold times its distance from the sum."""

    def shared(self, deltas: Sequence[Tensor]) -> Tensor:
        """scaling Σ Δ_i."""
        return task_arithmetic(deltas, [self.scaling] * len(deltas))

    def private(self, delta: Tensor, shared: Tensor) -> tuple[Tensor, float]:
        """`families.tall_private`; the scale is 1."""
        return tall_private(delta, shared, self.threshold), 1.0


class Twin(FamilyMethod):
    """Twin-Merging (arXiv 2406.15479): the private part is the rest Δ_i − τ̂, packed.

    The paper cuts a rest to a tenth of its rank; here the codecs of `pack` find ranks and
    precisions that fit the bytes.
    """

    scaling: Scaling
    """The shared part is the sum of the deltas, times this; their mean unless told otherwise."""

    def shared(self, deltas: Sequence[Tensor]) -> Tensor:
        """scaling Σ Δ_i."""
        return task_arithmetic(deltas, [self.scaling] * len(deltas))


FAMILY_METHODS: dict[str, type[FamilyMethod]] = {"emr": Emr, "tall": Tall, "twin": Twin}
"""Every method of families by its name."""


def find_family_method(name: str, settings: Mapping[str, Any], count: int) -> FamilyMethod:
    """The method of this name with these settings, for `count` packs.

    Raises: ConfigError for an unknown name or setting, or a value out of range.
    """
    if name not in FAMILY_METHODS:
        known = list(FAMILY_METHODS)
        raise ConfigError(
            f"method {name!r} is unknown{nearest(name, known)}; choose one of {', '.join(known)}"
        )
    kind = FAMILY_METHODS[name]
    defaults = {"scaling": 1 / count} if kind is Twin else {}
    return checked_settings(name, kind, {**defaults, **settings})
