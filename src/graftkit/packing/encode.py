"""One tensor becomes a record and a payload, and all of them become a pack.

A record says how the payload decodes, and its error: that of the weights that a reader gets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

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
    estimate_joined,
    join_payloads,
    matrices,
    matrix_shape,
    quantize_matrix,
    row_blocks,
    split_payload,
)
from graftkit.compress.coded import Coded, RowDecoder
from graftkit.compress.exact import encode_exact
from graftkit.config import VERSION, PackConfig
from graftkit.errors import BudgetError
from graftkit.files import WorkFolder, mapped_file
from graftkit.model_files import changed_code
from graftkit.packing.measure import Scan
from graftkit.packing.pairs import TensorPair
from graftkit.skillpack import SkillPack
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
"""An error whose text is as long as that of any error with four significant digits."""

GENERATOR = f"graftkit {VERSION}"
"""What manifests name as their writer."""


@dataclass(frozen=True)
class TensorTask:
    """One tensor of the result, with what its scan says.

    Attributes:
        appended: payload of the rows that a grown vocabulary has beyond the target's.
        lossy: whether a lossy codec encodes it.
        index: its place among all tensors of the pack, in the order of names.
    """

    pair: TensorPair
    scan: Scan
    appended: bytes = b""
    lossy: bool = False
    index: int = 0


@dataclass(frozen=True)
class EncodedTensor:
    """A finished tensor. distortion: relative squared error in the metric of the bound."""

    record: TensorRecord
    payload: bytes
    distortion: float


@dataclass(frozen=True)
class TensorTrial:
    """What a tensor at some precision would be.

    Attributes:
        nbytes: of its payload without appended rows: of entropy-coded ones an estimate, which is
            exact or a few bytes more. 0 where nothing is stored.
        error: relative error, for the record. distortion: as in `EncodedTensor`.
    """

    nbytes: int
    error: float
    distortion: float


@dataclass(frozen=True)
class StoredTensor:
    """A finished tensor whose payload, of `nbytes` bytes, is `file` of the work folder."""

    record: TensorRecord
    distortion: float
    nbytes: int
    file: str

    @classmethod
    def of(cls, encoded: EncodedTensor, file: str) -> Self:
        """A tensor whose payload is in that file."""
        return cls(encoded.record, encoded.distortion, len(encoded.payload), file)

    @property
    def body_bytes(self) -> int:
        """Bytes of the payload without appended rows."""
        return self.nbytes - self.record.appended_bytes


def store_tensor(work: WorkFolder, name: str, encoded: EncodedTensor) -> StoredTensor:
    """Write a finished tensor: its payload, then its record. Raises: OutputError."""
    stored = StoredTensor.of(encoded, f"{name}.bin")
    if encoded.payload:
        work.write(stored.file, encoded.payload)
    content = {
        "record": encoded.record.model_dump(mode="json"),
        "distortion": stored.distortion,
        "nbytes": stored.nbytes,
    }
    work.write_json(f"{name}.json", content)
    return stored


def load_stored(work: WorkFolder, name: str) -> StoredTensor | None:
    """The tensor that `store_tensor` wrote under this name, or None."""
    content = work.read_json(f"{name}.json")
    if content is None:
        return None
    record = TensorRecord.model_validate(content["record"])
    return StoredTensor(record, content["distortion"], content["nbytes"], f"{name}.bin")


def store_trial(work: WorkFolder, name: str, trial: TensorTrial) -> None:
    """Write a trial. Raises: OutputError."""
    work.write_json(f"{name}.trial.json", asdict(trial))


def load_trial(work: WorkFolder, name: str) -> TensorTrial | None:
    """The trial that `store_trial` wrote under this name, or None."""
    content = work.read_json(f"{name}.trial.json")
    return None if content is None else TensorTrial(**content)


def draft_record(task: TensorTask, codec: str, payload_bytes: int) -> TensorRecord:
    """The record without its error; that field is as long as it can get.

    Args:
        payload_bytes: of the payload with appended rows.
    """
    pair = task.pair
    fields: dict[str, Any] = {
        "name": pair.name,
        "kind": pair.role.kind.value,
        "dtype": pair.target.dtype,
        "shape": pair.target.shape,
        "blake3": task.scan.target_digest[:TENSOR_DIGEST_HEX],
        "codec": codec,
        "error": WORST_CASE_ERROR,
        "bytes": payload_bytes,
        "appended_bytes": len(task.appended),
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
    """Rows that a grown vocabulary has beyond the target's, lossless; empty without such rows."""
    if not pair.resized or pair.tuned.shape[0] <= pair.target.shape[0]:
        return b""
    return encode_added_rows(tuned.read(pair.tuned.name)[pair.target.shape[0] :])


