"""Entropy-coded payloads: factors, all entries, or a few factors and the residual's entries.

One number sets every quantization step, the water level c: the error of a coded value is about c /
√12 in the unit in which allocation adds errors (reverse water-filling). Values far below c are
coded as zeros, which take a small fraction of a bit, so precision follows the spectrum without
tiers. The payloads are laid out in docs/skillpack-format.md, sections 3.3, 3.4 and 3.6; module
`entropy` codes the matrices in them.

A delta is quantized first and coded when its payload is asked for: its error and its length are
known without coding, which takes most of the time.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.entropy import (
    LARGEST_CODE,
    Codes,
    decode_codes,
    encode_codes,
    estimate_bytes,
)
from graftkit.compress.quantize import (
    cholesky,
    feedback_codes,
    gram_matrix,
    round_codes,
    solve_ridged,
)
from graftkit.errors import CorruptPackError

CODED = 0
"""First byte of a coded payload; no other payload of `lowrank` or `dense` starts with it."""

_FACTORS = struct.Struct("<BBHff")  # marker, flag, rank, input step, peak of component scales
_ENTRIES = struct.Struct("<BBf")  # marker, flag, step
_LENGTH = struct.Struct("<I")
_UNIFORM_STEPS = 1
"""Flag: one step for all input columns."""
_STEP_RANGE = 120
_LARGEST_ROUNDED = 0.9 * LARGEST_CODE  # error feedback may add to a code
_RIDGE = 1e-4
_SMALLEST_SCALE = 6.2e-5  # smallest normal float16: relative to the component of largest norm


RowDecoder = Callable[[slice], Tensor]
"""Some rows of δ̂, float32, in a tensor of the caller's own."""


class Coded(Protocol):
    """A delta in codes, which are entropy-coded when its payload is asked for."""

    def decoder(self) -> RowDecoder:
        """δ̂ as a reader of the payload gets it."""

    def payload(self) -> bytes:
        """The payload."""

    def estimate(self) -> int:
        """Length of the payload, found without coding: that or a few bytes more."""


@dataclass(frozen=True)
class CodedFactors:
    """A low-rank delta as its payload stores it: δ̂ = left diag(component) right diag(steps).

    left: int codes (out, r); component: (r,) float32; right: int codes (r, in); base and octaves
    (in,): the step of column j is base · 2^(octaves_j / 2).
    """

    left: Tensor
    component: Tensor
    right: Tensor
    base: float
    octaves: np.ndarray

    @property
    def steps(self) -> Tensor:
        """Steps of the columns of `right`, (in,) float32."""
        return _steps(self.base, self.octaves)

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (out, r) with the components' scales, right (r, in) with its steps, float32."""
        return self.left.float().mul_(self.component), self.right.float() * self.steps

    def stored(self) -> Self:
        """These factors as they are read back: without zero components, with rounded scales."""
        kept = _any(self.left.T) & _any(self.right)
        left, component, right = self.left, self.component, self.right
        if not kept.all():
            left, component, right = left.T[kept].T, component[kept], right[kept]
        if len(component):
            shares, peak = _stored_scales(component)
            component = shares.float() * peak
        return replace(self, left=left, component=component, right=right)

    def decoder(self) -> RowDecoder:
        """δ̂."""
        left, right = self.factors()
        return lambda rows: left[rows] @ right

    def payload(self) -> bytes:
        """The payload of stored factors. Codes are not clamped."""
        return _join_parts(*self._parts())

    def estimate(self) -> int:
        """Length of the payload, found without coding: that or a few bytes more."""
        return _estimate_parts(*self._parts())

    def _parts(self) -> tuple[bytes, list[Codes]]:
        rank = len(self.component)
        if rank == 0:
            return _FACTORS.pack(CODED, _UNIFORM_STEPS, 0, 1.0, 1.0), []
        shares, peak = _stored_scales(self.component)
        uniform = not self.octaves.any()
        head = _FACTORS.pack(CODED, uniform * _UNIFORM_STEPS, rank, self.base, peak)
        head += shares.numpy().astype("<f2").tobytes()
        steps = [] if uniform else [self.octaves[None]]
        return head, [*steps, self.right.numpy(), self.left.T.numpy()]


