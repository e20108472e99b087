import itertools
import lzma
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_array_equal

from graftkit.compress import exact
from graftkit.compress.exact import decode_words, encode_words
from graftkit.errors import CorruptPackError

DTYPES = (np.uint16, np.uint32)


def bf16_words(values):
    """float32 values to bf16 words, rounded to nearest even."""
    words = values.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def float_words(values, kind):
    if kind == "bf16":
        return bf16_words(values)
    return values.astype(kind).view(np.uint16 if kind == np.float16 else np.uint32)


def tuned_and_target(count, change=1e-3, kind="bf16", seed=0):
    """Words of w ~ N(0, 0.02^2) and of w + N(0, change^2)."""
    rng = np.random.default_rng(seed)
    target = float_words(rng.normal(0, 0.02, count), kind)
    values = target.view({"bf16": np.uint16}.get(kind, kind))
    if kind == "bf16":
        values = (target.astype(np.uint32) << 16).view(np.float32)
    return float_words(values + rng.normal(0, change, count), kind), target


def bits_per_parameter(tuned, target):
    return 8 * len(encode_words(tuned, target)) / tuned.size


def assert_comes_back(tuned, target):
    payload = encode_words(tuned, target)
    decoded = decode_words(payload, target)
    assert decoded.dtype == tuned.dtype
    assert_array_equal(decoded, tuned)
    assert len(payload) <= tuned.nbytes + 1
    return payload


@st.composite
def any_words(draw):
    dtype = draw(st.sampled_from(DTYPES))
    count = draw(st.integers(0, 80))
    odd = [0, 1, 0x7F80, 0x7FC1, 0x8000, 0xFF80, 0xFFFF]  # ±0, subnormal, ±inf, NaN as bf16
    odd = odd if dtype == np.uint16 else [*odd, *(word << 16 for word in odd)]
    words = st.one_of(st.sampled_from(odd), st.integers(0, np.iinfo(dtype).max))
    target = draw(hnp.arrays(dtype, count, elements=words))
    near = (target + draw(hnp.arrays(dtype, count, elements=st.integers(0, 40)))).astype(dtype)
    return draw(st.sampled_from([near, draw(hnp.arrays(dtype, count, elements=words))])), target


@given(any_words())
def test_every_bit_pattern_comes_back(case):
    assert_comes_back(*case)


@pytest.mark.parametrize("difference", [1, 0x7FFF, 0x8000, 0xFFFF])
def test_all_65536_words_of_16_bits_come_back_from_any_difference(difference):
    target = np.arange(1 << 16, dtype=np.uint16)
    assert_comes_back(target + np.uint16(difference), target)
    assert_comes_back(target[::-1].copy(), target)


@pytest.mark.parametrize("kind", ["bf16", np.float16, np.float32])
@pytest.mark.parametrize("count", [1, 384, 1024, 1025, 70_001, 300_000])
def test_weights_of_each_format_come_back_at_every_chunk_boundary(kind, count):
    assert_comes_back(*tuned_and_target(count, kind=kind))