def encode_added_rows(rows: Tensor) -> bytes:
    """Rows of a grown vocabulary, lossless: the target has none to compare them with."""
    return encode_exact(rows.contiguous(), torch.zeros_like(rows))


def encode_lossless(task: TensorTask, states: tuple[Tensor, Tensor]) -> EncodedTensor:
    """Encode exactly: `zero` if no bit differs, else `exact`.

    Args:
        states: common rows of the target (in the tuned dtype) and of the tuned model.
    """
    before, after = states
    same = bytes(tensor_bytes(before)) == bytes(tensor_bytes(after))
    body = b"" if same else encode_exact(after.contiguous(), before.contiguous())
    return _finish(task, "zero" if same else "exact", body, (0.0, 0.0))


def try_lossy(
    task: TensorTask,
    states: tuple[Tensor, Tensor],
    covariance: Tensor | None,
    bases: Tensor | None,
    precision: Precision,
    weighted: bool,
) -> TensorTrial:
    """Errors and length of what `encode_lossy` makes of the same arguments, without coding."""
    delta = difference(states[1], states[0])
    parts = _quantize(task, delta, covariance, bases, precision)
    return _measure_trial(task, states[0], delta, covariance if weighted else None, parts)


def encode_lossy(
    task: TensorTask,
    states: tuple[Tensor, Tensor],
    covariance: Tensor | None,
    bases: Tensor | None,
    precision: Precision,
    weighted: bool,
    trial: TensorTrial | None = None,
) -> EncodedTensor:
    """Encode with a delta codec; `zero` where the decoded weights exceed the tuned dtype.

    Args:
        states: common rows of the target (in the tuned dtype) and of the tuned model.
        covariance: H of the inputs, (n, n), or None. bases: (matrices, side, k) or None.
        weighted: measure the bound's distortion under the covariance.
        trial: what `try_lossy` returned for the same arguments; without it, errors are measured.
    """
    delta = difference(states[1], states[0])
    parts = _quantize(task, delta, covariance, bases, precision)
    if trial is None:
        metric = covariance if weighted else None
        trial = _measure_trial(task, states[0], delta, metric, parts)
    errors = trial.error, trial.distortion
    if trial.nbytes == 0:
        return _finish(task, "zero", b"", errors)
    body = join_payloads([part.payload() for part in parts])
    return _finish(task, precision.codec, body, errors)


def _quantize(
    task: TensorTask,
    delta: Tensor,
    covariance: Tensor | None,
    bases: Tensor | None,
    precision: Precision,
) -> list[Coded]:
    """The matrices of a delta in codes; none where nothing is to be stored."""
    if isinstance(precision, Zero):
        return []
    return [
        quantize_matrix(
            part.contiguous(),
            Statistics(covariance, None if bases is None else bases[i]),
            precision,
        )
        for i, part in enumerate(matrices(delta, task.pair.layout))
    ]


def _measure_trial(
    task: TensorTask,
    before: Tensor,
    delta: Tensor,
    covariance: Tensor | None,
    parts: Sequence[Coded],
) -> TensorTrial:
    """Error and length of the codes; no bytes where a reader would refuse what they decode to."""
    energy = _energy(delta, task.pair, None)
    if energy == 0:
        return TensorTrial(0, 0.0, 0.0)
    decoders = [part.decoder() for part in parts]
    lost = _lost_energies(task.pair, before, delta, covariance, decoders) if parts else None
    if lost is None:
        return TensorTrial(0, 1.0, 1.0)
    error, distortion = _relative_errors(task.pair, delta, covariance, energy, lost)
    return TensorTrial(estimate_joined(parts), error, distortion)


