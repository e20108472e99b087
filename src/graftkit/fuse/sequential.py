"""Packs merged one after another, by the rules of `fuse.continual`: a checkpoint or a pack.

A state file holds the running merge between two calls: adding packs one by one gives the same bytes
as adding them in one call. The state and the result are put in place together or not at all.

The state is a safetensors file. Its tensors are the running merge in float32, by the names of the
target's tensors. Its `__metadata__` has one entry, `graftkit-running-merge`: the digest of header
and tensors, a blank, and the header as JSON. There is only one entry because safetensors writes
several in any order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftkit.checkpoint import Checkpoint, save_tensors, tensor_bytes
from graftkit.compress.codecs import TensorLayout
from graftkit.config import Settings
from graftkit.errors import CheckpointError, ConfigError, PackMismatchError
from graftkit.files import writing
from graftkit.fuse.continual import Kif, Opcm, RunningMerge, TaskDelta
from graftkit.fuse.merge import (
    add_to_target,
    check_computation,
    check_shapes,
    check_token_ids,
    load_packs,
    manifest_digest,
    merge_note,
    named_inputs,
    pack_merged,
    packing_inputs,
    with_prompt_format,
    write_merged,
)
from graftkit.fuse.search import measure_importances
from graftkit.model_files import files_beside_weights
from graftkit.outputs import Claim, claimed
from graftkit.progress import Progress
from graftkit.rows import Row
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import Digest, PromptFormat

RULES: dict[str, type[RunningMerge]] = {rule.method: rule for rule in (Opcm, Kif)}
"""Rules by name; the names are those of `methods.IN_TURN`."""

TaskRows = Sequence[Sequence[Row]]
_PLAIN_KINDS = ("embedding", "norm", "bias", "other")  # no linear layers: nothing is projected


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
    """Merge packs one after another, and write the target with them as a checkpoint.

    In memory is one delta of the whole target in float32; with rows also the model and a gradient.

    Args:
        target: the target of all packs. packs: one or more, in the order of their tasks.
        output_dir: a new or empty folder.
        method: opcm or kif.
        state: file of the running merge. If it exists, the merge continues from it; the new state
            is written to it. None starts anew and writes no state.
        rows: kif only: rows of each pack's task, on which importances are measured.
        trust_remote_code: copy files of code too.
    Returns: output_dir.
    Raises: PackMismatchError for a pack or state of another target, packs that change shapes or
        differ in the tokenizer; ConfigError for an unknown method, a pack that is merged already,
        or rows without kif; CheckpointError for a damaged state; RowsError; OutputError. Nothing is
        written in any of these cases.
    """
    code = {"trust_remote_code": trust_remote_code}
    call = _SequentialCall(target, packs, method, state, rows, code)
    with call.claimed(output_dir, folder=True) as (claim, state_claim):
        if claim is not None:
            merge = call.merge(state_claim, progress, copy_code=trust_remote_code)
            claim.open_work()
            write_merged(merge, claim.result, progress)
            _commit_state(merge, state_claim, claim)
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
    """Merge packs one after another, and write the result as one pack of the same target.

    Args:
        target: the target of all packs. packs: one or more, in the order of their tasks.
        file: the .skillpack file to write. force: replace it if it exists.
        method, state, rows: those of `merge_in_turn`.
        packing: further arguments of `pack_delta`.
    Raises: PackMismatchError for a pack or state of another target, packs that change shapes or
        differ in the tokenizer; ConfigError, CheckpointError, RowsError, BudgetError; OutputError.
        Nothing is written in any of these cases.
    """
    call = _SequentialCall(target, packs, method, state, rows, packing)
    with call.claimed(file, force=force) as (claim, state_claim):
        if claim is None:
            return SkillPack.load(file)
        merge = call.merge(state_claim, progress)
        name = f"{method}-of-{len(merge.merged)}-packs"
        licences, provenance = [pack.licence for pack in merge.merged], merge.provenance()
        packing = with_prompt_format(packing, [pack.prompt_format for pack in merge.merged])
        pack = pack_merged(target, merge, claim, name, licences, provenance, progress, **packing)
        _commit_state(merge, state_claim, claim)
        return pack


@dataclass(frozen=True)
class _SequentialCall:
    """The arguments of one call of `merge_in_turn` or `fuse_in_turn`, checked.

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
        """Claims of the output and of the state; both files are put in place together.

        The claim of the output is None if a killed run of the same call has put both in place. The
        claim of the state is None without a state.
        """
        inputs = named_inputs(self.target, list(self.packs))
        rows = [[row.content for row in rows] for rows in self.rows or ()]
        job = [self.method, *inputs, self.state, rows, Path(output).resolve(), self.packing]
        read = [*inputs, *packing_inputs(self.packing)]
        if self.state is None:
            with claimed(output, job, folder=folder, inputs=read, force=force) as claim:
                yield claim, None
            return
        # The state's lock is released last: its note says which job both files belong to.
        with claimed(self.state, job, inputs=[*read, output], force=True) as state_claim:
            if state_claim.done:
                yield None, state_claim
                return
            read.append(self.state)
            with claimed(output, job, folder=folder, inputs=read, force=force) as claim:
                yield claim, state_claim

    def merge(
        self, state: Claim | None, progress: Progress | None, copy_code: bool = False
    ) -> "SequentialMerge":
        """The merge of all packs, after those of the state.

        Raises: PackMismatchError, ConfigError, CheckpointError, RowsError.
        """
        packs, target = load_packs(self.packs), Checkpoint.open(self.target)
        if state is not None and state.path.exists():
            merge = SequentialMerge.load(state.path, target, self.method, copy_code)
        else:
            merge = SequentialMerge(target, RULES[self.method](), copy_code)
        for index, pack in enumerate(packs):
            if progress is not None:
                progress("adding packs", index, len(packs))
            merge.add(pack, None if self.rows is None else self.rows[index])
        return merge


