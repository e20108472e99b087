"""One packing job: its inputs, its work folder and the steps over all tensors.

From two checkpoints to a SkillPack: scan, calibrate, measure, plan, encode.

Every step leaves its result in a work folder, so that an interrupted run goes on where it
stopped; tensors are read in pairs, and never more of them than fit beside the largest one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.compress.allocate import MatrixFacts, waterfilling_bits
from graftkit.compress.codecs import Precision, matrix_shape
from graftkit.config import PackConfig
from graftkit.errors import CheckpointMismatchError, GraftError
from graftkit.files import WorkFolder, mapped_file
from graftkit.models.aligned import align
from graftkit.models.architecture import ModuleKind, tied_names
from graftkit.models.loading import class_name
from graftkit.packing.budget import fit_budget, plan_graftllm
from graftkit.packing.encode import (
    GENERATOR,
    EncodedTensor,
    PackAssembly,
    StoredTensor,
    encode_appended,
    encode_lossless,
    encode_lossy,
    remeasured,
)
from graftkit.packing.measure import (
    CalibrationRows,
    CalibrationStatistics,
    ErrorMetric,
    Scan,
    TensorFlags,
    basis_name,
    collect_statistics,
    job_key,
    known_facts,
    measure_pair,
    metric_of,
    scan_pair,
)
from graftkit.packing.pairs import TensorPair, match_tensors
from graftkit.packing.train import TrainingPlan, train_packed_codes
from graftkit.parallel import MemoryGate, in_threads
from graftkit.progress import Progress
from graftkit.side_files import check_side_files
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import (
    FORMAT_VERSION,
    CalibrationInfo,
    Manifest,
    RouterInfo,
    TensorRecord,
)
from graftkit.skillpack.pack import changed_files

FitKey = Callable[[Checkpoint, Sequence[str], int, Path], tuple[RouterInfo, bytes]]
"""Fits a router key from the target, prompts, a seed and a folder for the target's weights."""


@dataclass(frozen=True)
class RouterPrompts:
    """The prompts that a router shall send to the pack, and how a key is made of them."""

    prompts: tuple[str, ...]
    fit: FitKey


