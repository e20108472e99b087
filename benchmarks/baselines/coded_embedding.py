"""graftkit's own codec for an embedding, for the row that asks what graftllm makes of it."""

import math

from torch import Tensor

from baselines.embedding import decode_embedding, encode_embedding
from graftkit.compress.coded import encode_factors, load_factors, store_factors
from graftkit.compress.lowrank import eigenbasis, leading_rows

_CODED = 255
"""First byte of coded factors; the common codecs count from 0."""
_HALVINGS = 12


def encode_best(before: Tensor, after: Tensor, budget_bytes: int) -> bytes:
    """The payload of at most `budget_bytes` that keeps most of the delta's energy."""
    common = encode_embedding(before, after, budget_bytes)
    coded = _coded(after.float() - before.float(), budget_bytes - 1)
    if coded is None:
        return common
    return min(common, coded, key=lambda payload: _lost(before, after, payload))


def decode_best(payload: bytes, before: Tensor) -> Tensor:
    """The packed model's embedding, in the target's dtype."""
    if not payload or payload[0] != _CODED:
        return decode_embedding(payload, before)
    left, right = load_factors(
        memoryview(payload)[1:], (before.shape[0], before.shape[1])
    ).factors()
    return before.float().addmm(left, right).to(before.dtype)


def _coded(delta: Tensor, room: int) -> bytes | None:
    """Coded factors at the smallest water level that fits."""
    energies, basis = eigenbasis(delta, None)
    rows = leading_rows(delta, basis, len(energies), None)
    low, high = (math.log(float(energies[0].sqrt()) * share) for share in (1e-5, 1.0))
    best = None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        payload = store_factors(encode_factors(delta, rows, None, math.exp(middle)))
        if len(payload) <= room:
            best, high = bytes([_CODED]) + payload, middle
        else:
            low = middle
    return best


def _lost(before: Tensor, after: Tensor, payload: bytes) -> float:
    return float((decode_best(payload, before).float() - after.float()).square().sum())
