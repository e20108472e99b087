"""One packing job: its inputs, its work folder and the steps over all tensors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.compress.allocate import MatrixFacts
from graftkit.compress.bound import waterfilling_bits
from graftkit.compress.codecs import matrix_shape
from graftkit.config import VERSION, PackConfig
from graftkit.delta import Checkpoint, fingerprint
from graftkit.errors import BudgetError
from graftkit.models.architecture import ModuleKind, tied_names
from graftkit.models.calibration import CovarianceStore, collect_covariances
from graftkit.packing.encode import (
    Encoded,
    draft_record,
    encode_appended,
    encode_lossless,
    encode_lossy,
)
from graftkit.packing.job import MemoryGate, WorkFolder, map_tensors
from graftkit.packing.measure import (
    Scan,
    basis_name,
    covariance_of,
    job_key,
    known_facts,
    measure_pair,
    scan_pair,
)
from graftkit.packing.pairs import Pair, match_tensors
from graftkit.packing.recipes import Plan, plan_auto, plan_graftllm
from graftkit.rows import Row
from graftkit.skillpack.container import build_header, file_entry, payloads_digest
from graftkit.skillpack.files import changed_files
from graftkit.skillpack.manifest import (
    FORMAT_VERSION,
    CalibrationInfo,
    FileRecord,
    Manifest,
    TargetInfo,
    TensorRecord,
    TunedInfo,
)

GENERATOR = f"graftkit {VERSION}"

Progress = Callable[[str, int, int], None]
"""Called with the step's name, items done and items in all."""


@dataclass(frozen=True)
class Calibration:
    """Rows to measure activations on, and what the manifest says of their file."""

    rows: Sequence[Row]
    source: str
    digest: str


@dataclass(frozen=True)
class Stored:
    """A finished tensor whose payload lies in the work folder."""

    record: TensorRecord
    distortion: float
    nbytes: int


