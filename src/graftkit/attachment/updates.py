"""The forms in which a delta of one weight is kept, and what each does to activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graftkit.models.views import TensorView

# Up to this share of changed rows, the rows and their places are stored instead of the matrix.
_ROW_SHARE = 0.5


class WeightUpdate(Protocol):
    """A delta ΔW (out, in) in the orientation y = x Wᵀ."""

    def project(self, x: Tensor) -> Tensor:
        """x ΔWᵀ for x (..., in): (..., out), in x's dtype."""
        ...

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of ΔW for ids (...): (..., in)."""
        ...

    def dense(self) -> Tensor:
        """ΔW itself, float32."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = left @ right; left (out, r), right (r, in)."""

    left: Tensor
    right: Tensor

    def project(self, x: Tensor) -> Tensor:
        """(x rightᵀ) leftᵀ."""
        right, left = self.right.to(x.dtype), self.left.to(x.dtype)
        return (x @ right.T) @ left.T

    def look_up(self, ids: Tensor) -> Tensor:
        """left[ids] right."""
        return self.left[ids] @ self.right

    def dense(self) -> Tensor:
        """left @ right."""
        return self.left.float() @ self.right.float()

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes


@dataclass(frozen=True)
class RowUpdate:
    """ΔW that is zero outside a few rows.

    Attributes:
        rows: (changed + 1, in); the last one is zero.
        index: (changed,) the rows' places in ΔW.
        place: (out,) for each row of ΔW its place in `rows`: the zero row where it is unchanged.
    """

    rows: Tensor
    index: Tensor
    place: Tensor

    def project(self, x: Tensor) -> Tensor:
        """x rowsᵀ scattered to the changed outputs."""
        y = x.new_zeros(*x.shape[:-1], self.place.shape[0])
        y[..., self.index] = x @ self.rows[:-1].to(x.dtype).T
        return y

    def look_up(self, ids: Tensor) -> Tensor:
        """The changed rows, zeros elsewhere."""
        return self.rows[self.place[ids]]

    def dense(self) -> Tensor:
        """The whole matrix."""
        return self.rows[self.place].float()

    @property
    def nbytes(self) -> int:
        """Bytes of rows and places."""
        return self.rows.nbytes + self.index.nbytes + self.place.nbytes


@dataclass(frozen=True)
class DenseUpdate:
    """ΔW as it is."""

    matrix: Tensor

    def project(self, x: Tensor) -> Tensor:
        """x ΔWᵀ."""
        return x @ self.matrix.to(x.dtype).T

    def look_up(self, ids: Tensor) -> Tensor:
        """Rows of the matrix."""
        return self.matrix[ids]

    def dense(self) -> Tensor:
        """The matrix."""
        return self.matrix.float()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes


class StackedUpdates:
    """The factors of several packs side by side, for rows of different packs in two products.

    Attributes:
        packs: their indices.
    """

    def __init__(self, updates: Mapping[int, LowRankUpdate]):
        self.packs = tuple(updates)
        self._right = torch.cat([update.right for update in updates.values()])
        self._left = torch.cat([update.left for update in updates.values()], dim=1)
        ranks = torch.tensor([len(update.right) for update in updates.values()])
        self._owner = torch.arange(len(ranks)).repeat_interleave(ranks).to(self._right.device)

    def project(self, x: Tensor, weights: Tensor) -> Tensor:
        """((x Rᵀ) ∘ m) Lᵀ, m the weight of each component's pack.

        Args:
            x: (entries, ..., in). weights: (entries, packs).
        """
        components = x @ self._right.to(x.dtype).T
        mask = weights[:, self._owner].to(x.dtype)
        components *= mask.reshape(len(mask), *[1] * (x.dim() - 2), -1)
        return components @ self._left.to(x.dtype).T


def make_update(
    factors: tuple[Tensor, Tensor] | None, matrix: Tensor | None, like: Tensor
) -> WeightUpdate:
    """The smallest form of a delta, on the device and in the dtype of `like`.

    Args:
        factors: left (out, r) and right (r, in), where the delta has them.
        matrix: ΔW (out, in), float32, where it has none.
    """
    if factors is not None:
        left, right = (factor.to(like.device, like.dtype) for factor in factors)
        if left.numel() + right.numel() < left.shape[0] * right.shape[1]:
            return LowRankUpdate(left, right)
        matrix = factors[0] @ factors[1]
    assert matrix is not None
    index = matrix.any(dim=1).nonzero().flatten()
    if index.numel() > _ROW_SHARE * matrix.shape[0]:
        return DenseUpdate(matrix.to(like.device, like.dtype))
    rows = torch.cat([matrix[index], matrix.new_zeros(1, matrix.shape[1])])
    place = torch.full((matrix.shape[0],), index.numel(), dtype=torch.int64)
    place[index] = torch.arange(index.numel())
    device = like.device
    return RowUpdate(rows.to(device, like.dtype), index.to(device), place.to(device))


@dataclass(frozen=True)
class TunedPart:
    """One tuned tensor inside a parameter: the tensor itself, or an update to the target's.

    Attributes:
        transposed: the checkpoint holds the transpose of the update's (out, in).
    """

    view: TensorView
    value: Tensor | WeightUpdate
    transposed: bool

    def write(self, parameter: Tensor) -> None:
        """Put the tuned values into a copy of the target's parameter."""
        place = self.view.tensor(parameter)
        if isinstance(self.value, Tensor):
            place.copy_(self.value)
            return
        delta = self.value.dense()
        place.copy_((delta.T if self.transposed else delta).reshape(place.shape).add_(place))