def reencoded(
    task: TensorTask,
    states: tuple[Tensor, Tensor],
    covariance: Tensor | None,
    codec: str,
    body: bytes,
) -> EncodedTensor | None:
    """A tensor with another payload than it was encoded to; it has no appended rows.

    None where the decoded weights exceed the tuned dtype.
    """
    pair, delta = task.pair, difference(states[1], states[0])
    count, shape = matrix_shape(tuple(delta.shape), pair.layout)
    decoders = [decode_rows(codec, part, shape) for part in split_payload(memoryview(body), count)]
    lost = _lost_energies(pair, states[0], delta, covariance, decoders)
    if lost is None:
        return None
    energy = _energy(delta, pair, None)
    return _finish(task, codec, body, _relative_errors(pair, delta, covariance, energy, lost))


def _relative_errors(
    pair: TensorPair,
    delta: Tensor,
    covariance: Tensor | None,
    energy: float,
    lost: tuple[float, float],
) -> tuple[float, float]:
    """Relative error, and distortion under the covariance if there is one.

    Args:
        energy: of the delta. lost: what `_lost_energies` returned.
    """
    distortion = lost[0] / energy
    error = math.sqrt(distortion)
    if covariance is not None:
        distortion = lost[1] / max(_energy(delta, pair, covariance), 1e-30)
    return error, distortion


def _lost_energies(
    pair: TensorPair,
    before: Tensor,
    delta: Tensor,
    covariance: Tensor | None,
    decoders: Sequence[RowDecoder],
) -> tuple[float, float] | None:
    """‖δ̂ − δ‖² without and with the covariance (0 where it is None), block by block.

    None where before + δ̂, rounded as a reader rounds it, is not finite.
    """
    _, shape = matrix_shape(tuple(delta.shape), pair.layout)
    plain = weighted = 0.0
    sides = (matrices(tensor, pair.layout) for tensor in (before, delta))
    for rows, weight, matrix in zip(decoders, *sides, strict=True):
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
    """Whether the sum is finite in the weight's dtype; the peaks alone nearly always decide."""
    peaks = [float(end.abs()) for part in (decoded, weight) for end in torch.aminmax(part)]
    if sum(peaks) < torch.finfo(weight.dtype).max / 2:
        return True
    total = (decoded + weight).to(weight.dtype)
    return bool(decoded.isfinite().all()) and bool(total.isfinite().all())


def _finish(
    task: TensorTask, codec: str, body: bytes, errors: tuple[float, float]
) -> EncodedTensor:
    """errors: relative error for the record, and distortion for the bound."""
    payload = body + task.appended
    record = draft_record(task, codec, len(payload))
    error = float(f"{errors[0]:.4g}")
    return EncodedTensor(record.model_copy(update={"error": error}), payload, errors[1])


def _energy(delta: Tensor, pair: TensorPair, covariance: Tensor | None) -> float:
    return sum(output_energy(part, covariance) for part in matrices(delta, pair.layout))


