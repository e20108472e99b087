"""Tensors of the target and of the tuned model in pairs, by name and shape: no weight is read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graftkit.checkpoint import DTYPES, FLOAT_DTYPES, Checkpoint, TensorInfo
from graftkit.compress.codecs import TensorLayout, matrix_shape
from graftkit.errors import CheckpointMismatchError
from graftkit.models.aligned import AlignedCheckpoint, align
from graftkit.models.architecture import ModuleKind, TensorRole, tensor_roles, tied_names
from graftkit.skillpack.manifest import largest_vocabulary

SMALLEST_LOSSY = 4096
"""Matrices of fewer weights are stored exactly: side information would cost what codes save."""

ZEROS = ""
"""Base of a tensor for which the target's class has no place: its delta is taken from zeros."""

_LOSSY_KINDS = (
    ModuleKind.ATTENTION,
    ModuleKind.MLP,
    ModuleKind.EMBEDDING,
    ModuleKind.HEAD,
    ModuleKind.OTHER,
)


@dataclass(frozen=True)
class TensorPair:
    """One tensor of the result and its two states on disk.

    Attributes:
        name: of the tensor in the result. role: its place in the model.
        target, tuned: the two states.
        base: None if the target has this tensor; else the name of the target's tensor that the
            delta is taken from (for a head that training untied from the embedding), or `ZEROS`.
    """

    name: str
    role: TensorRole
    target: TensorInfo
    tuned: TensorInfo
    base: str | None = None

    @property
    def resized(self) -> bool:
        """Whether the vocabulary grew or shrank."""
        return self.target.shape != self.tuned.shape

    @property
    def resizes_vocabulary(self) -> bool:
        """Whether the shapes differ only by rows of a vocabulary, within `largest_vocabulary`."""
        before, after = self.target.shape, self.tuned.shape
        biases = len(before) == 1 and self.role.kind is ModuleKind.BIAS
        rows = bool(before) and len(before) == len(after) and before[1:] == after[1:]
        fits = rows and after[0] <= largest_vocabulary(before[0])
        return fits and (self.gathered or biases)

    @property
    def common_rows(self) -> int:
        """Rows that both states have."""
        return min(self.target.shape[0], self.tuned.shape[0])

    @property
    def layout(self) -> TensorLayout:
        """How the stored tensor becomes (out, in) matrices."""
        stacked = len(self.target.shape) == 3 and self.role.kind is ModuleKind.MLP
        if stacked:
            return "stack_transposed" if self.role.transposed else "stack"
        return "transposed" if self.role.transposed else "matrix"

    @property
    def common_shape(self) -> tuple[int, ...]:
        """StoredTensor shape of the part that both states have."""
        return (self.common_rows, *self.target.shape[1:]) if self.resized else self.target.shape

    @property
    def lossy(self) -> bool:
        """Whether a lossy codec may be used."""
        floats = self.target.dtype in FLOAT_DTYPES
        if not floats or len(self.target.shape) < 2 or self.role.kind not in _LOSSY_KINDS:
            return False
        count, (rows, columns) = matrix_shape(self.common_shape, self.layout)
        return count * rows * columns >= SMALLEST_LOSSY and min(rows, columns) >= 2

    @property
    def trainable(self) -> bool:
        """Whether code training can hook the module: a plain linear layer or an embedding."""
        hooked = self.role.linear or self.role.kind is ModuleKind.EMBEDDING
        return hooked and not self.resized and self.base is None and len(self.target.shape) == 2

    @property
    def gathered(self) -> bool:
        """Embedding or head: the paper's recipe prunes it and does not factor it."""
        return self.role.kind in (ModuleKind.EMBEDDING, ModuleKind.HEAD)

    def read_target(self, target: Checkpoint) -> Tensor:
        """The state that the delta is taken from: the target's tensor, or zeros."""
        if self.base == ZEROS:
            return torch.zeros(self.target.shape, dtype=DTYPES[self.target.dtype])
        return target.read(self.target.name)

    def read(self, target: Checkpoint, tuned: Checkpoint) -> tuple[Tensor, Tensor]:
        """The common rows of both states; the target's are cast to the tuned dtype."""
        before = self.read_target(target).to(DTYPES[self.tuned.dtype])
        after = tuned.read(self.tuned.name)
        if self.resized:
            return before[: self.common_rows], after[: self.common_rows]
        return before, after


def match_tensors(target: Checkpoint, tuned: Checkpoint) -> tuple[TensorPair, ...]:
    """TensorPair every tensor, in the order of names.

    Raises: CheckpointMismatchError, which names the first difference between the two models.
    """
    tuned = align(target, tuned)
    roles = tensor_roles(target)
    pairs = []
    for name, info in target.tensors.items():
        other = tuned.tensors.get(name)
        if other is None:
            raise CheckpointMismatchError(
                f"{tuned.path}: lacks tensor {name}, which the target {target.path} has; "
                "a pack needs two states of one model"
            )
        pairs.append(TensorPair(name, roles[name], info, other))
    pairs += _added_pairs(target, tuned)
    for pair in pairs:
        _check_pair(pair, tuned)
    return tuple(sorted(pairs, key=lambda pair: pair.name))


def _added_pairs(target: Checkpoint, tuned: AlignedCheckpoint) -> list[TensorPair]:
    """Tensors that only the tuned model has.

    The delta of a head that training untied from the embedding is taken from the embedding. The
    delta of a tensor for which the target's class has no place, such as the score head of a
    classifier, is taken from zeros.
    """
    added = [name for name in tuned.tensors if name not in target.tensors]
    if not added:
        return []
    roles, owners = tensor_roles(tuned, added), tied_names(tuned) | tied_names(target)
    pairs = []
    for name in added:
        info, owner = tuned.tensors[name], owners.get(name)
        if owner in target.tensors:
            pairs.append(TensorPair(name, roles[name], target.tensors[owner], info, owner))
        elif name in tuned.new:
            pairs.append(TensorPair(name, roles[name], info, info, ZEROS))
        else:
            raise CheckpointMismatchError(
                f"{tuned.path}: has tensor {name}, which the target {target.path} lacks; "
                "a pack needs two states of one model"
            )
    return pairs


def _check_pair(pair: TensorPair, tuned: Checkpoint) -> None:
    before, after = pair.target, pair.tuned
    floats = [info.dtype in FLOAT_DTYPES for info in (before, after)]
    if floats[0] != floats[1] or (not floats[0] and before.dtype != after.dtype):
        raise CheckpointMismatchError(
            f"{tuned.path}: {pair.name} is {after.dtype}, in the target it is {before.dtype}; "
            f"expected one of {', '.join(FLOAT_DTYPES)} in both (dequantize the model first)"
        )
    if pair.resized and not pair.resizes_vocabulary:
        raise CheckpointMismatchError(
            f"{tuned.path}: {pair.name} is {list(after.shape)}, in the target it is "
            f"{list(before.shape)}; a pack needs two states of one model"
        )