@pytest.mark.parametrize("block_log", [0, 5, 10])
def test_words_come_back_under_every_block_length(block_log, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_LOGS", (block_log,))
    tuned, target = tuned_and_target(5000)
    tuned[1024:3000] = target[1024:3000]
    assert assert_comes_back(tuned, target)[2] == block_log


def test_a_payload_reads_as_the_documented_layout_without_the_coder_library():
    tuned, target = tuned_and_target(2500, change=2e-3)
    tuned[:1100] = target[:1100]
    tuned[7] = 0x7FC1
    payload = encode_words(tuned, target)
    assert payload[2] > 0
    assert decode_by_the_book(payload, target.tolist()) == tuned.tolist()


def test_32_bit_payloads_read_as_the_documented_layout_too():
    tuned, target = tuned_and_target(1500, change=3e-2, kind=np.float32)
    payload = encode_words(tuned, target)
    assert decode_by_the_book(payload, target.tolist(), width=32) == tuned.tolist()


def test_an_unchanged_tensor_costs_one_byte():
    _, target = tuned_and_target(100_000)
    assert encode_words(target.copy(), target) == b"\x00"
    assert encode_words(target[:0], target[:0]) == b"\x00"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_tensor_costs_one_byte_and_one_word(dtype):
    target = np.random.default_rng(0).integers(0, 60_000, 10_000).astype(dtype)
    payload = assert_comes_back(np.full_like(target, 0x3F80), target)
    assert len(payload) == 1 + target.itemsize


def test_one_changed_word_in_a_million_costs_few_bytes():
    _, target = tuned_and_target(1 << 20)
    tuned = target.copy()
    tuned[777_777] += 3
    assert len(assert_comes_back(tuned, target)) < 100


def test_unrelated_words_cost_one_byte_more_than_raw():
    rng = np.random.default_rng(0)
    tuned, target = rng.integers(0, 1 << 16, (2, 3000)).astype(np.uint16)
    assert len(assert_comes_back(tuned, target)) == 1 + tuned.nbytes


@pytest.mark.parametrize(
    ("change", "bound"), [(3e-6, 0.18), (1e-5, 0.53), (1e-4, 2.93), (3e-4, 4.49), (1e-3, 6.28)]
)
def test_the_rate_stays_near_the_entropy_given_the_target_exponent(change, bound):
    assert bits_per_parameter(*tuned_and_target(1 << 18, change)) < bound


def test_a_typical_delta_is_a_fifth_smaller_than_lzma_of_xor_byte_planes():
    tuned, target = tuned_and_target(1 << 16, change=3e-4)
    planes = (tuned ^ target).view(np.uint8).reshape(-1, 2).T.tobytes()
    assert len(encode_words(tuned, target)) < 0.8 * len(lzma.compress(planes))


def test_rows_that_changed_little_cost_little():
    tuned, target = tuned_and_target(1 << 17, change=1e-3)
    small, _ = tuned_and_target(1 << 17, change=1e-5)
    rows = np.arange(tuned.size) // 512 % 2 == 1
    mixed = np.where(rows, tuned, small)
    halves = (bits_per_parameter(tuned, target) + bits_per_parameter(small, target)) / 2
    assert bits_per_parameter(mixed, target) < halves + 0.05


def test_the_arrays_are_left_unchanged_and_need_not_be_contiguous_or_writable():
    tuned, target = tuned_and_target(4000)
    copies = tuned.copy(), target.copy()
    tuned.flags.writeable = target.flags.writeable = False
    assert_comes_back(tuned[::2], target[::2])
    assert_array_equal(tuned, copies[0])
    assert_array_equal(target, copies[1])


@pytest.mark.parametrize("kind", ["bf16", np.float32])
def test_every_truncation_is_reported_as_corrupt(kind):
    tuned, target = tuned_and_target(300, kind=kind)
    payload = encode_words(tuned, target)
    assert payload[0] == exact.CODED
    for size in range(len(payload)):
        with pytest.raises(CorruptPackError, match="damaged"):
            decode_words(payload[:size], target)


@pytest.mark.parametrize("tail", [b"\x00", b"\x01", b"\x00" * 4, b"words"])
def test_extra_bytes_are_reported_as_corrupt(tail):
    tuned, target = tuned_and_target(300)
    rng = np.random.default_rng(0)
    payloads = [encode_words(words, target) for words in (tuned, target, target * 0)]
    payloads.append(encode_words(rng.integers(0, 1 << 16, 300).astype(np.uint16), target))
    assert [payload[0] for payload in payloads] == [exact.CODED, 0, exact.CONSTANT, exact.RAW]
    for payload in payloads:
        with pytest.raises(CorruptPackError):
            decode_words(payload + tail, target)


def test_a_payload_for_a_longer_or_shorter_target_is_reported_as_corrupt():
    tuned, target = tuned_and_target(3000)
    payload = encode_words(tuned, target)
    for other in (target[:2999], np.append(target, target[:50])):
        with pytest.raises(CorruptPackError):
            decode_words(payload, other)


def assert_words_or_corrupt(payload, target):
    try:
        assert decode_words(payload, target).shape == target.shape
    except CorruptPackError:
        return


@pytest.mark.parametrize("kind", ["bf16", np.float16, np.float32])
@pytest.mark.parametrize("count", [40, 1500])
def test_flipped_bits_give_words_or_a_corrupt_error_never_a_crash(kind, count):
    tuned, target = tuned_and_target(count, kind=kind)
    payload = encode_words(tuned, target)
    rng = np.random.default_rng(0)
    heads = range(8 * min(9, len(payload)))
    for bit in (*heads, *rng.integers(0, 8 * len(payload), 60).tolist()):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        assert_words_or_corrupt(bytes(damaged), target)


@given(st.binary(max_size=40), st.sampled_from(DTYPES), st.integers(0, 50))
def test_arbitrary_bytes_give_words_or_a_corrupt_error_never_a_crash(noise, dtype, count):
    target = np.random.default_rng(0).integers(0, 60_000, count).astype(dtype)
    assert_words_or_corrupt(noise, target)
    stream = bytes([exact.CODED, 8, 5, 200, 2, len(noise)]) + noise
    assert_words_or_corrupt(stream, target)


def test_a_forged_header_is_reported_as_corrupt():
    tuned, target = tuned_and_target(3)
    payload = encode_words(tuned, target)
    coded = bytes([exact.CODED, 8, 0, 0, 0])
    for forged in (
        b"",
        bytes([4]) + payload[1:],
        bytes([exact.CODED, 7, 0, 0, 0, 1, 1]),
        bytes([exact.CODED, 8, 4, 0, 0, 1, 1]),
        bytes([exact.CODED, 8, 11, 0, 0, 1, 1]),
        coded + b"\x81\x00\x01",  # a varint longer than it need be
        coded + b"\xff" * 9 + b"\x01",
        coded + b"\x01\x00",  # a stream that ends in zero
    ):
        with pytest.raises(CorruptPackError):
            decode_words(forged, target)
    with pytest.raises(CorruptPackError):
        decode_words(bytes([exact.CODED, 5, 0, 0, 0, 1, 1]), target.astype(np.uint32))


def test_arrays_of_another_dtype_shape_or_length_are_refused():
    words = np.zeros(4, dtype=np.uint16)
    for other in (words.astype(np.int16), words.reshape(2, 2), words[:3], words.astype(np.uint32)):
        with pytest.raises(ValueError, match="must be"):
            encode_words(other, words)
    with pytest.raises(ValueError, match="must be"):
        decode_words(b"\x00", words.astype(np.float32))


# ------------------------------------------- the module docstring, in plain Python, no library


class BookDecoder:
    """rANS: 64-bit state, 32-bit words from the end of the stream, 24-bit probabilities."""

    def __init__(self, stream):
        stream += b"\0" * (-len(stream) % 4)
        self.words = [int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)]
        self.state = 0
        while self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def pop(self, slots):
        """slots: size of each symbol's share of 2^24."""
        slot = self.state & 0xFFFFFF
        uppers = list(itertools.accumulate(slots))
        symbol = next(i for i, upper in enumerate(uppers) if slot < upper)
        self.step(slot - uppers[symbol] + slots[symbol], slots[symbol])
        return symbol

    def pop_uniform(self, bits):
        size = 1 << (24 - bits)
        value, rest = divmod(self.state & 0xFFFFFF, size)
        self.step(rest, size)
        return value

    def step(self, rest, size):
        self.state = (self.state >> 24) * size + rest
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()


