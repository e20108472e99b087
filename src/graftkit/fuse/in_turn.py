"""Packs merged in turn, by a rule with a memory: a checkpoint or a pack comes out.

With a state file the memory outlives the call: adding packs one by one gives the same bytes as
adding them in one call. The state and the result appear together or not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.compress.codecs import Layout
from graftkit.delta import Checkpoint, count_weights
from graftkit.errors import CheckpointError, ConfigError, PackMismatchError
from graftkit.files import replaced_file
from graftkit.fuse.importance import measure_importances
from graftkit.fuse.kif import Kif
from graftkit.fuse.memory import Header, Taken, read_memory, write_memory
from graftkit.fuse.merging import (
    Progress,
    check_computation,
    check_shapes,
    check_token_ids,
    merge_note,
    pack_digest,
    write_mixture,
)
from graftkit.fuse.opcm import Opcm
from graftkit.fuse.packing import check_output, pack_merged
from graftkit.fuse.running import Running, Skill
from graftkit.rows import Row
from graftkit.side_files import written_files
from graftkit.skillpack import SkillPack

RULES: dict[str, type[Running]] = {rule.method: rule for rule in (Opcm, Kif)}
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
    with _turns(target, packs, method, state, rows, progress) as turns:
        turns.code = trust_remote_code
        return write_mixture(turns, Path(output_dir), progress)


def fuse_in_turn(
    target: str | Path,
    packs: Sequence[str | Path | SkillPack],
    file: str | Path,
    method: str,
    state: str | Path | None = None,
    rows: TaskRows | None = None,
    progress: Progress | None = None,
    **packing: Any,
) -> SkillPack:
    """As `merge_in_turn`, and pack what comes out.

    Args:
        file: the .skillpack file to write. packing: further arguments of `pack_delta`.
    Raises: as `merge_in_turn` and `pack_delta`.
    """
    output = check_output(Path(file))
    with _turns(target, packs, method, state, rows, progress) as turns:
        name = f"{method}-of-{len(turns.taken)}-packs"
        licences, told = [taken.licence for taken in turns.taken], turns.provenance()
        return pack_merged(target, turns, output, name, licences, told, progress, **packing)


class Turns:
    """A target and what the packs so far, in their order, add to it: a merged checkpoint.

    Attributes:
        taken: the packs so far.
        code: whether the target's code is written, too.
    """

    def __init__(self, target: Checkpoint, rule: Running):
        self.target, self.rule = target, rule
        self.taken: list[Taken] = []
        self.code = False
        self._fingerprint = ""
        self._files: dict[str, str] = {}  # digests of side files that all packs changed alike
        self._contents: dict[str, bytes] = {}

    @classmethod
    def load(cls, file: Path, target: Checkpoint, method: str) -> "Turns":
        """Go on where a state file left off. Raises: as `merge_in_turn`."""
        header, total = read_memory(file, target)
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
        header = Header(
            method=self.rule.method,  # type: ignore[arg-type]
            target=self._fingerprint,
            packs=tuple(self.taken),
            files=self._files,
            statistics=self.rule.statistics,
        )
        write_memory(file, header, self.rule.total)

    def add(self, pack: SkillPack, rows: Sequence[Row] | None) -> None:
        """Take one more pack. Raises: as `merge_in_turn`; the turns are then of no more use."""
        self._check(pack)
        importances = None if rows is None else measure_importances(self.target, pack, rows)
        self.rule.add(Skill(_Deltas(pack, self.target), _layouts(pack), importances))
        manifest = pack.manifest
        self.taken.append(
            Taken(name=manifest.tuned.name, digest=pack_digest(pack), licence=manifest.licence)
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
        infos = self.target.tensors.values()
        weights = count_weights((info.dtype, info.numel) for info in infos)
        note = merge_note(self.target, [taken.name for taken in self.taken])
        return written_files(self.target.path, self._contents, weights, note, self.code)

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
        if pack_digest(pack) in {taken.digest for taken in self.taken}:
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


def _layouts(pack: SkillPack) -> dict[str, Layout]:
    """Of the weights of linear maps, heads of their own included."""
    return {
        record.name: record.layout
        for record in pack.manifest.tensors
        if record.kind not in _PLAIN_KINDS and len(record.shape) > 1
    }


@contextmanager
def _turns(
    target: str | Path,
    packs: Sequence[str | Path | SkillPack],
    method: str,
    state: str | Path | None,
    rows: TaskRows | None,
    progress: Progress | None,
) -> Iterator[Turns]:
    """All packs taken; the state appears under its name when the block ends well."""
    if method not in RULES:
        raise ConfigError(f"method {method!r} has no memory; choose one of {', '.join(RULES)}")
    if rows is not None and (method != "kif" or len(rows) != len(packs)):
        raise ConfigError(
            f"{len(rows)} sets of rows for {len(packs)} packs and {method}; rows go with kif, one "
            "set for each pack"
        )
    if not packs:
        raise ConfigError("no packs to merge; name at least one")
    opened = [p if isinstance(p, SkillPack) else SkillPack.load(p) for p in packs]
    checkpoint, file = Checkpoint.open(target), None if state is None else Path(state)
    if file is not None and file.exists():
        turns = Turns.load(file, checkpoint, method)
    else:
        turns = Turns(checkpoint, RULES[method]())
    for index, pack in enumerate(opened):
        if progress is not None:
            progress("adding packs", index, len(opened))
        turns.add(pack, None if rows is None else rows[index])
    if file is None:
        yield turns
        return
    with replaced_file(file) as partial:
        turns.save(partial)
        yield turns
