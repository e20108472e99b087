"""Matrices of codes are entropy-coded row by row, with adaptive models and an rANS coder.

The probability of a code depends on the mean |code| of its row and of its column: both have a scale
in half octaves, and the sum of the two scales is the context of a code. Each context has a model
that adapts to the codes seen so far, so no table of probabilities is stored.

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
from dataclasses import dataclass
from functools import cache, cached_property

import constriction
import numpy as np
import numpy.typing as npt

from graftkit.compress.exact import END_MARK, END_MODEL, pop_differences, push_raw
from graftkit.compress.exact_model import (
    FIRST_WITH_RAW,
    ONE_ULP,
    PRECISION,
    PRIOR_ONE,
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
    word_prior,
)
from graftkit.errors import CorruptPackError

Codes = npt.NDArray[np.int32]
LARGEST_CODE = 2**15 - 1

_LAYOUT = WordLayout(width=16, exponent_bits=8, block_log=0, top=0)
_MOST = SCALES - 1  # largest row scale
_HALF = SCALES // 2
_MOST_PER_BYTE = 2**19
"""No code takes less than log2(1 / (1 - 222 / 2^24)) bits: every other symbol has a slot."""
_SURE_BITS = 256
"""Of two ways to code a matrix, one of so many bits less is the shorter one once coded."""
_MANY_ROWS = 64
_STREAM_BYTES = 5
"""The byte in front of the stream, and the most that its last word may hold beyond its bits."""
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
        of_columns = np.zeros(columns, np.int64) if self.columns is None else self.columns
        # The sums are -32..94: they fit one byte, and bytes are compared 64 at a time.
        grid = self.rows[first:last, None].astype(np.int8) + of_columns.astype(np.int8)
        flat = grid.reshape(-1)[chunk.start - first * columns :][: chunk.stop - chunk.start]
        return np.clip(flat, 0, _LAYOUT.contexts - 1, out=flat).view(np.uint8)


def encode_codes(codes: Codes) -> bytes:
    """Write a matrix (rows, columns) of integers in ±LARGEST_CODE; the shape is not stored."""
    plans = sorted(_plans(codes), key=lambda plan: plan.bits)
    closest = [plan for plan in plans if plan.bits <= plans[0].bits + _SURE_BITS]
    return min((plan.encode() for plan in closest), key=len)


def estimate_bytes(codes: Codes) -> int:
    """Length of `encode_codes`, without coding: that or a few bytes more.

    Column scales nearly always pay where they are shared by many rows: there, the coding without
    them is not tried. If it is the shorter one, the estimate is longer by what the scales take.
    """
    plans = _plans(codes, with_columns_only=codes.shape[0] >= _MANY_ROWS)
    return math.ceil(min(plan.bits for plan in plans) / 8) + _STREAM_BYTES


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


@cache
def _priors() -> tuple[Ints, npt.NDArray[np.float64]]:
    """Prior masses of the symbols in each context, (contexts, A); bits of the scale symbols."""
    contexts = range(_LAYOUT.contexts)
    masses = [word_prior(u, _LAYOUT.width, _LAYOUT.mantissa_bits) for u in contexts]
    share = scale_prior() / scale_prior().sum()
    return np.stack(masses), -np.log2(share)


class _CodingPlan:
    """A matrix with its scales, and what the models see of it chunk by chunk.

    Args:
        words, symbols: of the codes in C order. columns: of the matrix.
    """

    def __init__(
        self,
        words: npt.NDArray[np.uint16],
        symbols: npt.NDArray[np.uint8],
        scales: _Scales,
        columns: int,
    ):
        self._words, self._symbols, self._scales = words, symbols, scales
        self._chunks = list(chunk_slices(words.size))
        self._contexts = [scales.contexts(chunk, columns) for chunk in self._chunks]
        self._used = int(symbols.max(initial=0)) + 1
        pairs = zip(self._contexts, self._chunks, strict=True)
        self._histograms = [self._histogram(mine, symbols[chunk]) for mine, chunk in pairs]

    def _histogram(self, contexts: npt.NDArray[np.uint8], symbols: npt.NDArray[np.uint8]) -> Ints:
        """How often each of the symbols that are used occurs in each context, (contexts, used)."""
        cells = contexts * np.uint16(self._used) + symbols
        size = _LAYOUT.contexts * self._used
        return np.bincount(cells, minlength=size).reshape(-1, self._used)

    @cached_property
    def bits(self) -> float:
        """Information of all symbols under the models that code them: the length, nearly."""
        priors, scale_bits = _priors()
        masses, totals = priors[:, : self._used].astype(np.float64), priors.sum(axis=1)
        free = (1 << PRECISION) - _LAYOUT.symbols
        bits, occurred = float(_END_BITS), np.zeros(self._used)
        for histogram in self._histograms:
            shares = np.log2(masses * (free / totals)[:, None] + 1)
            bits += PRECISION * histogram.sum() - float(np.vdot(histogram, shares))
            masses += PRIOR_ONE * histogram
            totals += PRIOR_ONE * histogram.sum(axis=1)
            occurred += histogram.sum(axis=0)
        bits += float(occurred @ symbol_tables(_LAYOUT.width)[1][: self._used])
        return bits + sum(float(scale_bits[part].sum()) for part in self._scale_symbols())

    def encode(self) -> bytes:
        """The coded matrix."""
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(END_MARK, END_MODEL)
        counts = Counts.empty(_LAYOUT)
        seen = counts.words[:, : self._used]
        seen += sum(self._histograms)
        parts = zip(self._chunks, self._contexts, self._histograms, strict=True)
        for chunk, contexts, histogram in reversed(list(parts)):  # a stack: the last comes first
            seen -= histogram
            order, groups = group_contexts(contexts)
            ordered = self._symbols[chunk][order].astype(np.int32)
            large = np.flatnonzero(ordered >= FIRST_WITH_RAW)
            raw_bits = symbol_tables(_LAYOUT.width)[1][ordered[large]]
            push_raw(coder, raw_bits, split_symbols(self._words[chunk][order[large]])[1])
            for context, group in reversed(groups):
                coder.encode_reverse(ordered[group], counts.word_model(context))
        scale_model = counted_model(np.zeros(SCALES, dtype=np.int64), scale_prior())
        for part in self._scale_symbols():
            coder.encode_reverse(part.astype(np.int32), scale_model)
        stream: bytes = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
        return bytes([self._scales.columns is not None]) + stream

    def _scale_symbols(self) -> list[Ints]:
        """Symbols of the scales, in the order in which they are written."""
        columns = self._scales.columns
        steps = np.diff(self._scales.rows, prepend=0) % SCALES
        return [steps] if columns is None else [steps, columns % SCALES]


def _plans(codes: Codes, with_columns_only: bool = False) -> list[_CodingPlan]:
    """The ways to code a matrix: with scales of rows, and with scales of rows and columns."""
    narrow = codes.astype(np.int16, order="C")
    words, columns = narrow.view(np.uint16).reshape(-1), codes.shape[1]
    symbols, size = _symbol_table()[words], np.abs(narrow)
    scales = [_both_scales(size)] if codes.shape[0] > 1 else []
    if not (scales and with_columns_only):
        scales.insert(0, _Scales(_row_scales(size), None))
    return [_CodingPlan(words, symbols, one, columns) for one in scales]


def _row_scales(size: npt.NDArray[np.int16]) -> Ints:
    """Twice the log2 of the mean |code| of each row, plus ONE_ULP. size: |codes|."""
    columns = size.shape[1]
    mean = size.sum(axis=1, dtype=np.int64) / columns + 0.5 / columns
    scales: Ints = np.clip(np.rint(2 * np.log2(mean) + ONE_ULP), 0, _MOST).astype(np.int64)
    return scales


def _both_scales(size: npt.NDArray[np.int16]) -> _Scales:
    """Scales of columns relative to the mean over their rows, then of rows relative to columns."""
    of_rows, of_columns = (size.sum(axis=axis, dtype=np.int64) for axis in (1, 0))
    expected = (of_rows / size.shape[1] + 0.5 / size.shape[1]).sum()
    ratio = (of_columns + 1.0) / (expected + 1.0)
    columns = np.clip(np.rint(2 * np.log2(ratio)), -_HALF, _HALF - 1)
    factors = 2 ** (columns / 2)
    level = (of_rows + 0.5) / factors.sum()
    scales = np.clip(np.rint(2 * np.log2(level) + ONE_ULP), 0, _MOST)
    return _Scales(scales.astype(np.int64), columns.astype(np.int64))


def _centred(symbols: Ints) -> Ints:
    centred: Ints = (symbols + _HALF) % SCALES - _HALF
    return centred
