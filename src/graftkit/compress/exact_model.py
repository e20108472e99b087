"""The model of `exact`, which encoder and decoder share: symbols, contexts, adaptive counts.

The layout is specified in `graftkit.compress.exact`. Nothing here reads or writes a stream.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[Any]  # uint16 or uint32
Ints = npt.NDArray[np.int64]
Index = npt.NDArray[np.intp]
Model = Any  # constriction has no type stubs

FIRST_CHUNK, LAST_CHUNK = 1 << 10, 1 << 17  # words; both are multiples of every block length
FIRST_WITH_RAW = 31  # smallest symbol with raw bits: that of 16
SCALES = 64  # half octaves a block may lie below the block of largest scale
ONE_ULP = 16  # context of an expected difference of one ulp; contexts are half octaves
ABOVE_WEIGHT = 32  # contexts above ONE_ULP + 2 * mantissa_bits, where the delta exceeds the weight
PRIOR_ONE = 2048  # mass of one count; a prior of mass 2^16 then weighs 32 words
PRECISION = 24  # bits of a probability, fixed by AnsCoder
LAZY_BELOW = 1  # mean symbol up to which a search upwards is faster than one by halves; measured


@dataclass(frozen=True)
class WordLayout:
    """Everything a decoder needs besides the ANS stream and the target."""

    width: int
    """Bits of one word, 16 or 32."""
    exponent_bits: int
    block_log: int
    top: int
    """Largest scale, in half octaves above the smallest subnormal."""

    @property
    def mantissa_bits(self) -> int:
        """t."""
        return self.width - 1 - self.exponent_bits

    @property
    def contexts(self) -> int:
        """Number of contexts u."""
        return ONE_ULP + 2 * self.mantissa_bits + ABOVE_WEIGHT

    @property
    def symbols(self) -> int:
        """Size A of the alphabet of word symbols."""
        return 2 * (16 + 8 * (self.width - 5) + 7) + 1

    def blocks(self, words: int) -> int:
        """Blocks with a scale of their own in the first `words` words."""
        return -(-words // (1 << self.block_log)) if self.block_log else 0


# ---------------------------------------------------------------- words, differences, symbols


def order_words(words: Words) -> Words:
    """m(v): float patterns to integers in ascending order of the floats."""
    half = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words >= half, ~words, words ^ half)


def unorder_words(ordered: Words) -> Words:
    """Inverse of `order_words`."""
    half = ordered.dtype.type(1 << (8 * ordered.itemsize - 1))
    return np.where(ordered >= half, ordered ^ half, ~ordered)


def reflect(difference: Words, target: Words) -> Words:
    """Negate mod 2^w where the target is negative; its own inverse."""
    negative = target >> target.dtype.type(8 * target.itemsize - 1)
    reflected: Words = (difference ^ (-negative)) + negative
    return reflected


def split_symbols(difference: Words) -> tuple[Ints, Ints]:
    """Symbol and raw bits of each difference, both (n,)."""
    if difference.itemsize == 2:
        symbols, raw = _split_table()
        return symbols[difference], raw[difference]
    return _split_any(difference)


@lru_cache(maxsize=1)
def _split_table() -> tuple[Ints, Ints]:
    return _split_any(np.arange(1 << 16, dtype=np.uint16))


def _split_any(difference: Words) -> tuple[Ints, Ints]:
    width = 8 * difference.itemsize
    signed = difference.astype(np.int64)
    signed -= (signed >> (width - 1)) << width
    size = np.abs(signed)
    length = np.frexp(size.astype(np.float64))[1].astype(np.int64)
    low = np.maximum(length - 4, 0)
    index = np.where(low == 0, size, 16 + 8 * (length - 5) + ((size >> low) & 7))
    symbols = np.where(size == 0, 0, 2 * index - (signed > 0))
    return symbols, size & ((1 << low) - 1)


@lru_cache(maxsize=2)
def symbol_tables(width: int) -> tuple[Ints, Ints, Ints]:
    """For each symbol: smallest |d|, raw bits, 1 where d < 0; each (A,), int64."""
    symbol = np.arange(2 * (16 + 8 * (width - 5) + 7) + 1, dtype=np.int64)
    index = (symbol + 1) // 2
    raw_bits = np.where(index < 16, 0, (index - 16) // 8 + 1)
    smallest = np.where(index < 16, index, (8 + index % 8) << raw_bits)
    return smallest, raw_bits, ((symbol > 0) & (symbol % 2 == 0)).astype(np.int64)


def join_symbols(
    symbols: npt.NDArray[np.int32], large: Index, raw: Ints, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Inverse of `split_symbols`; `raw` belongs to the symbols at `large`, the others have none."""
    # -1 where d <= 0: x ^ -1 = -x - 1. Arithmetic is several times faster than tables.
    sign = (symbols & 1) - 1
    joined: npt.NDArray[Any] = ((((symbols + 1) >> 1) ^ sign) - sign).astype(dtype)
    if large.size:
        smallest, _, negative = symbol_tables(8 * dtype.itemsize)
        size = smallest[symbols[large]] + raw
        joined[large] = np.where(negative[symbols[large]] == 1, -size, size).astype(dtype)
    return joined


# ---------------------------------------------------------------- models


def word_contexts(target: Words, drops: Ints, layout: WordLayout) -> npt.NDArray[np.uint8]:
    """Context u of each word, (n,); drops are the s_b of the blocks, (blocks,)."""
    mantissa = layout.mantissa_bits
    shift = target.dtype.type(mantissa - 1)
    steps = (target & target.dtype.type((1 << (layout.width - 1)) - 1)) >> shift
    steps = steps.astype(np.int32)  # exponent field and top mantissa bit
    context = ONE_ULP + layout.top - 2 * (np.maximum(steps >> 1, 1) - 1)
    if layout.block_log:
        context -= np.repeat(drops.astype(np.int32), 1 << layout.block_log)[: target.size]
    context -= (steps & 1) * (context > ONE_ULP + 2 * mantissa)
    clipped: npt.NDArray[np.uint8] = np.clip(context, 0, layout.contexts - 1).astype(np.uint8)
    return clipped


