"""Merges that take one pack after another and never look back: what they need and what they keep.

Memory is bounded: one delta in float32, whatever the number of packs. The order of packs matters
by definition, so nothing here sorts them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from graftkit.compress.codecs import Layout


@dataclass(frozen=True)
class Skill:
    """One pack, as a running merge takes it.

    Attributes:
        deltas: Δ of every tensor that the pack changes, float32; it may be decoded when asked for.
        layouts: how the weights of linear maps become (out, in) matrices. Embeddings, norms and
            biases are not among them.
        importances: how much each tensor matters for the task; None where nobody measured it.
    """

    deltas: Mapping[str, Tensor]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    importances: Mapping[str, float] | None = None


@dataclass
class Running(ABC):
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
    def add(self, skill: Skill) -> None:
        """Take one more pack."""

    @abstractmethod
    def delta(self, name: str) -> Tensor:
        """What the packs so far add to a tensor of the target; `name` is in `total`."""

    @abstractmethod
    def is_sound(self) -> bool:
        """Whether `statistics` are such that this class could have left behind."""