def _commit_state(merge: "SequentialMerge", state: Claim | None, output: Claim) -> None:
    """Write the state, if there is one, and put it in place together with the output.

    Raises: OutputError.
    """
    if state is not None:
        state.open_work()
        with writing(state.path):
            merge.save(state.result)
        state.commit(output)


class SequentialMerge:
    """A target and the packs merged so far, in their order: a merged checkpoint.

    Attributes:
        merged: the packs so far.
        copy_code: whether the target's files of code are copied.
    """

    def __init__(
        self,
        target: Checkpoint,
        rule: RunningMerge,
        copy_code: bool = False,
        header: "StateHeader | None" = None,
    ):
        """header: of the state that the merge continues from."""
        self.target, self.rule, self.copy_code = target, rule, copy_code
        self.merged: list[PackInState] = [] if header is None else list(header.packs)
        self._fingerprint = "" if header is None else header.target
        # Digests of the side files that all packs change to one content, and these contents.
        self._files: dict[str, str] = {} if header is None else dict(header.files)
        self._contents: dict[str, bytes] = {}

    @classmethod
    def load(
        cls, file: Path, target: Checkpoint, method: str, copy_code: bool = False
    ) -> "SequentialMerge":
        """Continue from a state file.

        Raises: CheckpointError for a damaged file; ConfigError for a file of another method.
        """
        header, total = read_state(file, target)
        if header.method != method:
            raise ConfigError(
                f"{file}: begun with {header.method}, which does not go on as {method}; use "
                f"--method {header.method} or another file"
            )
        rule = RULES[method](total, dict(header.statistics))
        if not rule.is_sound():
            raise CheckpointError(
                f"{file}: its statistics are not those of {method}; begin again without it"
            )
        return cls(target, rule, copy_code, header)

    def save(self, file: Path) -> None:
        """Write a state file. Raises: OSError."""
        header = StateHeader(
            method=self.rule.method,  # type: ignore[arg-type]
            target=self._fingerprint,
            packs=tuple(self.merged),
            files=self._files,
            statistics=self.rule.statistics,
        )
        write_state(file, header, self.rule.total)

    def add(self, pack: SkillPack, rows: Sequence[Row] | None) -> None:
        """Merge one more pack. After an error the merge is unusable.

        Raises: PackMismatchError, ConfigError, CheckpointError, RowsError.
        """
        self._check(pack)
        importances = None if rows is None else measure_importances(self.target, pack, rows)
        self.rule.add(TaskDelta(_Deltas(pack, self.target), _layouts(pack), importances))
        manifest = pack.manifest
        self.merged.append(
            PackInState(
                name=manifest.tuned.name,
                digest=manifest_digest(pack),
                licence=manifest.licence,
                prompt_format=manifest.effective_prompt_format,
            )
        )
        contents = pack.side_files(self.target)
        self._contents = {name: contents[name] for name in self._files}

    @property
    def names(self) -> list[str]:
        """Names of all tensors of the target."""
        return sorted(self.target.tensors)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the result, in the target's dtype.

        Raises: ConfigError for values that the dtype does not hold.
        """
        before = self.target.read(name)
        if name not in self.rule.total:
            return before
        result = add_to_target(before, self.rule.delta(name), 1.0)
        if result is None:
            raise ConfigError(f"{name}: the merged values are beyond what {before.dtype} holds")
        return result

    def side_files(self) -> Mapping[str, bytes]:
        """The target's files, and the side files that all packs change to one content."""
        note = merge_note(self.target, [pack.name for pack in self.merged])
        return files_beside_weights(self.target.path, self._contents, note, self.copy_code)

    def provenance(self) -> dict[str, str]:
        """The method and the packs in their order, for a manifest."""
        entries = {"method": self.rule.method}
        for index, pack in enumerate(self.merged, start=1):
            entries[f"pack {index}"] = f"{pack.name} ({pack.digest[:16]})"
        return entries

    def _check(self, pack: SkillPack) -> None:
        """Refuse a pack that cannot be merged next; else remember its target and side files.

        Raises: PackMismatchError, ConfigError.
        """
        name, fingerprint = pack.manifest.tuned.name, pack.manifest.target.fingerprint
        if self.merged and fingerprint != self._fingerprint:
            raise PackMismatchError(
                f"the pack of {name} was made for another target than the packs before it; "
                "use one state for each target"
            )
        if manifest_digest(pack) in {merged.digest for merged in self.merged}:
            raise ConfigError(f"the pack of {name} was taken already; leave it out")
        pack.check_target(self.target.read, set(self.target.tensors), str(self.target.path))
        check_shapes(pack)
        changed = {file.name: file.blake3 for file in pack.manifest.files}
        before = self._files if self.merged else changed
        alike = dict(before.items() & changed.items())
        check_token_ids(pack, (before.keys() | changed.keys()) - alike.keys())
        # Also the delta of a single pack is added here, which changes no config.json.
        check_computation(pack, self.target, ())
        self._fingerprint, self._files = fingerprint, alike