class PackingJob:
    """Everything that one call of `pack_delta` knows; `run` does the steps in order."""

    def __init__(
        self,
        target: Checkpoint,
        tuned: Checkpoint,
        config: PackConfig,
        calibration: Calibration | None,
        progress: Progress,
    ):
        self.target, self.tuned, self.config = target, tuned, config
        self.calibration, self.progress = calibration, progress
        self.pairs = match_tensors(target, tuned)
        self.files = changed_files(target, tuned)
        self.tied_owners = set(tied_names(tuned).values())
        largest = max(pair.target.numel for pair in self.pairs)
        self.gate = MemoryGate(largest)
        budget = config.parsed_budget
        self.budget_bytes = budget.to_bytes(target.nbytes, target.parameters) if budget else None

    def scan(self) -> list[Scan]:
        """Digest every tensor of both states; refuse what is not finite."""
        return self._map("reading", self._scan_one, self.pairs)

    def run(self, scans: list[Scan], work: WorkFolder) -> tuple[Manifest, dict[str, int]]:
        """Fill the work folder with payloads.

        Returns: the manifest, and the index of every tensor that has a payload, by name.
        Raises: BudgetError and every other GraftError of the steps.
        """
        self.scans, self.work = scans, work
        self.store = self._calibrate()
        indices = range(len(self.pairs))
        lossy = [i for i in indices if self._is_lossy(i)]
        rest = [i for i in indices if not self._is_lossy(i)]
        stored = dict(
            zip(rest, self._map("exact tensors", self._encode_lossless, rest), strict=True)
        )
        self.appended = {i: encode_appended(self.pairs[i], self.tuned) for i in lossy}
        room = self._room_for_lossy(stored, lossy)
        facts = dict(zip(lossy, self._map("measuring", self._measure, lossy), strict=True))
        plan = self._plan(facts, room)
        encode = partial(self._encode_lossy, plan)
        stored |= dict(zip(lossy, self._map("compressing", encode, lossy), strict=True))
        bound = self._bound(stored, facts)
        digest = payloads_digest(self._payloads(stored))
        manifest = self._manifest([stored[i].record for i in indices], bound, digest)
        self._check_size(manifest, stored)
        return manifest, {self.pairs[i].name: i for i in indices if stored[i].nbytes}

    def key(self, scans: list[Scan]) -> str:
        """What decides every byte of the result."""
        settings = {
            "versions": [GENERATOR, FORMAT_VERSION, torch.__version__],
            "recipe": self.config.recipe,
            "budget": self.budget_bytes,
            "seed": self.config.seed,
            "calibration": self.calibration.digest if self.calibration else None,
            "files": [record.blake3 for record, _ in self.files],
        }
        return job_key(scans, settings)

    def _map(self, step: str, work: Callable, items: Sequence) -> list:  # type: ignore[type-arg]
        done = 0
        self.progress(step, 0, len(items))

        def step_done() -> None:
            nonlocal done
            done += 1
            self.progress(step, done, len(items))

        return map_tensors(work, items, self.config.workers, step_done)

    def _scan_one(self, pair: Pair) -> Scan:
        with self.gate.hold(pair.target.numel):
            return scan_pair(pair, self.target, self.tuned)

    def _is_lossy(self, index: int) -> bool:
        changed = self.scans[index].changed and self.config.recipe != "lossless"
        return changed and self.pairs[index].lossy

    def _calibrate(self) -> CovarianceStore | None:
        if self.calibration is None or self.config.recipe == "lossless":
            return None
        store = CovarianceStore(self.work.path / "activations")
        modules = sorted(
            {
                pair.role.module
                for pair, scan in zip(self.pairs, self.scans, strict=True)
                if pair.role.linear and pair.lossy and scan.changed
            }
        )
        progress = partial(self.progress, "calibrating")
        rows, seed = self.calibration.rows, self.config.seed
        summary = collect_covariances(self.tuned, rows, modules, store, seed, progress)
        self.calibration_info = CalibrationInfo(
            source=self.calibration.source,
            blake3=self.calibration.digest,
            rows=summary.rows,
            tokens=summary.tokens,
            seed=seed,
        )
        return store

    @contextmanager
    def _states(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        pair = self.pairs[index]
        with self.gate.hold(pair.target.numel):
            yield pair.read(self.target, self.tuned)

    def _covariance(self, pair: Pair) -> Tensor | None:
        return covariance_of(pair, self.store, pair.tuned.name in self.tied_owners)

    def _makes_logits(self, pair: Pair) -> bool:
        """The output head, or the embedding that serves as one."""
        return pair.role.kind is ModuleKind.HEAD or pair.tuned.name in self.tied_owners

    def _measure(self, index: int) -> MatrixFacts:
        pair, known = self.pairs[index], known_facts(self.work, index)
        if known is not None:
            return known
        with self._states(index) as states:
            # The paper's energies are those of the delta, ours of what a layer's inputs see.
            metric = self._covariance(pair) if self.config.recipe == "auto" else None
            logits = self._makes_logits(pair)
            measure_pair(pair, states, metric, logits, self.work, index)
        return self._measure(index)

    def _encode_lossless(self, index: int) -> Stored:
        def encode() -> Encoded:
            pair, scan = self.pairs[index], self.scans[index]
            with self._states(index) as states:
                return encode_lossless(pair, scan, states, encode_appended(pair, self.tuned))

        return self._stored(index, encode)

    def _encode_lossy(self, plan: Plan, index: int) -> Stored:
        pair, scan, precision = self.pairs[index], self.scans[index], plan.precisions[index]

        def encode() -> Encoded:
            weighted = self.config.recipe == "auto"
            with self._states(index) as states:
                statistics = (self._covariance(pair), self._bases(index))
                return encode_lossy(
                    pair, scan, states, statistics, precision, self.appended[index], weighted
                )

        return self._stored(index, encode)

    def _bases(self, index: int) -> Tensor | None:
        bases = self.work.read_array(basis_name(index))
        return None if bases is None else torch.from_numpy(bases)

    def _stored(self, index: int, encode: Callable[[], Encoded]) -> Stored:
        """A tensor finished earlier, or encoded now; its payload goes to the work folder."""
        name = f"tensor-{index}.json"
        known = self.work.read_json(name)
        if known is None:
            encoded = encode()
            if encoded.payload:
                self.work.write(payload_name(index), encoded.payload)
            known = {
                "record": encoded.record.model_dump(mode="json"),
                "distortion": encoded.distortion,
                "nbytes": len(encoded.payload),
            }
            self.work.write_json(name, known)
        record = TensorRecord.model_validate(known["record"])
        return Stored(record, known["distortion"], known["nbytes"])

    def _room_for_lossy(self, stored: dict[int, Stored], lossy: list[int]) -> int:
        """Payload bytes left for lossy tensors. Raises: BudgetError when nothing is left."""
        if self.budget_bytes is None:
            return 0
        fixed = self._fixed_bytes(stored, lossy, self.budget_bytes)
        if fixed > self.budget_bytes:
            # The manifest repeats the budget, and a larger one may take a few more digits.
            least = self._fixed_bytes(stored, lossy, 2 * fixed) + 32
            raise BudgetError(
                f"budget {self.config.budget or '5%'} is {self.budget_bytes:,} bytes, but the "
                f"manifest and what is stored exactly take {fixed:,}; ask for at least "
                f"{least}B ({100 * least / self.target.nbytes:.2f}%)"
            )
        return self.budget_bytes - fixed

    def _fixed_bytes(self, stored: dict[int, Stored], lossy: list[int], longest: int) -> int:
        """Bytes of all but the lossy payloads, at most; none of these is over `longest` bytes."""
        pairs, appended = self.pairs, self.appended
        drafts = {
            i: draft_record(pairs[i], self.scans[i], "lowrank", longest, len(appended[i]))
            for i in lossy
        }
        records = [drafts[i] if i in drafts else stored[i].record for i in range(len(pairs))]
        sizes = {pairs[i].name: longest for i in lossy} | self._file_sizes()
        sizes |= {pairs[i].name: part.nbytes for i, part in stored.items()}
        header = build_header(self._manifest(records, 0.0001234, "0" * 64), sizes)
        fixed = len(header) + sum(part.nbytes for part in stored.values())
        return fixed + sum(map(len, appended.values())) + sum(self._file_sizes().values())

    def _payloads(self, stored: dict[int, Stored]) -> Iterator[bytes]:
        """What follows the header of the file."""
        for i in sorted(stored):
            if stored[i].nbytes:
                yield self.work.read(payload_name(i)) or b""
        yield from (payload for _, payload in self.files if payload)

    def _plan(self, facts: dict[int, MatrixFacts], room: int) -> Plan:
        if not facts:
            return Plan({}, 0, 0.0)
        kinds = {i: self.pairs[i].role.kind for i in facts}
        graftllm = self.config.recipe == "graftllm"
        return plan_graftllm(kinds, facts, room) if graftllm else plan_auto(facts, room)

    def _bound(self, stored: dict[int, Stored], facts: dict[int, MatrixFacts]) -> float | None:
        """Least bits per parameter at the distortion reached; exact tensors count as stored."""
        if self.config.recipe == "lossless":
            return None
        bits = 0.0
        for i, part in stored.items():
            shape = self.pairs[i].common_shape
            if i not in facts:
                bits += 8 * part.nbytes
                continue
            count, (rows, columns) = matrix_shape(shape, self.pairs[i].layout)
            energies, side = facts[i].energies, min(rows, columns)
            rate = waterfilling_bits(energies, side, part.distortion)
            bits += rate * count * rows * columns + 8 * part.record.appended_bytes
        return float(f"{bits / self.target.parameters:.4g}")

    def _file_sizes(self) -> dict[str, int]:
        return {file_entry(record.name): len(payload) for record, payload in self.files}

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
            calibration=self.calibration_info if self.store else None,
            bound_bits_per_parameter=bound,
            payload_blake3=digest,
            files=files,
            tensors=tuple(records),
        )

    def _check_size(self, manifest: Manifest, stored: dict[int, Stored]) -> None:
        """A lossless pack may still be larger than a budget that was asked for."""
        sizes = {self.pairs[i].name: part.nbytes for i, part in stored.items()}
        sizes |= self._file_sizes()
        total = len(build_header(manifest, sizes)) + sum(sizes.values())
        if self.budget_bytes is not None and total > self.budget_bytes:
            raise BudgetError(
                f"budget {self.config.budget} is {self.budget_bytes:,} bytes, but the lossless "
                f"pack takes {total:,}; ask for at least {total + 32}B, or use --recipe auto"
            )


def payload_name(index: int) -> str:
    """File of a payload in the work folder."""
    return f"payload-{index}.bin"


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
