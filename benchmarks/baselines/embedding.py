"""The tied embedding, stored in one way for every baseline."""

from collections.abc import Iterator

import torch
from torch import Tensor

from graftkit.compress import entries, lowrank
from graftkit.compress.codecs import (
    LowRankTiers,
    Precision,
    Sparse,
    Statistics,
    decode_matrix,
    encode_matrix,
    payload_bytes,
)
from graftkit.compress.exact import decode_exact, encode_exact

_CODECS = ("sparse", "lowrank", "exact")


def encode_embedding(before: Tensor, after: Tensor, budget_bytes: int) -> bytes:
    """The payload of at most `budget_bytes` that keeps most of the delta's energy.

    Args:
        before, after: (vocabulary, width) of target and tuned, one float dtype.
    Returns: a codec byte and the codec's payload; nothing at all where the budget is too small.
    """
    delta = after.float() - before.float()
    best, least = b"", float(delta.square().sum())
    for payload in _candidates(before, after, delta, budget_bytes - 1):
        error = (decode_embedding(payload, before).float() - after.float()).square().sum()
        if float(error) < least:
            best, least = payload, float(error)
    return best


def decode_embedding(payload: bytes, before: Tensor) -> Tensor:
    """The packed model's embedding, in the target's dtype."""
    if not payload:
        return before.clone()
    codec, body = _CODECS[payload[0]], memoryview(payload)[1:]
    if codec == "exact":
        return decode_exact(body, before)
    delta = decode_matrix(codec, body, (before.shape[0], before.shape[1]))
    return (before.float() + delta).to(before.dtype)


def _candidates(before: Tensor, after: Tensor, delta: Tensor, room: int) -> Iterator[bytes]:
    shape = (delta.shape[0], delta.shape[1])
    if room <= 0:
        return
    exact = encode_exact(after, before)
    if len(exact) <= room:
        yield bytes([_CODECS.index("exact")]) + exact
        return
    kept = _most(delta.numel(), lambda count: entries.sparse_bytes(shape, count) <= room)
    if kept:
        yield _encoded(delta, Sparse(kept), Statistics())
    statistics: Statistics | None = None
    for shares in lowrank.TIER_SHARES:
        rank = _most(
            min(shape),
            lambda r, s=shares: (
                payload_bytes(shape, LowRankTiers(lowrank.split_tiers(r, s))) <= room
            ),
        )
        if rank:
            # One eigenbasis serves every split of the rank.
            statistics = statistics or Statistics(basis=lowrank.eigenbasis(delta, None)[1])
            yield _encoded(delta, LowRankTiers(lowrank.split_tiers(rank, shares)), statistics)


def _encoded(delta: Tensor, precision: Precision, statistics: Statistics) -> bytes:
    codec = bytes([_CODECS.index(precision.codec)])
    return codec + encode_matrix(delta, statistics, precision)


def _most(limit: int, fits: object) -> int:
    """The largest count of 0 to `limit` that fits; sizes rise with the count."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)  # type: ignore[operator]
    return low


def relative_error(before: Tensor, after: Tensor, payload: bytes) -> float:
    """Squared error of a payload over the delta's energy."""
    delta = (after.float() - before.float()).square().sum().clamp(min=1e-30)
    error = (decode_embedding(payload, before).float() - after.float()).square().sum()
    return float(torch.as_tensor(error / delta))