@lru_cache(maxsize=512)
def word_prior(context: int, width: int, mantissa_bits: int) -> Ints:
    """Prior masses of the word symbols of one context, (A,)."""
    mean: int = math.isqrt(1 << (24 + min(context, ONE_ULP + 2 * mantissa_bits)))  # times 2^20

    def tail(size: int) -> int:
        powers = (1, mean, mean**2, mean**3, mean**4)
        total = sum(math.comb(size, k) * powers[4 - k] << (20 * k) for k in range(5))
        return (powers[4] << 40) // total

    smallest = [*symbol_tables(width)[0][::2].tolist(), 1 << width]  # of each index
    tails = [tail(size) for size in smallest]
    masses = [upper - lower for upper, lower in pairwise(tails)]
    both = [1 + (mass >> 25) for mass in masses[1:] for _ in range(2)]
    return np.array([1 + (masses[0] >> 24), *both], dtype=np.int64)


@lru_cache(maxsize=1)
def scale_prior() -> Ints:
    """Prior masses of the scale symbols, (SCALES,)."""
    return np.array(
        [max(1, 32768 >> (2 * min(i, SCALES - i))) for i in range(SCALES)], dtype=np.int64
    )


def counted_model(counts: Ints, prior: Ints, decoding: bool = False) -> Model:
    """Categorical model with exactly the probabilities of the module docstring.

    `Categorical` gives every symbol one slot and scales the weights to the remaining 2^24 - Z;
    weights that are integers with exactly this sum are scaled by 1.0, so nothing is rounded.
    """
    shift = 0
    while int(counts.sum()) >> shift >= 1 << PRECISION:
        shift += 1
    mass = PRIOR_ONE * (counts >> shift) + prior
    free = (1 << PRECISION) - mass.size
    weights = mass * free // mass.sum()
    weights[np.argmax(mass)] += free - weights.sum()
    # A lazy model searches from symbol 0 upwards; the probabilities are the same (constriction).
    lazy = decoding and int(weights @ np.arange(mass.size)) < LAZY_BELOW << PRECISION
    return constriction.stream.model.Categorical(
        weights.astype(np.float64), perfect=False, lazy=lazy
    )


@dataclass
class Counts:
    """How often each symbol has occurred so far; the same in encoder and decoder."""

    layout: WordLayout
    words: Ints
    """(contexts, A)"""
    scales: Ints
    """(SCALES,)"""

    @classmethod
    def empty(cls, layout: WordLayout) -> "Counts":
        """Before the first chunk."""
        words = np.zeros((layout.contexts, layout.symbols), dtype=np.int64)
        return cls(layout, words, np.zeros(SCALES, dtype=np.int64))

    def add(self, contexts: npt.NDArray[np.uint8], symbols: Ints, steps: Ints, sign: int) -> None:
        """Count the word and scale symbols of a chunk; sign −1 forgets them again."""
        self.words += sign * self.histogram(contexts, symbols)
        self.add_scales(steps, sign)

    def histogram(
        self, contexts: npt.NDArray[np.uint8], symbols: npt.NDArray[np.integer[Any]]
    ) -> Ints:
        """How often each symbol occurs in each context, (contexts, A)."""
        # All cells fit 16 bits: 94 contexts of 479 symbols at most.
        cells = contexts * np.uint16(self.layout.symbols) + symbols.astype(np.uint16)
        return np.bincount(cells, minlength=self.words.size).reshape(self.words.shape)

    def add_scales(self, steps: Ints, sign: int = 1) -> None:
        """Count the scale symbols of a chunk."""
        self.scales += sign * np.bincount(steps, minlength=SCALES)

    def add_decoded(self, context: int, symbols: npt.NDArray[np.int32]) -> None:
        """Count all symbols of a chunk that have one context."""
        moved = int(np.count_nonzero(symbols))
        if 4 * moved > symbols.size:
            self.words[context] += np.bincount(symbols, minlength=self.layout.symbols)
            return
        # Counting one cell over and over is slow: leave the zeros out.
        self.words[context] += np.bincount(symbols[symbols > 0], minlength=self.layout.symbols)
        self.words[context, 0] += symbols.size - moved

    def word_model(self, context: int, decoding: bool = False) -> Model:
        """Model of the word symbols of one context."""
        layout = self.layout
        prior = word_prior(context, layout.width, layout.mantissa_bits)
        return counted_model(self.words[context], prior, decoding)

    def scale_model(self) -> Model:
        """Model of the scale symbols."""
        return counted_model(self.scales, scale_prior())


def chunk_slices(count: int) -> Iterator[slice]:
    """The chunks of `count` words, in order."""
    start = 0
    while start < count:
        size = min(max(start, FIRST_CHUNK), LAST_CHUNK)
        yield slice(start, min(start + size, count))
        start += size


def group_contexts(contexts: npt.NDArray[np.uint8]) -> tuple[Index, list[tuple[int, slice]]]:
    """Stable order by context, and for each context that occurs its slice of that order."""
    sizes = np.bincount(contexts)
    ends = np.cumsum(sizes)
    present = [(int(u), slice(int(ends[u] - sizes[u]), int(ends[u]))) for u in sizes.nonzero()[0]]
    return np.argsort(contexts, kind="stable"), present
