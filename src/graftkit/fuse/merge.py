"""Packs added to a target for good: an ordinary checkpoint comes out.

    θ = θ_target + λ · rule(δ_1 … δ_T; w_1 … w_T)        (GraftLLM eq. 10 and 11: the rule is a sum)

One pack that the rule leaves as it is is decoded, so that a lossless pack gives the tuned bytes
back.

Several packs as one: merged in a temporary folder, and packed again for the same target.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.attachment.configuration import changed_computation, parse_settings
from graftkit.checkpoint import Checkpoint, write_checkpoint
from graftkit.errors import CheckpointError, ConfigError, PackMismatchError
from graftkit.files import writing
from graftkit.fuse.methods import Method, check_weights, find_method
from graftkit.models.configuration import differing_settings
from graftkit.models.loading import empty_model
from graftkit.outputs import Claim, claimed
from graftkit.pack import pack_delta
from graftkit.parallel import MemoryGate, in_threads
from graftkit.progress import Progress, silent
from graftkit.side_files import code_names, files_beside_weights, is_tokenizer_file
from graftkit.skillpack import SkillPack

Packs = str | Path | SkillPack | Sequence[str | Path | SkillPack]


def merge_packs(
    target: str | Path | Checkpoint,
    packs: Packs,
    output_dir: str | Path,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
    method: str = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write target + λ · merged deltas as a Hugging Face directory.

    Every file of the target that is no weight comes along (graftkit.side_files); config.json says
    the dtype that is written.

    Tensor by tensor: the peak of memory is a shard of the result, and the largest tensor's delta in
    float32 for every pack (ties and dare: with a copy). The packs' order does not matter.

    Args:
        target: the target of all packs. packs: one or more.
        output_dir: a new or empty folder; it appears whole or not at all.
        weights: one per pack, default 1 each; a pack of weight 0 takes no part.
        method: a name of `graftkit.fuse.methods.METHODS`. settings: values of its fields, such as
            {"density": 0.2, "scaling": 0.5}.
        trust_remote_code: files of code come along, too.
    Returns: output_dir.
    Raises: PackMismatchError when a pack is of another target, or the packs cannot be merged, such
        as one whose config.json changes the computation and that is weighted or not alone;
        ConfigError for wrong weights or settings; OutputError; nothing is written in any of these
        cases.
    """
    inputs = named_inputs(target, packs)
    job = ["merge", *inputs, weights, method, settings, trust_remote_code]
    with claimed(output_dir, job, folder=True, inputs=inputs) as claim:
        mixture = open_merge(target, packs, weights, method, settings)
        mixture.check_configurations()
        mixture.carry_code(trust_remote_code)
        claim.open_work()
        write_merged(mixture, claim.result, progress)
    return Path(output_dir)


def named_inputs(target: str | Path | Checkpoint, packs: Packs) -> list[str | Path]:
    """Where target and packs lie; a pack in memory is named by its digest."""
    several: Any = packs if isinstance(packs, (list, tuple)) else [packs]
    named = [pack.digest if isinstance(pack, SkillPack) else pack for pack in several]
    return [target.path if isinstance(target, Checkpoint) else target, *named]


def open_merge(
    target: str | Path | Checkpoint,
    packs: Packs,
    weights: Sequence[float] | None,
    method: str,
    settings: Mapping[str, Any] | None,
) -> "PackMerge":
    """Everything that a merge needs, checked. Raises: as `merge_packs`."""
    rule = find_method(method, settings or {})
    several = packs if isinstance(packs, (list, tuple)) else [packs]
    checked = check_weights(rule, weights, len(several))
    checkpoint = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
    opened = [p if isinstance(p, SkillPack) else SkillPack.load(p) for p in several]  # type: ignore[arg-type]
    mixture = PackMerge(checkpoint, opened, checked, rule)
    for pack in opened:
        pack.check_target(checkpoint.read, set(checkpoint.tensors), str(checkpoint.path))
    return mixture


class MergedCheckpoint(Protocol):
    """A merged checkpoint that is written tensor by tensor."""

    target: Checkpoint

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the result."""

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result."""

    def side_files(self) -> Mapping[str, bytes]:
        """Contents of all files beside its weights, by name."""