@dataclass(frozen=True)
class CodedEntries:
    """All entries of a delta as their payload stores them: δ̂ = codes diag(steps).

    codes: int32 (m, n); base and octaves (n,): as in `CodedFactors`.
    """

    codes: Tensor
    base: float
    octaves: np.ndarray

    def decoder(self) -> RowDecoder:
        """δ̂."""
        steps = _steps(self.base, self.octaves)
        return lambda rows: self.codes[rows].float().mul_(steps)

    def payload(self) -> bytes:
        """The payload."""
        return _join_parts(*self._parts())

    def estimate(self) -> int:
        """Length of the payload, found without coding: that or a few bytes more."""
        return _estimate_parts(*self._parts())

    def _parts(self) -> tuple[bytes, list[Codes]]:
        uniform = not self.octaves.any()
        head = _ENTRIES.pack(CODED, uniform * _UNIFORM_STEPS, self.base)
        return head, [*([] if uniform else [self.octaves[None]]), self.codes.numpy()]


@dataclass(frozen=True)
class CodedSum:
    """Factors of a few components, and the entries of what they leave."""

    first: CodedFactors
    rest: CodedEntries

    def decoder(self) -> RowDecoder:
        """δ̂."""
        left, right = self.first.factors()
        entries = self.rest.decoder()
        return lambda rows: entries(rows).addmm_(left[rows], right)

    def payload(self) -> bytes:
        """The payload."""
        return bytes([CODED]) + _with_length(self.first.payload()) + self.rest.payload()

    def estimate(self) -> int:
        """Length of the payload, found without coding: that or a few bytes more."""
        return 1 + _LENGTH.size + self.first.estimate() + self.rest.estimate()


def _any(codes: Tensor) -> Tensor:
    """Which rows hold a code that is not zero."""
    return torch.from_numpy(codes.numpy().any(axis=1))  # five times as fast as torch's


def _join_parts(head: bytes, matrices: Sequence[Codes]) -> bytes:
    """A payload: every coded matrix but the last has its length in front."""
    parts = [encode_codes(codes) for codes in matrices]
    return head + b"".join([*map(_with_length, parts[:-1]), *parts[-1:]])


def _estimate_parts(head: bytes, matrices: Sequence[Codes]) -> int:
    lengths = _LENGTH.size * len(matrices[1:])
    return len(head) + lengths + sum(estimate_bytes(codes) for codes in matrices)


def column_steps(level: float, lower: Tensor | None, columns: int) -> tuple[float, np.ndarray]:
    """Base step and the half octaves each column is above it, (columns,) int32."""
    if lower is None:
        return level, np.zeros(columns, dtype=np.int32)
    octaves = -2 * torch.log2(lower.diagonal().double().clamp(min=1e-30))
    middle = float(octaves.median())
    relative = (octaves - middle).round().clamp(-_STEP_RANGE, _STEP_RANGE)
    return level * 2 ** (middle / 2), relative.numpy().astype(np.int32)


def encode_factors(
    delta: Tensor, rows: Tensor, covariance: Tensor | None, level: float
) -> CodedFactors:
    """Coded factors of δ at water level c.

    V is coded under Σ with steps c / L_jj, U is refitted to what V became, and column k of U is
    coded with step c / ‖v̂_k‖_Σ. Components whose codes are all zero are dropped.

    Args:
        delta: (m, n) float32. rows: Uᵀ δ (r, n) of orthonormal left directions, by falling norm.
        covariance: Σ (n, n) or None for the identity. level: c > 0.
    """
    lower = None if covariance is None else cholesky(covariance)
    base, octaves = column_steps(level, lower, delta.shape[1])
    steps = _steps(base, octaves)
    codes = feedback_codes(_fit_codes(rows, steps), steps, lower).clamp_(
        -LARGEST_CODE, LARGEST_CODE
    )
    codes = codes[_any(codes)]
    right = codes * steps
    if len(right) == 0:
        nothing = torch.zeros(delta.shape[0], 0)
        return CodedFactors(nothing.int(), torch.zeros(0), codes.int(), base, octaves)
    weighted, gram = gram_matrix(right, covariance)
    # W with U = δ Wᵀ minimizing ‖(δ − U V̂) Σ^½‖: cheaper than solving for all rows of U.
    refitted = solve_ridged(gram, weighted, _RIDGE).float() @ delta.T
    finest = refitted.abs().amax(dim=1).double() / _LARGEST_ROUNDED
    stored, peak = _stored_scales(torch.maximum(level / gram.diagonal().sqrt(), finest))
    left = round_codes(refitted.div_((stored.double() * peak).float()[:, None]))
    left.clamp_(-LARGEST_CODE, LARGEST_CODE)
    return CodedFactors(left.T.int(), stored.float() * peak, codes.int(), base, octaves)


