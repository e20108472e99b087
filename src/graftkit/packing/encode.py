"""One pair of tensors becomes one record and its payload."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftkit.compress.codecs import (
    Precision,
    Statistics,
    Zero,
    decode_rows,
    encode_matrix,
    join_payloads,
    matrices,
    matrix_shape,
    row_blocks,
    split_payload,
)
from graftkit.compress.energy import output_energy
from graftkit.delta import TENSOR_DIGEST_HEX, Checkpoint, difference, tensor_bytes
from graftkit.packing.measure import Scan
from graftkit.packing.pairs import Pair
from graftkit.skillpack.manifest import TensorRecord
from graftkit.skillpack.words import encode_exact

WORST_CASE_ERROR = 0.0001234
"""As many characters as any error takes with four significant digits."""


@dataclass(frozen=True)
class Encoded:
    """A finished tensor. distortion: relative squared error in the metric of the bound."""

    record: TensorRecord
    payload: bytes
    distortion: float


def draft_record(
    pair: Pair, scan: Scan, codec: str, payload_bytes: int, appended_bytes: int
) -> TensorRecord:
    """The record without its error, with that field as long as it can get."""
    grown = pair.resized and pair.tuned.shape[0] > pair.target.shape[0]
    fields: dict[str, Any] = {
        "name": pair.name,
        "kind": pair.role.kind.value,
        "dtype": pair.target.dtype,
        "shape": pair.target.shape,
        "blake3": scan.target_digest[:TENSOR_DIGEST_HEX],
        "codec": codec,
        "error": WORST_CASE_ERROR,
        "bytes": payload_bytes,
        "appended_bytes": appended_bytes if grown else 0,
        "base": pair.base,
    }
    if pair.tuned.dtype != pair.target.dtype:
        fields["tuned_dtype"] = pair.tuned.dtype
    if pair.resized:
        fields["tuned_shape"] = pair.tuned.shape
    if codec not in ("zero", "exact"):
        fields["layout"] = pair.layout
    return TensorRecord(**fields)


def encode_appended(pair: Pair, tuned: Checkpoint) -> bytes:
    """Rows of a grown vocabulary that the target lacks, lossless."""
    if not pair.resized or pair.tuned.shape[0] <= pair.target.shape[0]:
        return b""
    return encode_rows(tuned.read(pair.tuned.name)[pair.target.shape[0] :])


def encode_rows(rows: Tensor) -> bytes:
    """Rows that have nothing to be compared with, lossless."""
    return encode_exact(rows.contiguous(), torch.zeros_like(rows))


def encode_lossless(
    pair: Pair, scan: Scan, states: tuple[Tensor, Tensor], appended: bytes
) -> Encoded:
    """Lossless: `zero` where no bit differs, else `exact`."""
    before, after = states
    same = bytes(tensor_bytes(before)) == bytes(tensor_bytes(after))
    body = b"" if same else encode_exact(after.contiguous(), before.contiguous())
    return _finish(pair, scan, "zero" if same else "exact", body, appended, (0.0, 0.0))


def encode_lossy(
    pair: Pair,
    scan: Scan,
    states: tuple[Tensor, Tensor],
    statistics: tuple[Tensor | None, Tensor | None],
    precision: Precision,
    appended: bytes,
    weighted: bool,
) -> Encoded:
    """Encode with a delta codec; `zero` where what comes out would not fit the tuned dtype.

    Args:
        states: common rows of target (in the tuned dtype) and tuned.
        statistics: covariance (n, n) or None; bases (matrices, side, k) or None.
        weighted: measure the bound's distortion under the covariance.
    """
    delta = difference(states[1], states[0])
    covariance, bases = statistics
    lost = (1.0, 1.0) if bool(delta.any()) else (0.0, 0.0)
    nothing = _finish(pair, scan, "zero", b"", appended, lost)
    if isinstance(precision, Zero) or lost == (0.0, 0.0):
        return nothing
    parts = [
        encode_matrix(
            part.contiguous(),
            Statistics(covariance, None if bases is None else bases[i]),
            precision,
        )
        for i, part in enumerate(matrices(delta, pair.layout))
    ]
    body = join_payloads(parts)
    metric = covariance if weighted else None
    measured = _measured(pair, scan, states, delta, metric, (precision.codec, body, appended))
    return nothing if measured is None else measured


def remeasured(
    pair: Pair,
    scan: Scan,
    states: tuple[Tensor, Tensor],
    covariance: Tensor | None,
    codec: str,
    body: bytes,
) -> Encoded | None:
    """A tensor whose payload was changed after it was coded; it has no appended rows.

    None where it decodes to weights that the tuned dtype does not hold.
    """
    delta = difference(states[1], states[0])
    return _measured(pair, scan, states, delta, covariance, (codec, body, b""))


def _measured(
    pair: Pair,
    scan: Scan,
    states: tuple[Tensor, Tensor],
    delta: Tensor,
    covariance: Tensor | None,
    coded: tuple[str, bytes, bytes],
) -> Encoded | None:
    """coded: codec, its payload, and the appended rows' payload. None: a reader would refuse it."""
    codec, body, appended = coded
    lost = _lost_energies(pair, states[0], delta, covariance, codec, memoryview(body))
    if lost is None:
        return None
    distortion = lost[0] / _energy(delta, pair, None)
    error = math.sqrt(distortion)
    if covariance is not None:
        distortion = lost[1] / max(_energy(delta, pair, covariance), 1e-30)
    return _finish(pair, scan, codec, body, appended, (error, distortion))


def _lost_energies(
    pair: Pair,
    before: Tensor,
    delta: Tensor,
    covariance: Tensor | None,
    codec: str,
    body: memoryview,
) -> tuple[float, float] | None:
    """‖δ̂ − δ‖² without and with the covariance (0 where it is None), block by block.

    None where before + δ̂, rounded as a reader rounds it, is not finite.
    """
    count, shape = matrix_shape(tuple(delta.shape), pair.layout)
    plain = weighted = 0.0
    sides = (matrices(tensor, pair.layout) for tensor in (before, delta))
    for part, weight, matrix in zip(split_payload(body, count), *sides, strict=True):
        rows = decode_rows(codec, part, shape)
        for block in row_blocks(shape):
            decoded = rows(block)
            if not _fits(decoded, weight[block]):
                return None
            error = decoded.sub_(matrix[block])
            plain += output_energy(error, None)
            if covariance is not None:
                weighted += output_energy(error, covariance)
    return plain, weighted


def _fits(decoded: Tensor, weight: Tensor) -> bool:
    """Whether the sum is finite in the weight's dtype; peaks alone nearly always tell."""
    peaks = [float(end.abs()) for part in (decoded, weight) for end in torch.aminmax(part)]
    if sum(peaks) < torch.finfo(weight.dtype).max / 2:
        return True
    total = (decoded + weight).to(weight.dtype)
    return bool(decoded.isfinite().all()) and bool(total.isfinite().all())


def _finish(
    pair: Pair, scan: Scan, codec: str, body: bytes, appended: bytes, lost: tuple[float, float]
) -> Encoded:
    payload = body + appended
    record = draft_record(pair, scan, codec, len(payload), len(appended))
    error = float(f"{lost[0]:.4g}")
    return Encoded(record.model_copy(update={"error": error}), payload, lost[1])


def _energy(delta: Tensor, pair: Pair, covariance: Tensor | None) -> float:
    return sum(output_energy(part, covariance) for part in matrices(delta, pair.layout))
