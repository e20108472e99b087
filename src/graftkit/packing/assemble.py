"""What surrounds the payloads: the manifest, its bytes, and the room that it leaves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from blake3 import blake3

from graftkit.config import VERSION, PackConfig
from graftkit.delta import Checkpoint, fingerprint
from graftkit.errors import BudgetError
from graftkit.packing.encode import draft_record
from graftkit.packing.job import WorkFolder
from graftkit.packing.measure import Scan
from graftkit.packing.pairs import Pair
from graftkit.route.key import RouterKey
from graftkit.side_files import changed_code
from graftkit.skillpack.container import build_header, file_entry, payloads_digest
from graftkit.skillpack.manifest import (
    ROUTER_ENTRY,
    CalibrationInfo,
    FileRecord,
    Manifest,
    Omission,
    TargetInfo,
    TensorRecord,
    TunedInfo,
)

GENERATOR = f"graftkit {VERSION}"


@dataclass(frozen=True)
class Stored:
    """A finished tensor whose payload lies in the work folder, in `file`."""

    record: TensorRecord
    distortion: float
    nbytes: int
    file: str


@dataclass(frozen=True)
class Assembly:
    """One pack around its payloads. budget_bytes: largest file allowed. files: side files with
    their payloads. router: the key by which prompts find the pack."""

    target: Checkpoint
    tuned: Checkpoint
    config: PackConfig
    budget_bytes: int | None
    pairs: Sequence[Pair]
    scans: Sequence[Scan]
    files: Sequence[tuple[FileRecord, bytes]]
    calibration: CalibrationInfo | None
    router: RouterKey | None
    work: WorkFolder

    def room_for_lossy(
        self, stored: Mapping[int, Stored], lossy: list[int], appended: Mapping[int, bytes]
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
        stored: Mapping[int, Stored],
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
        header = build_header(self._manifest(records, 0.0001234, "0" * 64), sizes)
        fixed = len(header) + sum(part.nbytes for part in stored.values())
        return fixed + sum(map(len, appended.values())) + sum(self._other_sizes().values())

    def _payloads(self, stored: Mapping[int, Stored]) -> Iterator[bytes]:
        """What follows the header of the file."""
        for i in sorted(stored):
            if stored[i].nbytes:
                yield self.work.read(stored[i].file) or b""
        yield from self.others().values()

    def finished(self, stored: Mapping[int, Stored], bound: float | None) -> Manifest:
        """The manifest of all tensors as they are stored."""
        digest = payloads_digest(self._payloads(stored))
        return self._manifest([stored[i].record for i in sorted(stored)], bound, digest)

    def others(self) -> dict[str, bytes]:
        """What is stored behind the tensors, by payload name, in the order of the file."""
        others = {file_entry(record.name): payload for record, payload in self.files if payload}
        return others if self.router is None else others | {ROUTER_ENTRY: self.router.to_bytes()}

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
            router=None if self.router is None else self.router.info,
            files=files,
            tensors=tuple(records),
        )

    def check_size(self, manifest: Manifest, stored: Mapping[int, Stored]) -> None:
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
    entries = [(t.name, t.dtype, t.shape, digests[t.name]) for t in target.tensors.values()]
    return TargetInfo(
        name=target.name,
        revision=target.revision,
        config_blake3=blake3(config).hexdigest(),
        fingerprint=fingerprint(entries),
        bytes=target.nbytes,
        parameters=target.parameters,
    )