def book_slots(counts, prior):
    shift = 0
    while sum(counts) >> shift >= 1 << 24:
        shift += 1
    mass = [2048 * (count >> shift) + p for count, p in zip(counts, prior, strict=True)]
    free = (1 << 24) - len(mass)
    shares = [m * free // sum(mass) for m in mass]
    shares[mass.index(max(mass))] += free - sum(shares)
    return [share + 1 for share in shares]


def book_prior(context, width, mantissa):
    mean = math.isqrt(2 ** (24 + min(context, 16 + 2 * mantissa)))
    starts = [*range(16), *((8 + k) << (e - 4) for e in range(5, width + 1) for k in range(8))]

    def tail(a):
        terms = [math.comb(a, k) * 2 ** (20 * k) * mean ** (4 - k) for k in range(5)]
        return 2**40 * mean**4 // sum(terms)

    shares = [tail(a) - tail(b) for a, b in itertools.pairwise([*starts, 1 << width])]
    return [1 + (shares[0] >> 24)] + [1 + (share >> 25) for share in shares[1:] for _ in "+-"]


def book_context(word, scale, width, mantissa):
    field, bit = word % (1 << width - 1) >> mantissa, word >> (mantissa - 1) & 1
    context = scale - 2 * (max(field, 1) - 1) + 16
    context -= bit if context > 16 + 2 * mantissa else 0
    return min(max(context, 0), 47 + 2 * mantissa)


def book_word(word, symbol, raw, width):
    index, half, full = (symbol + 1) // 2, 1 << (width - 1), 1 << width
    size = index if index < 16 else ((8 + index % 8) << ((index - 16) // 8 + 1)) + raw
    difference = -size if symbol % 2 == 0 else size
    difference = -difference if word >= half else difference
    ordered = ((full - 1 - word if word >= half else word + half) + difference) % full
    return ordered - half if ordered >= half else full - 1 - ordered


def book_raw(coder, symbols):
    bits = [max(0, ((symbol + 1) // 2 - 16) // 8 + 1) for symbol in symbols]
    low = [coder.pop_uniform(min(b, 16)) if b else 0 for b in bits]
    high = [coder.pop_uniform(b - 16) << 16 if b > 16 else 0 for b in bits]
    return [a + b for a, b in zip(low, high, strict=True)]


def book_drops(coder, counts, blocks, before):
    prior = [max(1, 32768 >> 2 * min(i, 64 - i)) for i in range(64)]
    slots = book_slots(counts, prior)
    steps = [coder.pop(slots) for _ in range(blocks)]
    for step in steps:
        counts[step] += 1
    return [drop % 64 for drop in itertools.accumulate(steps, initial=before)][1:]


def decode_by_the_book(payload, target, width=16):
    mode, exponent_bits, block_log = payload[:3]
    assert mode == 2
    top = int.from_bytes(payload[3:5], "little", signed=True)
    at = next(i for i in range(5, 11) if payload[i] < 128) + 1
    coder = BookDecoder(payload[at:])
    mantissa = width - 1 - exponent_bits
    counts, scale_counts = {}, [0] * 64
    tuned, drops = [], [0]
    while len(tuned) < len(target):
        words = target[len(tuned) :][: min(max(len(tuned), 1024), 1 << 17)]
        if block_log:
            drops = book_drops(coder, scale_counts, -(-len(words) >> block_log), drops[-1])
        scales = [top - drops[i >> block_log if block_log else 0] for i in range(len(words))]
        pairs = zip(words, scales, strict=True)
        contexts = [book_context(word, scale, width, mantissa) for word, scale in pairs]
        order = sorted(range(len(words)), key=lambda i: contexts[i])
        slots = {}
        for u in set(contexts):
            prior = book_prior(u, width, mantissa)
            slots[u] = book_slots(counts.setdefault(u, [0] * len(prior)), prior)
        symbols = [coder.pop(slots[contexts[i]]) for i in order]
        actual = dict(zip(order, zip(symbols, book_raw(coder, symbols), strict=True), strict=True))
        for i, word in enumerate(words):
            tuned.append(book_word(word, *actual[i], width))
            counts[contexts[i]][actual[i][0]] += 1
    assert coder.pop_uniform(23) == 2**23 - 1
    assert (coder.state, coder.words) == (0, [])
    return tuned
