"""Audit: what a pack changes, which other packs are similar, and proof that removal is complete.

The proof compares two copies of a library. One has all packs, answers with the pack in question,
and then removes it. The other, whose target is loaded anew, never had the pack. Files, routes,
router scores, logits and generated tokens of the two must be equal, bit for bit.
"""

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftkit.checkpoint import DTYPES, Checkpoint
from graftkit.errors import ConfigError
from graftkit.fuse.interference import Interference, compare_deltas
from graftkit.fuse.merge import manifest_digest
from graftkit.library.answers import unanswerable
from graftkit.library.folder import PACKS, PackEntry, PackFolder
from graftkit.library.live import RouterName
from graftkit.progress import Progress, silent
from graftkit.route import Route
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import TensorRecord

if TYPE_CHECKING:
    from graftkit.library.library import Library


MOST_ENERGY = 0.9
"""Share of a delta's energy that stands for most of it."""

NEW_TOKENS = 16
"""Tokens generated for each prompt of a proof."""

_LAYER = re.compile(r"\.(\d+)\.")
_VOCABULARY = ("embedding", "head")


@dataclass
class DeltaSize:
    """How large a delta is over the tensors of one kind or one layer."""

    tensors: int = 0
    """Tensors that the pack changes."""
    parameters: int = 0
    """Weights in them."""
    moved: int = 0
    """Of these, weights whose value changes."""
    energy: float = 0.0
    """Σ δ²."""
    target_energy: float = 0.0
    """Σ w² of the target's weights in them."""

    def add(self, delta: Tensor, before: Tensor) -> None:
        """Add one tensor."""
        self.tensors += 1
        self.parameters += delta.numel()
        self.moved += int(delta.count_nonzero())
        self.energy += float(delta.double().square().sum())
        self.target_energy += float(before.double().square().sum())

    @property
    def relative_norm(self) -> float | None:
        """‖δ‖ / ‖w‖; None where the target's weights are all zero."""
        return (self.energy / self.target_energy) ** 0.5 if self.target_energy else None

    def numbers(self, energy: float) -> dict[str, Any]:
        """For JSON; `energy` is that of the whole pack."""
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "moved": self.moved,
            "energy_share": self.energy / energy if energy else 0.0,
            "relative_norm": self.relative_norm,
        }


@dataclass
class Overlap:
    """How similar another pack's delta is."""

    kinds: dict[str, Interference] = field(default_factory=dict)
    """By module kind."""
    contains: bool = False
    """Whether it was fused from the audited pack, as its provenance says."""

    @property
    def total(self) -> Interference:
        """Over all tensors of the target."""
        return sum(self.kinds.values(), Interference())

    def numbers(self) -> dict[str, Any]:
        """By name."""
        return {
            "cosine": self.total.cosine,
            "top_overlap": self.total.top_overlap,
            "kinds": {kind: sums.cosine for kind, sums in sorted(self.kinds.items())},
            "contains": self.contains,
        }


@dataclass
class Audit:
    """What a pack changes, and how similar the other packs are."""

    kinds: dict[str, DeltaSize] = field(default_factory=dict)
    """By module kind."""
    layers: dict[str, DeltaSize] = field(default_factory=dict)
    """By the layer number in the tensor's name, "" for tensors outside of layers."""
    vocabulary: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of embedding and head: all `rows`, those that are `moved`, and the fewest that together hold
    MOST_ENERGY of the energy (`most`)."""
    files: list[str] = field(default_factory=list)
    """Side files of the target that the tuned model changed; a library does not use them."""
    omitted: list[str] = field(default_factory=list)
    """Changes of the tuned model that the pack leaves out."""
    overlaps: dict[str, Overlap] = field(default_factory=dict)
    """Similarity of the other packs, by label."""

    @property
    def energy(self) -> float:
        """‖δ‖² over all tensors."""
        return sum(change.energy for change in self.kinds.values())

    def numbers(self) -> dict[str, Any]:
        """Everything by name, for `--json` and tables."""
        kinds = sorted(self.kinds.items())
        layers = sorted(self.layers.items(), key=lambda item: int(item[0] or -1))
        return {
            "kinds": {kind: change.numbers(self.energy) for kind, change in kinds},
            "layers": {layer: change.numbers(self.energy) for layer, change in layers},
            "vocabulary": self.vocabulary,
            "files": self.files,
            "omitted": self.omitted,
            "leans": {label: overlap.numbers() for label, overlap in self.overlaps.items()},
        }


def audit_pack(
    target: Checkpoint,
    pack: SkillPack,
    others: Mapping[str, SkillPack],
    progress: Progress | None = None,
) -> Audit:
    """Decode a pack and all others once, tensor by tensor, and compare them.

    Args:
        others: by label; they and the pack must be of this target.
    Raises: CheckpointError, CorruptPackError.
    """
    report = progress or silent
    audit = Audit(
        files=[record.name for record in pack.manifest.files],
        omitted=[part.name for part in pack.manifest.omitted],
        overlaps={
            label: Overlap(contains=_contains(other, pack)) for label, other in others.items()
        },
    )
    records = pack.manifest.tensors
    for done, record in enumerate(records):
        report("comparing", done, len(records))
        before = _target_tensor(target, record)
        delta = pack.delta(record.name, before)
        if record.codec != "zero":
            _add_delta(audit, record.name, record.kind, delta, before)
        if record.base is not None:
            continue  # added; the others have nothing there
        for label, overlap in audit.overlaps.items():
            other = others[label]
            if record.codec != "zero" or other.record(record.name).codec != "zero":
                sums = compare_deltas(delta, other.delta(record.name, before))
                overlap.kinds[record.kind] = overlap.kinds.get(record.kind, Interference()) + sums
    return audit


def _target_tensor(target: Checkpoint, record: TensorRecord) -> Tensor:
    """The target's tensor that a record is coded against; zeros where it is against nothing."""
    if record.target_name is None:
        return torch.zeros(record.shape, dtype=DTYPES[record.dtype])
    return target.read(record.target_name)