class _Deltas(Mapping[str, Tensor]):
    """The deltas of a pack, decoded on access."""

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
    """Layouts of the weights of linear layers, untied heads included."""
    return {
        record.name: record.layout
        for record in pack.manifest.tensors
        if record.kind not in _PLAIN_KINDS and len(record.shape) > 1
    }


FORMAT = "graftkit-running-merge"
VERSION = 1


class _StateModel(Settings):
    """Base of the state's parts, without conversion of types."""

    model_config = ConfigDict(strict=True)


class PackInState(_StateModel):
    """A merged pack: the name of its tuned model, the digest of its manifest, its licence, and how
    its prompts were given."""

    name: str
    digest: Digest
    licence: str | None
    prompt_format: PromptFormat | None = None


class StateHeader(_StateModel):
    """Everything but the tensors.

    Attributes:
        target: fingerprint of the target.
        files: digests of the side files that all packs change to one content.
    """

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    method: Literal["opcm", "kif"]
    target: Digest
    packs: Annotated[tuple[PackInState, ...], Field(min_length=1, strict=False)]
    files: dict[str, Digest]
    statistics: dict[str, Annotated[float, Field(allow_inf_nan=False, strict=False)]]


def write_state(file: Path, header: StateHeader, tensors: dict[str, Tensor]) -> None:
    """Write a state file. Raises: OSError."""
    text = header.model_dump_json()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, file, {FORMAT: f"{_digest(text, contiguous)} {text}"})


def read_state(file: Path, target: Checkpoint) -> tuple[StateHeader, dict[str, Tensor]]:
    """Read a state file; checks its digest, and its tensors against the target.

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
                _check_tensor(file, name, handle.get_slice(name), target)
            # A copy: the alignment of a mapped tensor can change the last bit of a product.
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


def _check_tensor(file: Path, name: str, tensor: Any, target: Checkpoint) -> None:
    """Refuse a tensor that is not the target's. Raises: CheckpointError."""
    info = target.tensors.get(name)
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
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
