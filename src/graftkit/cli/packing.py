"""Behind `pack`, `verify` and `merge`: files and numbers, no printing."""

import time
from pathlib import Path
from typing import Any

from graftkit.checkpoint import Checkpoint, all_finite
from graftkit.cli import show
from graftkit.errors import ConfigError, CorruptPackError, OutputError, PackFault
from graftkit.files import WorkFolder
from graftkit.outputs import Claim, check_output, claimed
from graftkit.packing import pack_delta
from graftkit.parallel import peak_rss_bytes
from graftkit.progress import Progress
from graftkit.skillpack import SkillPack
from graftkit.skillpack.pack import pack_summary


def pack_to_file(
    target: str, tuned: str, output: Path, dry_run: bool, force: bool, **options: Any
) -> dict[str, Any]:
    """Pack into `output` (nothing is written on a dry run) and return the numbers.

    force: a file that is there may be replaced.
    """
    started = time.perf_counter()
    rows = [file for name in ("calibration", "prompts") if (file := options.get(name))]
    with show.progress() as report:
        if dry_run:
            check_output(output, inputs=[target, tuned, *rows], force=True)
            pack = pack_delta(target, tuned, progress=report, **options)
        else:
            job = ["pack", target, tuned, options]
            inputs = [target, tuned, *rows]
            with claimed(output, job, inputs=inputs, force=force, resumable=True) as claim:
                pack = pack_delta(target, tuned, work_dir=claim.work, progress=report, **options)
                _save(pack, claim)
    summary = pack_summary(pack)
    if not dry_run:
        # The size quoted is the size of the file.
        summary["pack_bytes"] = output.stat().st_size
    measured = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
    return {"output": None if dry_run else str(output)} | summary | measured


def _save(pack: SkillPack, claim: Claim) -> None:
    """Write the pack and put it in place; where that fails, nothing stays. Raises: OutputError."""
    try:
        pack.save(claim.result)
        claim.commit()
    except OutputError:
        WorkFolder(claim.work).remove()
        raise


def verify_file(file: Path, target: str, full: bool, progress: Progress) -> dict[str, Any]:
    """Check format, digests and target; decode everything where `full` is asked.

    Raises: PackFormatError, PackMismatchError, CorruptPackError for a tensor that is not finite.
    """
    pack = SkillPack.load(file)
    checkpoint = Checkpoint.open(target)
    progress("checking the target", 0, 1)
    pack.check_target(checkpoint.read, set(checkpoint.tensors), str(checkpoint.path))
    progress("checking the target", 1, 1)
    if full:
        pack.side_files(checkpoint)
        for done, record in enumerate(pack.manifest.tensors):
            progress("decoding", done, len(pack.manifest.tensors))
            _check_finite(pack, record.name, checkpoint)
    return {
        "ok": True,
        "format_version": pack.manifest.format_version,
        "pack_bytes": file.stat().st_size,
        "tensors": len(pack.manifest.tensors),
        "fingerprint": pack.manifest.target.fingerprint,
        "decoded": full,
    }


def parse_weights(text: str | None) -> list[float] | None:
    """`1,0.5` as numbers. Raises: ConfigError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"weights {text!r} are not numbers; write one per pack, such as 1,0.5"
        ) from error


def _check_finite(pack: SkillPack, name: str, target: Checkpoint) -> None:
    tensor, base = pack.rebuild(name, target.read), pack.record(name).target_name
    if not tensor.is_floating_point() or all_finite(tensor):
        return
    odd = ~tensor.isfinite()
    if base is not None:  # what the target has so is unchanged
        before = target.read(base).isfinite()
        before, odd = before.reshape(-1, *before.shape[1:]), odd.reshape(-1, *odd.shape[1:])
        rows = min(before.shape[0], odd.shape[0])
        odd[:rows] &= before[:rows]
    if bool(odd.any()):
        raise CorruptPackError(
            f"tensor {name} decodes to NaN or infinite weights; pack the model again",
            PackFault.INVALID_PAYLOAD,
        )
