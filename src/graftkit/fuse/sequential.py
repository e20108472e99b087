"""Packs merged in turn, by a rule with a memory: a checkpoint or a pack comes out.

With a state file the memory outlives the call: adding packs one by one gives the same bytes as
adding them in one call. The state and the result appear together or not at all.

The file in which a running merge waits for the next pack: its memory between two calls.

A safetensors file: the running tensors in float32 under the names of the target's, and in
`__metadata__` one entry, `graftkit-running-merge`: the digest of header and tensors, a blank, and
the header as JSON. One, because safetensors writes several in any order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftkit.checkpoint import Checkpoint, save_tensors, tensor_bytes
from graftkit.compress.codecs import TensorLayout
from graftkit.errors import CheckpointError, ConfigError, PackMismatchError
from graftkit.files import writing
from graftkit.fuse.continual import Kif, Opcm, RunningMerge, TaskDelta
from graftkit.fuse.merge import (
    check_computation,
    check_shapes,
    check_token_ids,
    manifest_digest,
    merge_note,
    named_inputs,
    pack_merged,
    packing_inputs,
    write_merged,
)
from graftkit.fuse.search import measure_importances
from graftkit.outputs import Claim, claimed
from graftkit.progress import Progress
from graftkit.rows import Row
from graftkit.side_files import files_beside_weights
from graftkit.skillpack import SkillPack

RULES: dict[str, type[RunningMerge]] = {rule.method: rule for rule in (Opcm, Kif)}
"""The rules with a memory by their names, those of `methods.IN_TURN`."""

TaskRows = Sequence[Sequence[Row]]
_PLAIN_KINDS = ("embedding", "norm", "bias", "other")  # no linear maps: nothing to project


def merge_in_turn(
    target: str | Path,
    packs: Sequence[str | Path | SkillPack],
    output_dir: str | Path,
    method: str,
    state: str | Path | None = None,
    rows: TaskRows | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write target + what the packs in this order, after those of the state, leave behind.

    In memory is one delta of the whole target in float32; with rows also the model and a gradient.

    Args:
        target: the target of all packs. packs: one or more, in the order in which they are learned.
        output_dir: a new or empty folder.
        method: opcm or kif. state: a file that is read if it is there, and then written; None
            begins anew and remembers nothing.
        rows: kif only: rows of each pack's task, to measure what matters for it.
        trust_remote_code: files of code come along, too.
    Returns: output_dir.
    Raises: PackMismatchError for a pack or state of another target, packs that change shapes or
        differ in the tokenizer; ConfigError for an unknown method, a pack that was taken already or
        rows that do not belong; CheckpointError for a damaged state; RowsError; OutputError.
        Nothing is written in any of these cases.
    """
    code = {"trust_remote_code": trust_remote_code}
    call = _Call(target, packs, method, state, rows, code)
    with call.claimed(output_dir, folder=True) as (claim, kept):
        if claim is not None:
            turns = call.turns(kept, progress)
            turns.code = trust_remote_code
            claim.open_work()
            write_merged(turns, claim.result, progress)
            _keep(turns, kept, claim)
    return Path(output_dir)


def fuse_in_turn(
    target: str | Path,
    packs: Sequence[str | Path | SkillPack],
    file: str | Path,
    method: str,
    state: str | Path | None = None,
    rows: TaskRows | None = None,
    progress: Progress | None = None,
    force: bool = False,
    **packing: Any,
) -> SkillPack:
    """As `merge_in_turn`, and pack what comes out.

    Args:
        file: the .skillpack file to write. force: it may be there, and is replaced.
        packing: further arguments of `pack_delta`.
    Raises: as `merge_in_turn` and `pack_delta`.
    """
    call = _Call(target, packs, method, state, rows, packing)
    with call.claimed(file, force=force) as (claim, kept):
        if claim is None:
            return SkillPack.load(file)
        turns = call.turns(kept, progress)
        name = f"{method}-of-{len(turns.taken)}-packs"
        licences, told = [taken.licence for taken in turns.taken], turns.provenance()
        pack = pack_merged(target, turns, claim, name, licences, told, progress, **packing)
        _keep(turns, kept, claim)
        return pack


