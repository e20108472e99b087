"""Several packs as one: merged in a temporary folder, and packed again for the same target."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftkit.fuse.merging import (
    Merged,
    Mixture,
    Packs,
    Progress,
    named_inputs,
    open_mixture,
    pack_digest,
    write_mixture,
)
from graftkit.outputs import Claim, claimed
from graftkit.packing import pack_delta
from graftkit.skillpack import SkillPack


def fuse_packs(
    target: str | Path,
    packs: Packs,
    file: str | Path,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    method: str = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
    **packing: Any,
) -> SkillPack:
    """Merge packs and write what comes out as one pack of the same target.

    The merged checkpoint takes the target's size on disk while this runs. The manifest's
    provenance names method, settings and every pack with its weight; its licence is that of the
    packs, or all of theirs joined by AND, and none where a pack names none.

    Args:
        target, packs, weights, progress, method, settings: as in `merge_packs`.
        file: the .skillpack file to write. force: it may be there, and is replaced.
        packing: further arguments of `pack_delta`, such as `budget="5%"`, `recipe="auto"` or
            `calibration="rows.jsonl"`.
    Returns: the pack.
    Raises: as `merge_packs` and `pack_delta`; nothing is written in any of these cases.
    """
    inputs = named_inputs(target, packs)
    job = ["fuse", *inputs, weights, method, settings, packing]
    read = [*inputs, *packing_inputs(packing)]
    with claimed(file, job, inputs=read, force=force) as claim:
        mixture = open_mixture(target, packs, weights, method, settings)
        mixture.check_configurations()
        name = f"{method}-of-{len(mixture.packs)}-packs"
        licences = [pack.manifest.licence for pack in mixture.packs]
        provenance = _provenance(mixture, method)
        return pack_merged(target, mixture, claim, name, licences, provenance, progress, **packing)


def packing_inputs(packing: Mapping[str, Any]) -> list[str | Path]:
    """The files among the arguments of `pack_delta`."""
    named = [packing.get("calibration"), packing.get("prompts")]
    return [value for value in named if isinstance(value, str | Path)]


def pack_merged(
    target: str | Path,
    merged: Merged,
    claim: Claim,
    name: str,
    licences: Sequence[str | None],
    provenance: Mapping[str, str],
    progress: Progress | None,
    **packing: Any,
) -> SkillPack:
    """Write a merged checkpoint as the pack of a claim; the checkpoint is on disk meanwhile.

    Args:
        name: of the tuned model in the manifest. licences: of everything that went in.
        packing: further arguments of `pack_delta`.
    Raises: as `pack_delta`.
    """
    folder = claim.open_work()
    write_mixture(merged, folder / name, progress)
    fused = pack_delta(
        target,
        folder / name,
        licence=joined_licences(licences),
        provenance=provenance,
        work_dir=folder / "steps",
        progress=progress,
        **packing,
    )
    fused.save(claim.result)
    return fused


def _provenance(mixture: Mixture, method: str) -> dict[str, str]:
    settings = sorted(mixture.method.model_dump().items())
    told = {"method": " ".join([method, *(f"{name}={value:g}" for name, value in settings)])}
    for index, (pack, weight) in enumerate(zip(mixture.packs, mixture.weights, strict=True)):
        tuned, digest = pack.manifest.tuned.name, pack_digest(pack)[:16]
        told[f"pack {index + 1}"] = f"{weight:g} x {tuned} ({digest})"
    return told


def joined_licences(licences: Sequence[str | None]) -> str | None:
    """All licences together hold for what was made of all packs (SPDX: AND)."""
    names = sorted({licence or "" for licence in licences})
    if not all(names):
        return None
    return " AND ".join(f"({n})" if " " in n and len(names) > 1 else n for n in names)