class PackingJob:
    """Everything that one call of `pack_delta` knows; `run` does the steps in order."""

    def __init__(
        self,
        target: Checkpoint,
        tuned: Checkpoint,
        config: PackConfig,
        calibration: CalibrationRows | None,
        router: RouterPrompts,
        progress: Progress,
    ):
        self.target, self.tuned, self.config = target, align(target, tuned), config
        self.calibration, self.router, self.progress = calibration, router, progress
        self.pairs = match_tensors(target, self.tuned)
        check_side_files(target.path, tuned.path)
        self.files = changed_files(target, tuned)
        self.tied_owners = set(tied_names(self.tuned).values())
        largest = max(pair.target.numel for pair in self.pairs)
        self.gate = MemoryGate(largest)
        budget = config.parsed_budget
        self.budget_bytes = budget.to_bytes(target.nbytes, target.parameters) if budget else None

    def run(self, work: WorkFolder) -> SkillPack:
        """Do all steps; finished ones are in the work folder.

        Raises: BudgetError and every other GraftError of the steps.
        """
        self.scans = self._map("reading", self._scan_one, self.pairs)
        try:
            work.open(self.key(self.scans))
            manifest, files = self._fill(work)
            payloads = {name: mapped_file(work.path / file) for name, file in files.items()}
            payloads |= {n: memoryview(part) for n, part in self.assembly.others().items()}
        except GraftError:
            # Refused inputs leave nothing behind; an interruption leaves what was finished.
            work.remove()
            raise
        finally:
            work.close()
        return SkillPack(manifest, {name: payloads[name] for name in manifest.payload_order})

    def _fill(self, work: WorkFolder) -> tuple[Manifest, dict[str, str]]:
        """Fill the work folder with payloads.

        Returns: the manifest, and the file of every tensor that has a payload, by name.
        """
        self.work = work
        self.activity, info = self._calibrate()
        self.assembly = PackAssembly(
            self.target,
            self.tuned,
            self.config,
            self.budget_bytes,
            self.pairs,
            self.scans,
            self.files,
            info,
            self._router_key(),
            work,
        )
        indices = range(len(self.pairs))
        lossy = [i for i in indices if self._is_lossy(i)]
        rest = [i for i in indices if not self._is_lossy(i)]
        stored = dict(
            zip(rest, self._map("exact tensors", self._encode_lossless, rest), strict=True)
        )
        self.appended = {i: encode_appended(self.pairs[i], self.tuned) for i in lossy}
        room = self.assembly.room_for_lossy(stored, lossy, self.appended)
        facts = dict(zip(lossy, self._map("measuring", self._measure, lossy), strict=True))
        stored |= self._spend(facts, room)
        stored |= self._correct(stored, facts, room)
        manifest = self.assembly.finished(stored, self._bound(stored, facts))
        self.assembly.check_size(manifest, stored)
        return manifest, {self.pairs[i].name: stored[i].file for i in indices if stored[i].nbytes}

    def key(self, scans: list[Scan]) -> str:
        """What decides every byte of the result."""
        settings = {
            "versions": [GENERATOR, FORMAT_VERSION, torch.__version__],
            "recipe": self.config.recipe,
            "servable": self.config.servable,
            "train_steps": self.config.train_steps,
            "budget": self.budget_bytes,
            "seed": self.config.seed,
            "calibration": self.calibration.digest if self.calibration else None,
            "prompts": list(self.router.prompts),
            "origin": [self.config.licence, self.config.provenance],
            "files": [record.blake3 for record, _ in self.files],
        }
        return job_key(scans, settings)

    def _map(self, step: str, work: Callable, items: Sequence) -> list:  # type: ignore[type-arg]
        results = []
        self.progress(step, 0, len(items))
        for result in in_threads(work, items, self.config.workers):
            results.append(result)
            self.progress(step, len(results), len(items))
        return results

    def _scan_one(self, pair: TensorPair) -> Scan:
        with self.gate.hold(pair.target.numel):
            return scan_pair(pair, self.target, self.tuned)

    def _is_lossy(self, index: int) -> bool:
        scan, pair = self.scans[index], self.pairs[index]
        codable = scan.changed and pair.lossy and not scan.extreme
        return codable and self.config.recipe != "lossless"

    def _calibrate(self) -> tuple[CalibrationStatistics | None, CalibrationInfo | None]:
        if self.calibration is None or self.config.recipe == "lossless":
            return None, None
        self._check_same_class()
        modules = sorted(
            {
                pair.role.module
                for pair, scan in zip(self.pairs, self.scans, strict=True)
                if pair.role.linear and pair.lossy and scan.changed
            }
        )
        weighing = self.config.recipe == "auto"
        seed, folder = self.config.seed, self.work.path
        return collect_statistics(
            self.tuned, self.calibration, modules, seed, folder, weighing, self.progress
        )

    def _check_same_class(self) -> None:
        """Rows run through the tuned model by the target's module names.

        Raises: CheckpointMismatchError for two classes.
        """
        target, tuned = (class_name(checkpoint) for checkpoint in (self.target, self.tuned))
        if target != tuned:
            raise CheckpointMismatchError(
                f"{self.tuned.path}: a {tuned}, and the target is a {target}; rows need two models "
                "of one class, so pack without calibration"
            )

    def _router_key(self) -> tuple[RouterInfo, bytes] | None:
        """The key of the prompts, fitted on the target; None where there are no prompts."""
        if not self.router.prompts:
            return None
        self.progress("router key", 0, 1)
        offload = self.work.path / "offload"
        key = self.router.fit(self.target, self.router.prompts, self.config.seed, offload)
        self.work.remove_folder("offload")
        self.progress("router key", 1, 1)
        return key

    @contextmanager
    def _states(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        pair = self.pairs[index]
        with self.gate.hold(pair.target.numel):
            yield pair.read(self.target, self.tuned)

    def _metric(self, pair: TensorPair) -> ErrorMetric:
        return metric_of(pair, self.activity, pair.tuned.name in self.tied_owners)

    def _makes_logits(self, pair: TensorPair) -> bool:
        """The output head, or the embedding that serves as one."""
        return pair.role.kind is ModuleKind.HEAD or pair.tuned.name in self.tied_owners

    def _measure(self, index: int) -> MatrixFacts:
        pair, known = self.pairs[index], known_facts(self.work, index)
        if known is not None:
            return known
        with self._states(index) as states:
            # The paper's energies are those of the delta, ours of what a layer's inputs see.
            auto = self.config.recipe == "auto"
            metric = self._metric(pair) if auto else ErrorMetric()
            calibrated = auto and self.activity is not None
            flags = TensorFlags(self._makes_logits(pair), calibrated, self._is_trained(pair))
            measure_pair(pair, states, metric, flags, self.work, index)
        return self._measure(index)

    def _is_trained(self, pair: TensorPair) -> bool:
        """Code training may follow if this tensor is factored."""
        trained = self.config.recipe == "auto" and self.config.train_steps > 0
        return trained and self.activity is not None and pair.trainable

    def _encode_lossless(self, index: int) -> StoredTensor:
        def encode() -> EncodedTensor:
            pair, scan = self.pairs[index], self.scans[index]
            with self._states(index) as states:
                return encode_lossless(pair, scan, states, encode_appended(pair, self.tuned))

        return self._stored(index, encode)

    def _spend(self, facts: dict[int, MatrixFacts], room: int) -> dict[int, StoredTensor]:
        """Lossy tensors, coded as the recipe spends `room` bytes of payload."""
        stored: dict[int, StoredTensor] = {}

        def encode(precisions: Mapping[int, Precision]) -> dict[int, tuple[int, float]]:
            one = partial(self._encode_lossy, precisions)
            done = self._map("compressing", one, list(precisions))
            stored.update(zip(precisions, done, strict=True))
            # Rows that the target lacks are stored anyway: room does not hold them.
            return {
                i: (stored[i].nbytes - len(self.appended[i]), stored[i].distortion)
                for i in precisions
            }

        if self.config.recipe == "graftllm" and facts:
            kinds = {i: self.pairs[i].role.kind for i in facts}
            encode(plan_graftllm(kinds, facts, room).precisions)
        elif facts:
            fit_budget(facts, room, self.config.servable, encode)
        return stored

    def _encode_lossy(self, precisions: Mapping[int, Precision], index: int) -> StoredTensor:
        pair, scan, precision = self.pairs[index], self.scans[index], precisions[index]

        def encode() -> EncodedTensor:
            weighted = self.config.recipe == "auto"
            with self._states(index) as states:
                statistics = (self._metric(pair).covariance, self._bases(index))
                return encode_lossy(
                    pair, scan, states, statistics, precision, self.appended[index], weighted
                )

        return self._stored(index, encode, repr(precision))

    def _correct(
        self, stored: dict[int, StoredTensor], facts: dict[int, MatrixFacts], room: int
    ) -> dict[int, StoredTensor]:
        """Tensors whose codes were trained; all lossy payloads together still fit `room`."""
        trained = {
            self.pairs[i].name: i
            for i in facts
            if facts[i].trainable and stored[i].record.codec == "lowrank"
        }
        if not trained or self.calibration is None:
            return {}
        lossy = sum(stored[i].nbytes - len(self.appended[i]) for i in facts)
        freed = sum(stored[i].nbytes for i in trained.values())
        plan = TrainingPlan(self.config.seed, self.config.train_steps, room - lossy + freed)
        files = train_packed_codes(
            SkillPack(self.assembly.finished(stored, None), self._views(stored)),
            {name: self.pairs[i].role.module for name, i in trained.items()},
            (self.target, self.tuned),
            self.calibration.rows,
            plan,
            self.work,
            partial(self.progress, "training codes"),
        )
        items = [(trained[name], file) for name, file in files.items()]
        measured = self._map("measuring again", self._retrained, items)
        pairs = zip([i for i, _ in items], measured, strict=True)
        return {i: part for i, part in pairs if part is not None}

    def _retrained(self, item: tuple[int, str]) -> StoredTensor | None:
        """None where the tensor is better kept as it was coded first."""
        index, file = item
        pair, scan, payload = self.pairs[index], self.scans[index], self.work.read(file) or b""
        with self._states(index) as states:
            covariance = self._metric(pair).covariance
            encoded = remeasured(pair, scan, states, covariance, "lowrank", payload)
        if encoded is None:
            return None
        return StoredTensor(encoded.record, encoded.distortion, len(payload), file)

    def _bases(self, index: int) -> Tensor | None:
        bases = self.work.read_array(basis_name(index))
        return None if bases is None else torch.from_numpy(bases)

    def _stored(
        self, index: int, encode: Callable[[], EncodedTensor], precision: str = "exact"
    ) -> StoredTensor:
        """A tensor finished earlier, or encoded now; its payload goes to the work folder."""
        # Rounds try one tensor at several precisions; each is a step of its own.
        name = f"tensor-{index}-{blake3(precision.encode()).hexdigest(length=8)}"
        known = self.work.read_json(f"{name}.json")
        if known is None:
            encoded = encode()
            if encoded.payload:
                self.work.write(f"{name}.bin", encoded.payload)
            known = {
                "record": encoded.record.model_dump(mode="json"),
                "distortion": encoded.distortion,
                "nbytes": len(encoded.payload),
            }
            self.work.write_json(f"{name}.json", known)
        record = TensorRecord.model_validate(known["record"])
        return StoredTensor(record, known["distortion"], known["nbytes"], f"{name}.bin")

    def _bound(
        self, stored: dict[int, StoredTensor], facts: dict[int, MatrixFacts]
    ) -> float | None:
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

    def _views(self, stored: dict[int, StoredTensor]) -> dict[str, memoryview]:
        """Payloads by tensor name."""
        return {
            self.pairs[i].name: mapped_file(self.work.path / part.file)
            for i, part in stored.items()
            if part.nbytes
        }
