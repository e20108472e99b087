"""Entropy coding of a matrix of small integers, row by row, with adaptive models and an rANS coder.

The probability of a code depends on the mean |code| of its row and of its column: both have a scale
in half octaves, and the sum of the two scales is the context of a code. Each context has a model
that adapts to the codes seen so far, so no table of probabilities is stored.

Payload: byte 0 is 1 where columns have scales, else 0; then the ANS stream to the end, without
the zero bytes at its end. Alphabet, priors, models, chunks and stream are those of
`graftkit.compress.exact` at w = 16, t = 7. The stream holds, in the order of decoding:

    1. where byte 0 is 1: one scale symbol for each column, (column scale) mod 64
    2. one scale symbol for each row, (s_k - s_(k-1)) mod 64, s before the first 0
    3. chunk by chunk over the codes in C order, as `exact` chunks words: for each context that
       occurs, ascending, its symbols in the order of codes; then the raw bits, as in `exact`
    4. the end mark of `exact`

A code is the d of its symbol. Scale symbols are coded by their priors alone, without counts.
Column scales are read as -32..31, they are 0 where byte 0 is 0; the context is
clip(row scale + column scale, 0, 61).
"""

from dataclasses import dataclass
from functools import cache

import constriction
import numpy as np
import numpy.typing as npt

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
