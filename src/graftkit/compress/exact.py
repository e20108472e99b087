"""Lossless coding of the float words of a tuned tensor, given the target's words.

Both tensors are 1-D arrays of n unsigned words of w = 16 (bf16, fp16) or w = 32 (fp32) bits.
Every bit pattern is restored, NaN payloads and -0 included. The decoder has the target, so the
target's exponents are free side information: they predict the size of a difference in units of the
last place (ulp).

Payload: byte 0 is the mode, integers are little-endian, no byte may follow.

    0 unchanged   nothing follows; tuned equals target (also n = 0)
    1 constant    one word of w/8 bytes; every word of tuned equals it
    2 coded       byte 1: exponent bits x (5 for fp16, else 8); byte 2: log2 of the block length,
                  5..10, or 0 for one block over all words; bytes 3-4: int16 `top`; then a LEB128
                  varint (at most 6 bytes, shortest form) with the length in bytes of the ANS
                  stream, then that stream
    3 raw         n words of w/8 bytes; written where mode 2 would not be shorter

Word difference. m(v) = ~v where the top bit of v is set, else v + 2^(w-1): a bijection that puts
the floats in ascending order. d = m(tuned) - m(target) mod 2^w, negated mod 2^w where the target
has its sign bit set: positive now means away from zero. d is read as two's complement, a = |d|.

Symbol. a < 16: index a, no raw bits. Else, with L the bit length of a: index 16 + 8 (L - 5) + the
three bits after the leading one, and the lowest r = L - 4 bits of a are raw. Symbol 0 for a = 0,
2 index - 1 for d > 0, 2 index for d < 0; A = 2 (16 + 8 (w - 5) + 7) + 1 symbols (223 or 479).

Scale and context. Block b has a scale S_b = top - s_b, 0 <= s_b < 64: twice the log2 of the
expected |tuned - target|, in units of the smallest subnormal. With e = max(exponent field of the
target, 1), mantissa bits t = w - 1 - x and g the top mantissa bit of the target,
u = S_b - 2 (e - 1) + 16, less g where u > 16 + 2 t, clipped to 0..47 + 2 t, is the context: twice
the log2 of the expected a, plus 16. The encoder chooses S_b as it likes.

Chunks. The words are coded in chunks of 1024, 1024, 2048, 4096, ... words (each as long as all
before it), at most 131072 (2^17); the last one is what remains. Blocks start with the first word;
each belongs to the chunk in which it starts and none crosses a chunk, but for the single block of
log2 0, whose s_b is 0 and not coded. A chunk holds, in the order of decoding:

    1. one scale symbol for each of its blocks: (s_b - s_(b-1)) mod 64, s before the first 0
    2. for each context u that occurs, ascending: the symbols of its words, in the order of words
    3. for each word with r > 0, sorted by context, then position: its min(r, 16) lowest raw bits,
       uniform over 2^min(r, 16) values
    4. for each word with r > 16, in the same order: the r - 16 bits above, uniform likewise

After the last chunk follows the end mark, the value 2^23 - 1, uniform over 2^23 values. A target of
another length never meets it: symbols read past the end only lower what is left of the stream.

Probabilities are integers / 2^24. A model is a row of counts c_i, zero at the start, and prior
masses p_i. The symbols of a chunk are coded with the counts of all chunks before it. For an
alphabet of size Z: while sum(c) >> k >= 2^24, k grows from 0; mass_i = 2048 (c_i >> k) + p_i;
f_i = floor(mass_i (2^24 - Z) / sum(mass)); the remainder 2^24 - Z - sum(f) goes to the first
largest mass; symbol i has probability (f_i + 1) / 2^24 and the slots follow the order of symbols.

Priors. Scale symbol i, with j = min(i, 64 - i): p_i = max(1, 32768 >> 2 j). Word symbols of
context u: with N = isqrt(2^(24 + min(u, 16 + 2 t))), the probability that |d| >= a is about
T(a) = floor(2^40 N^4 / sum over k = 0..4 of C(a, k) 2^(20 k) N^(4-k)), an exponential law of mean
N / 2^20; an index of magnitudes lo..hi-1 has mass h = T(lo) - T(hi); p_i = 1 + (h >> 24) for
symbol 0, 1 + (h >> 25) for each of the two symbols of any other index.

ANS stream. An rANS coder with 64-bit state, 32-bit words and 24-bit probabilities, started empty:
`constriction.stream.stack.AnsCoder` (a stack: it is written last symbol first). The array from
`get_compressed` is stored as bytes, less the zero bytes at its end. To read it:

    start       fill the stream up with zero bytes to a multiple of 4 and read it as 32-bit words,
                the last one first; state = 0, then refill until state >= 2^32 or no word is left
    refill      where state < 2^32 and a word is left: state = state 2^32 + that word
    symbol      q = state mod 2^24; the symbol is the one whose slots [c, c + f) hold q; then
                state = floor(state / 2^24) f + q - c, and refill once
    uniform     a value v over 2^k values has the slots c = v 2^(24-k), f = 2^(24-k)
    end         after the end mark, state = 0 and no word is left
"""