def _fit_codes(rows: Tensor, steps: Tensor) -> Tensor:
    """Rows, scaled down where their largest code would not fit a payload.

    The refit of U scales back, so that such a row has a coarser step, a 30,000th of its peak.
    """
    peaks = (rows / steps).abs().amax(dim=1, keepdim=True)
    return rows / (peaks / _LARGEST_ROUNDED).clamp(min=1.0)


def store_factors(coded: CodedFactors) -> bytes:
    """The payload of coded factors, without the components that are zero."""
    return coded.stored().payload()


def load_factors(payload: memoryview, shape: tuple[int, int]) -> CodedFactors:
    """Inverse of `store_factors`. Raises: CorruptPackError."""
    reader = _PayloadReader(payload)
    marker, flags, rank, base, peak = reader.struct(_FACTORS)
    rows, columns = shape
    is_known = marker == CODED and flags <= _UNIFORM_STEPS
    if rank > min(shape) or not is_known or not _are_positive(base, peak):
        raise CorruptPackError(f"coded factors of rank {rank} do not fit {list(shape)}")
    stored = np.frombuffer(reader.take(2 * rank), dtype="<f2").astype(np.float32)
    if not np.isfinite(stored).all():
        raise CorruptPackError("a component scale is NaN or infinite")
    part = None if flags & _UNIFORM_STEPS else reader.part()
    if rank == 0:
        reader.end()
        right, left = np.zeros((0, columns), np.int32), np.zeros((0, rows), np.int32)
    else:
        right = decode_codes(reader.part(), (rank, columns))
        left = decode_codes(reader.rest(), (rank, rows))
    # Codes come first: they show that the payload is long enough for a matrix of this shape.
    return CodedFactors(
        torch.from_numpy(left).T,
        torch.from_numpy(stored) * peak,
        torch.from_numpy(right),
        base,
        _octaves(part, columns),
    )


def describe(codec: str, payload: memoryview, shape: tuple[int, int]) -> dict[str, object]:
    """Rank where there are factors, for `inspect`. Raises: CorruptPackError."""
    if codec == "dense":
        return {"coded": True}
    reader = _PayloadReader(payload)
    if codec == "hybrid":
        reader.take(1)
        reader = _PayloadReader(reader.part())
    rank = reader.struct(_FACTORS)[2]
    if rank > min(shape):
        raise CorruptPackError(f"coded factors of rank {rank} do not fit {list(shape)}")
    return {"rank": rank, "coded": True}


def quantize_entries(delta: Tensor, covariance: Tensor | None, level: float) -> CodedEntries:
    """Every entry of δ (m, n) in codes, with feedback under Σ, column steps c / L_jj.

    The steps are larger where an entry's code would be too large for the payload.
    """
    lower = None if covariance is None else cholesky(covariance)
    base, octaves = column_steps(level, lower, delta.shape[1])
    # A clamped entry loses more than all others gain by a finer step.
    largest = float((delta.abs().amax(dim=0) / _steps(base, octaves)).max())
    base *= max(1.0, largest / _LARGEST_ROUNDED)
    codes = feedback_codes(delta, _steps(base, octaves), lower)
    return CodedEntries(codes.clamp_(-LARGEST_CODE, LARGEST_CODE).int(), base, octaves)