class SequentialMerge:
    """A target and what the packs so far, in their order, add to it: a merged checkpoint.

    Attributes:
        taken: the packs so far.
        code: whether the target's code is written, too.
    """

    def __init__(self, target: Checkpoint, rule: RunningMerge):
        self.target, self.rule = target, rule
        self.taken: list[MergedPack] = []
        self.code = False
        self._fingerprint = ""
        self._files: dict[str, str] = {}  # digests of side files that all packs changed alike
        self._contents: dict[str, bytes] = {}

    @classmethod
    def load(cls, file: Path, target: Checkpoint, method: str) -> "SequentialMerge":
        """Go on where a state file left off. Raises: as `merge_in_turn`."""
        header, total = read_state(file, target)
        if header.method != method:
            raise ConfigError(
                f"{file}: begun with {header.method}, which does not go on as {method}; use "
                f"--method {header.method} or another file"
            )
        turns = cls(target, RULES[method](total, dict(header.statistics)))
        if not turns.rule.is_sound():
            raise CheckpointError(
                f"{file}: its statistics are not those of {method}; begin again without it"
            )
        turns.taken, turns._files = list(header.packs), dict(header.files)
        turns._fingerprint = header.target
        return turns

    def save(self, file: Path) -> None:
        """Write a state file. Raises: OSError."""
        header = StateHeader(
            method=self.rule.method,  # type: ignore[arg-type]
            target=self._fingerprint,
            packs=tuple(self.taken),
            files=self._files,
            statistics=self.rule.statistics,
        )
        write_state(file, header, self.rule.total)

    def add(self, pack: SkillPack, rows: Sequence[Row] | None) -> None:
        """Take one more pack. Raises: as `merge_in_turn`; the turns are then of no more use."""
        self._check(pack)
        importances = None if rows is None else measure_importances(self.target, pack, rows)
        self.rule.add(TaskDelta(_Deltas(pack, self.target), _layouts(pack), importances))
        manifest = pack.manifest
        self.taken.append(
            MergedPack(
                name=manifest.tuned.name, digest=manifest_digest(pack), licence=manifest.licence
            )
        )
        contents = pack.side_files(self.target)
        self._contents = {name: contents[name] for name in self._files}

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the target."""
        return sorted(self.target.tensors)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result, in the target's dtype."""
        before = self.target.read(name)
        if name not in self.rule.total:
            return before
        result = before.float().add_(self.rule.delta(name)).to(before.dtype)
        if not result.isfinite().all():  # what the target has so is unchanged
            result = torch.where(before.isfinite(), result, before)
        if not (result.isfinite() | ~before.isfinite()).all():
            raise ConfigError(f"{name}: the merged values are beyond what {before.dtype} holds")
        return result

    def side_files(self) -> Mapping[str, bytes]:
        """The target's files, and the side files that all packs change alike."""
        note = merge_note(self.target, [taken.name for taken in self.taken])
        return files_beside_weights(self.target.path, self._contents, note, self.code)

    def provenance(self) -> dict[str, str]:
        """The method and every pack in its turn, for a manifest."""
        told = {"method": self.rule.method}
        for index, taken in enumerate(self.taken, start=1):
            told[f"pack {index}"] = f"{taken.name} ({taken.digest[:16]})"
        return told

    def _check(self, pack: SkillPack) -> None:
        """Refuse a pack that cannot be next; else its target and side files become ours."""
        name, fingerprint = pack.manifest.tuned.name, pack.manifest.target.fingerprint
        if self.taken and fingerprint != self._fingerprint:
            raise PackMismatchError(
                f"the pack of {name} was made for another target than the packs before it; "
                "use one state for each target"
            )
        if manifest_digest(pack) in {taken.digest for taken in self.taken}:
            raise ConfigError(f"the pack of {name} was taken already; leave it out")
        pack.check_target(self.target.read, set(self.target.tensors), str(self.target.path))
        check_shapes(pack)
        changed = {file.name: file.blake3 for file in pack.manifest.files}
        before = self._files if self.taken else changed
        alike = dict(before.items() & changed.items())
        check_token_ids(pack, (before.keys() | changed.keys()) - alike.keys())
        # Deltas are projected and added here, also that of a single pack.
        check_computation(pack, self.target, ())
        self._fingerprint, self._files = fingerprint, alike


