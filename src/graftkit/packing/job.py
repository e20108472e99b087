"""One packing job: the steps over all tensors, in their order.

    scan       digests of both states of every tensor             measure.scan_pair
    calibrate  statistics of the tuned model on rows              measure.collect_statistics
    measure    energies and bases of every lossy tensor           measure.measure_tensor
    plan       a precision for every tensor within the budget     budget
    encode     records and payloads                               encode
    train      codes, against the tuned model                     train

Every step writes its results to the work folder, so that an interrupted job continues there. The
tensors in memory at one time have at most a quarter more weights than the largest tensor.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.compress.allocate import MatrixFacts, waterfilling_bits
from graftkit.compress.codecs import Precision, matrix_shape
from graftkit.config import PackConfig
from graftkit.errors import CheckpointMismatchError, GraftError
from graftkit.files import WorkFolder
from graftkit.model_files import check_side_files
from graftkit.models.aligned import align
from graftkit.models.architecture import ModuleKind, tied_names
from graftkit.models.loading import class_name
from graftkit.packing.budget import fit_budget, plan_graftllm
from graftkit.packing.encode import (
    GENERATOR,
    PackAssembly,
    StoredTensor,
    TensorTask,
    TensorTrial,
    encode_appended,
    encode_lossless,
    encode_lossy,
    load_stored,
    load_trial,
    reencoded,
    store_tensor,
    store_trial,
    try_lossy,
)
from graftkit.packing.measure import (
    CalibrationRows,
    CalibrationStatistics,
    ErrorMetric,
    TensorFlags,
    collect_statistics,
    error_metric,
    load_bases,
    load_facts,
    measure_tensor,
    save_measured,
    scan_pair,
)
from graftkit.packing.pairs import TensorPair, match_tensors
from graftkit.packing.train import TrainingPlan, train_packed_codes
from graftkit.parallel import MemoryGate, in_threads
from graftkit.progress import Progress
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import FORMAT_VERSION, RouterInfo
from graftkit.skillpack.pack import changed_files

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Facts = Mapping[int, MatrixFacts]
"""What is measured of the lossy tensors, by their index among all tensors."""

FitKey = Callable[[Checkpoint, Sequence[str], int, Path], tuple[RouterInfo, bytes]]
"""Fits a router key: takes the target, prompts, a seed and a folder for the target's weights;
returns description and payload of the key."""


@dataclass(frozen=True)
class RouterPrompts:
    """Prompts that a router sends to the pack, and the function that fits their key."""

    prompts: tuple[str, ...]
    fit_key: FitKey


class PackingJob:
    """One call of `pack_delta`: two checkpoints, settings, and a work folder.

    Args:
        calibration: None compresses without data.
        work: not opened yet.
    Raises: CheckpointError, CheckpointMismatchError, BudgetError.
    """

    def __init__(
        self,
        target: Checkpoint,
        tuned: Checkpoint,
        config: PackConfig,
        calibration: CalibrationRows | None,
        router: RouterPrompts,
        work: WorkFolder,
        progress: Progress,
    ):
        self.target, self.tuned, self.config = target, align(target, tuned), config
        self.calibration, self.router = calibration, router
        self.work, self.progress = work, progress
        self.pairs = match_tensors(target, self.tuned)
        check_side_files(target.path, tuned.path)
        self.files = changed_files(target, tuned)
        self.tied_owners = set(tied_names(self.tuned).values())
        # Small tensors are worked on beside the largest, which is often a fifth of all weights.
        self.gate = MemoryGate(5 * max(pair.target.numel for pair in self.pairs) // 4)
        budget = config.parsed_budget
        self.budget_bytes = budget.to_bytes(target.nbytes, target.parameters) if budget else None

    def run(self) -> SkillPack:
        """Do all steps.

        Raises: CheckpointError, CheckpointMismatchError, RowsError, BudgetError, OutputError.
        """
        tasks = self._map("reading", self._scan, range(len(self.pairs)))
        lossy, exact = ([t for t in tasks if t.lossy is kind] for kind in (True, False))
        with self._open_work(tasks):
            statistics = self._calibrate(tasks)
            assembly = self._assembly(tasks, statistics, self._fit_router_key())
            encoded = self._map("exact tensors", self._encode_exact, exact)
            stored = {task.index: part for task, part in zip(exact, encoded, strict=True)}
            room = assembly.room_for_lossy(stored)
            measured = self._map("measuring", partial(self._measure, statistics), lossy)
            facts = {task.index: part for task, part in zip(lossy, measured, strict=True)}
            stored |= self._encode_within(room, facts, tasks, statistics)
            stored |= self._train_codes(room, facts, stored, assembly, statistics)
            return assembly.finish(stored, self._bound(stored, facts))

    def _map(
        self, step: str, work: Callable[[_Item], _Result], items: Sequence[_Item]
    ) -> list[_Result]:
        """`work` of every item, in threads, with progress."""
        results: list[_Result] = []
        self.progress(step, 0, len(items))
        for result in in_threads(work, items, self.config.workers):
            results.append(result)
            self.progress(step, len(results), len(items))
        return results

    @contextmanager
    def _states(self, pair: TensorPair) -> Iterator[tuple[Tensor, Tensor]]:
        """Both states of a tensor, in memory as soon as there is room for them."""
        with self.gate.hold(pair.target.numel):
            yield pair.read(self.target, self.tuned)

    def _scan(self, index: int) -> TensorTask:
        """Digest one tensor of both states; refuse weights that are not finite."""
        pair = self.pairs[index]
        with self.gate.hold(pair.target.numel):
            scan = scan_pair(pair, self.target, self.tuned)
            appended = encode_appended(pair, self.tuned)
        codable = scan.changed and pair.lossy and not scan.extreme
        lossy = codable and self.config.recipe != "lossless"
        return TensorTask(pair, scan, appended, lossy, index)

    @contextmanager
    def _open_work(self, tasks: Sequence[TensorTask]) -> Iterator[None]:
        """The work folder, ready for this job.

        A refused input leaves nothing behind; an interruption leaves the finished steps.
        """
        try:
            self.work.open(self._key(tasks))
            yield
        except GraftError:
            self.work.remove()
            raise
        finally:
            self.work.close()

    def _key(self, tasks: Sequence[TensorTask]) -> str:
        """Everything that decides the bytes of the pack."""
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
            "prompt_format": [self.config.prompt_format, self.config.template_blake3],
            "files": [record.blake3 for record, _ in self.files],
        }
        tensors = [(t.pair.name, t.scan.target_digest, t.scan.tuned_digest) for t in tasks]
        return json.dumps({"settings": settings, "tensors": tensors}, sort_keys=True)

    def _calibrate(self, tasks: Sequence[TensorTask]) -> CalibrationStatistics | None:
        """Run the tuned model on the rows; None without rows.

        Raises: CheckpointMismatchError for two classes: rows run through the tuned model by the
            target's module names.
        """
        if self.calibration is None or self.config.recipe == "lossless":
            return None
        target, tuned = (class_name(checkpoint) for checkpoint in (self.target, self.tuned))
        if target != tuned:
            raise CheckpointMismatchError(
                f"{self.tuned.path}: a {tuned}, and the target is a {target}; rows need two models "
                "of one class, so pack without calibration"
            )
        measured = [t.pair for t in tasks if t.scan.changed and t.pair.lossy]
        modules = sorted({pair.role.module for pair in measured if pair.role.linear})
        weighing = self.config.recipe == "auto"
        seed, folder = self.config.seed, self.work.path
        return collect_statistics(
            self.tuned, self.calibration, modules, seed, folder, weighing, self.progress
        )

    def _fit_router_key(self) -> tuple[RouterInfo, bytes] | None:
        """Description and payload of the key of the prompts; None without prompts."""
        if not self.router.prompts:
            return None
        self.progress("router key", 0, 1)
        offload = self.work.path / "offload"
        key = self.router.fit_key(self.target, self.router.prompts, self.config.seed, offload)
        self.work.remove_folder("offload")
        self.progress("router key", 1, 1)
        return key

    def _assembly(
        self,
        tasks: Sequence[TensorTask],
        statistics: CalibrationStatistics | None,
        router: tuple[RouterInfo, bytes] | None,
    ) -> PackAssembly:
        return PackAssembly(
            target=self.target,
            tuned=self.tuned,
            config=self.config,
            budget_bytes=self.budget_bytes,
            tasks=tasks,
            files=self.files,
            calibration=None if statistics is None else statistics.info,
            router=router,
            work=self.work,
        )

    def _encode_exact(self, task: TensorTask) -> StoredTensor:
        name = _step_name(task, "exact")
        stored = load_stored(self.work, name)
        if stored is None:
            with self._states(task.pair) as states:
                encoded = encode_lossless(task, states)
            stored = store_tensor(self.work, name, encoded)
        return stored

    def _measure(self, statistics: CalibrationStatistics | None, task: TensorTask) -> MatrixFacts:
        facts, pair = load_facts(self.work, task.index), task.pair
        if facts is None:
            # The paper's energies are those of the delta, ours those of a layer's outputs.
            auto = self.config.recipe == "auto"
            calibrated = auto and statistics is not None
            trainable = calibrated and self.config.train_steps > 0 and pair.trainable
            logits = pair.role.kind is ModuleKind.HEAD or pair.tuned.name in self.tied_owners
            flags = TensorFlags(logits, calibrated, trainable, pruned=pair.gathered and not auto)
            with self._states(pair) as states:
                metric = self._metric(pair, statistics) if auto else ErrorMetric()
                facts, bases = measure_tensor(pair, states, metric, flags)
                save_measured(self.work, task.index, facts, bases)
        return facts

    def _metric(self, pair: TensorPair, statistics: CalibrationStatistics | None) -> ErrorMetric:
        return error_metric(pair, statistics, pair.tuned.name in self.tied_owners)

    def _encode_within(
        self,
        room: int,
        facts: Facts,
        tasks: Sequence[TensorTask],
        statistics: CalibrationStatistics | None,
    ) -> dict[int, StoredTensor]:
        """Plan and encode the lossy tensors. room: bytes of their payloads, without added rows."""
        stored: dict[int, StoredTensor] = {}

        def encode(precisions: Mapping[int, Precision]) -> dict[int, tuple[int, float]]:
            planned = [tasks[index] for index in precisions]
            one = partial(self._encode_lossy, precisions, statistics)
            stored.update(zip(precisions, self._map("compressing", one, planned), strict=True))
            return {i: (stored[i].body_bytes, stored[i].distortion) for i in precisions}

        def estimate(precisions: Mapping[int, Precision]) -> dict[int, tuple[int, float]]:
            planned = [tasks[index] for index in precisions]
            one = partial(self._try_lossy, precisions, statistics)
            trials = zip(precisions, self._map("compressing", one, planned), strict=True)
            return {i: (trial.nbytes, trial.distortion) for i, trial in trials}

        if self.config.recipe == "graftllm" and facts:
            kinds = {i: tasks[i].pair.role.kind for i in facts}
            encode(plan_graftllm(kinds, facts, room).precisions)
        elif facts:
            fit_budget(facts, room, self.config.servable, encode, estimate)
        return stored

    def _encode_lossy(
        self,
        precisions: Mapping[int, Precision],
        statistics: CalibrationStatistics | None,
        task: TensorTask,
    ) -> StoredTensor:
        precision = precisions[task.index]
        # One tensor is encoded at several precisions; each is a step of its own.
        name = _step_name(task, repr(precision))
        stored = load_stored(self.work, name)
        if stored is None:
            with self._lossy_inputs(task, statistics) as (states, covariance, bases):
                trial = load_trial(self.work, name)
                encoded = encode_lossy(
                    task, states, covariance, bases, precision, self._weighted, trial
                )
            stored = store_tensor(self.work, name, encoded)
        return stored

    def _try_lossy(
        self,
        precisions: Mapping[int, Precision],
        statistics: CalibrationStatistics | None,
        task: TensorTask,
    ) -> TensorTrial:
        precision = precisions[task.index]
        name = _step_name(task, repr(precision))
        trial = load_trial(self.work, name)
        if trial is None:
            with self._lossy_inputs(task, statistics) as (states, covariance, bases):
                trial = try_lossy(task, states, covariance, bases, precision, self._weighted)
            store_trial(self.work, name, trial)
        return trial

    @property
    def _weighted(self) -> bool:
        """Whether distortions are measured under the covariance."""
        return self.config.recipe == "auto"

    @contextmanager
    def _lossy_inputs(
        self, task: TensorTask, statistics: CalibrationStatistics | None
    ) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]]:
        """States, covariance and bases of a tensor, as soon as there is memory for them."""
        with self._states(task.pair) as states:
            covariance = self._metric(task.pair, statistics).covariance
            yield states, covariance, load_bases(self.work, task.index)

    def _train_codes(
        self,
        room: int,
        facts: Facts,
        stored: Mapping[int, StoredTensor],
        assembly: PackAssembly,
        statistics: CalibrationStatistics | None,
    ) -> dict[int, StoredTensor]:
        """The tensors whose codes are better after training; all payloads still fit `room`."""
        trained = {
            self.pairs[i].name: i
            for i in facts
            if facts[i].trainable and stored[i].record.codec == "lowrank"
        }
        if not trained or self.calibration is None:
            return {}
        free = room - sum(stored[i].body_bytes for i in facts)
        freed = sum(stored[i].nbytes for i in trained.values())
        files = train_packed_codes(
            assembly.pack(stored, None),
            {name: self.pairs[i].role.module for name, i in trained.items()},
            (self.target, self.tuned),
            self.calibration.rows,
            TrainingPlan(self.config.seed, self.config.train_steps, free + freed),
            self.work,
            partial(self.progress, "training codes"),
        )
        tasks = [(assembly.tasks[trained[name]], file) for name, file in files.items()]
        results = self._map("measuring again", partial(self._remeasure, statistics), tasks)
        pairs = zip(tasks, results, strict=True)
        return {task.index: result for (task, _), result in pairs if result is not None}

    def _remeasure(
        self, statistics: CalibrationStatistics | None, trained: tuple[TensorTask, str]
    ) -> StoredTensor | None:
        """A tensor with its trained payload; None where it then exceeds the tuned dtype."""
        task, file = trained
        payload = self.work.read(file) or b""
        with self._states(task.pair) as states:
            covariance = self._metric(task.pair, statistics).covariance
            encoded = reencoded(task, states, covariance, "lowrank", payload)
        return None if encoded is None else StoredTensor.of(encoded, file)

    def _bound(self, stored: Mapping[int, StoredTensor], facts: Facts) -> float | None:
        """Least bits per parameter at the distortion reached; exact tensors count as stored."""
        if self.config.recipe == "lossless":
            return None
        bits = 0.0
        for i, part in stored.items():
            if i not in facts:
                bits += 8 * part.nbytes
                continue
            pair = self.pairs[i]
            count, (rows, columns) = matrix_shape(pair.common_shape, pair.layout)
            rate = waterfilling_bits(facts[i].energies, min(rows, columns), part.distortion)
            bits += rate * count * rows * columns + 8 * part.record.appended_bytes
        return float(f"{bits / self.target.parameters:.4g}")


def _step_name(task: TensorTask, precision: str) -> str:
    """Files of one encoded tensor in the work folder, without their ending."""
    return f"tensor-{task.index}-{blake3(precision.encode()).hexdigest(length=8)}"
