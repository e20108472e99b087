"""All delta codecs behind one interface: encode(delta, statistics, precision) -> payload, and back.

zero       nothing is stored
sparse     the largest entries, quantized (module entries)
dense      every entry, quantized (entries) or entropy-coded (coded)
lowrank    factors, quantized in tiers (lowrank) or entropy-coded (coded)
hybrid     a few entropy-coded factors and the residual's entries (coded)
factors    the two factors of a LoRA as they are (factors)

A codec sees matrices only. `matrices` turns a stored tensor into them: transposed weights are
turned to (out, in), stacks of experts become one matrix per expert, kernels are flattened.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from graftkit.compress import coded, entries, factors, lowrank
from graftkit.errors import CorruptPackError

TensorLayout = Literal["matrix", "transposed", "stack", "stack_transposed"]
DeltaCodec = Literal["zero", "sparse", "lowrank", "dense", "hybrid"]
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


@dataclass(frozen=True)
class CodedLowRank:
    """Entropy-coded factors of at most `rank` components at water level `level`."""

    rank: int
    level: float
    codec: DeltaCodec = "lowrank"


@dataclass(frozen=True)
class CodedDense:
    """Every entry entropy-coded at water level `level`."""

    level: float
    codec: DeltaCodec = "dense"


@dataclass(frozen=True)
class CodedHybrid:
    """Factors of `rank` components, then the entries of what they leave."""

    rank: int
    level: float
    codec: DeltaCodec = "hybrid"


FixedPrecision = Zero | Sparse | LowRankTiers | Dense
"""Precisions whose payload length is known beforehand."""
Precision = FixedPrecision | CodedLowRank | CodedDense | CodedHybrid

_LENGTHS = 0xFF
"""First byte of a stack whose payloads have lengths of their own."""
_LENGTH = struct.Struct("<I")
_DECODERS = {"sparse": entries.decode_sparse, "dense": entries.decode_dense}
_BLOCK_VALUES, _BLOCK_ROWS = 2**18, 64  # 1 MB of float32 stays in a core's cache; rows at least


@dataclass(frozen=True)
class Statistics:
    """Statistics of one matrix that the encoder uses beside its delta.

    covariance: H = E[x xᵀ] of the layer's inputs, (n, n), shrunk, or None without calibration.
    basis: left directions as `lowrank.eigenbasis` returns them, or None where nothing is factored.
    """

    covariance: Tensor | None = None
    basis: Tensor | None = None


def matrix_shape(shape: tuple[int, ...], layout: TensorLayout) -> tuple[int, Shape]:
    """Number of matrices in a tensor of this stored shape, and the (out, in) shape of each."""
    if layout.startswith("stack"):
        count, rows, columns = shape
    else:
        count, rows, columns = 1, shape[0], _product(shape[1:])
    return count, (columns, rows) if layout.endswith("transposed") else (rows, columns)


def matrices(tensor: Tensor, layout: TensorLayout) -> list[Tensor]:
    """The (out, in) matrices of a stored tensor, as views where that is possible."""
    slices = list(tensor) if layout.startswith("stack") else [tensor.reshape(tensor.shape[0], -1)]
    return [part.T for part in slices] if layout.endswith("transposed") else slices


def assemble(parts: list[Tensor], shape: tuple[int, ...], layout: TensorLayout) -> Tensor:
    """Inverse of `matrices`."""
    if layout.endswith("transposed"):
        parts = [part.T for part in parts]
    return torch.stack(parts) if layout.startswith("stack") else parts[0].reshape(shape)


def payload_bytes(shape: Shape, precision: FixedPrecision) -> int:
    """Exact bytes of one encoded matrix."""
    if isinstance(precision, Zero):
        return 0
    if isinstance(precision, Sparse):
        return entries.sparse_bytes(shape, precision.kept)
    if isinstance(precision, Dense):
        return entries.dense_bytes(shape, precision.bits)
    return lowrank.payload_bytes(shape, precision.tiers)


@dataclass(frozen=True)
class FixedPayload:
    """A delta in a payload of known length: the counterpart of coded factors and entries."""

    codec: DeltaCodec
    body: bytes
    shape: Shape

    def decoder(self) -> coded.RowDecoder:
        """δ̂."""
        return decode_rows(self.codec, memoryview(self.body), self.shape)

    def payload(self) -> bytes:
        """The payload."""
        return self.body

    def estimate(self) -> int:
        """Length of the payload."""
        return len(self.body)


def encode_matrix(delta: Tensor, statistics: Statistics, precision: Precision) -> bytes:
    """Payload of one (m, n) float32 delta; its length is `payload_bytes` where that is known.

    Raises: ValueError when factors are asked for without a basis.
    """
    return quantize_matrix(delta, statistics, precision).payload()


def quantize_matrix(delta: Tensor, statistics: Statistics, precision: Precision) -> coded.Coded:
    """One (m, n) float32 delta at a precision, before entropy coding.

    Raises: ValueError when factors are asked for without a basis.
    """
    covariance = statistics.covariance
    if isinstance(precision, CodedDense):
        return coded.quantize_entries(delta, covariance, precision.level)
    if isinstance(precision, CodedLowRank | CodedHybrid):
        basis = _require_basis(statistics)
        rows = lowrank.leading_rows(delta, basis, precision.rank, covariance)
        if isinstance(precision, CodedHybrid):
            return coded.quantize_hybrid(delta, rows, covariance, precision.level)
        return coded.encode_factors(delta, rows, covariance, precision.level).stored()
    body = b""
    if isinstance(precision, Sparse):
        body = entries.encode_sparse(delta, precision.kept)
    elif isinstance(precision, Dense):
        body = entries.encode_dense(delta, covariance, precision.bits)
    elif isinstance(precision, LowRankTiers):
        left = lowrank.left_vectors(delta, _require_basis(statistics), precision.rank)
        body = lowrank.encode(delta, left, covariance, precision.tiers)
    return FixedPayload(precision.codec, body, (delta.shape[0], delta.shape[1]))


def _require_basis(statistics: Statistics) -> Tensor:
    if statistics.basis is None:
        raise ValueError("the low-rank codec needs the basis of the delta")
    return statistics.basis


def decode_matrix(codec: str, payload: memoryview, shape: Shape) -> Tensor:
    """δ̂, (m, n) float32. Raises: CorruptPackError."""
    rows = decode_rows(codec, payload, shape)  # first: it checks that the payload may be so large
    delta = torch.empty(shape)
    for block in row_blocks(shape):
        delta[block] = rows(block)
    return delta


def decode_rows(codec: str, payload: memoryview, shape: Shape) -> coded.RowDecoder:
    """δ̂ as a function of some of its rows; a whole one in float32 is often too large.

    Raises: CorruptPackError.
    """
    if codec == "hybrid":
        return coded.decode_hybrid(payload, shape)
    if codec == "dense" and _is_coded(payload):
        return coded.decode_entries(payload, shape)
    if codec in ("lowrank", "factors"):
        left, right = decode_factors(payload, shape, codec)
        return lambda rows: left[rows] @ right
    whole = torch.zeros(shape) if codec == "zero" else _DECODERS[codec](payload, shape)
    return lambda rows: whole[rows].clone()


def row_blocks(shape: Shape) -> Iterator[slice]:
    """Rows that are computed together, the same everywhere: blocks decide how sums are rounded."""
    rows = max(_BLOCK_ROWS, _BLOCK_VALUES // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def decode_factors(
    payload: memoryview, shape: Shape, codec: str = "lowrank"
) -> tuple[Tensor, Tensor]:
    """left (m, r) and right (r, n) of `lowrank` or `factors`, float32. Raises: CorruptPackError."""
    if codec == "factors":
        return factors.load(payload, shape).scaled()
    if _is_coded(payload):
        return coded.load_factors(payload, shape).factors()
    decoded = lowrank.decode(payload, shape)
    return decoded.left, decoded.right


def _is_coded(payload: memoryview) -> bool:
    return len(payload) > 0 and payload[0] == coded.CODED


def decode_delta(
    codec: str, payload: memoryview, shape: tuple[int, ...], layout: TensorLayout
) -> Tensor:
    """The delta of a whole tensor in its stored shape, float32. Raises: CorruptPackError."""
    if codec == "zero":
        return torch.zeros(shape)
    count, matrix = matrix_shape(shape, layout)
    parts = split_payload(payload, count)
    return assemble([decode_matrix(codec, part, matrix) for part in parts], shape, layout)


def add_delta(codec: str, payload: memoryview, weight: Tensor, layout: TensorLayout) -> Tensor:
    """Weight plus the delta of a whole tensor, summed in float32 and rounded once.

    Args:
        weight: as stored, any float dtype. Returns: the sum in its dtype.
    Raises: CorruptPackError.
    """
    count, shape = matrix_shape(tuple(weight.shape), layout)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    payloads = split_payload(payload, count)
    pairs = zip(matrices(weight, layout), matrices(result, layout), strict=True)
    for part, (before, after) in zip(payloads, pairs, strict=True):
        rows = decode_rows(codec, part, shape)
        for block in row_blocks(shape):
            after[block] = rows(block).add_(before[block])
    return result


def join_payloads(parts: Sequence[bytes]) -> bytes:
    """One payload for all matrices of a tensor."""
    if len(parts) == 1:
        return parts[0]
    if not parts[0] or parts[0][0] != coded.CODED:
        return b"".join(parts)
    lengths = (_LENGTH.pack(len(part)) for part in parts)
    return b"".join((bytes([_LENGTHS]), *lengths, *parts))


def estimate_joined(parts: Sequence[coded.Coded]) -> int:
    """Length of `join_payloads` of the payloads of these matrices, as they estimate their own."""
    lengths = sum(part.estimate() for part in parts)
    if len(parts) == 1 or isinstance(parts[0], FixedPayload):
        return lengths
    return 1 + len(parts) * _LENGTH.size + lengths


def split_payload(payload: memoryview, count: int) -> list[memoryview]:
    """One payload per matrix: of equal length, or of the lengths that stand in front."""
    if count == 1:
        return [payload]
    if len(payload) and payload[0] == _LENGTHS:
        start = 1 + count * _LENGTH.size
        if len(payload) < start:
            raise CorruptPackError(f"the payload ends inside the lengths of {count} matrices")
        sizes = [size for (size,) in _LENGTH.iter_unpack(payload[1:start])]
    else:
        if len(payload) % count or len(payload) < count:
            raise CorruptPackError(
                f"a payload of {len(payload)} bytes cannot hold {count} equal parts"
            )
        start, sizes = 0, [len(payload) // count] * count
    ends = list(accumulate(sizes, initial=start))
    if ends[-1] != len(payload):
        raise CorruptPackError(f"{count} matrices take {ends[-1]} bytes, found {len(payload)}")
    return [payload[first:last] for first, last in pairwise(ends)]


def describe_payload(
    codec: str, payload: memoryview, shape: tuple[int, ...], layout: TensorLayout
) -> dict[str, object]:
    """Rank, bits or entries kept, read from a payload's header. Raises: CorruptPackError."""
    if codec in ("zero", "exact"):
        return {}
    count, matrix = matrix_shape(shape, layout)
    part = split_payload(payload, count)[0]
    if codec == "hybrid" or (codec in ("lowrank", "dense") and _is_coded(part)):
        return coded.describe(codec, part, matrix)
    describers = {
        "lowrank": lowrank.describe,
        "factors": factors.describe,
        "dense": entries.describe_dense,
        "sparse": entries.describe_sparse,
    }
    return describers[codec](part, matrix)


def _product(extents: tuple[int, ...]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result
