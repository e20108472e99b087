"""Several packs as one: merged in a temporary folder, and packed again for the same target."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from graftkit.errors import OutputError
from graftkit.fuse.merging import (
    Mixture,
    Packs,
    Progress,
    open_mixture,
    pack_digest,
    write_mixture,
)
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
    **packing: Any,
) -> SkillPack:
    """Merge packs and write what comes out as one pack of the same target.

    The merged checkpoint takes the target's size on disk while this runs. The manifest's
    provenance names method, settings and every pack with its weight; its licence is that of the
    packs, or all of theirs joined by AND, and none where a pack names none.

    Args:
        target, packs, weights, progress, method, settings: as in `merge_packs`.
        file: the .skillpack file to write.
        packing: further arguments of `pack_delta`, such as `budget="5%"`, `recipe="auto"` or
            `calibration="rows.jsonl"`.
    Returns: the pack.
    Raises: as `merge_packs` and `pack_delta`; nothing is written in any of these cases.
    """
    output = Path(file)
    if output.is_dir() or not output.parent.is_dir():
        raise OutputError(f"{output}: name a .skillpack file in a folder that exists")
    mixture = open_mixture(target, packs, weights, method, settings)
    with _sibling_folder(output) as folder:
        # The folder's name is the tuned model's name in the manifest.
        merged = folder / f"{method}-of-{len(mixture.packs)}-packs"
        write_mixture(mixture, merged, progress)
        fused = pack_delta(
            target,
            merged,
            licence=_licence(mixture.packs),
            provenance=_provenance(mixture, method),
            progress=progress,
            **packing,
        )
        fused.save(output)
    return fused


@contextmanager
def _sibling_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside the file. Raises: OutputError."""
    try:
        folder = TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from error
    with folder as path:
        yield Path(path)


def _provenance(mixture: Mixture, method: str) -> dict[str, str]:
    settings = sorted(mixture.method.model_dump().items())
    told = {"method": " ".join([method, *(f"{name}={value:g}" for name, value in settings)])}
    for index, (pack, weight) in enumerate(zip(mixture.packs, mixture.weights, strict=True)):
        tuned, digest = pack.manifest.tuned.name, pack_digest(pack)[:16]
        told[f"pack {index + 1}"] = f"{weight:g} x {tuned} ({digest})"
    return told


def _licence(packs: Sequence[SkillPack]) -> str | None:
    """All licences together hold for what was made of all packs (SPDX: AND)."""
    names = sorted({pack.manifest.licence or "" for pack in packs})
    if not all(names):
        return None
    return " AND ".join(f"({n})" if " " in n and len(names) > 1 else n for n in names)
