"""Packs added to a target for good: as an ordinary checkpoint, or as one new pack.

    θ = θ_target + λ · rule(δ_1 … δ_T; w_1 … w_T)        (GraftLLM eq. 10 and 11: the rule is a sum)

`merge_packs` writes the checkpoint. `fuse_packs` merges in a temporary folder, and packs the result
for the same target.

A single pack that the rule leaves unchanged is decoded and not added. So a lossless pack gives the
bytes of the tuned model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from torch import Tensor

from graftkit.attachment.configuration import effective_config_keys, parse_settings
from graftkit.checkpoint import Checkpoint, write_checkpoint
from graftkit.config import SELF
from graftkit.errors import CheckpointError, ConfigError, PackMismatchError
from graftkit.files import writing
from graftkit.fuse.methods import Method, check_weights, find_method
from graftkit.model_files import code_names, files_beside_weights, is_tokenizer_file
from graftkit.models.configuration import differing_settings
from graftkit.models.loading import empty_model
from graftkit.outputs import Claim, claimed
from graftkit.pack import pack_delta
from graftkit.parallel import MemoryGate, in_threads
from graftkit.progress import Progress, silent
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import PromptFormat

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

    The target's files other than weights are copied (graftkit.model_files); config.json names the
    dtype that is written.

    Tensors are merged one by one. Peak memory is a shard of the result, and the largest tensor's
    delta in float32 for every pack (ties and dare: with a copy). The result does not depend on the
    order of packs.

    Args:
        target: the target of all packs. packs: one or more.
        output_dir: a new or empty folder; it appears whole or not at all.
        weights: one per pack, default 1 each; a pack of weight 0 takes no part.
        method: a name of `graftkit.fuse.methods.METHODS`. settings: values of its fields, such as
            {"density": 0.2, "scaling": 0.5}.
        trust_remote_code: copy files of code too.
    Returns: output_dir.
    Raises: PackMismatchError for a pack of another target, or packs that cannot be merged: a pack
        whose config.json changes the computation must be alone and have weight 1. ConfigError for
        wrong weights or settings; OutputError. Nothing is written in any of these cases.
    """
    inputs = named_inputs(target, packs)
    job = ["merge", *inputs, weights, method, settings, trust_remote_code]
    with claimed(output_dir, job, folder=True, inputs=inputs) as claim:
        merge = open_merge(target, packs, weights, method, settings, trust_remote_code)
        merge.check_configurations()
        claim.open_work()
        write_merged(merge, claim.result, progress)
    return Path(output_dir)


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
    """Merge packs and write the result as one pack of the same target.

    The merged checkpoint is on disk meanwhile and takes the target's size. The manifest's
    provenance names the method, its settings, and every pack with its weight. The licence joins
    those of the packs by AND; there is none if a pack has none.

    Args:
        target: the target of all packs. packs: one or more. weights: one per pack, default 1 each.
        file: the .skillpack file to write. force: replace it if it exists.
        method: a name of `graftkit.fuse.methods.METHODS`. settings: values of its fields.
        packing: further arguments of `pack_delta`, such as `budget="5%"`, `recipe="auto"` or
            `calibration="rows.jsonl"`.
    Returns: the pack.
    Raises: PackMismatchError for packs of another target or that cannot be merged; ConfigError for
        wrong weights, settings or arguments; CheckpointError, RowsError, BudgetError of packing;
        OutputError. Nothing is written in any of these cases.
    """
    inputs = named_inputs(target, packs)
    job = ["fuse", *inputs, weights, method, settings, packing]
    read = [*inputs, *packing_inputs(packing)]
    with claimed(file, job, inputs=read, force=force) as claim:
        merge = open_merge(target, packs, weights, method, settings)
        merge.check_configurations()
        name = f"{method}-of-{len(merge.packs)}-packs"
        licences = [pack.manifest.licence for pack in merge.packs]
        provenance = _provenance(merge, method)
        packing = with_prompt_format(
            packing, [pack.manifest.effective_prompt_format for pack in merge.packs]
        )
        return pack_merged(target, merge, claim, name, licences, provenance, progress, **packing)


def named_inputs(target: str | Path | Checkpoint, packs: Packs) -> list[str | Path]:
    """Paths of target and packs; a pack in memory is named by its digest."""
    several: Any = packs if isinstance(packs, (list, tuple)) else [packs]
    named = [pack.digest if isinstance(pack, SkillPack) else pack for pack in several]
    return [target.path if isinstance(target, Checkpoint) else target, *named]


def packing_inputs(packing: Mapping[str, Any]) -> list[str | Path]:
    """The files among the arguments of `pack_delta`."""
    named = [packing.get("calibration"), packing.get("prompts")]
    return [value for value in named if isinstance(value, str | Path) and value != SELF]


