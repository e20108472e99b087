"""Entropy-coded payloads: factors, all entries, or a few factors and the residual's entries.

One number sets every quantization step, the water level c: the error of a coded value is about c /
√12 in the unit in which allocation adds errors (reverse water-filling). Values far below c are
coded as zeros, which take a small fraction of a bit, so precision follows the spectrum without
tiers. The payloads are laid out in docs/skillpack-format.md, sections 3.3, 3.4 and 3.6.

Matrices of codes are entropy-coded row by row, with adaptive models and an rANS coder. The
probability of a code depends on the mean |code| of its row and of its column: both have a scale in
half octaves, and the sum of the two scales is the context of a code. Each context has a model that
adapts to the codes seen so far, so no table of probabilities is stored.

Coded matrix: byte 0 is 1 where columns have scales, else 0; then the ANS stream to the end, without
the zero bytes at its end. Alphabet, priors, models, chunks and stream are those of
`graftkit.compress.exact` at w = 16, t = 7. The stream holds, in the order of decoding:

    1. where byte 0 is 1: one scale symbol for each column, (column scale) mod 64
    2. one scale symbol for each row, (s_k - s_(k-1)) mod 64, s before the first 0
    3. chunk by chunk over the codes in C order, as `exact` chunks words: for each context that
       occurs, ascending, its symbols in the order of codes; then the raw bits, as in `exact`
    4. the end mark of `exact`

A code is the d of its symbol. Scale symbols are coded by their priors alone, without counts. Column
scales are read as -32..31, they are 0 where byte 0 is 0; the context is clip(row scale + column
scale, 0, 61).
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftkit.compress.exact import END_MARK, END_MODEL, pop_differences, push_raw
from graftkit.compress.exact_model import (
    FIRST_WITH_RAW,
    ONE_ULP,
    SCALES,
    Counts,
    Ints,
    WordLayout,
    chunk_slices,
    counted_model,
    group_contexts,
    scale_prior,
    split_symbols,
    symbol_tables,
)
from graftkit.compress.quantize import (
    cholesky,
    feedback_codes,
    gram_matrix,
    round_codes,
    solve_ridged,
)
from graftkit.errors import CorruptPackError

Codes = npt.NDArray[np.int32]
LARGEST_CODE = 2**15 - 1

_LAYOUT = WordLayout(width=16, exponent_bits=8, block_log=0, top=0)
_MOST = SCALES - 1  # largest row scale
_HALF = SCALES // 2
_MOST_PER_BYTE = 2**19
"""No code takes less than log2(1 / (1 - 222 / 2^24)) bits: every other symbol has a slot."""
_END_BITS = 23
"""What the end mark leaves in the coder at least; past its end, a stream never gives it."""


@dataclass(frozen=True)
class _Scales:
    """Row scales (rows,), 0..63, and column scales (columns,), -32..31, or None."""

    rows: Ints
    columns: Ints | None

    def contexts(self, chunk: slice, columns: int) -> npt.NDArray[np.uint8]:
        """Context of each code of a chunk."""
        first, last = chunk.start // columns, -(-chunk.stop // columns)
        row = self.rows[first:last, None]
        grid = row + (np.zeros(columns, np.int64) if self.columns is None else self.columns)
        flat = grid.reshape(-1)[chunk.start - first * columns :][: chunk.stop - chunk.start]
        clipped: npt.NDArray[np.uint8] = np.clip(flat, 0, _LAYOUT.contexts - 1).astype(np.uint8)
        return clipped


def encode_codes(codes: Codes) -> bytes:
    """Write a matrix (rows, columns) of integers in ±LARGEST_CODE; the shape is not stored."""
    words = codes.astype(np.int16).view(np.uint16).reshape(-1)
    symbols = _symbol_table()[words]
    plain = _encode(words, symbols, _Scales(_row_scales(codes), None), codes.shape[1])
    if codes.shape[0] < 2:
        return plain
    both = _encode(words, symbols, _both_scales(codes), codes.shape[1])
    return min(plain, both, key=len)


def decode_codes(payload: memoryview, shape: tuple[int, int]) -> Codes:
    """Inverse of `encode_codes`. Raises: CorruptPackError when the payload is none of its."""
    if len(payload) == 0 or payload[0] > 1 or (len(payload) > 1 and payload[-1] == 0):
        raise CorruptPackError("a coded matrix is empty, or starts or ends as none does")
    rows, columns = shape
    if rows * columns > _MOST_PER_BYTE * len(payload):
        raise CorruptPackError(f"{len(payload)} bytes cannot hold {rows} x {columns} codes")
    stream = bytes(payload[1:])
    padded = np.frombuffer(stream + b"\0" * (-len(stream) % 4), dtype="<u4")
    coder = constriction.stream.stack.AnsCoder(padded.astype(np.uint32))
    scale_model = counted_model(np.zeros(SCALES, dtype=np.int64), scale_prior())
    column_scales = None
    if payload[0]:
        column_scales = _centred(coder.decode(scale_model, columns).astype(np.int64))
    row_scales = np.cumsum(coder.decode(scale_model, rows).astype(np.int64)) % SCALES
    scales = _Scales(row_scales, column_scales)
    counts = Counts.empty(_LAYOUT)
    codes = np.empty(rows * columns, dtype=np.int32)
    for chunk in chunk_slices(codes.size):
        contexts = scales.contexts(chunk, columns)
        codes[chunk] = pop_differences(coder, contexts, counts, np.dtype(np.int16))
        if coder.num_valid_bits() < _END_BITS:
            raise CorruptPackError("a coded matrix ends before its last code")
    if coder.decode(END_MODEL) != END_MARK or not coder.is_empty():
        raise CorruptPackError("a coded matrix does not end where its shape does")
    return codes.reshape(shape)


@cache
def _symbol_table() -> npt.NDArray[np.uint8]:
    return split_symbols(np.arange(1 << 16, dtype=np.uint16))[0].astype(np.uint8)


def _encode(
    words: npt.NDArray[np.uint16], symbols: npt.NDArray[np.uint8], scales: _Scales, columns: int
) -> bytes:
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(END_MARK, END_MODEL)
    counts = Counts.empty(_LAYOUT)
    chunks = list(chunk_slices(words.size))
    contexts = [scales.contexts(chunk, columns) for chunk in chunks]
    pairs = zip(contexts, chunks, strict=True)
    learned = [counts.histogram(mine, symbols[chunk]) for mine, chunk in pairs]
    for histogram in learned:
        counts.words += histogram
    while chunks:  # a stack: what is decoded first is written last
        chunk = chunks.pop()
        counts.words -= learned.pop()
        order, groups = group_contexts(contexts.pop())
        ordered = symbols[chunk][order].astype(np.int32)
        large = np.flatnonzero(ordered >= FIRST_WITH_RAW)
        raw_bits = symbol_tables(_LAYOUT.width)[1][ordered[large]]
        push_raw(coder, raw_bits, split_symbols(words[chunk][order[large]])[1])
        for context, group in reversed(groups):
            coder.encode_reverse(ordered[group], counts.word_model(context))
    scale_model = counted_model(np.zeros(SCALES, dtype=np.int64), scale_prior())
    steps = np.diff(scales.rows, prepend=0) % SCALES
    coder.encode_reverse(steps.astype(np.int32), scale_model)
    if scales.columns is not None:
        coder.encode_reverse((scales.columns % SCALES).astype(np.int32), scale_model)
    stream: bytes = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    return bytes([scales.columns is not None]) + stream


def _row_scales(codes: Codes) -> Ints:
    """Twice the log2 of the mean |code| of each row, plus ONE_ULP."""
    mean = np.abs(codes).sum(axis=1, dtype=np.int64) / codes.shape[1] + 0.5 / codes.shape[1]
    scales: Ints = np.clip(np.rint(2 * np.log2(mean) + ONE_ULP), 0, _MOST).astype(np.int64)
    return scales


def _both_scales(codes: Codes) -> _Scales:
    """Scales of columns relative to the mean over their rows, then of rows relative to columns."""
    size = np.abs(codes)
    of_rows, of_columns = (size.sum(axis=axis, dtype=np.int64) for axis in (1, 0))
    expected = (of_rows / codes.shape[1] + 0.5 / codes.shape[1]).sum()
    ratio = (of_columns + 1.0) / (expected + 1.0)
    columns = np.clip(np.rint(2 * np.log2(ratio)), -_HALF, _HALF - 1)
    factors = 2 ** (columns / 2)
    level = (of_rows + 0.5) / factors.sum()
    scales = np.clip(np.rint(2 * np.log2(level) + ONE_ULP), 0, _MOST)
    return _Scales(scales.astype(np.int64), columns.astype(np.int64))


def _centred(symbols: Ints) -> Ints:
    centred: Ints = (symbols + _HALF) % SCALES - _HALF
    return centred


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
    codes = codes[codes.any(dim=1)]
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
    """The payload of coded factors, without the components that are zero. Codes are not clamped."""
    kept = coded.left.any(dim=0) & coded.right.any(dim=1)
    rank = int(kept.sum())
    if rank == 0:
        return _FACTORS.pack(CODED, _UNIFORM_STEPS, 0, 1.0, 1.0)
    stored, peak = _stored_scales(coded.component[kept])
    uniform = not coded.octaves.any()
    parts = [
        _FACTORS.pack(CODED, uniform * _UNIFORM_STEPS, rank, coded.base, peak),
        stored.numpy().astype("<f2").tobytes(),
    ]
    if not uniform:
        parts.append(_with_length(encode_codes(coded.octaves[None])))
    parts.append(_with_length(encode_codes(_int_array(coded.right[kept]))))
    parts.append(encode_codes(_int_array(coded.left.T[kept])))
    return b"".join(parts)


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


def encode_entries(delta: Tensor, covariance: Tensor | None, level: float) -> bytes:
    """Every entry of δ (m, n) coded with feedback under Σ, column steps c / L_jj.

    The steps are larger where an entry's code would be too large for the payload.
    """
    lower = None if covariance is None else cholesky(covariance)
    base, octaves = column_steps(level, lower, delta.shape[1])
    # A clamped entry loses more than all others gain by a finer step.
    largest = float((delta.abs().amax(dim=0) / _steps(base, octaves)).max())
    base *= max(1.0, largest / _LARGEST_ROUNDED)
    codes = feedback_codes(delta, _steps(base, octaves), lower)
    codes.clamp_(-LARGEST_CODE, LARGEST_CODE)
    flags = 0 if octaves.any() else _UNIFORM_STEPS
    parts = [_ENTRIES.pack(CODED, flags, base)]
    if octaves.any():
        parts.append(_with_length(encode_codes(octaves[None])))
    parts.append(encode_codes(codes.numpy().astype(np.int32)))
    return b"".join(parts)


RowDecoder = Callable[[slice], Tensor]
"""Some rows of δ̂, float32, in a tensor of the caller's own."""


