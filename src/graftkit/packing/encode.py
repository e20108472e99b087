"""One pair of tensors becomes one record and its payload.

What surrounds the payloads: the manifest, its bytes, and the room that it leaves.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.checkpoint import TENSOR_DIGEST_HEX, Checkpoint, difference, tensor_bytes
from graftkit.compress.allocate import output_energy
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
from graftkit.compress.exact import encode_exact
from graftkit.config import VERSION, PackConfig
from graftkit.errors import BudgetError
from graftkit.files import WorkFolder
from graftkit.packing.measure import Scan
from graftkit.packing.pairs import TensorPair
from graftkit.side_files import changed_code
from graftkit.skillpack.container import build_header, file_entry, payloads_digest
from graftkit.skillpack.manifest import (
    ROUTER_ENTRY,
    CalibrationInfo,
    FileRecord,
    Manifest,
    Omission,
    RouterInfo,
    TargetInfo,
    TensorRecord,
    TunedInfo,
)

WORST_CASE_ERROR = 0.0001234
"""As many characters as any error takes with four significant digits."""


@dataclass(frozen=True)
class EncodedTensor:
    """A finished tensor. distortion: relative squared error in the metric of the bound."""

    record: TensorRecord
    payload: bytes
    distortion: float


def draft_record(
    pair: TensorPair, scan: Scan, codec: str, payload_bytes: int, appended_bytes: int
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


def encode_appended(pair: TensorPair, tuned: Checkpoint) -> bytes:
    """Rows of a grown vocabulary that the target lacks, lossless."""
    if not pair.resized or pair.tuned.shape[0] <= pair.target.shape[0]:
        return b""
    return encode_added_rows(tuned.read(pair.tuned.name)[pair.target.shape[0] :])


def encode_added_rows(rows: Tensor) -> bytes:
    """Rows that have nothing to be compared with, lossless."""
    return encode_exact(rows.contiguous(), torch.zeros_like(rows))


def encode_lossless(
    pair: TensorPair, scan: Scan, states: tuple[Tensor, Tensor], appended: bytes
) -> EncodedTensor:
    """Lossless: `zero` where no bit differs, else `exact`."""
    before, after = states
    same = bytes(tensor_bytes(before)) == bytes(tensor_bytes(after))
    body = b"" if same else encode_exact(after.contiguous(), before.contiguous())
    return _finish(pair, scan, "zero" if same else "exact", body, appended, (0.0, 0.0))


def encode_lossy(
    pair: TensorPair,
    scan: Scan,
    states: tuple[Tensor, Tensor],
    statistics: tuple[Tensor | None, Tensor | None],
    precision: Precision,
    appended: bytes,
    weighted: bool,
) -> EncodedTensor:
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
    pair: TensorPair,
    scan: Scan,
    states: tuple[Tensor, Tensor],
    covariance: Tensor | None,
    codec: str,
    body: bytes,
) -> EncodedTensor | None:
    """A tensor whose payload was changed after it was coded; it has no appended rows.

    None where it decodes to weights that the tuned dtype does not hold.
    """
    delta = difference(states[1], states[0])
    return _measured(pair, scan, states, delta, covariance, (codec, body, b""))


def _measured(
    pair: TensorPair,
    scan: Scan,
    states: tuple[Tensor, Tensor],
    delta: Tensor,
    covariance: Tensor | None,
    coded: tuple[str, bytes, bytes],
) -> EncodedTensor | None:
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
    pair: TensorPair,
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
    pair: TensorPair,
    scan: Scan,
    codec: str,
    body: bytes,
    appended: bytes,
    lost: tuple[float, float],
) -> EncodedTensor:
    payload = body + appended
    record = draft_record(pair, scan, codec, len(payload), len(appended))
    error = float(f"{lost[0]:.4g}")
    return EncodedTensor(record.model_copy(update={"error": error}), payload, lost[1])


def _energy(delta: Tensor, pair: TensorPair, covariance: Tensor | None) -> float:
    return sum(output_energy(part, covariance) for part in matrices(delta, pair.layout))


GENERATOR = f"graftkit {VERSION}"


@dataclass(frozen=True)
class StoredTensor:
    """A finished tensor whose payload lies in the work folder, in `file`."""

    record: TensorRecord
    distortion: float
    nbytes: int
    file: str


@dataclass(frozen=True)
class PackAssembly:
    """One pack around its payloads. budget_bytes: largest file allowed. files: side files with
    their payloads. router: description and bytes of the key
    by which prompts find the pack."""

    target: Checkpoint
    tuned: Checkpoint
    config: PackConfig
    budget_bytes: int | None
    pairs: Sequence[TensorPair]
    scans: Sequence[Scan]
    files: Sequence[tuple[FileRecord, bytes]]
    calibration: CalibrationInfo | None
    router: tuple[RouterInfo, bytes] | None
    work: WorkFolder

    def room_for_lossy(
        self, stored: Mapping[int, StoredTensor], lossy: list[int], appended: Mapping[int, bytes]
    ) -> int:
        """Payload bytes left for lossy tensors. Raises: BudgetError when nothing is left."""
        if self.budget_bytes is None:
            return 0
        fixed = self._fixed_bytes(stored, lossy, appended, self.budget_bytes)
        if fixed > self.budget_bytes:
            # The manifest repeats the budget, and a larger one may take a few more digits.
            least = self._fixed_bytes(stored, lossy, appended, 2 * fixed) + 32
            raise BudgetError(
                f"budget {self.config.budget or '5%'} is {self.budget_bytes:,} bytes, but the "
                f"manifest and what is stored exactly take {fixed:,}; ask for at least "
                f"{least}B ({100 * least / self.target.nbytes:.2f}%)"
            )
        return self.budget_bytes - fixed

    def _fixed_bytes(
        self,
        stored: Mapping[int, StoredTensor],
        lossy: list[int],
        appended: Mapping[int, bytes],
        longest: int,
    ) -> int:
        """Bytes of all but the lossy payloads, at most; none of these is over `longest` bytes."""
        pairs = self.pairs
        drafts = {
            i: draft_record(pairs[i], self.scans[i], "lowrank", longest, len(appended[i]))
            for i in lossy
        }
        records = [drafts[i] if i in drafts else stored[i].record for i in range(len(pairs))]
        sizes = {pairs[i].name: longest for i in lossy} | self._other_sizes()
        sizes |= {pairs[i].name: part.nbytes for i, part in stored.items()}
        header = build_header(self._manifest(records, WORST_CASE_ERROR, "0" * 64), sizes)
        fixed = len(header) + sum(part.nbytes for part in stored.values())
        return fixed + sum(map(len, appended.values())) + sum(self._other_sizes().values())

    def _payloads(self, stored: Mapping[int, StoredTensor]) -> Iterator[bytes]:
        """What follows the header of the file."""
        for i in sorted(stored):
            if stored[i].nbytes:
                yield self.work.read(stored[i].file) or b""
        yield from self.others().values()

    def finished(self, stored: Mapping[int, StoredTensor], bound: float | None) -> Manifest:
        """The manifest of all tensors as they are stored."""
        digest = payloads_digest(self._payloads(stored))
        return self._manifest([stored[i].record for i in sorted(stored)], bound, digest)

    def others(self) -> dict[str, bytes]:
        """What is stored behind the tensors, by payload name, in the order of the file."""
        others = {file_entry(record.name): payload for record, payload in self.files if payload}
        return others if self.router is None else others | {ROUTER_ENTRY: self.router[1]}

    @cached_property
    def omitted(self) -> tuple[Omission, ...]:
        """What the tuned model has otherwise and no pack holds: code, which would be executed."""
        reason = "code of the tuned model, which differs from the target's"
        names = changed_code(self.target.path, self.tuned.path)
        return tuple(Omission(name=name, reason=reason) for name in names)

    def _other_sizes(self) -> dict[str, int]:
        return {name: len(payload) for name, payload in self.others().items()}

    def _manifest(
        self, records: Sequence[TensorRecord], bound: float | None, digest: str | None
    ) -> Manifest:
        files: tuple[FileRecord, ...] = tuple(record for record, _ in self.files)
        return Manifest(
            generator=GENERATOR,
            target=target_info(self.target, self.scans),
            tuned=TunedInfo(name=self.tuned.name, revision=self.tuned.revision),
            recipe=self.config.recipe,
            budget=self.config.budget,
            budget_bytes=self.budget_bytes,
            calibration=self.calibration,
            licence=self.config.licence,
            provenance=self.config.provenance,
            bound_bits_per_parameter=bound,
            payload_blake3=digest,
            omitted=self.omitted,
            router=None if self.router is None else self.router[0],
            files=files,
            tensors=tuple(records),
        )

    def check_size(self, manifest: Manifest, stored: Mapping[int, StoredTensor]) -> None:
        """A lossless pack may still be larger than a budget that was asked for."""
        sizes = {self.pairs[i].name: part.nbytes for i, part in stored.items()}
        sizes |= self._other_sizes()
        total = len(build_header(manifest, sizes)) + sum(sizes.values())
        if self.budget_bytes is not None and total > self.budget_bytes:
            raise BudgetError(
                f"budget {self.config.budget} is {self.budget_bytes:,} bytes, but the lossless "
                f"pack takes {total:,}; ask for at least {total + 32}B, or use --recipe auto"
            )


def target_info(target: Checkpoint, scans: Sequence[Scan]) -> TargetInfo:
    """What the manifest says of the target."""
    digests = {scan.name: scan.target_digest for scan in scans}
    config = target.side_file("config.json") or b""
    return TargetInfo(
        name=target.name,
        revision=target.revision,
        config_blake3=blake3(config).hexdigest(),
        fingerprint=target.fingerprint(digests),
        bytes=target.nbytes,
        parameters=target.parameters,
    )