class PackMerge:
    """Packs of one target with their weights and a method: the merged tensors, one at a time."""

    def __init__(
        self, target: Checkpoint, packs: list[SkillPack], weights: list[float], method: Method
    ):
        self.target, self.packs, self.weights, self.method = target, packs, weights, method
        self._code = False
        # Sums are rounded in this order, whatever the order in which packs were named.
        takes_part = [
            (manifest_digest(pack), weight, pack)
            for pack, weight in zip(packs, weights, strict=True)
            if weight != 0 and method.scaling != 0
        ]
        self._parts = sorted(takes_part, key=lambda part: part[:2])
        self._kept = packs[0] if len(packs) == 1 and method.keeps(weights[0]) else None
        if self._kept is None:
            self.check_addable()

    def reweighted(self, weights: Sequence[float], scaling: float) -> "PackMerge":
        """The same packs and method with other weights and another λ."""
        method = self.method.model_copy(update={"scaling": scaling})
        return PackMerge(self.target, self.packs, list(weights), method)

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the result."""
        return sorted({record.name for pack in self.packs for record in pack.manifest.tensors})

    def changes(self, name: str) -> bool:
        """Whether any pack changes this tensor."""
        return any(pack.record(name).codec != "zero" for pack in self.packs)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result, in the dtype that the target (or a pack kept as it is) has."""
        if self._kept is not None:
            return self._kept.rebuild(name, self.target.read)
        before = self.target.read(name)
        if not self._parts or not self.changes(name):
            return before
        deltas = [pack.delta(name, before) for _, _, pack in self._parts]
        weights = self._scaled([weight for _, weight, _ in self._parts])
        keys = [f"{digest}/{name}" for digest, _, _ in self._parts]
        merged = self.method.merge(deltas, weights, keys)
        result = before.float().add_(merged, alpha=self.method.scaling).to(before.dtype)
        if not result.isfinite().all():  # what the target has so is unchanged
            result = torch.where(before.isfinite(), result, before)
        if not (result.isfinite() | ~before.isfinite()).all():
            raise ConfigError(
                f"{name}: weights {self.weights} and lambda {self.method.scaling:g} give values "
                f"that {before.dtype} does not hold; use smaller ones"
            )
        return result

    def _scaled(self, weights: list[float]) -> list[float]:
        """Times a power of two where only proportions count: tiny weights vanish in float32."""
        if not self.method.averages:
            return weights
        exponent = math.frexp(sum(weights))[1]
        return [math.ldexp(weight, -exponent) for weight in weights]

    def side_files(self) -> Mapping[str, bytes]:
        """The target's files, and the side files that all packs that take part change alike."""
        packs = [pack for _, _, pack in self._parts]
        changed = packs[0].side_files(self.target) if packs else {}
        alike = {name: changed[name] for name in _changed_alike(packs)}
        names = [pack.manifest.tuned.name for pack in packs]
        return files_beside_weights(
            self.target.path, alike, merge_note(self.target, names), self._code
        )

    def carry_code(self, allowed: bool) -> None:
        """Have the target's code come along. Raises: PackMismatchError where a pack's differs."""
        self._code = allowed
        for pack in self.packs if allowed else ():
            check_code(pack, self.target)

    def check_configurations(self) -> None:
        """Raises: PackMismatchError for a change of the computation that is weighted, or that only
        some packs make."""
        parts = [pack for _, _, pack in self._parts]
        if self._kept is None:
            alike = _changed_alike(parts) if len(parts) > 1 else set()
            for pack in parts:
                check_computation(pack, self.target, alike)

    def check_addable(self) -> None:
        """Raises: PackMismatchError for packs whose deltas cannot be weighted or summed."""
        alike = _changed_alike(self.packs)
        for pack in self.packs:
            check_shapes(pack)
            check_token_ids(pack, {file.name for file in pack.manifest.files} - alike)


def check_shapes(pack: SkillPack) -> None:
    """Raises: PackMismatchError for a pack that changes shapes or adds tensors."""
    for record in pack.manifest.tensors:
        if record.tuned_shape is not None or record.base is not None:
            raise PackMismatchError(
                f"{record.name}: the pack of {pack.manifest.tuned.name} changes its shape or adds "
                "it, which cannot be weighted or summed; merge it alone"
            )