class _Deltas(Mapping[str, Tensor]):
    """The deltas that a pack holds, decoded when they are asked for."""

    def __init__(self, pack: SkillPack, target: Checkpoint):
        self._pack, self._target = pack, target
        self._names = [record.name for record in pack.manifest.tensors if record.codec != "zero"]

    def __getitem__(self, name: str) -> Tensor:
        return self._pack.delta(name, self._target.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _layouts(pack: SkillPack) -> dict[str, TensorLayout]:
    """Of the weights of linear maps, heads of their own included."""
    return {
        record.name: record.layout
        for record in pack.manifest.tensors
        if record.kind not in _PLAIN_KINDS and len(record.shape) > 1
    }


@dataclass(frozen=True)
class _Call:
    """The arguments of one call, checked.

    Raises: ConfigError.
    """

    target: str | Path
    packs: Sequence[str | Path | SkillPack]
    method: str
    state: str | Path | None
    rows: TaskRows | None
    packing: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in RULES:
            raise ConfigError(
                f"method {self.method!r} has no memory; choose one of {', '.join(RULES)}"
            )
        if self.rows is not None and (self.method != "kif" or len(self.rows) != len(self.packs)):
            raise ConfigError(
                f"{len(self.rows)} sets of rows for {len(self.packs)} packs and {self.method}; "
                "rows go with kif, one set for each pack"
            )
        if not self.packs:
            raise ConfigError("no packs to merge; name at least one")

    @contextmanager
    def claimed(
        self, output: str | Path, folder: bool = False, force: bool = False
    ) -> Iterator[tuple[Claim | None, Claim | None]]:
        """The right to write output and state, which are put in place together.

        The output's is None where a run of this very call was killed when both were there.
        """
        inputs = named_inputs(self.target, list(self.packs))
        rows = [[[row.prompt, row.completion] for row in rows] for rows in self.rows or ()]
        job = [self.method, *inputs, self.state, rows, Path(output).resolve(), self.packing]
        read = [*inputs, *packing_inputs(self.packing)]
        if self.state is None:
            with claimed(output, job, folder=folder, inputs=read, force=force) as claim:
                yield claim, None
            return
        # The state's lock is the last to go: it tells what the two belong to.
        with claimed(self.state, job, inputs=[*read, output], force=True) as kept:
            if kept.done:
                yield None, kept
                return
            read.append(self.state)
            with claimed(output, job, folder=folder, inputs=read, force=force) as claim:
                yield claim, kept

    def turns(self, kept: Claim | None, progress: Progress | None) -> "SequentialMerge":
        """All packs taken, after those of the state. Raises: as `merge_in_turn`."""
        opened = [p if isinstance(p, SkillPack) else SkillPack.load(p) for p in self.packs]
        checkpoint = Checkpoint.open(self.target)
        if kept is not None and kept.path.exists():
            turns = SequentialMerge.load(kept.path, checkpoint, self.method)
        else:
            turns = SequentialMerge(checkpoint, RULES[self.method]())
        for index, pack in enumerate(opened):
            if progress is not None:
                progress("adding packs", index, len(opened))
            turns.add(pack, None if self.rows is None else self.rows[index])
        return turns


def _keep(turns: "SequentialMerge", kept: Claim | None, claim: Claim) -> None:
    """Write the state, if one is kept, and put it in place together with the result.

    Raises: OutputError.
    """
    if kept is not None:
        kept.open_work()
        with writing(kept.path):
            turns.save(kept.result)
        kept.commit(claim)


FORMAT = "graftkit-running-merge"
VERSION = 1

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class StateModel(BaseModel):
    """Common rules: frozen, no unknown keys, no guessed types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class MergedPack(StateModel):
    """One pack that was merged: the name of its tuned model, its digest and its licence."""

    name: str
    digest: Digest
    licence: str | None


class StateHeader(StateModel):
    """Everything but the tensors; `files` are the side files that every pack changed alike."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    method: Literal["opcm", "kif"]
    target: Digest
    packs: Annotated[tuple[MergedPack, ...], Field(min_length=1, strict=False)]
    files: dict[str, Digest]
    statistics: dict[str, Annotated[float, Field(allow_inf_nan=False, strict=False)]]


def write_state(file: Path, header: StateHeader, tensors: dict[str, Tensor]) -> None:
    """Write a file. Raises: OSError."""
    text = header.model_dump_json()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, file, {FORMAT: f"{_digest(text, contiguous)} {text}"})


def read_state(file: Path, target: Checkpoint) -> tuple[StateHeader, dict[str, Tensor]]:
    """Open a file and check all of it: digest, and that its tensors are those of the target.

    Raises: CheckpointError for anything that `write_state` did not write for this target.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            entry = (handle.metadata() or {}).get(FORMAT)
            if entry is None:
                raise CheckpointError(
                    f"{file}: not the state of a running merge; name a file that --state wrote, or "
                    "a new one"
                )
            names = sorted(handle.keys())
            for name in names:
                _check_place(file, name, handle.get_slice(name), target)
            # A copy of its own: a mapped tensor may start anywhere, and its alignment can decide
            # the last bit of a product.
            tensors = {name: handle.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a safetensors file ({error}); begin again without it"
        ) from error
    digest, _, text = entry.partition(" ")
    if digest != _digest(text, tensors):
        raise CheckpointError(
            f"{file}: the file is damaged, it does not match its digest; begin again without it"
        )
    try:
        return StateHeader.model_validate_json(text), tensors
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{file}: {where} of its header is not as expected ({first['msg']}); use the version "
            "of graftkit that wrote it"
        ) from error


def _check_place(file: Path, name: str, found: object, target: Checkpoint) -> None:
    info = target.tensors.get(name)
    shape, dtype = tuple(found.get_shape()), found.get_dtype()  # type: ignore[attr-defined]
    if info is None or shape != info.shape or dtype != "F32":
        expected = "no such tensor" if info is None else f"F32 {list(info.shape)}"
        raise CheckpointError(
            f"{file}: it holds {name} as {dtype} {list(shape)}, the target asks for {expected}; "
            "use the target that the state was begun with"
        )


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    hasher = blake3(text.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensor_bytes(tensors[name]))
    return hasher.hexdigest()