@dataclass(frozen=True)
class PackAssembly:
    """A pack around its payloads.

    Attributes:
        budget_bytes: largest file allowed; None for any size.
        files: records and payloads of the side files.
        router: description and payload of the router key.
        work: holds the payloads of tensors.
    """

    target: Checkpoint
    tuned: Checkpoint
    config: PackConfig
    budget_bytes: int | None
    tasks: Sequence[TensorTask]
    files: Sequence[tuple[FileRecord, bytes]]
    calibration: CalibrationInfo | None
    router: tuple[RouterInfo, bytes] | None
    work: WorkFolder

    def room_for_lossy(self, stored: Mapping[int, StoredTensor]) -> int:
        """Payload bytes left for lossy tensors, without appended rows.

        Args:
            stored: the exact tensors.
        Raises: BudgetError when nothing is left.
        """
        if self.budget_bytes is None:
            return 0
        fixed = self._fixed_bytes(stored, self.budget_bytes)
        if fixed > self.budget_bytes:
            # The manifest repeats the budget, and a larger one may take a few more digits.
            least = self._fixed_bytes(stored, 2 * fixed) + 32
            raise BudgetError(
                f"budget {self.config.budget or '5%'} is {self.budget_bytes:,} bytes, but the "
                f"manifest and what is stored exactly take {fixed:,}; ask for at least "
                f"{least}B ({100 * least / self.target.nbytes:.2f}%)"
            )
        return self.budget_bytes - fixed

    def pack(self, stored: Mapping[int, StoredTensor], bound: float | None) -> SkillPack:
        """The pack of all tensors as they are stored. bound: for the manifest."""
        payloads = {
            self.tasks[i].pair.name: mapped_file(self.work.path / stored[i].file)
            for i in sorted(stored)
            if stored[i].nbytes
        }
        payloads |= {name: memoryview(content) for name, content in self._others.items()}
        digest = payloads_digest(payloads.values())
        manifest = self._manifest([stored[i].record for i in sorted(stored)], bound, digest)
        return SkillPack(manifest, {name: payloads[name] for name in manifest.payload_order})

    def finish(self, stored: Mapping[int, StoredTensor], bound: float | None) -> SkillPack:
        """The pack, within its budget.

        Raises: BudgetError: a lossless pack may be larger than its budget.
        """
        pack = self.pack(stored, bound)
        size = pack.pack_bytes
        if self.budget_bytes is not None and size > self.budget_bytes:
            raise BudgetError(
                f"budget {self.config.budget} is {self.budget_bytes:,} bytes, but the lossless "
                f"pack takes {size:,}; ask for at least {size + 32}B, or use --recipe auto"
            )
        return pack

    def _fixed_bytes(self, stored: Mapping[int, StoredTensor], longest: int) -> int:
        """Most bytes that everything but the lossy payloads takes.

        Args:
            longest: bytes that no lossy payload exceeds; its digits are in the header.
        """
        lossy = [task for task in self.tasks if task.lossy]
        drafts = {task.index: draft_record(task, "lowrank", longest) for task in lossy}
        records = [drafts.get(i) or stored[i].record for i in range(len(self.tasks))]
        others = {name: len(content) for name, content in self._others.items()}
        sizes = {task.pair.name: longest for task in lossy} | others
        sizes |= {self.tasks[i].pair.name: part.nbytes for i, part in stored.items()}
        header = build_header(self._manifest(records, WORST_CASE_ERROR, "0" * 64), sizes)
        exact = sum(part.nbytes for part in stored.values())
        appended = sum(len(task.appended) for task in lossy)
        return len(header) + exact + appended + sum(others.values())

    @cached_property
    def _others(self) -> dict[str, bytes]:
        """The payloads behind those of the tensors, by name, in the order of the file."""
        others = {file_entry(record.name): payload for record, payload in self.files if payload}
        return others if self.router is None else others | {ROUTER_ENTRY: self.router[1]}

    @cached_property
    def _omitted(self) -> tuple[Omission, ...]:
        """Code of the tuned model: a pack holds none, because it would be executed."""
        reason = "code of the tuned model, which differs from the target's"
        names = changed_code(self.target.path, self.tuned.path)
        return tuple(Omission(name=name, reason=reason) for name in names)

    def _manifest(
        self, records: Sequence[TensorRecord], bound: float | None, digest: str | None
    ) -> Manifest:
        return Manifest(
            generator=GENERATOR,
            target=target_info(self.target, [task.scan for task in self.tasks]),
            tuned=TunedInfo(name=self.tuned.name, revision=self.tuned.revision),
            recipe=self.config.recipe,
            budget=self.config.budget,
            budget_bytes=self.budget_bytes,
            calibration=self.calibration,
            licence=self.config.licence,
            provenance=self.config.provenance,
            prompt_format=self.config.prompt_format,
            template_blake3=self.config.template_blake3,
            bound_bits_per_parameter=bound,
            payload_blake3=digest,
            omitted=self._omitted,
            router=None if self.router is None else self.router[0],
            files=tuple(record for record, _ in self.files),
            tensors=tuple(records),
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
