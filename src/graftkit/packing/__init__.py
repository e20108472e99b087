"""From two checkpoints to a SkillPack: scan, calibrate, measure, plan, encode.

Every step leaves its result in a work folder, so that an interrupted run goes on where it
stopped; tensors are read in pairs, and never more of them than fit beside the largest one.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from graftkit.config import TRAIN_STEPS, PackConfig
from graftkit.delta import Checkpoint
from graftkit.errors import GraftError
from graftkit.packing.job import WorkFolder, mapped_file
from graftkit.packing.measure import Calibration, Progress
from graftkit.packing.run import PackingJob
from graftkit.rows import read_prompts, read_rows, rows_digest
from graftkit.skillpack import SkillPack


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
    report = progress or (lambda step, done, total: None)
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