def encode_entries(delta: Tensor, covariance: Tensor | None, level: float) -> bytes:
    """The payload of all entries of δ (m, n) at water level c."""
    return quantize_entries(delta, covariance, level).payload()


def decode_entries(payload: memoryview, shape: tuple[int, int]) -> RowDecoder:
    """δ̂ (m, n), row by row. Raises: CorruptPackError."""
    return _load_entries(payload, shape).decoder()


def _load_entries(payload: memoryview, shape: tuple[int, int]) -> CodedEntries:
    reader = _PayloadReader(payload)
    marker, flags, base = reader.struct(_ENTRIES)
    if marker != CODED or flags > 1 or not _are_positive(base):
        raise CorruptPackError("coded entries have an unknown flag or a step that is no number")
    part = None if flags & _UNIFORM_STEPS else reader.part()
    codes = torch.from_numpy(decode_codes(reader.rest(), shape))
    return CodedEntries(codes, base, _octaves(part, shape[1]))


def quantize_hybrid(
    delta: Tensor, rows: Tensor, covariance: Tensor | None, level: float
) -> CodedSum:
    """Coded factors of the components `rows`, then the entries of the residual."""
    coded = encode_factors(delta, rows, covariance, level)
    residual = torch.addmm(delta, *coded.factors(), alpha=-1)
    return CodedSum(coded.stored(), quantize_entries(residual, covariance, level))


def encode_hybrid(delta: Tensor, rows: Tensor, covariance: Tensor | None, level: float) -> bytes:
    """The payload of `quantize_hybrid`."""
    return quantize_hybrid(delta, rows, covariance, level).payload()


def decode_hybrid(payload: memoryview, shape: tuple[int, int]) -> RowDecoder:
    """δ̂ (m, n), row by row. Raises: CorruptPackError."""
    reader = _PayloadReader(payload)
    if reader.take(1)[0] != CODED:
        raise CorruptPackError("a hybrid payload has an unknown first byte")
    first = load_factors(reader.part(), shape)
    return CodedSum(first, _load_entries(reader.rest(), shape)).decoder()


def _steps(base: float, octaves: np.ndarray) -> Tensor:
    # The file stores float32; the encoder must round with what the decoder will read.
    stored = float(np.float32(base))
    return (stored * torch.from_numpy(2.0 ** (octaves.astype(np.float64) / 2))).float()


def _stored_scales(scales: Tensor) -> tuple[Tensor, float]:
    """Scales as float16 shares of the largest, and the largest as the float32 it is stored as."""
    peak = float(np.float32(float(scales.max())))
    return (scales / peak).clamp_(min=_SMALLEST_SCALE).half(), peak


def _octaves(part: memoryview | None, columns: int) -> np.ndarray:
    if part is None:
        return np.zeros(columns, dtype=np.int32)
    octaves = decode_codes(part, (1, columns))[0]
    if np.abs(octaves).max(initial=0) > _STEP_RANGE:
        raise CorruptPackError(f"a column step is over {_STEP_RANGE} half octaves off")
    return octaves


def _with_length(part: bytes) -> bytes:
    return _LENGTH.pack(len(part)) + part


def _are_positive(*values: float) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


class _PayloadReader:
    """Reads a payload front to back and never past its end."""

    def __init__(self, payload: memoryview):
        self._payload, self._at = payload, 0

    def take(self, size: int) -> memoryview:
        part = self._payload[self._at : self._at + size]
        if len(part) < size:
            raise CorruptPackError(f"a coded payload ends {size - len(part)} bytes early")
        self._at += size
        return part

    def struct(self, layout: struct.Struct) -> tuple:  # type: ignore[type-arg]
        return layout.unpack(self.take(layout.size))

    def part(self) -> memoryview:
        (size,) = self.struct(_LENGTH)
        return self.take(size)

    def rest(self) -> memoryview:
        return self.take(len(self._payload) - self._at)

    def end(self) -> None:
        if self._at != len(self._payload):
            raise CorruptPackError("a coded payload goes on behind its end")
