"""One packing job: its inputs, its work folder and the steps over all tensors.

From two checkpoints to a SkillPack: scan, calibrate, measure, plan, encode.

Every step leaves its result in a work folder, so that an interrupted run goes on where it
stopped; tensors are read in pairs, and never more of them than fit beside the largest one.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.compress.allocate import MatrixFacts, waterfilling_bits
from graftkit.compress.codecs import Precision, matrix_shape
from graftkit.config import TRAIN_STEPS, PackConfig
from graftkit.errors import CheckpointMismatchError, GraftError
from graftkit.files import WorkFolder, mapped_file
from graftkit.models.aligned import align
from graftkit.models.architecture import ModuleKind, tied_names
from graftkit.models.encoding import usable_tokenizer
from graftkit.models.loading import class_name, stream_model
from graftkit.packing.budget import fit_budget, plan_graftllm
from graftkit.packing.encode import (
    GENERATOR,
    Assembly,
    Encoded,
    Stored,
    encode_appended,
    encode_lossless,
    encode_lossy,
    remeasured,
)
from graftkit.packing.measure import (
    Activity,
    Calibration,
    Flags,
    Metric,
    Scan,
    basis_name,
    job_key,
    known_facts,
    measure_pair,
    metric_of,
    scan_pair,
    watch,
)
from graftkit.packing.pairs import Pair, match_tensors
from graftkit.packing.train import Plan, correct_codes
from graftkit.parallel import MemoryGate, in_threads
from graftkit.progress import Progress, silent
from graftkit.route.centroid import fit_key
from graftkit.route.key import RouterKey
from graftkit.rows import read_prompts, read_rows, rows_digest
from graftkit.side_files import check_carried
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import (
    FORMAT_VERSION,
    CalibrationInfo,
    Manifest,
    TensorRecord,
)
from graftkit.skillpack.pack import changed_files


class PackingJob:
    """Everything that one call of `pack_delta` knows; `run` does the steps in order."""

    def __init__(
        self,
        target: Checkpoint,
        tuned: Checkpoint,
        config: PackConfig,
        calibration: Calibration | None,
        prompts: Sequence[str],
        progress: Progress,
    ):
        self.target, self.tuned, self.config = target, align(target, tuned), config
        self.calibration, self.prompts, self.progress = calibration, prompts, progress
        self.pairs = match_tensors(target, self.tuned)
        check_carried(target.path, tuned.path)
        self.files = changed_files(target, tuned)
        self.tied_owners = set(tied_names(self.tuned).values())
        largest = max(pair.target.numel for pair in self.pairs)
        self.gate = MemoryGate(largest)
        budget = config.parsed_budget
        self.budget_bytes = budget.to_bytes(target.nbytes, target.parameters) if budget else None

    def scan(self) -> list[Scan]:
        """Digest every tensor of both states; refuse what is not finite."""
        return self._map("reading", self._scan_one, self.pairs)

    def run(self, scans: list[Scan], work: WorkFolder) -> tuple[Manifest, dict[str, str]]:
        """Fill the work folder with payloads.

        Returns: the manifest, and the file of every tensor that has a payload, by name.
        Raises: BudgetError and every other GraftError of the steps.
        """
        self.scans, self.work = scans, work
        self.activity, info = self._calibrate()
        self.assembly = Assembly(
            self.target,
            self.tuned,
            self.config,
            self.budget_bytes,
            self.pairs,
            scans,
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
            "prompts": list(self.prompts),
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

    def _scan_one(self, pair: Pair) -> Scan:
        with self.gate.hold(pair.target.numel):
            return scan_pair(pair, self.target, self.tuned)

    def _is_lossy(self, index: int) -> bool:
        scan, pair = self.scans[index], self.pairs[index]
        codable = scan.changed and pair.lossy and not scan.extreme
        return codable and self.config.recipe != "lossless"

    def _calibrate(self) -> tuple[Activity | None, CalibrationInfo | None]:
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
        return watch(self.tuned, self.calibration, modules, seed, folder, weighing, self.progress)

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

    def _router_key(self) -> RouterKey | None:
        """The key of the prompts, fitted on the target; None where there are no prompts."""
        if not self.prompts:
            return None
        self.progress("router key", 0, 1)
        model = stream_model(self.target, self.work.path / "offload")
        tokenizer = usable_tokenizer(self.target)
        key = fit_key(model, tokenizer, self.prompts, seed=self.config.seed)
        self.work.remove_folder("offload")
        self.progress("router key", 1, 1)
        return key

    @contextmanager
    def _states(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        pair = self.pairs[index]
        with self.gate.hold(pair.target.numel):
            yield pair.read(self.target, self.tuned)

    def _metric(self, pair: Pair) -> Metric:
        return metric_of(pair, self.activity, pair.tuned.name in self.tied_owners)

    def _makes_logits(self, pair: Pair) -> bool:
        """The output head, or the embedding that serves as one."""
        return pair.role.kind is ModuleKind.HEAD or pair.tuned.name in self.tied_owners

    def _measure(self, index: int) -> MatrixFacts:
        pair, known = self.pairs[index], known_facts(self.work, index)
        if known is not None:
            return known
        with self._states(index) as states:
            # The paper's energies are those of the delta, ours of what a layer's inputs see.
            auto = self.config.recipe == "auto"
            metric = self._metric(pair) if auto else Metric()
            calibrated = auto and self.activity is not None
            flags = Flags(self._makes_logits(pair), calibrated, self._is_trained(pair))
            measure_pair(pair, states, metric, flags, self.work, index)
        return self._measure(index)

    def _is_trained(self, pair: Pair) -> bool:
        """Code training may follow if this tensor is factored."""
        trained = self.config.recipe == "auto" and self.config.train_steps > 0
        return trained and self.activity is not None and pair.trainable

    def _encode_lossless(self, index: int) -> Stored:
        def encode() -> Encoded:
            pair, scan = self.pairs[index], self.scans[index]
            with self._states(index) as states:
                return encode_lossless(pair, scan, states, encode_appended(pair, self.tuned))

        return self._stored(index, encode)

    def _spend(self, facts: dict[int, MatrixFacts], room: int) -> dict[int, Stored]:
        """Lossy tensors, coded as the recipe spends `room` bytes of payload."""
        stored: dict[int, Stored] = {}

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

    def _encode_lossy(self, precisions: Mapping[int, Precision], index: int) -> Stored:
        pair, scan, precision = self.pairs[index], self.scans[index], precisions[index]

        def encode() -> Encoded:
            weighted = self.config.recipe == "auto"
            with self._states(index) as states:
                statistics = (self._metric(pair).covariance, self._bases(index))
                return encode_lossy(
                    pair, scan, states, statistics, precision, self.appended[index], weighted
                )

        return self._stored(index, encode, repr(precision))

    def _correct(
        self, stored: dict[int, Stored], facts: dict[int, MatrixFacts], room: int
    ) -> dict[int, Stored]:
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
        plan = Plan(self.config.seed, self.config.train_steps, room - lossy + freed)
        files = correct_codes(
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

    def _retrained(self, item: tuple[int, str]) -> Stored | None:
        """None where the tensor is better kept as it was coded first."""
        index, file = item
        pair, scan, payload = self.pairs[index], self.scans[index], self.work.read(file) or b""
        with self._states(index) as states:
            covariance = self._metric(pair).covariance
            encoded = remeasured(pair, scan, states, covariance, "lowrank", payload)
        if encoded is None:
            return None
        return Stored(encoded.record, encoded.distortion, len(payload), file)

    def _bases(self, index: int) -> Tensor | None:
        bases = self.work.read_array(basis_name(index))
        return None if bases is None else torch.from_numpy(bases)

    def _stored(
        self, index: int, encode: Callable[[], Encoded], precision: str = "exact"
    ) -> Stored:
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
        return Stored(record, known["distortion"], known["nbytes"], f"{name}.bin")

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

    def _views(self, stored: dict[int, Stored]) -> dict[str, memoryview]:
        """Payloads by tensor name."""
        return {
            self.pairs[i].name: mapped_file(self.work.path / part.file)
            for i, part in stored.items()
            if part.nbytes
        }


def pack_delta(
    target: str | Path,
    tuned: str | Path,
    *,
    budget: str | None = None,
    recipe: str = "auto",
    calibration: str | Path | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    servable: bool = False,
    train_steps: int | None = None,
    licence: str | None = None,
    provenance: Mapping[str, str] | None = None,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> SkillPack:
    """Compress what `tuned` learned beyond `target`.

    Args:
        target, tuned: Hugging Face directories or Hub ids of the two states of one model.
        budget: largest file: 5%, 12MB or 1.0bpp; default 5% (lossless: none).
        recipe: auto, graftllm or lossless.
        calibration: rows.jsonl on which activations are measured; None compresses data-free.
        prompts: 20 or more prompts of the skill, or a rows.jsonl with them: the pack then carries
            a key by which a router finds it, counted in the budget.
        seed: picks the calibration rows and the prompts where there are more than are used.
        workers: tensors in work at the same time, default one per core; the bytes are the same.
        servable: keep to factors whose side path adds at most a quarter of a matrix's
            multiply-accumulates (recipe auto).
        train_steps: steps of code training after coding (recipe auto with calibration); 0: none.
        licence, provenance: where the skill comes from, for the manifest; counted in the budget.
        work_dir: folder for finished steps; a later call with the same inputs goes on from
            there. It is left behind on success and removed when the inputs are refused.
        progress: called with (step, done, total).
    Returns: the pack; `save` writes it.
    Raises: CheckpointError, CheckpointMismatchError, RowsError, ConfigError, BudgetError,
        OutputError.
    """
    cores = os.cpu_count() or 1
    config = PackConfig.checked(
        recipe,
        budget,
        seed,
        cores if workers is None else workers,
        servable,
        TRAIN_STEPS if train_steps is None else train_steps,
    ).model_copy(update={"licence": licence, "provenance": dict(provenance or {})})
    rows = None if calibration is None else _calibration(Path(calibration))
    report = progress or silent
    asked = _prompts(prompts)
    job = PackingJob(Checkpoint.open(target), Checkpoint.open(tuned), config, rows, asked, report)
    scans = job.scan()
    if work_dir is None:
        with TemporaryDirectory(prefix="graftkit-") as folder:
            return _run(job, scans, WorkFolder(Path(folder) / "work"))
    return _run(job, scans, WorkFolder(Path(work_dir)))


def _calibration(file: Path) -> Calibration:
    return Calibration(read_rows(file), file.name, rows_digest(file))


def _prompts(prompts: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(prompts, str | Path):
        return read_prompts(prompts)
    return tuple(prompts or ())


def _run(job: PackingJob, scans: list, work: WorkFolder) -> SkillPack:  # type: ignore[type-arg]
    try:
        work.open(job.key(scans))
        manifest, files = job.run(scans, work)
        payloads = {name: mapped_file(work.path / file) for name, file in files.items()}
        payloads |= {n: memoryview(content) for n, content in job.assembly.others().items()}
    except GraftError:
        # Refused inputs leave nothing behind; an interruption leaves what was finished.
        work.remove()
        raise
    finally:
        work.close()
    return SkillPack(manifest, _ordered(payloads, manifest.payload_order))


def _ordered(payloads: Mapping[str, memoryview], order: tuple[str, ...]) -> dict[str, memoryview]:
    return {name: payloads[name] for name in order}