def open_merge(
    target: str | Path | Checkpoint,
    packs: Packs,
    weights: Sequence[float] | None,
    method: str,
    settings: Mapping[str, Any] | None,
    copy_code: bool = False,
) -> "PackMerge":
    """Open the target and packs of a merge, and check all arguments.

    Raises: PackMismatchError for packs of another target or that cannot be merged; ConfigError for
        wrong weights or settings.
    """
    rule = find_method(method, settings or {})
    several: Any = packs if isinstance(packs, (list, tuple)) else [packs]
    checked = check_weights(rule, weights, len(several))
    checkpoint = target if isinstance(target, Checkpoint) else Checkpoint.open(target)
    opened = load_packs(several)
    merge = PackMerge(checkpoint, opened, checked, rule, copy_code)
    for pack in opened:
        pack.check_target(checkpoint.read, set(checkpoint.tensors), str(checkpoint.path))
    return merge


def load_packs(packs: Sequence[str | Path | SkillPack]) -> list[SkillPack]:
    """The packs, those named by a file read from it. Raises: PackFormatError, CorruptPackError."""
    return [pack if isinstance(pack, SkillPack) else SkillPack.load(pack) for pack in packs]


class MergedCheckpoint(Protocol):
    """A checkpoint that is merged while it is written, tensor by tensor."""

    target: Checkpoint

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the result."""

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result."""

    def side_files(self) -> Mapping[str, bytes]:
        """Contents of all files other than weights, by name."""


class PackMerge:
    """Packs of one target, merged with weights by a method.

    Args:
        weights: one per pack. copy_code: whether the target's files of code are copied.
    Raises: PackMismatchError for packs whose deltas cannot be weighted or summed.
    """

    def __init__(
        self,
        target: Checkpoint,
        packs: list[SkillPack],
        weights: list[float],
        method: Method,
        copy_code: bool = False,
    ):
        self.target, self.packs, self.weights, self.method = target, packs, weights, method
        self.copy_code = copy_code
        # Sums are rounded in this order, whatever the order of the arguments.
        weighted = [
            (manifest_digest(pack), weight, pack)
            for pack, weight in zip(packs, weights, strict=True)
            if weight != 0 and method.scaling != 0
        ]
        self._parts = sorted(weighted, key=lambda part: part[:2])
        unchanged = len(packs) == 1 and method.keeps(weights[0])
        self._unchanged = packs[0] if unchanged else None
        if self._unchanged is None:
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
        """One tensor of the result, in the target's dtype, or in that of a single unchanged pack.

        Raises: ConfigError for values that the dtype does not hold.
        """
        if self._unchanged is not None:
            return self._unchanged.rebuild(name, self.target.read)
        before = self.target.read(name)
        if not self._parts or not self.changes(name):
            return before
        deltas = [pack.delta(name, before) for _, _, pack in self._parts]
        weights = self._scaled([weight for _, weight, _ in self._parts])
        keys = [f"{digest}/{name}" for digest, _, _ in self._parts]
        merged = self.method.merge(deltas, weights, keys)
        result = add_to_target(before, merged, self.method.scaling)
        if result is None:
            raise ConfigError(
                f"{name}: weights {self.weights} and lambda {self.method.scaling:g} give values "
                f"that {before.dtype} does not hold; use smaller ones"
            )
        return result

    def _scaled(self, weights: list[float]) -> list[float]:
        """Scale weights by a power of two if only proportions count: float32 loses tiny ones."""
        if not self.method.averages:
            return weights
        exponent = math.frexp(sum(weights))[1]
        return [math.ldexp(weight, -exponent) for weight in weights]

    def side_files(self) -> Mapping[str, bytes]:
        """The target's files, and the side files that all weighted packs change to one content."""
        packs = [pack for _, _, pack in self._parts]
        changed = packs[0].side_files(self.target) if packs else {}
        alike = {name: changed[name] for name in _changed_alike(packs)}
        names = [pack.manifest.tuned.name for pack in packs]
        return files_beside_weights(
            self.target.path, alike, merge_note(self.target, names), self.copy_code
        )

    def check_configurations(self) -> None:
        """Refuse a change of the computation that is weighted, or that only some packs make.

        If code is copied, refuse packs of other code too.

        Raises: PackMismatchError.
        """
        parts = [pack for _, _, pack in self._parts]
        if self._unchanged is None:
            alike = _changed_alike(parts) if len(parts) > 1 else set()
            for pack in parts:
                check_computation(pack, self.target, alike)
        for pack in self.packs if self.copy_code else ():
            check_code(pack, self.target)

    def check_addable(self) -> None:
        """Refuse packs whose deltas cannot be weighted or summed. Raises: PackMismatchError."""
        alike = _changed_alike(self.packs)
        for pack in self.packs:
            check_shapes(pack)
            check_token_ids(pack, {file.name for file in pack.manifest.files} - alike)


def add_to_target(before: Tensor, delta: Tensor, scaling: float) -> Tensor | None:
    """before + scaling · delta, summed in float32 and rounded to the dtype of `before`.

    Entries that are not finite in `before` stay. None where another entry leaves the dtype's range.
    """
    result = before.float().add_(delta, alpha=scaling).to(before.dtype)
    if result.isfinite().all():
        return result
    result = torch.where(before.isfinite(), result, before)
    return result if bool((result.isfinite() | ~before.isfinite()).all()) else None


