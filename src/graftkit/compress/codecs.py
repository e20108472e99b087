"""One door to all delta codecs: encode(delta, statistics, precision) -> payload, and back.

A codec sees matrices only. `matrices` turns a stored tensor into them: transposed weights are
put the right way round, stacks of experts become one matrix per expert, kernels are flattened.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graftkit.compress import dense, lowrank, sparse
from graftkit.errors import CorruptPackError

Layout = Literal["matrix", "transposed", "stack", "stack_transposed"]
DeltaCodec = Literal["zero", "sparse", "lowrank", "dense"]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Zero:
    """Nothing is stored; the delta is taken to be zero."""

    codec: DeltaCodec = "zero"


@dataclass(frozen=True)
class Sparse:
    """The `kept` largest entries."""

    kept: int
    codec: DeltaCodec = "sparse"


@dataclass(frozen=True)
class LowRankTiers:
    """Quantized factors, tiers by falling singular value."""

    tiers: tuple[lowrank.Tier, ...]
    codec: DeltaCodec = "lowrank"

    @property
    def rank(self) -> int:
        """Components kept."""
        return sum(tier.rank for tier in self.tiers)


@dataclass(frozen=True)
class Dense:
    """Every entry in `bits` bits."""

    bits: int
    codec: DeltaCodec = "dense"


Precision = Zero | Sparse | LowRankTiers | Dense


@dataclass(frozen=True)
class Statistics:
    """What the encoder knows of one matrix beside its delta.

    covariance: H = E[x xᵀ] of the layer's inputs, (n, n), shrunk, or None without calibration.
    basis: left directions as `lowrank.eigenbasis` returns them, or None where nothing is factored.
    """

    covariance: Tensor | None = None
    basis: Tensor | None = None


def matrix_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, Shape]:
    """Number of matrices in a tensor of this stored shape, and the (out, in) shape of each."""
    if layout.startswith("stack"):
        count, rows, columns = shape
    else:
        count, rows, columns = 1, shape[0], _product(shape[1:])
    return count, (columns, rows) if layout.endswith("transposed") else (rows, columns)


def matrices(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """The (out, in) matrices of a stored tensor, as views where that is possible."""
    slices = list(tensor) if layout.startswith("stack") else [tensor.reshape(tensor.shape[0], -1)]
    return [part.T for part in slices] if layout.endswith("transposed") else slices


def assemble(parts: list[Tensor], shape: tuple[int, ...], layout: Layout) -> Tensor:
    """Inverse of `matrices`."""
    if layout.endswith("transposed"):
        parts = [part.T for part in parts]
    return torch.stack(parts) if layout.startswith("stack") else parts[0].reshape(shape)


def payload_bytes(shape: Shape, precision: Precision) -> int:
    """Exact bytes of one encoded matrix."""
    if isinstance(precision, Zero):
        return 0
    if isinstance(precision, Sparse):
        return sparse.payload_bytes(shape, precision.kept)
    if isinstance(precision, Dense):
        return dense.payload_bytes(shape, precision.bits)
    return lowrank.payload_bytes(shape, precision.tiers)


def encode_matrix(delta: Tensor, statistics: Statistics, precision: Precision) -> bytes:
    """Payload of one (m, n) float32 delta; its length is `payload_bytes(delta.shape, precision)`.

    Raises: ValueError when factors are asked for without a basis.
    """
    if isinstance(precision, Zero):
        return b""
    if isinstance(precision, Sparse):
        return sparse.encode(delta, precision.kept)
    if isinstance(precision, Dense):
        return dense.encode(delta, statistics.covariance, precision.bits)
    if statistics.basis is None:
        raise ValueError("the low-rank codec needs the basis of the delta")
    left = lowrank.left_vectors(delta, statistics.basis, precision.rank)
    return lowrank.encode(delta, left, statistics.covariance, precision.tiers)


def decode_matrix(codec: str, payload: memoryview, shape: Shape) -> Tensor:
    """δ̂, (m, n) float32. Raises: CorruptPackError."""
    if codec == "zero":
        return torch.zeros(shape)
    if codec == "sparse":
        return sparse.decode(payload, shape)
    if codec == "dense":
        return dense.decode(payload, shape)
    return lowrank.decode(payload, shape).delta()


def decode_delta(codec: str, payload: memoryview, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """The delta of a whole tensor in its stored shape, float32. Raises: CorruptPackError."""
    count, matrix = matrix_shape(shape, layout)
    parts = split_payload(payload, count)
    return assemble([decode_matrix(codec, part, matrix) for part in parts], shape, layout)


def split_payload(payload: memoryview, count: int) -> Iterator[memoryview]:
    """A stack's payload holds one payload of equal length per matrix; found one by one."""
    if len(payload) % count:
        raise CorruptPackError(f"a payload of {len(payload)} bytes cannot hold {count} equal parts")
    size = len(payload) // count
    for i in range(count):
        yield payload[i * size : (i + 1) * size]


def describe_payload(
    codec: str, payload: memoryview, shape: tuple[int, ...], layout: Layout
) -> dict[str, object]:
    """Rank, bits or entries kept, read from a payload's header. Raises: CorruptPackError."""
    describers = {
        "lowrank": lowrank.describe,
        "dense": dense.describe,
        "sparse": sparse.describe,
    }
    if codec not in describers:
        return {}
    count, matrix = matrix_shape(shape, layout)
    return describers[codec](next(split_payload(payload, count)), matrix)


def _product(extents: tuple[int, ...]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result
