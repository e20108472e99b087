"""A family of packs in memory, as a file would hold it, so that its bytes are those of a file.

The shared part and factors are bf16, masks are packed to one bit an entry, scales are float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftkit.compress.bitpack import pack_bits, unpack_bits
from graftkit.compress.codecs import Layout
from graftkit.delta import Checkpoint
from graftkit.fuse.families import Masked, Twin
from graftkit.fuse.merging import open_mixture
from graftkit.skillpack import SkillPack

SCALE_BYTES = 4
"""A float32 scale."""

Split = Callable[[Sequence[Tensor], Layout], Masked | Twin]
"""One tensor's deltas and its layout to a shared part and private parts."""


class Family:
    """A shared part and one private part per skill, tensor by tensor.

    Attributes:
        skills: names of the tuned models, in the packs' order.
        shared_bytes: bytes of the shared part. private_bytes: bytes of each skill's own part.
    """

    def __init__(self, skills: Sequence[str], shapes: dict[str, tuple[int, ...]]):
        self.skills = tuple(skills)
        self.shared_bytes = 0
        self.private_bytes = [0] * len(self.skills)
        self._shapes = shapes
        self._parts: dict[str, _StoredMasked | _StoredTwin] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of everything: the shared part once, and every private part."""
        return self.shared_bytes + sum(self.private_bytes)

    def add(self, name: str, part: Masked | Twin) -> None:
        """Store one tensor's parts, rounded and packed."""
        stored = _StoredMasked(part) if isinstance(part, Masked) else _StoredTwin(part)
        self._parts[name] = stored
        self.shared_bytes += stored.shared.nbytes
        for index in range(len(self.skills)):
            self.private_bytes[index] += stored.private_bytes(index)

    def delta(self, skill: int, name: str) -> Tensor:
        """What one skill adds to a tensor of the target, float32; zeros where nothing changes.

        Args:
            skill: its index in `skills`. name: any tensor of the target.
        """
        if name not in self._parts:
            return torch.zeros(self._shapes[name])
        return self._parts[name].opened(skill).delta(0)


def build_family(
    target: str | Path | Checkpoint, packs: Sequence[str | Path | SkillPack], split: Split
) -> Family:
    """A family of packs of one target, tensor by tensor.

    Args:
        split: such as `lambda deltas, layout: emr(deltas)`.
    Raises: PackMismatchError for a pack of another target, or one that changes shapes, adds
        tensors or changes the tokenizer; ConfigError without packs.
    """
    mixture = open_mixture(target, list(packs), None, "task_arithmetic", None)
    mixture.check_addable()
    opened, checkpoint = mixture.packs, mixture.target
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    family = Family([pack.manifest.tuned.name for pack in opened], shapes)
    for name in filter(mixture.changes, mixture.names):
        before = checkpoint.read(name)
        deltas = [pack.delta(name, before) for pack in opened]
        layout = next(r.layout for r in (p.record(name) for p in opened) if r.codec != "zero")
        family.add(name, split(deltas, layout))
    return family


class _StoredMasked:
    def __init__(self, part: Masked):
        self.shared = part.shared.bfloat16()
        self._masks = [pack_bits(mask.numpy().astype(np.uint8), 1) for mask in part.masks]
        self._scales = part.scales

    def private_bytes(self, index: int) -> int:
        return self._masks[index].nbytes + (SCALE_BYTES if self._scales else 0)

    def opened(self, index: int) -> Masked:
        """The part of one skill alone."""
        bits = unpack_bits(self._masks[index], 1, self.shared.numel())
        mask = torch.from_numpy(bits).bool().reshape(self.shared.shape)
        scales = None if self._scales is None else [float(np.float32(self._scales[index]))]
        return Masked(self.shared.float(), [mask], scales)


class _StoredTwin:
    def __init__(self, part: Twin):
        self.shared = part.shared.bfloat16()
        self._part = replace(
            part,
            rests=[[(left.bfloat16(), right.bfloat16()) for left, right in r] for r in part.rests],
        )

    def private_bytes(self, index: int) -> int:
        vector = self.shared.dim() < 2
        return sum(
            left.nbytes + (0 if vector else right.nbytes) for left, right in self._part.rests[index]
        )

    def opened(self, index: int) -> Twin:
        """The part of one skill alone."""
        factors = [(left.float(), right.float()) for left, right in self._part.rests[index]]
        return Twin(self.shared.float(), [factors], self._part.layout)
