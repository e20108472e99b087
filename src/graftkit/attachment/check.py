"""Is this live model the target of these packs, and where in it does each record belong?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftkit.delta import DTYPE_NAMES, DTYPES, check_digest, narrowed
from graftkit.errors import AttachError, PackMismatchError
from graftkit.models.views import (
    View,
    checkpoint_views,
    find_view,
    is_ignored,
    is_unused,
    live_name,
)
from graftkit.skillpack import SkillPack
from graftkit.skillpack.manifest import TensorRecord


@dataclass(frozen=True)
class Change:
    """One record of a pack and its place in the live model.

    Attributes:
        view: where the tuned tensor goes.
        slots: live names (module.attribute) that it sets. A tied parameter has several; those with
            a record of their own are not among them.
        source: where the target tensor lies against which it is coded, None for zeros.
        changed: False where the tuned tensor equals what the live slots hold already.
    """

    record: TensorRecord
    view: View
    slots: tuple[str, ...]
    source: View | None
    changed: bool


class LiveTarget:
    """A live model read by the names of its checkpoint.

    Raises: AttachError when its weights are not in memory.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = type(model).__name__
        self.views = checkpoint_views(model)
        self.state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.verified: set[tuple[str, str, tuple[int, ...], str]] = set()
        """Name, dtype, shape and digest of tensors that were found to be as a pack expects them."""
        for name, value in self.state.items():
            if value.is_meta:
                raise AttachError(
                    f"{name} is not in memory (offloaded or empty model); load the whole model"
                )

    def find(self, name: str) -> View | None:
        """The view of a checkpoint tensor, None where the model has none."""
        return find_view(self.model, self.views, name)

    def live(self, view: View) -> Tensor:
        """The tensor behind a view, in the model's own dtype; writing to it changes the model."""
        return view.tensor(self.state[view.parameter])

    def read(self, view: View, dtype: str) -> Tensor:
        """The tensor behind a view as the checkpoint holds it: on the CPU, in its dtype.

        Raises: PackMismatchError when the live dtype cannot hold that of the checkpoint, or holds
            values that the checkpoint's dtype does not have.
        """
        value, wanted = self.live(view), DTYPES[dtype]
        if value.dtype == wanted:
            return value.cpu()
        if torch.promote_types(value.dtype, wanted) != value.dtype:
            raise PackMismatchError(
                f"{self.name}: {view.name} is loaded as {_dtype_name(value)}, but the pack was "
                f"made for {dtype}; load the model with dtype={wanted!s}"
            )
        narrow = narrowed(value, wanted)
        if not torch.equal(narrow.to(value.dtype).nan_to_num(), value.nan_to_num()):
            raise PackMismatchError(
                f"{self.name}: {view.name} has values that {dtype} does not hold, so it is not the "
                "target this pack was made for; use that target, or pack again for this one"
            )
        return narrow.cpu()

    def source(self, change: Change) -> Tensor:
        """The target tensor that a record is coded against, in checkpoint layout and dtype."""
        record = change.record
        if change.source is None:
            return torch.zeros(record.shape, dtype=DTYPES[record.dtype])
        return self.read(change.source, record.dtype)

    def slot(self, name: str) -> tuple[nn.Module, str]:
        """Module and attribute of a live name."""
        path, _, attribute = name.rpartition(".")
        return self.model.get_submodule(path), attribute


def check_packs(target: LiveTarget, packs: Sequence[SkillPack]) -> None:
    """Refuse the model unless it is the target of every pack; each tensor is read once.

    What was verified is remembered with the target: any number of packs of one target, checked
    together or one after another, read it once.

    Raises: PackMismatchError naming the first tensor that is missing or differs; AttachError for
        one that has no place of its own in memory.
    """
    for pack in packs:
        for record in pack.manifest.tensors:
            expected = (record.dtype, record.shape, record.blake3)
            if record.base is not None or (record.name, *expected) in target.verified:
                continue
            view = target.find(record.name)
            if view is None and _may_lack(target.model, record):
                continue
            if view is None and live_name(target.model, record.name) is not None:
                raise AttachError(
                    f"{record.name} is split or permuted when {target.name} is loaded, so a pack "
                    "is not attached to it; merge the pack into a checkpoint (graftkit merge)"
                )
            if view is None:
                raise PackMismatchError(
                    f"{target.name} lacks tensor {record.name}; "
                    f"the pack was made for {pack.manifest.target.name}, load that model"
                )
            if view.shape != record.shape:
                raise PackMismatchError(
                    f"{target.name}: {record.name} is {list(view.shape)}, but the pack was made "
                    f"for {list(record.shape)}; use {pack.manifest.target.name}"
                )
            check_digest(record.name, target.read(view, record.dtype), expected, target.name)
            target.verified.add((record.name, *expected))


def _may_lack(model: PreTrainedModel, record: TensorRecord) -> bool:
    """Whether the model of this class answers the same without the tensor of a record.

    Such are ignored buffers, and what only another class has where the pack does not change it: the
    causal head of a target whose pack makes it a classifier.
    """
    unchanged = record.codec == "zero" and not record.appended_bytes
    return is_ignored(model, record.name) or (unchanged and is_unused(model, record.name))


def find_changes(target: LiveTarget, pack: SkillPack) -> list[Change]:
    """Every record of a checked pack with its place.

    Raises: AttachError when the pack adds a tensor for which this class has no place.
    """
    places = []
    for record in pack.manifest.tensors:
        view = target.find(record.name)
        if view is None and record.base is None and record.codec == "zero":
            continue
        if view is None and is_ignored(target.model, record.name):
            continue
        if view is None:
            raise AttachError(
                f"{target.name} has no place for tensor {record.name} of "
                f"{pack.manifest.tuned.name}; load the model by a class that has it"
            )
        places.append((record, view))
    taken = {view.parameter for _, view in places}
    changes = []
    for record, view in places:
        slots = tuple(
            owner for owner in view.owners if owner == view.parameter or owner not in taken
        )
        needs = view if record.base is None else target.find(record.base) if record.base else None
        changes.append(Change(record, view, slots, needs, _is_changed(record, view, needs)))
    return changes


def _is_changed(record: TensorRecord, view: View, source: View | None) -> bool:
    resized = record.tuned_shape is not None or record.tuned_dtype is not None
    moved = source is None or source.owners != view.owners
    return record.codec != "zero" or resized or moved


def _dtype_name(tensor: Tensor) -> str:
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