def decode_entries(payload: memoryview, shape: tuple[int, int]) -> RowDecoder:
    """δ̂ (m, n), row by row. Raises: CorruptPackError."""
    reader = _PayloadReader(payload)
    marker, flags, base = reader.struct(_ENTRIES)
    if marker != CODED or flags > 1 or not _are_positive(base):
        raise CorruptPackError("coded entries have an unknown flag or a step that is no number")
    part = None if flags & _UNIFORM_STEPS else reader.part()
    codes = torch.from_numpy(decode_codes(reader.rest(), shape))
    steps = _steps(base, _octaves(part, shape[1]))
    return lambda rows: codes[rows].float().mul_(steps)


def encode_hybrid(delta: Tensor, rows: Tensor, covariance: Tensor | None, level: float) -> bytes:
    """Coded factors of the components `rows`, then the entries of the residual."""
    coded = encode_factors(delta, rows, covariance, level)
    residual = torch.addmm(delta, *coded.factors(), alpha=-1)
    first = _with_length(store_factors(coded))
    return bytes([CODED]) + first + encode_entries(residual, covariance, level)


def decode_hybrid(payload: memoryview, shape: tuple[int, int]) -> RowDecoder:
    """δ̂ (m, n), row by row. Raises: CorruptPackError."""
    reader = _PayloadReader(payload)
    if reader.take(1)[0] != CODED:
        raise CorruptPackError("a hybrid payload has an unknown first byte")
    left, right = load_factors(reader.part(), shape).factors()
    entries = decode_entries(reader.rest(), shape)
    return lambda rows: entries(rows).addmm_(left[rows], right)


def _steps(base: float, octaves: np.ndarray) -> Tensor:
    # The file stores float32; the encoder must round with what the decoder will read.
    stored = float(np.float32(base))
    return (stored * torch.from_numpy(2.0 ** (octaves.astype(np.float64) / 2))).float()


def _stored_scales(scales: Tensor) -> tuple[Tensor, float]:
    """Scales as float16 shares of the largest, and the largest as the float32 it is stored as."""
    peak = float(np.float32(float(scales.max())))
    return (scales / peak).clamp_(min=_SMALLEST_SCALE).half(), peak


def _int_array(codes: Tensor) -> np.ndarray:
    return codes.numpy().astype(np.int32)


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