def check_token_ids(pack: SkillPack, unlike: Iterable[str]) -> None:
    """Raises: PackMismatchError where one of the files that packs change differently, or not at
    all, is the tokenizer's."""
    for name in sorted(filter(is_tokenizer_file, unlike)):
        raise PackMismatchError(
            f"{name}: the pack of {pack.manifest.tuned.name} changes the tokenizer otherwise than "
            "another, or not at all, so their token ids differ; merge it alone"
        )


def check_computation(pack: SkillPack, target: Checkpoint, alike: Iterable[str]) -> None:
    """Raises: PackMismatchError where the pack's config.json, not among the files that all packs
    change `alike`, changes what the model computes."""
    if "config.json" in alike:
        return
    keys = config_changes(pack, target)
    if keys:
        raise PackMismatchError(
            f"config.json of {pack.manifest.tuned.name} has another {', '.join(keys)}, which "
            "changes what the model computes and cannot be weighted or added; merge this pack alone"
        )


def config_changes(pack: SkillPack, target: Checkpoint) -> list[str]:
    """Keys of the pack's config.json that change, or may change, what the model computes."""
    if all(file.name != "config.json" for file in pack.manifest.files):
        return []
    try:
        model = empty_model(target)
    except CheckpointError:  # an architecture that this transformers cannot build
        content = pack.side_file("config.json", lambda: target.side_file("config.json"))
        return differing_settings(target.config, parse_settings("config.json", content))
    return changed_computation(model, pack, target.side_file)


def check_code(pack: SkillPack, target: Checkpoint) -> None:
    """Raises: PackMismatchError where the tuned model had other code than the target."""
    own = {part.name for part in pack.manifest.omitted} & set(code_names(target.path))
    if own:
        raise PackMismatchError(
            f"{min(own)}: the code of {pack.manifest.tuned.name} differs from the target's, and a "
            "pack holds no code; merge without --trust-remote-code, and copy its code by hand"
        )


def merge_note(target: Checkpoint, names: Sequence[str]) -> str:
    """What a merged model's card begins with."""
    packs = ", ".join(names) or "no pack"
    return (
        f"Merged by graftkit from {target.name} and {packs}. What follows is the card of "
        f"{target.name}."
    )


def _changed_alike(packs: Sequence[SkillPack]) -> set[str]:
    """Names of the side files that every pack changes to the same content."""
    changes = [{(file.name, file.blake3) for file in pack.manifest.files} for pack in packs]
    return {name for name, _ in set.intersection(*changes)} if changes else set()


def manifest_digest(pack: SkillPack) -> str:
    """One digest of the whole pack: the manifest holds the digests of everything else."""
    return blake3(pack.manifest.to_json().encode()).hexdigest()


def write_merged(mixture: MergedCheckpoint, folder: Path, progress: Progress | None) -> None:
    """Write a new folder: tensors in shards, then the index and the side files.

    Raises: OutputError.
    """
    names, report = mixture.names, progress or silent
    gate = MemoryGate(max(info.numel for info in mixture.target.tensors.values()))

    def merged(name: str) -> Tensor:
        info = mixture.target.tensors.get(name)
        with gate.hold(info.numel if info else 0):
            return mixture.tensor(name)

    results = in_threads(merged, names)
    step_done = partial(_report, report, len(names))
    files = mixture.side_files()
    with writing(folder):
        write_checkpoint(folder, names, lambda name: next(results), files, step_done)


def _report(progress: Progress, total: int, done: int) -> None:
    progress("merging", done, total)


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
        mixture = open_merge(target, packs, weights, method, settings)
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
    merged: MergedCheckpoint,
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
    write_merged(merged, folder / name, progress)
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


def _provenance(mixture: PackMerge, method: str) -> dict[str, str]:
    settings = sorted(mixture.method.model_dump().items())
    told = {"method": " ".join([method, *(f"{name}={value:g}" for name, value in settings)])}
    for index, (pack, weight) in enumerate(zip(mixture.packs, mixture.weights, strict=True)):
        tuned, digest = pack.manifest.tuned.name, manifest_digest(pack)[:16]
        told[f"pack {index + 1}"] = f"{weight:g} x {tuned} ({digest})"
    return told


def joined_licences(licences: Sequence[str | None]) -> str | None:
    """All licences together hold for what was made of all packs (SPDX: AND)."""
    names = sorted({licence or "" for licence in licences})
    if not all(names):
        return None
    return " AND ".join(f"({n})" if " " in n and len(names) > 1 else n for n in names)
