"""From packs of one target to a family file that is no larger than its budget.

The shared part is coded first, and read again; masks and rests are made for what was read.
"""

import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.config import Budget
from graftkit.errors import ConfigError, FamilyError
from graftkit.files import writing
from graftkit.fuse.family import Family
from graftkit.fuse.family_file import (
    NAME_PATTERN,
    Content,
    Masks,
    apply_mask,
    encode_mask,
    masked_names,
)
from graftkit.fuse.family_frame import FamilyFrame
from graftkit.fuse.family_methods import FamilyMethod, MaskMethod, find_family_method
from graftkit.fuse.merging import Mixture, Progress, named_inputs, open_mixture
from graftkit.outputs import claimed
from graftkit.packing import pack_delta
from graftkit.sharded import write_checkpoint
from graftkit.skillpack import SkillPack

BUDGET_PER_SKILL = 10
"""Per cent of the target that a skill of a family may take unless told otherwise."""
ROUNDS = 4
GOOD_ENOUGH = 0.98
"""Share of the room that must be used before masks and shared part are not balanced again."""


def make_family(
    target: str | Path,
    packs: Sequence[str | Path | SkillPack],
    file: str | Path,
    method: str,
    settings: Mapping[str, Any] | None = None,
    budget: str | None = None,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Family:
    """Write packs of one target as one file: a shared part, and a private one for each.

    A temporary checkpoint lies beside the file while this runs, in float32 where it is compressed:
    twice the size of a bfloat16 target.

    Args:
        packs: two or more. Better ones make a better family: lossless packs lose nothing before.
        file: the .skillfamily file to write. force: it may be there, and is replaced.
        method: emr, tall or twin. settings: values of its fields, such as {"scaling": 0.3}.
        budget: largest file, as in `pack_delta`; default 10 % of the target for every skill.
        names: of the skills; default the packs' file names, or those of their tuned models.
    Returns: the family, opened from the file.
    Raises: PackMismatchError for a pack of another target, or one that changes shapes, adds tensors
        or changes the tokenizer; ConfigError for a wrong method, setting or name, or fewer than two
        packs; BudgetError, which says what would do; OutputError. Nothing is written then.
    """
    if len(packs) < 2:
        raise ConfigError(f"{len(packs)} packs make no family; name two or more, or keep the pack")
    rule = find_family_method(method, settings or {}, len(packs))
    called = _skill_names(packs, names)
    limit = Budget.parse(budget or f"{min(100, BUDGET_PER_SKILL * len(packs))}%")
    inputs = named_inputs(target, list(packs))
    job = ["family", *inputs, method, settings, budget, called]
    report = progress or (lambda step, done, total: None)
    with claimed(file, job, inputs=inputs, force=force) as claim:
        mixture = open_mixture(target, list(packs), None, "task_arithmetic", None)
        frame = FamilyFrame(mixture, called, method, rule, limit)
        making = _Making(target, mixture, frame, claim.open_work(), report)
        split = making.masked(rule) if isinstance(rule, MaskMethod) else making.rests(rule)
        private = [_content(part) for part in split.private]
        frame.write(claim.result, split.shared, private, split.errors)
    return Family.open(file)


def _skill_names(
    packs: Sequence[str | Path | SkillPack], names: Sequence[str] | None
) -> tuple[str, ...]:
    """One name for each pack. Raises: ConfigError."""
    if names is not None and len(names) != len(packs):
        raise ConfigError(f"{len(names)} names for {len(packs)} packs; give one name per pack")
    found = names or [
        p.manifest.tuned.name if isinstance(p, SkillPack) else Path(p).stem for p in packs
    ]
    for name in found:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(
                f"a skill cannot be called {name!r}; give names of letters, digits, '.', '_' and "
                "'-', one per pack (--names)"
            )
        if list(found).count(name) > 1:
            raise ConfigError(f"two skills are called {name}; give each its own name (--names)")
    return tuple(found)


@dataclass(frozen=True)
class _Split:
    """The parts of a family. errors: relative error of every skill."""

    shared: SkillPack
    private: Sequence[bytes | SkillPack]
    errors: Sequence[float]

    @property
    def nbytes(self) -> int:
        """Bytes of shared and private parts, without side files."""
        return self.shared.pack_bytes + sum(map(_size, self.private))


def _size(part: bytes | SkillPack) -> int:
    return len(part) if isinstance(part, bytes) else part.pack_bytes


def _content(part: bytes | SkillPack) -> Content:
    return [part] if isinstance(part, bytes) else list(part.parts())


class _Making:
    """One call of `make_family`: packs, the room that there is, and a folder to work in."""

    def __init__(
        self,
        reference: str | Path,
        mixture: Mixture,
        frame: FamilyFrame,
        folder: Path,
        report: Progress,
    ):
        self.reference, self.target, self.packs = reference, mixture.target, mixture.packs
        self.frame, self.folder, self.report = frame, folder, report
        self.files = mixture.side_files()
        self.changed = [name for name in mixture.names if mixture.changes(name)]

    def masked(self, rule: MaskMethod) -> _Split:
        """Masks take what they take; the shared part is coded in what they leave.

        The masks are known only when the shared part is, so the two are balanced in rounds.
        Raises: BudgetError.
        """
        room, least = self.frame.room, self.frame.least_part
        wanted = sum(map(len, self._masks(rule, None)[0]))
        self.frame.check_room(wanted + least, "masks and manifests")
        best: _Split | None = None
        ours, smallest = room - wanted, sys.maxsize
        for _ in range(ROUNDS):
            shared = self._packed("shared", partial(self._shared, rule), ours, self.files)
            split = _Split(shared, *self._masks(rule, shared))
            left = room - split.nbytes
            if left >= 0 and (best is None or split.nbytes > best.nbytes):
                best = split
            if 0 <= left <= (1 - GOOD_ENOUGH) * room:
                break
            smallest = min(smallest, split.nbytes)
            ours = max(least, ours + left - abs(left) // 16)
        if best is None:
            raise self.frame.too_small(smallest, "masks and the shared part")
        return best

    def rests(self, rule: FamilyMethod) -> _Split:
        """A pack of the shared part in its share of the bytes, and packs of what it leaves.

        Raises: BudgetError.
        """
        room, least, count = self.frame.room, self.frame.least_part, len(self.packs)
        self.frame.check_room((count + 1) * least, "the manifests and what is stored exactly")
        ours = min(max(least, int(self._explained(rule) * room)), room - count * least)
        shared = self._packed("shared", partial(self._shared, rule), ours, self.files)
        room -= shared.pack_bytes
        private: list[SkillPack] = []
        files = self.target.side_files()
        for index, name in enumerate(self.frame.names):
            own = room // (count - index)
            private.append(self._packed(name, partial(self._rest, shared, index), own, files))
            room -= private[-1].pack_bytes
        return _Split(shared, private, self._errors(shared, private))

    def _shared(self, rule: FamilyMethod, name: str, before: Tensor) -> Tensor:
        return rule.shared([pack.delta(name, before) for pack in self.packs])

    def _rest(self, shared: SkillPack, index: int, name: str, before: Tensor) -> Tensor:
        return self.packs[index].delta(name, before).sub_(shared.delta(name, before))

    def _packed(
        self,
        name: str,
        delta: Callable[[str, Tensor], Tensor],
        nbytes: int,
        files: Mapping[str, bytes],
    ) -> SkillPack:
        """A data-free pack of the target plus deltas, of at most `nbytes` bytes."""
        folder, names = self.folder / name, list(self.target.tensors)

        def changed(tensor: str) -> Tensor:
            before = self.target.read(tensor)
            if tensor not in self.changed:
                return before
            # In the target's dtype a rest would be rounded to steps as large as itself. What is
            # stored exactly lies on that grid anyway, and would cost twice the bytes in float32.
            dtype = torch.float32 if tensor in self.frame.lossy else before.dtype
            return before.float().add_(delta(tensor, before)).to(dtype)

        step = f"{name}, state"
        with writing(folder):
            write_checkpoint(
                folder, names, changed, files, lambda done: self.report(step, done, len(names))
            )
        try:
            return pack_delta(
                self.reference,
                folder,
                budget=f"{nbytes}B",
                progress=lambda step, done, total: self.report(f"{name}, {step}", done, total),
            )
        finally:
            shutil.rmtree(folder)

    def _masks(self, rule: MaskMethod, shared: SkillPack | None) -> tuple[list[bytes], list[float]]:
        """Coded masks of every skill and their errors; over the exact τ where `shared` is None."""
        coded: list[list[tuple[bytes, float]]] = [[] for _ in self.packs]
        lost = _Lost(len(self.packs))
        stored = self.changed if shared is None else masked_names(shared)
        for name, deltas, before in self._deltas("masks"):
            common = rule.shared(deltas) if shared is None else shared.delta(name, before)
            for index, delta in enumerate(deltas):
                mask, scale = rule.private(delta, common)
                if name in stored:
                    coded[index].append((encode_mask(mask, common), scale))
                found = apply_mask(mask, scale, common)
                if shared is not None:
                    self._check_sum(index, name, before, found)
                lost.add(index, delta, found)
        return [Masks.encode(masks) for masks in coded], lost.errors()

    def _errors(self, shared: SkillPack, private: Sequence[SkillPack]) -> list[float]:
        lost = _Lost(len(self.packs))
        for name, deltas, before in self._deltas("errors"):
            common = shared.delta(name, before)
            for index, delta in enumerate(deltas):
                found = common + private[index].delta(name, before)
                self._check_sum(index, name, before, found)
                lost.add(index, delta, found)
        return lost.errors()

    def _check_sum(self, index: int, name: str, before: Tensor, found: Tensor) -> None:
        """What the dtype does not hold could not be unfolded. Raises: FamilyError."""
        if not bool((before + found).to(before.dtype).isfinite().all()):
            raise FamilyError(
                f"{name}: the family's {self.frame.names[index]} is beyond what {before.dtype} "
                "holds; give it a larger budget, or keep the packs"
            )

    def _explained(self, rule: FamilyMethod) -> float:
        """Share of the deltas' energy that the shared part explains: 1 − Σ‖Δ − τ‖² / Σ‖Δ‖²."""
        lost = _Lost(len(self.packs))
        for _, deltas, _ in self._deltas("shared energy"):
            common = rule.shared(deltas)
            for index, delta in enumerate(deltas):
                lost.add(index, delta, common)
        return max(0.0, 1 - sum(lost.missed) / max(sum(lost.whole), 1e-30))

    def _deltas(self, step: str) -> Iterator[tuple[str, list[Tensor], Tensor]]:
        """Name, all packs' deltas and the target's values of every tensor that a pack changes."""
        for done, name in enumerate(self.changed):
            self.report(step, done, len(self.changed))
            before = self.target.read(name)
            yield name, [pack.delta(name, before) for pack in self.packs], before
        self.report(step, len(self.changed), len(self.changed))


class _Lost:
    """Energies of deltas and of what is missing from them, by skill."""

    def __init__(self, skills: int):
        self.whole, self.missed = [0.0] * skills, [0.0] * skills

    def add(self, index: int, delta: Tensor, found: Tensor) -> None:
        self.whole[index] += float(delta.double().square().sum())
        self.missed[index] += float((delta - found).double().square().sum())

    def errors(self) -> list[float]:
        """‖Δ − Δ̂‖ / ‖Δ‖ of every skill; 0 where it changes nothing."""
        pairs = zip(self.missed, self.whole, strict=True)
        return [math.sqrt(missed / whole) if whole else 0.0 for missed, whole in pairs]
