"""Codes of 1 to 8 bits, packed without gaps into bytes and back.

Layout: code i occupies the bits [i * bits, (i + 1) * bits) of the stream; bit j of the stream is
bit j % 8 (least significant first) of byte j // 8. The last byte is filled up with zero bits, so
`count` codes take exactly ceil(count * bits / 8) bytes.

Eight codes fill exactly `bits` bytes. One 64-bit word therefore holds eight codes, one per byte,
and three shift-and-merge steps close (or open) the gaps between them: pairs, quads, all eight.
"""

import numpy as np
import numpy.typing as npt

from graftkit.errors import CorruptPackError

Bytes = npt.NDArray[np.uint8]
Lanes = npt.NDArray[np.uint64]

CODES_PER_LANE = 8
LANES_PER_BLOCK = 1 << 14  # 131,072 codes at a time: temporaries stay inside the cache


def packed_bytes(count: int, bits: int) -> int:
    """Size of `count` packed codes in bytes: ceil(count * bits / 8).

    Raises: ValueError when bits is outside 1..8 or count is negative.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; a code has 1 to 8 bits")
    if count < 0:
        raise ValueError(f"count is {count}; it cannot be negative")
    return -(-count * bits // 8)


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """Pack `codes` into the layout of this module.

    Args:
        codes: uint8, any shape, read in C order; every code below 2**bits.
        bits: width of one code, 1 to 8.
    Returns: uint8, (packed_bytes(codes.size, bits),).
    Raises: ValueError when bits is outside 1..8 or a code does not fit.
    """
    packed = np.empty(packed_bytes(codes.size, bits), dtype=np.uint8)
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"code {int(flat.max())} does not fit into {bits} bits")
    if bits == 8:
        return flat.copy()
    step = LANES_PER_BLOCK * CODES_PER_LANE
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        rows = _close_gaps(_as_lanes(block), bits).view(np.uint8).reshape(-1, 8)[:, :bits]
        first = packed_bytes(start, bits)
        size = packed_bytes(block.size, bits)
        packed[first : first + size] = rows.reshape(-1)[:size]
    return packed


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """Inverse of `pack_bits`.

    Args:
        packed: uint8, (packed_bytes(count, bits),).
        bits: width of one code, 1 to 8.
        count: number of codes.
    Returns: uint8 codes, (count,).
    Raises: CorruptPackError when the number of bytes is wrong or a padding bit is set; ValueError
        when bits is outside 1..8 or count is negative.
    """
    expected = packed_bytes(count, bits)
    if packed.size != expected:
        raise CorruptPackError(
            f"{count} codes of {bits} bits take {expected} bytes; found {packed.size}. "
            "The file is damaged; fetch it again."
        )
    flat = np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1)
    used = count * bits % 8
    if used and int(flat[-1]) >> used:
        raise CorruptPackError("a padding bit after the last code is set; the file is damaged.")
    if bits == 8:
        return flat.copy()
    codes = np.empty(count, dtype=np.uint8)
    step = LANES_PER_BLOCK * CODES_PER_LANE
    for start in range(0, count, step):
        size = min(step, count - start)
        first = packed_bytes(start, bits)
        lanes = _read_lanes(flat[first : first + packed_bytes(size, bits)], bits)
        codes[start : start + size] = _open_gaps(lanes, bits).view(np.uint8)[:size]
    return codes


def _as_lanes(codes: Bytes) -> Lanes:
    """A copy of codes (n,) as little-endian uint64 (ceil(n / 8),), zero-padded."""
    lanes = np.zeros(-(-codes.size // CODES_PER_LANE), dtype="<u8")
    lanes.view(np.uint8)[: codes.size] = codes
    return lanes


def _read_lanes(packed: Bytes, bits: int) -> Lanes:
    """Packed bytes (n,) as little-endian uint64 (ceil(n / bits),), `bits` bytes in each."""
    lanes = np.zeros(-(-packed.size // bits), dtype="<u8")
    rows = lanes.view(np.uint8).reshape(-1, 8)
    whole = packed.size // bits
    rows[:whole, :bits] = packed[: whole * bits].reshape(-1, bits)
    if whole < len(rows):
        rows[whole, : packed.size - whole * bits] = packed[whole * bits :]
    return lanes


def _merge_steps(bits: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """(shift, low mask, high mask) of the three steps from 8-bit fields to one 64-bit field."""
    steps = []
    for field in (8, 16, 32):  # width of the fields that are merged in pairs
        width = bits * field // 8
        mask = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * field))
        steps.append((np.uint64(field - width), np.uint64(mask), np.uint64(mask << width)))
    return steps


def _close_gaps(lanes: Lanes, bits: int) -> Lanes:
    """Move the eight codes of each lane together, in place; returns lanes."""
    for shift, low, high in _merge_steps(bits):
        upper = lanes >> shift
        upper &= high
        lanes &= low
        lanes |= upper
    return lanes


def _open_gaps(lanes: Lanes, bits: int) -> Lanes:
    """Inverse of `_close_gaps`, in place; returns lanes."""
    for shift, low, high in reversed(_merge_steps(bits)):
        upper = lanes & high
        upper <<= shift
        lanes &= low
        lanes |= upper
    return lanes