def _add_delta(audit: Audit, name: str, kind: str, delta: Tensor, before: Tensor) -> None:
    layer = _LAYER.search(name)
    audit.kinds.setdefault(kind, DeltaSize()).add(delta, before)
    audit.layers.setdefault(layer[1] if layer else "", DeltaSize()).add(delta, before)
    if kind in _VOCABULARY and delta.dim() == 2:
        audit.vocabulary[name] = _count_rows(delta)


def _count_rows(delta: Tensor) -> dict[str, int]:
    """Rows of a delta (rows, columns), those that are not zero, and those of most energy."""
    energy = delta.double().square().sum(dim=1)
    cumulative = energy.sort(descending=True).values.cumsum(dim=0)
    fewer = int((cumulative < MOST_ENERGY * energy.sum()).sum())
    moved = int(energy.count_nonzero())
    return {"rows": len(energy), "moved": moved, "most": min(fewer + 1, moved)}


def _contains(other: SkillPack, pack: SkillPack) -> bool:
    """Whether the other pack was fused from this one, by its provenance."""
    return any(manifest_digest(pack)[:16] in text for text in other.manifest.provenance.values())


@dataclass(frozen=True)
class Proof:
    """What was compared after a removal, and whether it was equal."""

    prompts: int
    """Prompts compared."""
    changed_by_pack: int
    """Prompts whose logits the pack changes before it is removed."""
    files: bool
    """The packs' files are the same, byte for byte."""
    routes: bool
    """All weights and scores of the router are the same."""
    logits: bool
    """The logits of every token of every prompt are the same, bit for bit."""
    tokens: bool
    """The generated tokens are the same."""

    @property
    def holds(self) -> bool:
        """Whether everything is equal."""
        return self.files and self.routes and self.logits and self.tokens

    def numbers(self) -> dict[str, int | bool]:
        """Everything by name."""
        return asdict(self) | {"holds": self.holds}


def prove_removal(
    folder: PackFolder,
    gone: Sequence[PackEntry],
    prompts: Sequence[str],
    router: RouterName,
    open_library: Callable[[PackFolder], "Library"],
) -> Proof:
    """Remove packs from a copy of a library and compare it with one that never had them.

    Each of the two loads the target, one after the other. Files are hard-linked where possible.

    Args:
        gone: the packs to remove. open_library: makes the library of a folder.
    Raises: ConfigError where no prompt can be answered; LibraryError, OutputError.
    """
    with TemporaryDirectory(prefix="graftkit-") as place:
        had = open_library(folder.copy_to(Path(place) / "had", set()))
        answered = _answerable(had, prompts)
        with_pack = [_logits(had, prompt, {gone[-1]: 1.0}) for prompt in answered]
        for entry in gone:
            had.remove(entry.label)
        after = _outcome(had, answered, router)
        bare = [_logits(had, prompt, {}) for prompt in answered]
        del had
        gc.collect()  # a model and its attachment refer to each other
        never = open_library(
            folder.copy_to(Path(place) / "never", {entry.digest for entry in gone})
        )
        fresh = _outcome(never, answered, router)
    changed = sum(not torch.equal(*pair) for pair in zip(with_pack, bare, strict=True))
    return Proof(
        prompts=len(answered),
        changed_by_pack=changed,
        files=after.files == fresh.files,
        routes=after.routes == fresh.routes,
        logits=all(map(torch.equal, after.logits, fresh.logits)),
        tokens=after.texts == fresh.texts,
    )


@dataclass(frozen=True)
class _Outcome:
    files: dict[str, bytes]
    routes: list[Route]
    logits: list[Tensor]
    texts: list[str]


def _outcome(library: "Library", prompts: Sequence[str], router: RouterName) -> _Outcome:
    routes = library.route(prompts, router=router)
    return _Outcome(
        files={file.name: file.read_bytes() for file in (library.path / PACKS).iterdir()},
        routes=routes,
        logits=[
            _logits(library, prompt, library.mixture(route))
            for prompt, route in zip(prompts, routes, strict=True)
        ],
        texts=[
            answer.text
            for answer in library.generate(prompts, router=router, max_new_tokens=NEW_TOKENS)
        ],
    )


@torch.no_grad()
def _logits(library: "Library", prompt: str, mixture: Mapping[PackEntry, float]) -> Tensor:
    """(tokens, vocabulary), of the prompt alone."""
    live = library.live
    live.use(mixture)
    (ids,) = live.encode([prompt])
    logits: Tensor = live.model(input_ids=torch.tensor([ids]).to(live.model.device)).logits[0]
    return logits


def _answerable(library: "Library", prompts: Sequence[str]) -> list[str]:
    """The prompts that can be continued. Raises: ConfigError where there are none."""
    tokens = library.live.encode(prompts)
    answerable = [
        prompt
        for prompt, ids in zip(prompts, tokens, strict=True)
        if unanswerable(library.live, ids) is None
    ]
    if not answerable:
        raise ConfigError("no prompts to answer; a proof compares what a library says to some")
    return answerable
