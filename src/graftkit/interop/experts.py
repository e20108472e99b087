"""Factors of a stack of experts, taken apart into those of the tensors on disk.

PEFT keeps the factors of all E experts of one 3-D parameter in two matrices,

    ΔW_e = scale · B_e A_e,   B (out, r · E) = [out, r, E],   A (r · E, in) = [E, r, in],

and a checkpoint may keep the same parameter as one stack, or as one or two tensors per expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from graftkit.models.views import View


@dataclass(frozen=True)
class Stack:
    """A live parameter of E matrices (out, in), and where the tensors on disk lie in it."""

    parameter: str
    experts: int
    rows: int
    columns: int
    transposed: bool
    views: dict[str, View]

    def fits(self, left: Tensor, right: Tensor) -> bool:
        """Whether B and A can be those of this parameter."""
        inner = left.shape[1]
        sides = (left.shape[0], right.shape[1]) == (self.rows, self.columns)
        return sides and inner == right.shape[0] and inner > 0 and inner % self.experts == 0

    def pieces(self) -> "dict[str, Piece] | None":
        """What each tensor on disk holds; None where one is no band of rows of one expert."""
        found = {name: self._piece(view) for name, view in self.views.items()}
        known = {name: piece for name, piece in found.items() if piece is not None}
        return known if len(known) == len(found) else None

    def _piece(self, view: View) -> "Piece | None":
        if view.whole:
            return Piece(range(self.experts), slice(0, self.rows))
        expert, rest = divmod(view.offset, self.rows * self.columns)
        first, shift = divmod(rest, self.columns)
        band = len(view.shape) == 2 and view.shape[1] == self.columns and shift == 0
        if self.transposed or not band or view.stride != (self.columns, 1):
            return None
        return Piece(range(expert, expert + 1), slice(first, first + view.shape[0]))


@dataclass(frozen=True)
class Piece:
    """Rows of some experts of a stack."""

    experts: range
    rows: slice

    def cut(self, stack: Stack, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """B_e (rows, r) and A_e (r, in) of each expert, from PEFT's B and A of all."""
        all_left = left.reshape(stack.rows, -1, stack.experts)
        all_right = right.reshape(stack.experts, -1, stack.columns)
        for expert in self.experts:
            yield all_left[self.rows, :, expert].contiguous(), all_right[expert].contiguous()