import struct
from functools import cache
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graftkit.checkpoint import tensor_bytes
from graftkit.compress.exact_model import (
    FIRST_CHUNK,
    FIRST_WITH_RAW,
    LAST_CHUNK,
    SCALES,
    Counts,
    Ints,
    WordLayout,
    Words,
    chunk_slices,
    group_contexts,
    join_symbols,
    order_words,
    reflect,
    split_symbols,
    symbol_tables,
    unorder_words,
    word_contexts,
)
from graftkit.errors import CorruptPackError

Coder = Any  # constriction has no type stubs

BLOCK_WORDS = 2**22
"""Words of a tensor in one block: bounds working memory, and blocks decode on their own."""

_WORD_DTYPES = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32}
_LENGTH = struct.Struct("<I")
UNIFORM = constriction.stream.model.Uniform()  # its size comes with each symbol
END_VALUES = 1 << 23
END_MODEL, END_MARK = constriction.stream.model.Uniform(END_VALUES), END_VALUES - 1
UNCHANGED, CONSTANT, CODED, RAW = 0, 1, 2, 3
BLOCK_LOGS = (0, 5, 7, 9)  # tried by the encoder; log2 of the words that share one scale
_NO_INTS = np.zeros(0, dtype=np.int64)
SAMPLE_RUNS, SAMPLE_RUN = 8, 1 << 12  # the encoder picks its settings on 8 runs of 4096 words


def encode_words(tuned: Words, target: Words) -> bytes:
    """Write `tuned` so that `decode_words` returns it, given the same `target`.

    Args:
        tuned: bit patterns, (n,), uint16 (bf16 or fp16) or uint32 (fp32).
        target: bit patterns of the same dtype, (n,).
    Returns: the payload, at most 1 byte longer than tuned.
    Raises: ValueError when the arrays are not 1-D, of one length and of one of the two dtypes.
    """
    _check_words(target)
    _check_words(tuned)
    if tuned.dtype != target.dtype or tuned.size != target.size:
        raise ValueError(
            f"tuned is {tuned.dtype} ({tuned.size},), target {target.dtype} ({target.size},); "
            "both must be of one dtype and length"
        )
    if np.array_equal(tuned, target):
        return bytes([UNCHANGED])
    little = tuned.dtype.newbyteorder("<")
    if bool((tuned == tuned[0]).all()):
        return bytes([CONSTANT]) + tuned[:1].astype(little).tobytes()
    tuned, target = np.ascontiguousarray(tuned), np.ascontiguousarray(target)
    coded = _write_coded(tuned, target, *_choose_layout(tuned, target))
    if len(coded) > tuned.nbytes:
        return bytes([RAW]) + tuned.astype(little).tobytes()
    return coded