def check_shapes(pack: SkillPack) -> None:
    """Refuse a pack that changes shapes or adds tensors. Raises: PackMismatchError."""
    for record in pack.manifest.tensors:
        if record.tuned_shape is not None or record.base is not None:
            raise PackMismatchError(
                f"{record.name}: the pack of {pack.manifest.tuned.name} changes its shape or adds "
                "it, which cannot be weighted or summed; merge it alone"
            )


def check_token_ids(pack: SkillPack, unlike: Iterable[str]) -> None:
    """Refuse packs of different tokenizers.

    Args:
        unlike: names of the files that not all packs change to one content.
    Raises: PackMismatchError.
    """
    for name in sorted(filter(is_tokenizer_file, unlike)):
        raise PackMismatchError(
            f"{name}: the pack of {pack.manifest.tuned.name} changes the tokenizer otherwise than "
            "another, or not at all, so their token ids differ; merge it alone"
        )


def check_computation(pack: SkillPack, target: Checkpoint, alike: Iterable[str]) -> None:
    """Refuse a pack whose config.json changes what the model computes.

    Args:
        alike: names of the files that all packs change to one content; these are accepted.
    Raises: PackMismatchError.
    """
    if "config.json" in alike:
        return
    keys = config_changes(pack, target)
    if keys:
        raise PackMismatchError(
            f"config.json of {pack.manifest.tuned.name} has another {', '.join(keys)}, which "
            "changes what the model computes and cannot be weighted or added; merge this pack alone"
        )


def config_changes(pack: SkillPack, target: Checkpoint) -> list[str]:
    """Keys of the pack's config.json that change, or may change, what the model computes.

    Raises: CorruptPackError.
    """
    if all(file.name != "config.json" for file in pack.manifest.files):
        return []
    try:
        model = empty_model(target)
    except CheckpointError:  # an architecture that this transformers cannot build
        content = pack.side_file("config.json", lambda: target.side_file("config.json"))
        return differing_settings(target.config, parse_settings("config.json", content))
    return effective_config_keys(model, pack, target.side_file)


def check_code(pack: SkillPack, target: Checkpoint) -> None:
    """Refuse a pack whose tuned model has other code than the target. Raises: PackMismatchError."""
    own = {part.name for part in pack.manifest.omitted} & set(code_names(target.path))
    if own:
        raise PackMismatchError(
            f"{min(own)}: the code of {pack.manifest.tuned.name} differs from the target's, and a "
            "pack holds no code; merge without --trust-remote-code, and copy its code by hand"
        )


def merge_note(target: Checkpoint, names: Sequence[str]) -> str:
    """First paragraph of a merged model's card."""
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
    """Digest of the manifest, which holds the digests of everything else in the pack."""
    return blake3(pack.manifest.to_json().encode()).hexdigest()


def write_merged(merged: MergedCheckpoint, folder: Path, progress: Progress | None) -> None:
    """Write a new folder: tensors in shards, then the index and the side files.

    Raises: OutputError.
    """
    names, report = merged.names, progress or silent
    gate = MemoryGate(max(info.numel for info in merged.target.tensors.values()))

    def merge(name: str) -> Tensor:
        info = merged.target.tensors.get(name)
        with gate.hold(info.numel if info else 0):
            return merged.tensor(name)

    def tensor_done(done: int) -> None:
        report("merging", done, len(names))

    results = in_threads(merge, names)
    files = merged.side_files()
    with writing(folder):
        write_checkpoint(folder, names, lambda name: next(results), files, tensor_done)


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
        name: of the tuned model in the manifest. licences: of all packs.
        packing: further arguments of `pack_delta`.
    Raises: CheckpointError, RowsError, ConfigError, BudgetError, OutputError.
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


def with_prompt_format(
    packing: Mapping[str, Any], formats: Sequence[PromptFormat | None]
) -> dict[str, Any]:
    """Arguments of `pack_delta` with the prompt format that all packs have, if it is one.

    Calibration rows of a file say it themselves.
    """
    if packing.get("calibration") not in (None, SELF) or len(set(formats)) != 1:
        return dict(packing)
    return {"prompt_format": formats[0], **packing}


def _provenance(merge: PackMerge, method: str) -> dict[str, str]:
    """The method with its settings, and every pack with its weight."""
    settings = sorted(merge.method.model_dump().items())
    entries = {"method": " ".join([method, *(f"{name}={value:g}" for name, value in settings)])}
    for index, (pack, weight) in enumerate(zip(merge.packs, merge.weights, strict=True), start=1):
        tuned, digest = pack.manifest.tuned.name, manifest_digest(pack)[:16]
        entries[f"pack {index}"] = f"{weight:g} x {tuned} ({digest})"
    return entries


def joined_licences(licences: Sequence[str | None]) -> str | None:
    """All licences, joined by AND (SPDX); None if a pack has none."""
    names = sorted({licence or "" for licence in licences})
    if not all(names):
        return None
    return " AND ".join(f"({n})" if " " in n and len(names) > 1 else n for n in names)
