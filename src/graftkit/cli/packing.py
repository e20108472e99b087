"""Behind `pack`, `verify` and `merge`: files and numbers, no printing."""

import shutil
import time
from pathlib import Path
from typing import Any

from graftkit.cli import show
from graftkit.delta import Checkpoint, all_finite
from graftkit.errors import ConfigError, CorruptPackError, OutputError, PackFault
from graftkit.memory import peak_rss_bytes
from graftkit.packing import pack_delta
from graftkit.packing.measure import Progress
from graftkit.skillpack import SkillPack
from graftkit.skillpack.summary import pack_summary


def pack_to_file(
    target: str, tuned: str, output: Path, dry_run: bool, **options: Any
) -> dict[str, Any]:
    """Pack into `output` (nothing is written on a dry run) and return the numbers."""
    started = time.perf_counter()
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; name the .skillpack file to write")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: there is no folder {output.parent}; make it first")
    partial = output.with_name(output.name + ".partial")
    with show.progress() as report:
        work_dir = None if dry_run else partial
        pack = pack_delta(target, tuned, work_dir=work_dir, progress=report, **options)
    if not dry_run:
        try:
            pack.save(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    summary = pack_summary(pack)
    if not dry_run:
        # The size quoted is the size of the file.
        summary["pack_bytes"] = output.stat().st_size
    measured = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
    return {"output": None if dry_run else str(output)} | summary | measured


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