def decode_words(payload: bytes, target: Words) -> Words:
    """Inverse of `encode_words`.

    Args:
        payload: what `encode_words` returned, not a byte more or less.
        target: the bit patterns that were given to it, (n,), uint16 or uint32.
    Returns: the tuned bit patterns, (n,), dtype of target.
    Raises: CorruptPackError when the payload cannot be one for this target (a damaged payload may
        also give wrong words: a digest outside has to tell); ValueError when target is not 1-D of
        one of the two dtypes.
    """
    _check_words(target)
    if not payload:
        raise _corrupt("it is empty")
    mode, body = payload[0], payload[1:]
    little = target.dtype.newbyteorder("<")
    if mode == CODED:
        return _decode_coded(body, np.ascontiguousarray(target))
    sizes = {UNCHANGED: 0, CONSTANT: target.itemsize, RAW: target.nbytes}
    if mode not in sizes:
        raise _corrupt(f"mode {mode} is unknown")
    if len(body) != sizes[mode]:
        raise _corrupt(f"mode {mode} takes {sizes[mode]} bytes, found {len(body)}")
    if mode == UNCHANGED:
        return target.copy()
    words = np.frombuffer(body, dtype=little).astype(target.dtype)
    return words if mode == RAW else np.full_like(target, words[0])


def _check_words(words: Words) -> None:
    if words.ndim != 1 or words.dtype not in (np.uint16, np.uint32):
        raise ValueError(f"words must be 1-D uint16 or uint32, found {words.dtype} {words.shape}")


def _corrupt(reason: str) -> CorruptPackError:
    return CorruptPackError(f"an exact payload is damaged: {reason}. Fetch the file again.")


# ---------------------------------------------------------------- encoder


def _write_coded(tuned: Words, target: Words, layout: WordLayout, drops: Ints) -> bytes:
    """The payload of mode 2; drops are the s_b of the blocks, (layout.blocks(n),)."""
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(END_MARK, END_MODEL)
    counts = Counts.empty(layout)
    chunks = list(chunk_slices(target.size))
    for chunk in chunks:
        counts.add(*_chunk_symbols(tuned, target, drops, chunk, layout)[:3], sign=1)
    for chunk in reversed(chunks):  # a stack: what is decoded first is written last
        contexts, symbols, steps, raw = _chunk_symbols(tuned, target, drops, chunk, layout)
        counts.add(contexts, symbols, steps, sign=-1)
        order, groups = group_contexts(contexts)
        symbols = symbols[order]
        push_raw(coder, symbol_tables(layout.width)[1][symbols], raw[order])
        symbols = symbols.astype(np.int32)
        for context, group in reversed(groups):
            coder.encode_reverse(symbols[group], counts.word_model(context))
        if steps.size:
            coder.encode_reverse(steps.astype(np.int32), counts.scale_model())
    stream: bytes = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    head = bytes([CODED, layout.exponent_bits, layout.block_log])
    return head + layout.top.to_bytes(2, "little", signed=True) + _varint(len(stream)) + stream


def _chunk_symbols(
    tuned: Words, target: Words, drops: Ints, chunk: slice, layout: WordLayout
) -> tuple[npt.NDArray[np.uint8], Ints, Ints, Ints]:
    """Contexts, symbols (both per word), scale symbols (per block) and raw bits of a chunk."""
    base = target[chunk]
    symbols, raw = split_symbols(reflect(order_words(tuned[chunk]) - order_words(base), base))
    first = layout.blocks(chunk.start)
    mine = drops[first : layout.blocks(chunk.stop)]
    steps = np.diff(mine, prepend=drops[first - 1] if first else 0) % SCALES
    return word_contexts(base, mine, layout), symbols, steps, raw


def push_raw(coder: Coder, raw_bits: Ints, raw: Ints) -> None:
    """Write the raw bits behind symbols: `raw_bits` of each value of `raw`, both (n,)."""
    high = raw_bits > 16
    if high.any():
        sizes = (1 << (raw_bits[high] - 16)).astype(np.int32)
        coder.encode_reverse((raw[high] >> 16).astype(np.int32), UNIFORM, sizes)
    some = raw_bits > 0
    if some.any():
        sizes = (1 << np.minimum(raw_bits[some], 16)).astype(np.int32)
        coder.encode_reverse((raw[some] & 0xFFFF).astype(np.int32), UNIFORM, sizes)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _choose_layout(tuned: Words, target: Words) -> tuple[WordLayout, Ints]:
    """The cheapest settings on a sample, and the s_b of all blocks under them."""
    starts = np.linspace(0, max(target.size - SAMPLE_RUN, 0), SAMPLE_RUNS).astype(int)
    runs = [slice(s, s + SAMPLE_RUN) for s in np.unique(starts // FIRST_CHUNK * FIRST_CHUNK)]
    if target.size <= SAMPLE_RUNS * SAMPLE_RUN:
        runs = [slice(0, target.size)]
    few_tuned = np.concatenate([tuned[run] for run in runs])
    few_target = np.concatenate([target[run] for run in runs])

    @cache
    def cost(exponent_bits: int, block_log: int) -> int:
        settings = _scales(few_tuned, few_target, exponent_bits, block_log)
        return len(_write_coded(few_tuned, few_target, *settings))

    kinds = (8, 5) if target.itemsize == 2 else (8,)
    exponent_bits = min(kinds, key=lambda bits: cost(bits, 0))
    block_log = min(BLOCK_LOGS, key=lambda log: cost(exponent_bits, log))
    return _scales(tuned, target, exponent_bits, block_log)


def _scales(
    tuned: Words, target: Words, exponent_bits: int, block_log: int
) -> tuple[WordLayout, Ints]:
    """Layout, and s_b of each block, (blocks,): from the mean |tuned - target| of the block."""
    width = 8 * target.itemsize
    block = 1 << (block_log or 10)
    sums = np.empty(-(-target.size // block))
    rows = LAST_CHUNK // block
    for first in range(0, len(sums), rows):
        part = slice(first * block, (first + rows) * block)
        sums[first : first + rows] = _change(tuned[part], target[part], exponent_bits, block)
    means = sums / block if block_log else sums.sum(keepdims=True) / target.size
    smallest_log = width - 1 - exponent_bits + (1 << (exponent_bits - 1)) - 2
    with np.errstate(divide="ignore"):
        scales = np.rint(2 * (np.log2(means) + smallest_log))
    top = int(np.clip(scales.max(), -(1 << 15), (1 << 15) - 1))  # -inf where nothing is finite
    drops = np.clip(top - scales, 0, SCALES - 1).astype(np.int64)
    return WordLayout(width, exponent_bits, block_log, top), drops if block_log else drops[:0]


def _change(tuned: Words, target: Words, exponent_bits: int, block: int) -> npt.NDArray[np.float64]:
    """Σ |tuned - target| of each block, words read as floats; a change to or from NaN is 0."""
    with np.errstate(all="ignore"):
        change = np.abs(_floats(tuned, exponent_bits) - _floats(target, exponent_bits))
    change[~np.isfinite(change)] = 0.0
    return np.add.reduceat(change, np.arange(0, change.size, block))


def _floats(words: Words, exponent_bits: int) -> npt.NDArray[np.float64]:
    if words.itemsize == 4:
        return words.view(np.float32).astype(np.float64)
    if exponent_bits == 5:
        return words.view(np.float16).astype(np.float64)
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# ---------------------------------------------------------------- decoder


def _decode_coded(body: bytes, target: Words) -> Words:
    layout, stream = _parse_head(body, target)
    padded = stream + b"\0" * (-len(stream) % 4)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(padded, dtype="<u4").astype(np.uint32))
    counts = Counts.empty(layout)
    tuned = np.empty_like(target)
    last_drop = 0
    for chunk in chunk_slices(target.size):
        base = target[chunk]
        blocks = layout.blocks(chunk.stop) - layout.blocks(chunk.start)
        steps = np.zeros(0, dtype=np.int64)
        if blocks:
            steps = coder.decode(counts.scale_model(), blocks).astype(np.int64)
        drops = (last_drop + np.cumsum(steps)) % SCALES
        last_drop = int(drops[-1]) if blocks else 0
        contexts = word_contexts(base, drops, layout)
        difference = reflect(pop_differences(coder, contexts, counts, target.dtype), base)
        counts.add_scales(steps)
        tuned[chunk] = unorder_words(order_words(base) + difference)
    if coder.decode(END_MODEL) != END_MARK or not coder.is_empty():
        raise _corrupt("its stream does not end with the last word of the target")
    return tuned


def _parse_head(body: bytes, target: Words) -> tuple[WordLayout, bytes]:
    width = 8 * target.itemsize
    if len(body) < 5:
        raise _corrupt("its header is cut short")
    exponent_bits, block_log = body[0], body[1]
    if exponent_bits not in ((5, 8) if width == 16 else (8,)):
        raise _corrupt(f"{exponent_bits} exponent bits do not fit words of {width} bits")
    if block_log != 0 and not 5 <= block_log <= 10:
        raise _corrupt(f"block length 2^{block_log} is not allowed")
    top = int.from_bytes(body[2:4], "little", signed=True)
    size = shift = 0
    at = 4
    while True:
        if at >= len(body) or shift > 35:
            raise _corrupt("the length of its stream is cut short")
        size |= (body[at] & 0x7F) << shift
        shift += 7
        at += 1
        if body[at - 1] < 0x80:
            break
    stream = body[at:]
    if len(stream) != size or (at > 5 and body[at - 1] == 0):
        raise _corrupt(f"its stream should have {size} bytes, found {len(stream)}")
    if stream.endswith(b"\0"):
        raise _corrupt("its stream ends in a zero byte")
    return WordLayout(width, exponent_bits, block_log, top), stream


def pop_differences(
    coder: Coder, contexts: npt.NDArray[np.uint8], counts: Counts, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """Differences of one chunk, (n,), as integers of `dtype`; their symbols are counted."""
    order, groups = group_contexts(contexts)
    symbols = np.empty(contexts.size, dtype=np.int32)
    for context, group in groups:
        size = group.stop - group.start
        symbols[group] = coder.decode(counts.word_model(context, decoding=True), size)
        counts.add_decoded(context, symbols[group])
    large = np.flatnonzero(symbols >= FIRST_WITH_RAW)
    raw_bits = symbol_tables(counts.layout.width)[1][symbols[large]]
    raw = _NO_INTS
    if large.size:
        raw = coder.decode(UNIFORM, _uniform_sizes(np.minimum(raw_bits, 16))).astype(np.int64)
    high = raw_bits > 16
    if high.any():
        above = coder.decode(UNIFORM, _uniform_sizes(raw_bits[high] - 16))
        raw[high] |= above.astype(np.int64) << 16
    differences = np.empty(contexts.size, dtype=dtype)
    differences[order] = join_symbols(symbols, large, raw, dtype)
    return differences


def _uniform_sizes(bits: Ints) -> npt.NDArray[np.int32]:
    return (1 << bits).astype(np.int32)


# ---------------------------------------------------------------- tensors: blocks of words (3.2)


def encode_exact(tuned: Tensor, target: Tensor) -> bytes:
    """Code `tuned` losslessly against `target`, two tensors of one shape and float dtype."""
    words, context = _words_of(tuned), _words_of(target)
    blocks = [
        encode_words(words[start : start + BLOCK_WORDS], context[start : start + BLOCK_WORDS])
        for start in range(0, words.size, BLOCK_WORDS)
    ]
    return b"".join([*(_LENGTH.pack(len(block)) for block in blocks), *blocks])


def decode_exact(payload: memoryview, target: Tensor) -> Tensor:
    """The tuned tensor, of `target`'s shape and dtype. Raises: CorruptPackError."""
    context = _words_of(target)
    starts = range(0, context.size, BLOCK_WORDS)
    offset = len(starts) * _LENGTH.size
    if offset > len(payload):
        raise CorruptPackError("exact payload ends inside its table of blocks")
    words = np.empty_like(context)
    for i, start in enumerate(starts):
        (length,) = _LENGTH.unpack_from(payload, i * _LENGTH.size)
        if offset + length > len(payload):
            raise CorruptPackError("exact payload ends inside a block")
        block = bytes(payload[offset : offset + length])
        words[start : start + BLOCK_WORDS] = decode_words(
            block, context[start : start + BLOCK_WORDS]
        )
        offset += length
    if offset != len(payload):
        raise CorruptPackError(f"{len(payload) - offset} bytes follow the last exact block")
    return torch.from_numpy(words.view(np.uint8)).view(target.dtype).reshape(target.shape)


def _words_of(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor_bytes(tensor), dtype=_WORD_DTYPES[tensor.dtype])
